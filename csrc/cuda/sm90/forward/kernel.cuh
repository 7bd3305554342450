// The Hopper forward kernel. A persistent block has two producer threads, which find its tiles and keep TMA loads of Q
// and of K and V in flight, and two or three consumer warpgroups, each with 64 rows of queries, which do everything
// else:
//
//   S = Q K^T        wgmma, both operands in shared memory
//   P = softmax(S)   in registers
//   O += P V         wgmma, P from registers
//
// Within a warpgroup the S of the next block is issued before the O of this one, and its softmax runs under them.
// Between warpgroups a token goes round: who holds it issues its products, so that the others' softmaxes run meanwhile.
#pragma once

#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/registers.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/forward/consumer.cuh"
#include "cuda/sm90/forward/producer.cuh"
#include "cuda/sm90/forward/shared.cuh"

namespace jax_flash::sm90 {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) forward_kernel(const __grid_constant__ ForwardArguments a) {
  extern __shared__ __align__(1024) unsigned char memory[];
  ForwardShared<Config>& shared = *reinterpret_cast<ForwardShared<Config>*>(memory);

  if (threadIdx.x == 0) {
    for (int s = 0; s < Config::kQStages; ++s) {
      for (int w = 0; w < Config::kWarpgroups; ++w) {
        ptx::mbarrier_init(&shared.q_full[s][w], 1);
        ptx::mbarrier_init(&shared.q_empty[s][w], 4);
      }
    }
    for (int s = 0; s < Config::kStages; ++s) {
      ptx::mbarrier_init(&shared.k_full[s], 1);
      ptx::mbarrier_init(&shared.v_full[s], 1);
      ptx::mbarrier_init(&shared.k_empty[s], 4 * Config::kWarpgroups);
      ptx::mbarrier_init(&shared.v_empty[s], 4 * Config::kWarpgroups);
    }
    for (uint64_t& told : shared.work_told) ptx::mbarrier_init(&told, 1);
    ptx::mbarrier_init(&shared.near_end, 1);
    ptx::fence_mbarrier_init();
    ptx::tma_prefetch_descriptor(&a.q);
    ptx::tma_prefetch_descriptor(&a.k);
    ptx::tma_prefetch_descriptor(&a.v);
  }
  if (threadIdx.x < Config::kRows) {
    const int row = static_cast<int>(threadIdx.x), query = row / a.packed;
    shared.row_query[row] = query < a.queries ? query : 2 * kMaxLength;
    shared.row_head[row] = row % a.packed;
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the compiler then knows that it is uniform
  if (warpgroup == 0) {
    ptx::registers_give<Config::kProducerRegisters>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp == 0) {
      if (ptx::elect_one()) produce_tiles<Config>(shared, a);
    } else if (warp == 1) {
      if (ptx::elect_one()) produce_keys<Config>(shared, a);
    }
  } else {
    ptx::registers_take<Config::kConsumerRegisters>();
    Consumer<Config>(shared, a, warpgroup - 1).run();
  }
}

}  // namespace jax_flash::sm90
