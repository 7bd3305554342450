// The backward pass for head dims up to 128. One thread block owns 128 keys of one KV head and loops over the query
// tiles that see them, over all query heads of the group:
//
//   Sᵀ = K Qᵀ      P = exp2(S - lse)            dV += Pᵀ dO
//   dPᵀ = V dOᵀ    dS = P (dP - delta)          dK += dSᵀ Q       dQ += dS K
//
// A consumer warpgroup owns 64 keys. It computes the transposes Sᵀ and dPᵀ, so that P and dS are already the A operands
// of dV and dK and never leave its registers. Only dS goes through shared memory, for dQ, which sums over the keys of
// both.
//
// Of the first warpgroup, one thread of warp 0 loads by TMA, one each of warps 1 and 2 adds the finished dQ of a
// consumer to the workspace, and warp 3 clears rows of Q and dO that see nothing. Thread blocks stay: while one's dK
// and dV leave, its next tiles are on their way.
//
// The tensor core has something queued while a consumer does arithmetic: dP runs under the exponentials, dV under dS,
// and the next tile's S under the hand-over of dQ.
#pragma once

#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/registers.cuh"
#include "cuda/sm90/backward/dq_semaphore.cuh"
#include "cuda/sm90/backward/tile.cuh"
#include "cuda/sm90/backward/work_queue.cuh"

namespace jax_flash::sm90 {

template <class C>
struct alignas(1024) SplitKeysShared {
  using Row = typename C::T[kPanelColumns];
  Row k[C::kPanels][C::kN];
  Row v[C::kPanels][C::kN];
  Row q[C::kStages][C::kPanels][C::kM];
  Row d_o[C::kStages][C::kPanels][C::kM];
  Row ds[C::kDsBuffers][C::kQueryPanels * C::kN];  // see kDsByQuery; at a key block's end dV
  float dq[2][kDqPartFloats];                      // by consumer; at a key block's end dK
  float lse2[C::kStages][C::kM];
  float minus_delta[C::kStages][C::kM];
  uint64_t k_full, v_full, keys_empty;
  uint64_t q_full[C::kStages], q_empty[C::kStages];
  uint64_t do_full[C::kStages], do_empty[C::kStages];
  uint64_t q_raw[C::kStages], do_raw[C::kStages];  // the same where rows are to be cleared first: see clear_all
  uint64_t ds_full[C::kDsBuffers], ds_empty[C::kDsBuffers];  // filled and emptied by both consumers
  uint64_t dq_full[2], dq_empty[2];                          // by consumer
  WorkQueue<C> queue;
};

// ---- the work
// --------------------------------------------------------------------------------------------------------

// Those who read what the work is: eight consumer warps, two writers, and the warp that clears.
inline constexpr int kWorkReaders = 8 + 2 + 1;

// The first ticket of each thread block needs no counter, unless they add in order: a thread block must not wait for
// one that may have no place to run.
__device__ __forceinline__ int32_t take_ticket(const BackwardArguments& args) {
  return static_cast<int32_t>(ptx::fetch_add(args.workspace.next_block, 1) + (args.deterministic ? 0 : gridDim.x));
}

template <class C>
__device__ __forceinline__ void produce_all(const BackwardArguments& args, SplitKeysShared<C>& shared) {
  ptx::wait_for_previous_kernel();
  int32_t tile = 0, key_use = 0;
  int32_t ticket = args.deterministic ? take_ticket(args) : blockIdx.x;
  for (int32_t round = 0;; ++round) {
    const BackwardWork<C>& work = shared.queue.describe(args, round, ticket, 0);
    if (work.count < 0) return;
    produce<C>(args, shared, work, tile, key_use);
    tile += work.count;
    key_use += work.count > 0;
    ticket = take_ticket(args);
  }
}

// ---- dQ writer ----------------------------------------------------------------------------------------------------

// One thread for each consumer w: adds what it hands over to the workspace.
template <class C>
__device__ __forceinline__ void add_dq(const BackwardArguments& args, SplitKeysShared<C>& shared,
                                       const BackwardWork<C>& work, int32_t tile, int w) {
  const DqSemaphore semaphore = DqSemaphore::make<C>(args, work);
  float* gDq = nullptr;
  for (BackwardStep step(work, tile); step.index < work.count; step.next(work)) {
    gDq = step.m == work.tiles.begin ? dq_part<C>(args, work, step.m, step.g, w) : gDq + C::kM * C::kH;
    if (args.deterministic) {
      semaphore.wait<C>(args, work, step.m, step.g, w);
      ptx::fence_async_global();
    }
    ptx::mbarrier_wait(&shared.dq_full[w], step.tile & 1);
    ptx::bulk_reduce_add_f32(gDq, shared.dq[w], C::dq_floats(w) * 128 * sizeof(float));
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
    ptx::mbarrier_arrive(&shared.dq_empty[w]);
    if (args.deterministic) {
      ptx::bulk_wait<0>();
      ptx::fence_async_global();
      semaphore.release<C>(args, work, step.m, step.g, w);
    }
  }
}

template <class C>
__device__ __forceinline__ void add_all(const BackwardArguments& args, SplitKeysShared<C>& shared, int w) {
  ptx::wait_for_previous_kernel();
  int32_t tile = 0;
  for (int32_t round = 0;; ++round) {
    const BackwardWork<C>& work = shared.queue.wait(round);
    if (work.count < 0) return;
    add_dq<C>(args, shared, work, tile, w);
    tile += work.count;
    shared.queue.end(round);
  }
}

// ---- consumers ----------------------------------------------------------------------------------------------------

// What a consumer keeps in registers beside its accumulators.
template <class C>
struct SplitKeysConsumer {
  const BackwardArguments& args;
  SplitKeysShared<C>& shared;
  const BackwardWork<C>& work;
  int w, thread, lane;
  int32_t row;               // the warp's first key in the block
  uint64_t k_rows, v_rows;   // this consumer's keys of K and V
  uint64_t k_columns;        // all keys, the columns of its part of dQ
  uint64_t q_tile, do_tile;  // stage 0
  uint64_t ds_tile;          // buffer 0, the queries of its part of dQ

  static constexpr int kStageStep = C::kPanels * C::kM * kPanelRowBytes >> 4;
  static constexpr int kBufferStep = C::kQueryPanels * C::kN * kPanelRowBytes >> 4;

  __device__ __forceinline__ SplitKeysConsumer(const BackwardArguments& args, SplitKeysShared<C>& shared,
                                               const BackwardWork<C>& work, int w, int thread)
      : args(args), shared(shared), work(work), w(w), thread(thread), lane(thread % 32) {
    constexpr auto kSwizzle = ptx::Swizzle::k128Bytes;
    row = 64 * w + thread / 32 * 16;
    k_rows = ptx::wgmma_descriptor(shared.k[0][64 * w], kSwizzle, C::kN * kPanelRowBytes);
    v_rows = ptx::wgmma_descriptor(shared.v[0][64 * w], kSwizzle, C::kN * kPanelRowBytes);
    k_columns = ptx::wgmma_descriptor(shared.k[C::kPanels == 1 ? 0 : w], kSwizzle, C::kN * kPanelRowBytes);
    q_tile = ptx::wgmma_descriptor(shared.q, kSwizzle, C::kM * kPanelRowBytes);
    do_tile = ptx::wgmma_descriptor(shared.d_o, kSwizzle, C::kM * kPanelRowBytes);
    // Its queries: 64 columns, a panel of their own where there are two, or with kDsByQuery 64 rows.
    const int queries = C::kQueryPanels == 1 ? 0 : 64 * w;
    ds_tile = ptx::wgmma_descriptor(shared.ds[0][C::kDsByQuery ? queries : queries / 64 * C::kN], kSwizzle, 0);
  }

  __device__ __forceinline__ void wait_q(const BackwardStep& step) {
    ptx::mbarrier_wait(&shared.q_full[step.stage<C>()], step.parity<C>());
  }
  __device__ __forceinline__ void wait_do(const BackwardStep& step) {
    ptx::mbarrier_wait(&shared.do_full[step.stage<C>()], step.parity<C>());
  }
  // The whole warp is done with something that others wait for.
  __device__ __forceinline__ void arrive(uint64_t* barrier) {
    if (lane == 0) ptx::mbarrier_arrive(barrier);
  }

  // dK and dV of the key block before have left the buffers of dS and dQ.
  __device__ __forceinline__ void wait_stores() {
    if (thread == 0) ptx::bulk_wait_read<0>();
    ptx::named_barrier_sync(kWarpgroup + w, 128);
  }

  __device__ __forceinline__ void share_ds(const uint32_t (&ds)[C::kM / 4], int32_t tile) {
    const int buffer = tile % C::kDsBuffers;
    ptx::mbarrier_wait(&shared.ds_empty[buffer], tile / C::kDsBuffers & 1 ^ 1);
    if constexpr (C::kDsByQuery) {
      store_transposed(shared.ds[buffer][C::kM * w], ds, row % 64, lane);
    } else {
      store_fragment(shared.ds[buffer], C::kN * kPanelRowBytes, ds, row, lane);
    }
    ptx::fence_async_shared();
    __syncwarp();
    arrive(&shared.ds_full[buffer]);
  }

  // This consumer's part of dQ of tile `tile`, once both have shared their dS.
  __device__ __forceinline__ void issue_dq(float (&dq)[32], int32_t tile) {
    const int buffer = tile % C::kDsBuffers;
    ptx::mbarrier_wait(&shared.ds_full[buffer], tile / C::kDsBuffers & 1);
    issue_query_gradient<C, C::kDsByQuery>(dq, ds_tile + buffer * kBufferStep, k_columns);
  }

  // dQ of tile `tile` is complete: its dS may be overwritten. Then the writer is told.
  __device__ __forceinline__ void store_dq(const float (&dq)[32], int32_t tile) {
    arrive(&shared.ds_empty[tile % C::kDsBuffers]);
    ptx::mbarrier_wait(&shared.dq_empty[w], tile & 1 ^ 1);
    float4* sDq = reinterpret_cast<float4*>(shared.dq[w]) + thread;
    const int floats = C::dq_floats(w);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (4 * i < floats) sDq[i * 128] = make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
    }
  }
  __device__ __forceinline__ void hand_over_dq() {
    ptx::fence_async_shared();
    __syncwarp();
    arrive(&shared.dq_full[w]);
  }
};

// One query tile, from S (complete on entry, as is the next tile's on exit) to dV and dK, and dQ of the tile before.
//
// dQ waits a tile so that a consumer never waits for the other's dS: they drift apart until one's arithmetic falls into
// the other's products. With kDqFirst it goes to shared memory under the products of dK, which read half of what those
// of S read: under S its stores would have to wait for shared memory. The compiler follows products in flight within
// one body but not around a loop, and where they are issued under a condition it serialises them: so the first and the
// last tile are bodies of their own.
template <class C, bool kCapped, bool kFirst, bool kLast>
__device__ __forceinline__ void take_tile(SplitKeysConsumer<C>& c, BackwardStep& step, float (&s)[C::kM / 2],
                                          float (&dk)[C::kH / 2], float (&dv)[C::kH / 2]) {
  const int stage = step.stage<C>();
  const uint64_t q_tile = c.q_tile + stage * c.kStageStep, do_tile = c.do_tile + stage * c.kStageStep;
  const int32_t tile = step.tile;
  const BlockRange tiles = c.work.tiles;
  float dp[C::kM / 2], dq[32];
  uint32_t p[C::kM / 4], ds[C::kM / 4];

  c.wait_do(step);
  RowStatistic<C> minus_delta, lse2;
  minus_delta.load(c.shared.minus_delta[stage], c.lane);
#pragma unroll
  for (int i = 0; i < C::kM / 2; ++i) dp[i] = minus_delta[i];
  issue_products<C, true>(dp, c.v_rows, do_tile);
  lse2.load(c.shared.lse2[stage], c.lane);
  probabilities<C, kCapped>(c.args, c.work, s, p, lse2, tiles, step.m, c.work.n0 + c.row + c.lane / 4, c.lane);
  issue_key_gradient<C>(dv, p, do_tile);

  ptx::wgmma_wait<1>();
  ptx::fence_operand(dp);
  score_gradients<C, kCapped>(c.args, s, dp, ds, c.shared.lse2[stage], c.lane);
  if constexpr (kFirst) c.wait_stores();
  c.share_ds(ds, tile);
  if constexpr (C::kDqFirst && !kFirst) c.issue_dq(dq, tile - 1);
  issue_key_gradient<C>(dk, ds, q_tile);

  ptx::wgmma_wait<C::kDqFirst && !kFirst ? 2 : 1>();  // dV, so that the registers of P are free
  c.arrive(&c.shared.do_empty[stage]);
  if constexpr (!C::kDqFirst && !kFirst) c.issue_dq(dq, tile - 1);
  if constexpr (C::kDqFirst && !kFirst) {
    ptx::wgmma_wait<1>();
    ptx::fence_operand(dq);
    c.store_dq(dq, tile - 1);
  }

  step.next(c.work);
  if constexpr (!kLast) {
    c.wait_q(step);
    issue_products<C>(s, c.k_rows, c.q_tile + step.stage<C>() * c.kStageStep);
    if constexpr (C::kDqFirst && !kFirst) c.hand_over_dq();
    ptx::wgmma_wait<1>();
  } else {
    if constexpr (C::kDqFirst && !kFirst) c.hand_over_dq();
    ptx::wgmma_wait<0>();
  }
  c.arrive(&c.shared.q_empty[stage]);
  if constexpr (!C::kDqFirst && !kFirst) {
    ptx::fence_operand(dq);
    c.store_dq(dq, tile - 1);
    c.hand_over_dq();
  }
  if constexpr (!kLast) {
    ptx::wgmma_wait<0>();
    ptx::fence_operand(s);
  }
}

template <class C, bool kCapped>
__device__ __forceinline__ void consume(const BackwardArguments& args, SplitKeysShared<C>& shared,
                                        const BackwardWork<C>& work, int32_t tile, int32_t key_use, int w, int thread) {
  float dk[C::kH / 2], dv[C::kH / 2];
#pragma unroll
  for (int i = 0; i < C::kH / 2; ++i) dk[i] = dv[i] = 0.0f;

  SplitKeysConsumer<C> c(args, shared, work, w, thread);
  if (work.count > 0) {
    BackwardStep step(work, tile);
    float s[C::kM / 2];
    wait_key_tile<C>(args, work, shared.k, C::kPanels, work.n0, &shared.k_full, key_use & 1, w, thread);
    c.wait_q(step);
    issue_products<C>(s, c.k_rows, c.q_tile + step.stage<C>() * c.kStageStep);
    wait_key_tile<C>(args, work, shared.v, C::kPanels, work.n0, &shared.v_full, key_use & 1, w, thread);
    ptx::wgmma_wait<0>();
    ptx::fence_operand(s);

    if (work.count == 1) {
      take_tile<C, kCapped, true, true>(c, step, s, dk, dv);
    } else {
      take_tile<C, kCapped, true, false>(c, step, s, dk, dv);
      while (step.index < work.count - 1) take_tile<C, kCapped, false, false>(c, step, s, dk, dv);
      take_tile<C, kCapped, false, true>(c, step, s, dk, dv);
    }
    float dq[32];
    c.issue_dq(dq, step.tile - 1);
    ptx::wgmma_wait<0>();
    ptx::fence_operand(dq);
    c.store_dq(dq, step.tile - 1);
    c.hand_over_dq();
    ptx::fence_operand(dk);
    ptx::fence_operand(dv);
  } else {
    c.wait_stores();
  }
  ptx::named_barrier_sync(kConsumers, C::kConsumers);  // nobody reads K, V and dS any more
  if (work.count > 0 && w == 0 && thread == 0) ptx::mbarrier_arrive(&shared.keys_empty);

  if (args.parts > 1) {
    if (work.count == 0) return;
    add_key_gradient<C>(args, dv, work, 1, work.n0 + 64 * w, thread);
    add_key_gradient<C>(args, dk, work, 0, work.n0 + 64 * w, thread);
    return;
  }
  // dV leaves through this consumer's rows of dS, dK through its dQ once that has been added.
  store_key_gradient<C>(shared.ds[0][(C::kDsByQuery ? C::kM : 64) * w], C::kN * kPanelRowBytes, &args.dv, dv, 1.0f,
                        work, work.n0 + 64 * w, w, thread);
  ptx::mbarrier_wait(&shared.dq_empty[w], (tile + work.count) & 1 ^ 1);
  store_key_gradient<C>(shared.dq[w], 64 * kPanelRowBytes, &args.dk, dk, args.softmax_scale, work, work.n0 + 64 * w, w,
                        thread);
}

template <class C, bool kCapped>
__device__ __forceinline__ void consume_all(const BackwardArguments& args, SplitKeysShared<C>& shared, int w,
                                            int thread) {
  int32_t tile = 0, key_use = 0;
  for (int32_t round = 0;; ++round) {
    const BackwardWork<C>& work = shared.queue.wait(round);
    if (work.count < 0) break;
    consume<C, kCapped>(args, shared, work, tile, key_use, w, thread);
    tile += work.count;
    key_use += work.count > 0;
    __syncwarp();
    if (thread % 32 == 0) shared.queue.end(round);
  }
  if (thread == 0) ptx::bulk_wait_read<0>();
}

// ---- kernel -------------------------------------------------------------------------------------------------------

template <class C, bool kCapped>
__global__ void __launch_bounds__(C::kThreads, 1)
    backward_split_keys_kernel(const __grid_constant__ BackwardArguments args) {
  extern __shared__ __align__(1024) char sBytes[];
  SplitKeysShared<C>& shared = *reinterpret_cast<SplitKeysShared<C>*>(sBytes);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    init_barriers<C>(shared);
    for (int i = 0; i < C::kDsBuffers; ++i) {
      ptx::mbarrier_init(&shared.ds_full[i], C::kConsumers / 32);
      ptx::mbarrier_init(&shared.ds_empty[i], C::kConsumers / 32);
    }
    for (int w = 0; w < 2; ++w) {
      ptx::mbarrier_init(&shared.dq_full[w], 4);
      ptx::mbarrier_init(&shared.dq_empty[w], 1);
    }
    ptx::mbarrier_init(&shared.keys_empty, 1);
    shared.queue.init(kWorkReaders);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (warpgroup == 0) {
    ptx::registers_give<C::kProducerRegisters>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp == 3) {
      clear_all<C>(args, shared);
    } else if (ptx::elect_one()) {
      if (warp == 0) {
        produce_all<C>(args, shared);
      } else {
        add_all<C>(args, shared, warp - 1);
      }
    }
  } else {
    ptx::registers_take<C::kConsumerRegisters>();
    consume_all<C, kCapped>(args, shared, warpgroup - 1, threadIdx.x % 128);
  }
}

}  // namespace jax_flash::sm90
