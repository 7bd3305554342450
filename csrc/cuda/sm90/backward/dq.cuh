// After the backward kernel: the float32 sums become dQ.
#pragma once

#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/sm90/backward/tile.cuh"

namespace jax_flash::sm90 {

// One block takes one query tile of one head, one warpgroup each part of it. Its threads read the floats that the
// consumers' same threads added up.
template <class C>
__global__ void __launch_bounds__(C::kDqParts * 128)
    backward_dq_kernel(const __grid_constant__ BackwardArguments args) {
  __shared__ __align__(1024) typename C::T sDq[C::kDqParts][64][kPanelColumns];
  ptx::wait_for_previous_kernel();

  const int tiles = static_cast<int>(args.workspace.rows / C::kM);
  const int64_t head = blockIdx.x / tiles;
  const int m = blockIdx.x % tiles;
  const int part = threadIdx.x / 128, thread = threadIdx.x % 128;
  const float* gTile = args.workspace.dq + (head * args.workspace.rows + m * C::kM) * C::kH;
  const float4* gDq = reinterpret_cast<const float4*>(gTile + part * kDqPartFloats) + thread;
  float dq[32];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float4 x = 4 * i < C::dq_floats(part) ? __ldcs(gDq + i * 128) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    dq[4 * i] = x.x * args.softmax_scale;
    dq[4 * i + 1] = x.y * args.softmax_scale;
    dq[4 * i + 2] = x.z * args.softmax_scale;
    dq[4 * i + 3] = x.w * args.softmax_scale;
  }
  uint32_t words[16];
  pack_fragment<typename C::T>(dq, words);
  store_fragment(sDq[part], 0, words, thread / 32 * 16, thread % 32);
  ptx::fence_async_shared();
  ptx::named_barrier_sync(1 + part, 128);
  if (thread < 32 && ptx::elect_one()) {
    const int row = m * C::kM + C::dq_row(part);
    const int column = C::dq_column(part);
    const int N = static_cast<int>(args.shape.K * args.shape.G);
    if (row < args.shape.T && column < args.shape.H) {
      ptx::tma_store_4d(&args.dq, sDq[part], column, static_cast<int>(head % N), row, static_cast<int>(head / N));
    }
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
}

}  // namespace jax_flash::sm90
