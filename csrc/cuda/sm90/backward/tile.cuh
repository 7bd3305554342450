// The steps that the backward kernels are made of, on one tile.
#pragma once

#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/fence.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/reduce.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/backward/work.cuh"
#include "cuda/tile/apply_mask.cuh"
#include "cuda/tile/softmax.cuh"

namespace jax_flash::sm90 {

enum NamedBarrier : int {
  kDsReady = 1,     // dS is in shared memory (split roles)
  kPReady = 2,      // P is (split roles)
  kDsFree = 3,      // dS has been read (split roles)
  kDqAdded = 4,     // the scores' share of dQ is in the workspace (split roles, deterministic)
  kConsumers = 6,   // both consumers (split keys)
  kWarpgroup = 7,   // + w: one of them
  kScoresHere = 9,  // see meet_consumers (split roles)
  kGradientsHere = 10,
};

template <class C, class Shared>
__device__ __forceinline__ void init_barriers(Shared& shared) {
  ptx::mbarrier_init(&shared.k_full, 1);
  ptx::mbarrier_init(&shared.v_full, 1);
#pragma unroll
  for (int i = 0; i < C::kStages; ++i) {
    ptx::mbarrier_init(&shared.q_full[i], 1);
    ptx::mbarrier_init(&shared.do_full[i], 1);
    ptx::mbarrier_init(&shared.q_raw[i], 1);
    ptx::mbarrier_init(&shared.do_raw[i], 1);
    ptx::mbarrier_init(&shared.q_empty[i], C::kConsumers / 32);
    ptx::mbarrier_init(&shared.do_empty[i], C::kConsumers / 32);
  }
}

template <class C>
__device__ __forceinline__ void load_panels(void* sTile, const CUtensorMap* map, uint64_t* barrier, int rows, int row,
                                            int head, int b) {
#pragma unroll
  for (int p = 0; p < C::kPanels; ++p) {
    ptx::tma_load_4d(static_cast<char*>(sTile) + p * rows * kPanelRowBytes, map, barrier, p * kPanelColumns, head, row,
                     b);
  }
}

// ---- consumers ----------------------------------------------------------------------------------------------------

// K of the pair's other block: the columns of dQ that this block computes.
template <class C, class Shared>
__device__ __forceinline__ void load_peer_keys(const BackwardArguments& args, Shared& shared,
                                               const BackwardWork<C>& work) {
  const int column = (work.n0 % kSumKeys == 0 ? 0 : 2) * kPanelColumns;
  ptx::mbarrier_arrive_expect(&shared.k_peer_full, sizeof(shared.k_peer));
  for (int p = 0; p < 2; ++p) {
    ptx::tma_load_4d(shared.k_peer[p], &args.k, &shared.k_peer_full, column + p * kPanelColumns, work.kh,
                     work.n0 ^ C::kN, work.b);
  }
}

// The producer: one thread that keeps K, V and the tiles of Q, dO and their statistics coming. key_use: key blocks with
// tiles, that the thread block has made before.
template <class C, class Shared>
__device__ __forceinline__ void produce(const BackwardArguments& args, Shared& shared, const BackwardWork<C>& work,
                                        int32_t tile, int32_t key_use) {
  constexpr uint32_t kKeyBytes = C::kPanels * C::kN * kPanelRowBytes;
  constexpr uint32_t kQueryBytes = C::kPanels * C::kM * kPanelRowBytes, kStatisticBytes = C::kM * sizeof(float);
  const int32_t G = static_cast<int32_t>(args.shape.G);
  for (BackwardStep step(work, tile); step.index < work.count; step.next(work)) {
    const int stage = step.stage<C>();
    const uint32_t free_parity = step.parity<C>() ^ 1;
    const int32_t m0 = step.m * C::kM;
    const int head = work.kh * G + step.g;
    const int64_t row = query_head(args, work, step.g) * args.workspace.rows + m0;

    const bool careful = work.careful(step.m);
    uint64_t* q_full = careful ? &shared.q_raw[stage] : &shared.q_full[stage];
    uint64_t* do_full = careful ? &shared.do_raw[stage] : &shared.do_full[stage];

    ptx::mbarrier_wait(&shared.q_empty[stage], free_parity);
    // In a pair the scores read lse2 where it is.
    ptx::mbarrier_arrive_expect(q_full, kQueryBytes + (C::kBlocks == 1 ? kStatisticBytes : 0));
    load_panels<C>(shared.q[stage], &args.q, q_full, C::kM, m0, head, work.b);
    if constexpr (C::kBlocks == 1) {
      ptx::bulk_load(shared.lse2[stage], args.workspace.lse2 + row, kStatisticBytes, q_full);
    }
    if (step.index == 0) {
      ptx::mbarrier_wait(&shared.keys_empty, key_use & 1 ^ 1);
      ptx::mbarrier_arrive_expect(&shared.k_full, kKeyBytes);
      load_panels<C>(shared.k, &args.k, &shared.k_full, C::kN, work.n0, work.kh, work.b);
      ptx::mbarrier_arrive_expect(&shared.v_full, kKeyBytes);
      load_panels<C>(shared.v, &args.v, &shared.v_full, C::kN, work.n0, work.kh, work.b);
      if constexpr (C::kBlocks == 2) load_peer_keys<C>(args, shared, work);
    }
    ptx::mbarrier_wait(&shared.do_empty[stage], free_parity);
    ptx::mbarrier_arrive_expect(do_full, kQueryBytes + kStatisticBytes);
    load_panels<C>(shared.d_o[stage], &args.d_o, do_full, C::kM, m0, head, work.b);
    ptx::bulk_load(shared.minus_delta[stage], args.workspace.minus_delta + row, kStatisticBytes, do_full);
  }
}

// A warp. Rows of a query tile that see nothing become zero, once it has come: a gradient that comes back to one may be
// NaN, as may all that lies past a sequence's length, and 0 * NaN is not 0. Then the consumers are told.
template <class C>
__device__ __forceinline__ void clear_unseen_rows(void* sTile, const float* gLse2, uint64_t* raw, uint64_t* full,
                                                  uint32_t parity, int lane) {
  ptx::mbarrier_wait(raw, parity);
#pragma unroll 1
  for (int row = lane / 8; row < C::kM; row += 4) {
    if (gLse2[row] != infinity()) continue;
#pragma unroll 1
    for (int p = 0; p < C::kPanels; ++p) {
      uint4* sRow = reinterpret_cast<uint4*>(static_cast<char*>(sTile) + (p * C::kM + row) * kPanelRowBytes);
      sRow[lane % 8] = uint4{0, 0, 0, 0};
    }
  }
  ptx::fence_async_shared();
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(full);
}

// The warp that does so, for all tickets. The consumers have no registers and no time for it.
template <class C, class Shared>
__device__ __forceinline__ void clear_all(const BackwardArguments& args, Shared& shared) {
  ptx::wait_for_previous_kernel();
  const int lane = threadIdx.x % 32;
  uint32_t parities = 0;  // by stage: only tiles that want care come this way
  int32_t tile = 0;
  for (int32_t round = 0;; ++round) {
    const BackwardWork<C>& work = shared.queue.wait(round);
    if (work.count < 0) return;
    for (BackwardStep step(work, tile); step.index < work.count; step.next(work)) {
      if (!work.careful(step.m)) continue;
      const int stage = step.stage<C>();
      const uint32_t parity = parities >> stage & 1;
      const float* gLse2 = args.workspace.lse2 + sum_row<C>(args, work, step.m, step.g);
      clear_unseen_rows<C>(shared.q[stage], gLse2, &shared.q_raw[stage], &shared.q_full[stage], parity, lane);
      clear_unseen_rows<C>(shared.d_o[stage], gLse2, &shared.do_raw[stage], &shared.do_full[stage], parity, lane);
      parities ^= 1u << stage;
    }
    tile += work.count;
    __syncwarp();
    if (lane == 0) shared.queue.end(round);
  }
}

// Rows [begin, rows) of a tile of K or V become zero: what lies past a sequence's length may be NaN, and 0 * NaN is not
// 0. Each consumer does it for itself, so that they need not meet.
__device__ __forceinline__ void clear_rows(void* sTile, int panels, int rows, int begin, int w, int thread) {
  for (int p = 0; p < panels; ++p) {
    uint4* sPanel = reinterpret_cast<uint4*>(static_cast<char*>(sTile) + p * rows * kPanelRowBytes);
    for (int i = begin * 8 + thread; i < rows * 8; i += 128) sPanel[i] = uint4{0, 0, 0, 0};
  }
  ptx::fence_async_shared();
  ptx::named_barrier_sync(kWarpgroup + w, 128);
}

// Waits for `panels` panels of K or V, keys n0 ..., and clears what lies past the sequence's keys.
template <class C>
__device__ __forceinline__ void wait_key_tile(const BackwardArguments& args, const BackwardWork<C>& work, void* sTile,
                                              int panels, int32_t n0, uint64_t* full, uint32_t parity, int w,
                                              int thread) {
  ptx::mbarrier_wait(full, parity);
  const int32_t valid = work.band.S - n0;
  if (valid < C::kN && work.band.S < args.shape.S) clear_rows(sTile, panels, C::kN, max_i32(0, valid), w, thread);
}

// A statistic of this lane's queries: columns 8 n + 2 (lane % 4) + {0, 1} of a fragment.
template <class C>
struct RowStatistic {
  float2 x[C::kM / 8];

  __device__ __forceinline__ void load(const float* sStatistic, int lane) {
    const float2* sPairs = reinterpret_cast<const float2*>(sStatistic) + lane % 4;
#pragma unroll
    for (int n = 0; n < C::kM / 8; ++n) x[n] = sPairs[4 * n];
  }
  // Of element i of a fragment.
  __device__ __forceinline__ float operator[](int i) const { return i % 2 ? x[i / 4].y : x[i / 4].x; }
};

// acc = sKeys . sQueriesᵀ, or with kOnto +=: [64 keys, M queries]
template <class C, bool kOnto = false>
__device__ __forceinline__ void issue_products(float (&acc)[C::kM / 2], uint64_t keys, uint64_t queries) {
  ptx::wgmma_fence();
  if constexpr (kOnto) {
    ptx::wgmma<typename C::T, C::kM, ptx::Major::kK, ptx::Major::kK>(acc, keys, queries, 1);
  } else {
    ptx::wgmma_overwrite<typename C::T, C::kM, ptx::Major::kK, ptx::Major::kK>(acc, keys, queries);
  }
#pragma unroll
  for (int i = 1; i < C::kH / 16; ++i) {
    ptx::wgmma<typename C::T, C::kM, ptx::Major::kK, ptx::Major::kK>(
        acc, keys + ((i / 4 * C::kN * kPanelRowBytes + i % 4 * 32) >> 4),
        queries + ((i / 4 * C::kM * kPanelRowBytes + i % 4 * 32) >> 4), 1);
  }
  ptx::wgmma_commit();
}

// acc += rKeysQueries . sQueries: [64 keys, H]
template <class C>
__device__ __forceinline__ void issue_key_gradient(float (&acc)[C::kH / 2], uint32_t (&weights)[C::kM / 4],
                                                   uint64_t queries) {
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < C::kM / 16; ++i) {
    ptx::wgmma<typename C::T, C::kH, ptx::Major::kMN>(acc, weights[4 * i], weights[4 * i + 1], weights[4 * i + 2],
                                                      weights[4 * i + 3], queries + (i * 16 * kPanelRowBytes >> 4), 1);
  }
  ptx::wgmma_commit();
}

// acc = sDs . sKeys, or with kOnto +=: [64 queries, 64 columns]. kByQuery: a row of sDs is a query, of panels of 64
// keys; else it is a key.
template <class C, bool kByQuery = false, bool kOnto = false>
__device__ __forceinline__ void issue_query_gradient(float (&acc)[32], uint64_t ds, uint64_t keys) {
  constexpr auto kMajor = kByQuery ? ptx::Major::kK : ptx::Major::kMN;
  ptx::wgmma_fence();
  if constexpr (kOnto) {
    ptx::wgmma<typename C::T, 64, kMajor, ptx::Major::kMN>(acc, ds, keys, 1);
  } else {
    ptx::wgmma_overwrite<typename C::T, 64, kMajor, ptx::Major::kMN>(acc, ds, keys);
  }
#pragma unroll
  for (int i = 1; i < C::kN / 16; ++i) {
    const int step = kByQuery ? i / 4 * C::kM * kPanelRowBytes + i % 4 * 32 : i * 16 * kPanelRowBytes;
    ptx::wgmma<typename C::T, 64, kMajor, ptx::Major::kMN>(acc, ds + (step >> 4), keys + (i * 16 * kPanelRowBytes >> 4),
                                                           1);
  }
  ptx::wgmma_commit();
}

// With a softcap a fragment holds tanh(...), and this where a key is hidden: no tanh.
inline constexpr float kHiddenTanh = 2.0f;

__device__ __forceinline__ float capped_probability(float tanh_score, float log2_scale, float lse2) {
  return tanh_score == kHiddenTanh ? 0.0f : ptx::ex2(tanh_score * log2_scale - lse2);
}

// s: products, [64 keys, M queries] -> probabilities, or with a softcap tanh(...); p: probabilities, packed. tiles:
// work.tiles, read by the caller before it issues products.
template <class C, bool kCapped>
__device__ __forceinline__ void probabilities(const BackwardArguments& args, const BackwardWork<C>& work,
                                              float (&s)[C::kM / 2], uint32_t (&p)[C::kM / 4],
                                              const RowStatistic<C>& lse2, const BlockRange& tiles, int32_t m,
                                              int32_t key, int lane) {
#pragma unroll
  for (int i = 0; i < C::kM / 2; ++i) {
    s[i] = kCapped ? tanh_accurate(s[i] * args.tanh_scale) : ptx::ex2(s[i] * args.log2_scale - lse2[i]);
  }
  if (m < tiles.full_begin || m >= tiles.full_end) {
    const int32_t first = m * C::kM + lane % 4 * 2;
    const typename C::Band& band = work.band;
    const int begin[2] = {band.query_begin(key) - first, band.query_begin(key + 8) - first};
    const int end[2] = {band.query_end(key) - first, band.query_end(key + 8) - first};
    keep_columns(s, begin, end, kCapped ? kHiddenTanh : 0.0f);
  }
#pragma unroll
  for (int i = 0; i < C::kM / 4; ++i) {
    const float low = s[2 * i], high = s[2 * i + 1];
    p[i] = kCapped ? pack<typename C::T>(capped_probability(low, args.log2_scale, lse2[2 * i]),
                                         capped_probability(high, args.log2_scale, lse2[2 * i + 1]))
                   : pack<typename C::T>(low, high);
  }
}

// dp: dP - delta -> ds: P (dP - delta), times the derivative of the softcap, packed.
template <class C, bool kCapped>
__device__ __forceinline__ void score_gradients(const BackwardArguments& args, const float (&s)[C::kM / 2],
                                                float (&dp)[C::kM / 2], uint32_t (&ds)[C::kM / 4], const float* sLse2,
                                                int lane) {
  if constexpr (kCapped) {
    RowStatistic<C> lse2;
    lse2.load(sLse2, lane);
#pragma unroll
    for (int i = 0; i < C::kM / 2; ++i) {
      dp[i] *= capped_probability(s[i], args.log2_scale, lse2[i]) * (1.0f - s[i] * s[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < C::kM / 2; ++i) dp[i] *= s[i];
  }
  pack_fragment<typename C::T>(dp, ds);
}

// A packed fragment of 16 rows a warp and kColumns columns into panels of 64 columns, swizzled as TMA and wgmma expect.
// row: the warp's first row of the tile.
template <int kWords>
__device__ __forceinline__ void store_fragment(void* sTile, int panel_bytes, const uint32_t (&words)[kWords], int row,
                                               int lane) {
  const int r = row + lane % 16;
  const uint32_t sRow = ptx::shared_address(sTile) + r * kPanelRowBytes;
#pragma unroll
  for (int i = 0; i < kWords / 4; ++i) {
    const int chunk = (i % 4 * 2 + lane / 16) ^ (r % 8);
    ptx::stmatrix_x4(sRow + i / 4 * panel_bytes + chunk * 16, words[4 * i], words[4 * i + 1], words[4 * i + 2],
                     words[4 * i + 3]);
  }
}

// The same, transposed: the fragment's rows become columns column ... of [columns of the fragment][64] at sPanel.
template <int kWords>
__device__ __forceinline__ void store_transposed(void* sPanel, const uint32_t (&words)[kWords], int column, int lane) {
  const int r = lane % 8 + lane / 16 * 8;
  const int chunk = (column / 8 + lane / 8 % 2) ^ (lane % 8);
  const uint32_t sChunk = ptx::shared_address(sPanel) + r * kPanelRowBytes + chunk * 16;
#pragma unroll
  for (int i = 0; i < kWords / 4; ++i) {
    ptx::stmatrix_x4_transposed(sChunk + i * 16 * kPanelRowBytes, words[4 * i], words[4 * i + 1], words[4 * i + 2],
                                words[4 * i + 3]);
  }
}

// dK or dV of 64 keys, row0 ..., of one warpgroup to global memory, through [64][64 columns] at sRows and every
// panel_bytes.
template <class C>
__device__ __forceinline__ void store_key_gradient(void* sRows, int panel_bytes, const CUtensorMap* map,
                                                   float (&acc)[C::kH / 2], float scale, const BackwardWork<C>& work,
                                                   int32_t row0, int w, int thread) {
#pragma unroll
  for (int i = 0; i < C::kH / 2; ++i) acc[i] *= scale;
  uint32_t words[C::kH / 4];
  pack_fragment<typename C::T>(acc, words);
  store_fragment(sRows, panel_bytes, words, thread / 32 * 16, thread % 32);
  ptx::fence_async_shared();
  ptx::named_barrier_sync(kWarpgroup + w, 128);
  if (thread == 0) {
#pragma unroll
    for (int p = 0; p < C::kPanels; ++p) {
      ptx::tma_store_4d(map, static_cast<char*>(sRows) + p * panel_bytes, p * kPanelColumns, work.kh, row0, work.b);
    }
    ptx::bulk_commit();
  }
}

// The same, where parts of a group add to it: unscaled, to the sums of dK (which: 0) or dV (1).
template <class C>
__device__ __forceinline__ void add_key_gradient(const BackwardArguments& args, const float (&acc)[C::kH / 2],
                                                 const BackwardWork<C>& work, int which, int32_t row0, int thread) {
  const int64_t kv_head = static_cast<int64_t>(work.b) * args.shape.K + work.kh;
  float* gSums = key_sums<C>(args, kv_head, which, row0) + thread * 4;
#pragma unroll
  for (int i = 0; i < C::kH / 8; ++i) {
    ptx::red_add_v4(gSums + i * 512, acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]);
  }
}

}  // namespace jax_flash::sm90
