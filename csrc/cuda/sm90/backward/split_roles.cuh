// The backward pass for head dims above 128. A cluster of two thread blocks owns 128 keys of one KV head, 64 each, and
// loops over the query tiles that see them, over all query heads of the group. The products are those of
// backward_split_keys.cuh, but 64 keys by 256 columns of both dK and dV are more accumulators than a warpgroup has
// registers, so a block's two consumers share the work by role:
//
//   P, dV    Sᵀ = K Qᵀ,    P,  dV += Pᵀ dO,  and 64 columns of dQ
//   dS, dK   dPᵀ = V dOᵀ,  dS, dK += dSᵀ Q,  and 64 others
//
// P crosses from one to the other as it lies in registers, through a slot per thread. While one does arithmetic the
// other's products keep the tensor core busy.
//
// Adding dQ to the workspace is much traffic. So the blocks of a pair exchange their dS through distributed shared
// memory, and each adds up half of dQ's columns over the keys of both: half the traffic.
//
// Pairs stay: the first block's producer takes key blocks for both. While dK and dV leave through the buffers of K and
// V, the next Q and dO are loaded.
#pragma once

#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/registers.cuh"
#include "cuda/sm90/backward/pair.cuh"

namespace jax_flash::sm90 {

// lse2 of the tile at `step`, straight from the workspace. Asked for under products it costs nothing.
template <class C>
__device__ __forceinline__ RowStatistic<C> load_lse2(const PairedDq<C>& paired, const BackwardStep& step) {
  RowStatistic<C> lse2;
  lse2.load(paired.args.workspace.lse2 + sum_row<C>(paired.args, paired.work, step.m, step.g), paired.thread % 32);
  return lse2;
}

// dS from packed P. With a softcap the derivative is found back from P itself.
template <class C, bool kCapped>
__device__ __forceinline__ void score_gradients_from(const PairedDq<C>& paired, const BackwardStep& step,
                                                     const uint32_t (&p)[C::kM / 4], float (&dp)[C::kM / 2],
                                                     uint32_t (&ds)[C::kM / 4]) {
  RowStatistic<C> lse2, minus_delta;
  minus_delta.load(paired.shared.minus_delta[step.stage<C>()], paired.thread % 32);
  if constexpr (kCapped) lse2 = load_lse2(paired, step);
  const float inverse_scale = kCapped ? 1.0f / paired.args.log2_scale : 0.0f;
#pragma unroll
  for (int i = 0; i < C::kM / 2; ++i) {
    float x = i % 2 ? unpack_high<typename C::T>(p[i / 2]) : unpack_low<typename C::T>(p[i / 2]);
    if constexpr (kCapped) {
      const float tanh_score = (ptx::lg2(x) + lse2[i]) * inverse_scale;
      x = x == 0.0f ? 0.0f : x * (1.0f - tanh_score * tanh_score);
    }
    dp[i] = x * (dp[i] + minus_delta[i]);
  }
  pack_fragment<typename C::T>(dp, ds);
}

// From a stage's descriptor to the next's.
template <class C>
inline constexpr int kQueryStep = C::kPanels * C::kM * kPanelRowBytes >> 4;

// This lane's slots of packed P: every 32nd of them.
template <class C>
__device__ __forceinline__ uint4* packed_p(SplitRolesShared<C>& shared, int thread) {
  return reinterpret_cast<uint4*>(shared.ds) + thread / 32 * (C::kM / 16 * 32) + thread % 32;
}

// P of the tile at `step`, packed, from S that is on its way. Leaves nothing in flight.
template <class C, bool kCapped>
__device__ __forceinline__ void take_probabilities(PairedDq<C>& paired, const BackwardStep& step, float (&s)[C::kM / 2],
                                                   const RowStatistic<C>& lse2, uint32_t (&p)[C::kM / 4]) {
  const int lane = paired.thread % 32;
  ptx::wgmma_wait<0>();
  ptx::fence_operand(s);
  probabilities<C, kCapped>(paired.args, paired.work, s, p, lse2, paired.work.tiles, step.m,
                            paired.work.n0 + paired.thread / 32 * 16 + lane / 4, lane);
  if (lane == 0) ptx::mbarrier_arrive(&paired.shared.q_empty[step.stage<C>()]);
}

// One query tile of P and dV, from P (packed on entry, as is the next tile's on exit) to dV and dQ. The next tile's P
// comes before this one's dQ: its arithmetic fills the time until the other block's dS has come. The last is a body of
// its own: products issued under a condition would be serialised.
template <class C, bool kCapped, bool kLast>
__device__ __forceinline__ void step_p_dv(PairedDq<C>& paired, BackwardStep& step, uint32_t (&p)[C::kM / 4],
                                          float (&dv)[C::kH / 2], uint64_t k_tile, uint64_t q_tile, uint64_t do_tile) {
  SplitRolesShared<C>& shared = paired.shared;
  const int thread = paired.thread, lane = thread % 32;
  const int stage = step.stage<C>();
  if (step.index > 0) ptx::named_barrier_sync(kDsFree, C::kConsumers);
  uint4* sP = packed_p<C>(shared, thread);
#pragma unroll
  for (int i = 0; i < C::kM / 16; ++i) sP[32 * i] = make_uint4(p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]);
  ptx::named_barrier_arrive(kPReady, C::kConsumers);

  ptx::mbarrier_wait(&shared.do_full[stage], step.parity<C>());
  issue_key_gradient<C>(dv, p, do_tile + stage * kQueryStep<C>);

  const BackwardStep done = step;
  step.next(paired.work);
  if constexpr (!kLast) {
    const int next = step.stage<C>();
    float s[C::kM / 2];
    ptx::mbarrier_wait(&shared.q_full[next], step.parity<C>());
    issue_products<C>(s, k_tile, q_tile + next * kQueryStep<C>);
    const RowStatistic<C> lse2 = load_lse2(paired, step);
    ptx::wgmma_wait<1>();
    if (lane == 0) ptx::mbarrier_arrive(&shared.do_empty[stage]);
    take_probabilities<C, kCapped>(paired, step, s, lse2, p);
  } else {
    ptx::wgmma_wait<0>();
    if (lane == 0) ptx::mbarrier_arrive(&shared.do_empty[stage]);
  }

  ptx::named_barrier_sync(kDsReady, C::kConsumers);
  paired.template add<false>(done);
}

template <class C, bool kCapped>
__device__ __forceinline__ void consume_p_dv(const BackwardArguments& args, SplitRolesShared<C>& shared,
                                             const BackwardWork<C>& work, int32_t tile, int32_t key_use, int thread) {
  constexpr auto kSwizzle = ptx::Swizzle::k128Bytes;

  float dv[C::kH / 2];
#pragma unroll
  for (int i = 0; i < C::kH / 2; ++i) dv[i] = 0.0f;

  if (work.count > 0) {
    const uint64_t k_tile = ptx::wgmma_descriptor(shared.k, kSwizzle, C::kN * kPanelRowBytes);
    const uint64_t q_tile = ptx::wgmma_descriptor(shared.q, kSwizzle, C::kM * kPanelRowBytes);
    const uint64_t do_tile = ptx::wgmma_descriptor(shared.d_o, kSwizzle, C::kM * kPanelRowBytes);
    PairedDq<C> paired(args, shared, work, 0, thread);
    float s[C::kM / 2];
    uint32_t p[C::kM / 4];
    BackwardStep step(work, tile);

    wait_key_tile<C>(args, work, shared.k, C::kPanels, work.n0, &shared.k_full, key_use & 1, 0, thread);
    wait_key_tile<C>(args, work, shared.k_peer, 2, work.n0 ^ C::kN, &shared.k_peer_full, key_use & 1, 0, thread);
    const int stage = step.stage<C>();
    ptx::mbarrier_wait(&shared.q_full[stage], step.parity<C>());
    issue_products<C>(s, k_tile, q_tile + stage * kQueryStep<C>);
    take_probabilities<C, kCapped>(paired, step, s, load_lse2(paired, step), p);

    while (step.index < work.count - 1) step_p_dv<C, kCapped, false>(paired, step, p, dv, k_tile, q_tile, do_tile);
    step_p_dv<C, kCapped, true>(paired, step, p, dv, k_tile, q_tile, do_tile);
    paired.pass_on_last();
    ptx::fence_operand(dv);
  }
  meet_consumers<C>(0);  // nobody reads K and V any more
  if (args.parts > 1) {
    if (work.count > 0) add_key_gradient<C>(args, dv, work, 1, work.n0, thread);
  } else {
    store_key_gradient<C>(shared.v, C::kN * kPanelRowBytes, &args.dv, dv, 1.0f, work, work.n0, 0, thread);
  }
  if (thread == 0) {
    ptx::bulk_wait_read<0>();
    ptx::mbarrier_arrive(&shared.keys_empty);
  }
  __syncwarp();
}

// One query tile of dS and dK, from dP (complete on entry, as is the next tile's on exit) to dK and dQ.
template <class C, bool kCapped, bool kLast>
__device__ __forceinline__ void step_ds_dk(PairedDq<C>& paired, BackwardStep& step, float (&dp)[C::kM / 2],
                                           float (&dk)[C::kH / 2], uint64_t v_tile, uint64_t q_tile, uint64_t do_tile) {
  SplitRolesShared<C>& shared = paired.shared;
  const int thread = paired.thread, lane = thread % 32;
  const int stage = step.stage<C>();
  uint32_t p[C::kM / 4], ds[C::kM / 4];
  ptx::mbarrier_wait(&shared.q_full[stage], step.parity<C>());

  ptx::named_barrier_sync(kPReady, C::kConsumers);
  const uint4* sP = packed_p<C>(shared, thread);
#pragma unroll
  for (int i = 0; i < C::kM / 16; ++i) {
    const uint4 x = sP[32 * i];
    p[4 * i] = x.x;
    p[4 * i + 1] = x.y;
    p[4 * i + 2] = x.z;
    p[4 * i + 3] = x.w;
  }
  __syncwarp();  // this warp's dS takes the place of its P
  score_gradients_from<C, kCapped>(paired, step, p, dp, ds);
  store_fragment(shared.ds, 0, ds, thread / 32 * 16, lane);
  ptx::fence_async_shared();
  ptx::named_barrier_arrive(kDsReady, C::kConsumers);
  __syncwarp();
  if (lane == 0) {
    ptx::mbarrier_arrive(&shared.do_empty[stage]);
    paired.send_ds(step.tile);
  }
  __syncwarp();
  issue_key_gradient<C>(dk, ds, q_tile + stage * kQueryStep<C>);

  const BackwardStep done = step;
  step.next(paired.work);
  if constexpr (!kLast) {
    const int next = step.stage<C>();
    ptx::mbarrier_wait(&shared.do_full[next], step.parity<C>());
    issue_products<C>(dp, v_tile, do_tile + next * kQueryStep<C>);
    ptx::wgmma_wait<1>();
  } else {
    ptx::wgmma_wait<0>();
  }
  if (lane == 0) ptx::mbarrier_arrive(&shared.q_empty[stage]);

  paired.template add<!kLast>(done);
  if constexpr (!kLast) {
    ptx::fence_operand(dp);
  } else {
    if (thread == 0) ptx::mbarrier_wait(&shared.ds_sent, done.tile & 1);
    __syncwarp();
  }
}

template <class C, bool kCapped>
__device__ __forceinline__ void consume_ds_dk(const BackwardArguments& args, SplitRolesShared<C>& shared,
                                              const BackwardWork<C>& work, int32_t tile, int32_t key_use, int thread) {
  constexpr auto kSwizzle = ptx::Swizzle::k128Bytes;

  float dk[C::kH / 2];
#pragma unroll
  for (int i = 0; i < C::kH / 2; ++i) dk[i] = 0.0f;

  if (work.count > 0) {
    const uint64_t v_tile = ptx::wgmma_descriptor(shared.v, kSwizzle, C::kN * kPanelRowBytes);
    const uint64_t q_tile = ptx::wgmma_descriptor(shared.q, kSwizzle, C::kM * kPanelRowBytes);
    const uint64_t do_tile = ptx::wgmma_descriptor(shared.d_o, kSwizzle, C::kM * kPanelRowBytes);
    PairedDq<C> paired(args, shared, work, 1, thread);
    float dp[C::kM / 2];
    BackwardStep step(work, tile);

    wait_key_tile<C>(args, work, shared.v, C::kPanels, work.n0, &shared.v_full, key_use & 1, 1, thread);
    wait_key_tile<C>(args, work, shared.k, C::kPanels, work.n0, &shared.k_full, key_use & 1, 1, thread);
    wait_key_tile<C>(args, work, shared.k_peer, 2, work.n0 ^ C::kN, &shared.k_peer_full, key_use & 1, 1, thread);
    const int stage = step.stage<C>();
    ptx::mbarrier_wait(&shared.do_full[stage], step.parity<C>());
    issue_products<C>(dp, v_tile, do_tile + stage * kQueryStep<C>);
    ptx::wgmma_wait<0>();
    ptx::fence_operand(dp);

    while (step.index < work.count - 1) step_ds_dk<C, kCapped, false>(paired, step, dp, dk, v_tile, q_tile, do_tile);
    step_ds_dk<C, kCapped, true>(paired, step, dp, dk, v_tile, q_tile, do_tile);
    paired.pass_on_last();
    ptx::fence_operand(dk);
  }
  meet_consumers<C>(1);  // nobody reads K and V any more
  if (args.parts > 1) {
    if (work.count > 0) add_key_gradient<C>(args, dk, work, 0, work.n0, thread);
  } else {
    store_key_gradient<C>(shared.k, C::kN * kPanelRowBytes, &args.dk, dk, args.softmax_scale, work, work.n0, 1, thread);
  }
  if (thread == 0) {
    ptx::bulk_wait_read<0>();
    ptx::mbarrier_arrive(&shared.keys_empty);
  }
  __syncwarp();
}

// ---- the work
// --------------------------------------------------------------------------------------------------------

// Those who read what the work is: eight consumer warps, the thread that acknowledges, and the warp that clears.
inline constexpr int kPairWorkReaders = 8 + 1 + 1;

template <class C>
__device__ __forceinline__ void produce_pairs(const BackwardArguments& args, SplitRolesShared<C>& shared) {
  ptx::wait_for_previous_kernel();
  const int32_t rank = static_cast<int32_t>(ptx::cluster_block_rank());
  int32_t tile = 0;
  for (int32_t round = 0;; ++round) {
    const int32_t pair = take_ticket(args, shared, round, rank);
    const BackwardWork<C>& work = shared.queue.describe(args, round, pair, rank);
    if (work.count < 0) return;
    produce<C>(args, shared, work, tile, round);
    // Without tiles zeros leave through the buffers of K and V.
    if (work.count == 0) ptx::mbarrier_wait(&shared.keys_empty, round & 1 ^ 1);
    tile += work.count;
  }
}

template <class C, bool kCapped, bool kPdv>
__device__ __forceinline__ void consume_pairs(const BackwardArguments& args, SplitRolesShared<C>& shared, int thread) {
  ptx::wait_for_previous_kernel();
  int32_t tile = 0, key_use = 0;
  for (int32_t round = 0;; ++round) {
    const BackwardWork<C> work = shared.queue.wait(round);
    if (work.count < 0) return;
    if constexpr (kPdv) {
      consume_p_dv<C, kCapped>(args, shared, work, tile, key_use, thread);
    } else {
      consume_ds_dk<C, kCapped>(args, shared, work, tile, key_use, thread);
    }
    tile += work.count;
    key_use += work.count > 0;
    __syncwarp();
    if (thread % 32 == 0) shared.queue.end(round);
  }
}

// ---- kernel -------------------------------------------------------------------------------------------------------

template <class C, bool kCapped>
__global__ void __cluster_dims__(C::kBlocks, 1, 1) __launch_bounds__(C::kThreads, 1)
    backward_split_roles_kernel(const __grid_constant__ BackwardArguments args) {
  extern __shared__ __align__(1024) char sBytes[];
  SplitRolesShared<C>& shared = *reinterpret_cast<SplitRolesShared<C>*>(sBytes);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    init_barriers<C>(shared);
    ptx::mbarrier_init(&shared.k_peer_full, 1);
    ptx::mbarrier_init(&shared.ds_peer_full, 1);
    ptx::mbarrier_init(&shared.ds_sent, 1);
    ptx::mbarrier_init(&shared.ds_sent_free, C::kConsumers / 32);
    ptx::mbarrier_init(&shared.keys_empty, 2);
    ptx::mbarrier_init(&shared.ticket_full, 1);
    ptx::mbarrier_init(&shared.ticket_empty, 1);
    shared.queue.init(kPairWorkReaders);
    ptx::fence_mbarrier_init();
  }
  __syncwarp();
  ptx::cluster_arrive();
  ptx::cluster_wait();

  if (warpgroup == 0) {
    ptx::registers_give<C::kProducerRegisters>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp == 2) {
      clear_all<C>(args, shared);
    } else if (warp < 2 && ptx::elect_one()) {
      if (warp == 0) {
        produce_pairs<C>(args, shared);
      } else {
        acknowledge_all<C>(shared);
      }
    }
  } else {
    ptx::registers_take<C::kConsumerRegisters>();
    if (warpgroup == 1) {
      consume_pairs<C, kCapped, true>(args, shared, threadIdx.x % 128);
    } else {
      consume_pairs<C, kCapped, false>(args, shared, threadIdx.x % 128);
    }
  }
  __syncwarp();
  // Neither block leaves while the other may still reach into its shared memory.
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

}  // namespace jax_flash::sm90
