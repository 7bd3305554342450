// The consumers of the Hopper forward kernel: each warpgroup computes the attention of its 64 rows.
#pragma once

#include <cstdint>

#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/forward/shared.cuh"
#include "cuda/sm90/forward/softmax.cuh"
#include "cuda/sm90/forward/store.cuh"
#include "cuda/tile/apply_mask.cuh"
#include "cuda/tile/convert.cuh"

namespace jax_flash::sm90 {

// S = Q K^T of one block, asynchronous.
template <class Config>
__device__ __forceinline__ void issue_scores(float (&rS)[Config::kKeys / 2], uint64_t q, uint64_t k) {
  constexpr int kStepsPerPanel = Config::kPanelColumns / 16;
  constexpr int kQPanel = Config::kRows * Config::kPanelBytes >> 4;
  constexpr int kKPanel = Config::kKeys * Config::kPanelBytes >> 4;
  ptx::launder(q);  // sixteen descriptors of Q, loop-invariant, would overflow the uniform registers
#pragma unroll
  for (int i = 0; i < Config::kHeadDim / 16; ++i) {
    const int panel = i / kStepsPerPanel, within = i % kStepsPerPanel * (32 >> 4);
    ptx::wgmma<typename Config::Element, Config::kKeys, ptx::Major::kK, ptx::Major::kK>(
        rS, q + panel * kQPanel + within, k + panel * kKPanel + within, i != 0);
  }
  ptx::wgmma_commit();
}

// O (+)= P V of one block, asynchronous.
template <class Config>
__device__ __forceinline__ void issue_output(float (&rO)[Config::kHeadDim / 2], const uint32_t (&rP)[Config::kKeys / 4],
                                             uint64_t v, bool accumulate) {
  constexpr int kStep = 16 * Config::kPanelBytes >> 4;
#pragma unroll
  for (int i = 0; i < Config::kKeys / 16; ++i) {
    ptx::wgmma<typename Config::Element, Config::kHeadDim, ptx::Major::kMN>(
        rO, rP[4 * i], rP[4 * i + 1], rP[4 * i + 2], rP[4 * i + 3], v + i * kStep, i != 0 || accumulate);
  }
  ptx::wgmma_commit();
}

// Rows of V past the last valid key may hold anything, NaN included, and 0 * NaN is NaN. Every warpgroup clears them
// for itself: the same zeros, so they need not wait for one another.
template <class Config>
__device__ __forceinline__ void clear_values(typename Config::Element (*sV)[Config::kKeys * Config::kPanelColumns],
                                             int32_t valid, int warpgroup, int thread) {
  constexpr int kChunks = Config::kPanelBytes / 16;
  for (int p = 0; p < Config::kPanels; ++p) {
    uint4* const panel = reinterpret_cast<uint4*>(sV[p]);
    for (int i = valid * kChunks + thread; i < Config::kKeys * kChunks; i += 128) panel[i] = make_uint4(0, 0, 0, 0);
  }
  ptx::fence_async_shared();
  ptx::named_barrier_sync(1 + Config::kWarpgroups + warpgroup, 128);
}

// One warpgroup's work, seen from one of its threads.
template <class Config>
class Consumer {
  using Element = typename Config::Element;
  static constexpr int kKeys = Config::kKeys;
  static constexpr int kStage = sizeof(ForwardShared<Config>::sK[0]) >> 4;
  using KVSlot = Slot<Config::kStages>;
  using QSlot = Slot<Config::kQStages>;

 public:
  __device__ __forceinline__ Consumer(ForwardShared<Config>& shared, const ForwardArguments& a, int warpgroup)
      : shared(shared),
        a(a),
        warpgroup(warpgroup),
        my_barrier(1 + warpgroup),
        next_barrier(1 + (warpgroup + 1) % Config::kWarpgroups),
        thread(static_cast<int>(threadIdx.x) % 128),
        lane(thread % 32),
        row0(thread / 32 * 16 + lane / 4),
        leader(lane == 0),
        q_tile(ptx::wgmma_descriptor(shared.sQ[0][warpgroup], Config::kSwizzle, 0)),
        k_tile(ptx::wgmma_descriptor(shared.sK, Config::kSwizzle, 0)),
        v_tile(ptx::wgmma_descriptor(shared.sV, Config::kSwizzle, kKeys * Config::kPanelBytes)),
        softmax(a.transform.log2_scale) {}

  // Tiles overlap: where one follows another directly, the first block of the new one and the last of the old one make
  // up a step like any other.
  __device__ __forceinline__ void run() {
    // The token: a warpgroup waits at its own barrier for the one before it.
    if (Config::kSchedulerBarriers && warpgroup == Config::kWarpgroups - 1)
      ptx::named_barrier_arrive(next_barrier, 256);
    open(0);
    while (!work().last) {
      if (sees_nothing()) {
        free_q();
        skip(work().steps, true);
        store_nothing<Config>(a, shared, work(), first_query(), row0, lane);
        open(round + 1);
        continue;
      }
      skip(own.begin, false);
      first_block();
      while (true) {
        later_blocks();
        const int32_t skipped_after = work().steps - own.end;
        open(round + 1);
        if (work().last || sees_nothing() || skipped_after > 0 || own.begin > 0) {
          last_output();
          skip(skipped_after, false);
          break;
        }
        last_and_first_block();
      }
    }
  }

 private:
  enum class Softmax { kGeneral, kSteady, kSteadyMasked };

  __device__ __forceinline__ const ForwardWork& work(uint32_t rounds_ago = 0) const {
    return shared.work[(round - rounds_ago) % shared.kWorks];
  }

  // Waits for a tile's description, and with it for its Q.
  __device__ __forceinline__ void open(uint32_t next_round) {
    round = next_round;
    const QSlot slot(round);
    ptx::mbarrier_wait(&shared.q_full[slot.stage][warpgroup], slot.full_parity);
    own = work().own[warpgroup];
  }
  __device__ __forceinline__ int32_t first_query(uint32_t rounds_ago = 0) const {
    return work(rounds_ago).query + warpgroup * a.queries;
  }
  __device__ __forceinline__ bool sees_nothing() const { return own.begin >= own.end; }
  __device__ __forceinline__ Range& row_keys(int r) { return shared.row_keys[warpgroup][row0 + 8 * r]; }

  // The first block of a tile, alone.
  __device__ __forceinline__ void first_block() {
    wait_k(use);
    float rS[kKeys / 2];
    ptx::fence_operand(rS);
    ptx::wgmma_fence();
    issue_scores<Config>(rS, q_slot(), k_slot(use));
    ptx::wgmma_wait<0>();
    ptx::fence_operand(rS);
    free_k(use);
    if (own.end - 1 == own.begin) free_q();
    init_softmax();
    online_softmax(own.begin, rS);
    pack_fragment<Element>(rS, rP);
    prepare_second();
  }

  // O lags one step behind. Whole blocks have a loop of their own.
  __device__ __forceinline__ void later_blocks() {
    accumulate = false;
    int32_t n = own.begin + 1;
    for (; n < own.steady; ++n) step<Softmax::kGeneral>(n);
    for (; n < own.full_end; ++n) step<Softmax::kSteady>(n);
    for (; n < own.end; ++n) step<Softmax::kSteadyMasked>(n);
    clear_v(own.end - 1);
  }

  // The last O of the tile before this one, alone.
  __device__ __forceinline__ void last_output() {
    wait_v();
    ptx::fence_operand(rP);
    ptx::fence_operand(rO);
    ptx::wgmma_fence();
    issue_output<Config>(rO, rP, v_slot(), accumulate);
    ptx::wgmma_wait<0>();
    ptx::fence_operand(rO);
    free_v();
    store(finished());
  }

  // The last O of the tile before this one, and the first block of this one.
  __device__ __forceinline__ void last_and_first_block() {
    wait_k(use + 1);
    float rS[kKeys / 2];
    ptx::fence_operand(rS);
    ptx::fence_operand(rP);
    ptx::fence_operand(rO);
    ptx::wgmma_fence();
    issue_scores<Config>(rS, q_slot(), k_slot(use + 1));
    wait_v();
    ptx::wgmma_fence();
    issue_output<Config>(rO, rP, v_slot(), accumulate);
    ptx::wgmma_wait<1>();
    ptx::fence_operand(rS);
    free_k(use + 1);
    if (own.end - 1 == own.begin) free_q();
    const LaggingSoftmax before = finished();
    init_softmax();
    online_softmax(own.begin, rS);
    ptx::wgmma_wait<0>();
    ptx::fence_operand(rO);
    ptx::fence_operand(rP);
    free_v();
    pack_fragment<Element>(rS, rP);
    store(before);
    prepare_second();
  }

  __device__ __forceinline__ void prepare_second() {
    clear_v(own.begin);
    if (own.begin + 1 < own.end) wait_k(use + 1);
  }

  // The state of the tile's rows at its end.
  __device__ __forceinline__ LaggingSoftmax finished() {
    LaggingSoftmax state = softmax;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row_keys(r).empty()) state.forget(r);
    }
    return state;
  }

  // O of the tile before this one.
  __device__ __forceinline__ void store(const LaggingSoftmax& finished) {
    store_output<Config>(a, shared, work(1), first_query(1), row0, rO, finished, lane);
  }

  // S of step n, under use + 1, while O takes the block of the step before, under use.
  template <Softmax kSoftmax>
  __device__ __forceinline__ void step(int32_t n) {
    uint64_t q = q_slot(), k = k_slot(use + 1);
    if (Config::kSchedulerBarriers) ptx::named_barrier_sync(my_barrier + after(q, k), 256);
    float rS[kKeys / 2];
    ptx::fence_operand(rS);
    ptx::fence_operand(rP);
    ptx::fence_operand(rO);
    ptx::wgmma_fence();
    issue_scores<Config>(rS, q, k);
    wait_v();
    ptx::wgmma_fence();
    issue_output<Config>(rO, rP, v_slot(), accumulate);
    if (Config::kSchedulerBarriers) ptx::named_barrier_arrive(next_barrier, 256);
    ptx::wgmma_wait<1>();
    ptx::fence_operand(rS);
    free_k(use + 1);
    if (n == own.end - 1) free_q();
    bool rescale;
    if constexpr (kSoftmax == Softmax::kSteady) {
      rescale = softmax.template update_steady<Config::kPolynomial>(rS, correction);
    } else if constexpr (kSoftmax == Softmax::kSteadyMasked) {
      hide(n, rS);
      rescale = softmax.template update_steady<0>(rS, correction);
    } else {
      rescale = online_softmax(n, rS);
    }
    // Here, and not at the top of the next step: a basic block ends, or the compiler would sink the exponentials below
    // the wait for O and out of its shadow. That it depends on the sums keeps their additions up here too, in the gaps
    // between the exponentials.
    if (n < own.end - 1) wait_k(use + 2, softmax.sum[0] + softmax.sum[1] < 0.0f);
    ptx::wgmma_wait<0>();
    ptx::fence_operand(rO);
    ptx::fence_operand(rP);
    free_v();
    pack_fragment<Element>(rS, rP);
    if (rescale) scale_rows(rO, correction);
    accumulate = true;
  }

  __device__ __forceinline__ void init_softmax() {
    bool sees[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Range keys = work().band.keys(first_query() + shared.row_query[row0 + 8 * r]);
      row_keys(r) = keys;
      sees[r] = !keys.empty();
    }
    softmax.init(sees);
  }

  // Softmax of a block that may need anything.
  __device__ __forceinline__ bool online_softmax(int32_t n, float (&rS)[kKeys / 2]) {
    if (a.transform.needed) a.transform.apply(rS);
    if (n < own.full_begin || n >= own.full_end) hide(n, rS);
    const bool rescale = softmax.update(rS, correction);
    if (n + 1 == own.steady && own.steady < own.end) put_off_steady_state(n);
    return rescale;
  }

  // A row that the band shows keys may have met scores of -inf alone: then the next step is not a steady one either.
  // That is for the whole warpgroup to say, which takes its steps together. (bar.red would be shorter, but beside it
  // the compiler runs out of registers and serialises the products.)
  __device__ __forceinline__ void put_off_steady_state(int32_t n) {
    int32_t& steady = shared.work[round % shared.kWorks].own[warpgroup].steady;
    if (softmax.not_steady()) steady = n + 2;
    ptx::named_barrier_sync(1 + Config::kWarpgroups + warpgroup, 128);
    own.steady = min(steady, n + 2);  // a warp ahead of this one may have put it off once more
  }

  // What the band hides in step n.
  __device__ __forceinline__ void hide(int32_t n, float (&rS)[kKeys / 2]) {
    const int32_t first = work().key(n) + lane % 4 * 2;
    const Range keys[2] = {row_keys(0), row_keys(1)};
    const int begin[2] = {keys[0].begin - first, keys[1].begin - first};
    const int end[2] = {keys[0].end - first, keys[1].end - first};
    keep_columns(rS, begin, end, -infinity());
  }

  // Blocks that only other warpgroups' rows see. The token still goes round once a block but the tile's first.
  __device__ __forceinline__ void skip(int32_t blocks, bool first) {
    for (; blocks > 0; --blocks, first = false) {
      wait_k(use);
      free_k(use);
      wait_v();
      free_v();
      if (Config::kSchedulerBarriers && !first) {
        ptx::named_barrier_sync(my_barrier, 256);
        ptx::named_barrier_arrive(next_barrier, 256);
      }
    }
  }

  // `never` is false, which the compiler cannot know: what it is computed from has to be done before the wait.
  __device__ __forceinline__ void wait_k(uint32_t k_use, bool never = false) {
    const KVSlot slot(k_use);
    ptx::mbarrier_wait(&shared.k_full[slot.stage], slot.full_parity ^ static_cast<uint32_t>(never));
  }
  __device__ __forceinline__ void free_k(uint32_t k_use) {
    if (leader) ptx::mbarrier_arrive(&shared.k_empty[KVSlot(k_use).stage]);
  }
  __device__ __forceinline__ void wait_v() {
    const KVSlot slot(use);
    ptx::mbarrier_wait(&shared.v_full[slot.stage], slot.full_parity);
  }
  __device__ __forceinline__ void free_v() {
    if (leader) ptx::mbarrier_arrive(&shared.v_empty[KVSlot(use).stage]);
    ++use;
  }
  __device__ __forceinline__ void free_q() {
    if (leader) ptx::mbarrier_arrive(&shared.q_empty[QSlot(round).stage][warpgroup]);
  }
  // Where a sequence ends in the block of step n, under use, and the array does not.
  __device__ __forceinline__ void clear_v(int32_t n) {
    const int32_t valid = work().band.S - work().key(n);
    if (valid >= kKeys || work().band.S >= a.shape.S) return;
    wait_v();
    clear_values<Config>(shared.sV[KVSlot(use).stage], valid, warpgroup, thread);
  }
  // 0, which the compiler cannot know: what it is added to has to wait for these descriptors. (Their arithmetic would
  // otherwise follow the barrier, where the tensor cores wait for it.)
  __device__ __forceinline__ static int after(uint64_t& q, uint64_t& k) {
    ptx::launder(q);
    ptx::launder(k);
    return static_cast<int>((static_cast<uint32_t>(q) | static_cast<uint32_t>(k)) >> 31);
  }
  __device__ __forceinline__ uint64_t q_slot() const {
    return q_tile + QSlot(round).stage * (sizeof(ForwardShared<Config>::sQ[0]) >> 4);
  }
  __device__ __forceinline__ uint64_t k_slot(uint32_t k_use) const { return k_tile + KVSlot(k_use).stage * kStage; }
  __device__ __forceinline__ uint64_t v_slot() const { return v_tile + KVSlot(use).stage * kStage; }

  ForwardShared<Config>& shared;
  const ForwardArguments& a;
  const int warpgroup, my_barrier, next_barrier;  // named barriers
  const int thread, lane, row0;                   // row0: this lane's first row, the other is 8 below
  const bool leader;                              // speaks for its warp at the barriers
  const uint64_t q_tile, k_tile, v_tile;          // descriptors, of stage 0

  uint32_t use = 0;  // blocks done: the K and V slots of the block in hand
  uint32_t round;    // tiles opened before this one
  ForwardSteps own;  // of this tile
  bool accumulate;   // O holds something of this tile
  LaggingSoftmax softmax;
  float correction[2];
  float rO[Config::kHeadDim / 2];
  uint32_t rP[kKeys / 4];
};

}  // namespace jax_flash::sm90
