// The parts of a backward step: which warp owns what, and the five matrix products on swizzled tiles.
#pragma once

#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/ordered.cuh"
#include "cuda/ptx/reduce.cuh"
#include "cuda/sm80/fits.h"
#include "cuda/sm80/shared_tile.cuh"
#include "cuda/tile/apply_mask.cuh"
#include "cuda/tile/softmax.cuh"
#include "mask.h"
#include "params.h"

namespace jax_flash::sm80 {

template <class Element_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, int kScoreWarps_, int kKeyWarps_,
          int kQueryWarps_, int kQueryStages_, int kOutStages_, Fits kFits_>
struct BackwardConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;  // bucket: the head dim, rounded up
  static constexpr int kBlockM = kBlockM_;    // queries of a step
  static constexpr int kBlockN = kBlockN_;    // keys of a block
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kScoreWarps = kScoreWarps_;  // warps along the queries of S and dP; the others along the keys
  static constexpr int kKeyWarps = kKeyWarps_;      // warps along the keys of dK and dV; the others along the head dim
  static constexpr int kQueryWarps = kQueryWarps_;  // warps along the queries of dQ; the others along the head dim
  static constexpr int kQueryStages = kQueryStages_;  // of Q
  static constexpr int kOutStages = kOutStages_;      // of dO
  static constexpr Fits kFits = kFits_;

  static constexpr int kScoreColWarps = kWarps / kScoreWarps;
  static constexpr int kScoreTiles = kBlockM / kScoreWarps / 16;  // a warp's 16-row tiles of S
  static constexpr int kScoreCols = kBlockN / kScoreColWarps;
  static constexpr int kScoreFloats = kScoreCols / 2;  // a lane's share of a 16-row tile
  static constexpr int kKeyColWarps = kWarps / kKeyWarps;
  static constexpr int kKeyTiles = kBlockN / kKeyWarps / 16;
  static constexpr int kKeyCols = kHeadDim / 16 / kKeyColWarps;  // a warp's pieces of 16 columns of dK and dV
  static constexpr int kQueryColWarps = kWarps / kQueryWarps;
  static constexpr int kQueryTiles = kBlockM / kQueryWarps / 16;
  static constexpr int kQueryCols = kHeadDim / 16 / kQueryColWarps;
  static_assert(kScoreTiles * kScoreWarps * 16 == kBlockM && kScoreCols % 16 == 0);
  static_assert(kKeyTiles * kKeyWarps * 16 == kBlockN && kKeyCols * kKeyColWarps * 16 == kHeadDim);
  static_assert(kQueryTiles * kQueryWarps * 16 == kBlockM && kQueryCols * kQueryColWarps * 16 == kHeadDim);

  using ScoreFragment = float[kScoreTiles][kScoreFloats];
  using KeyFragment = float[kKeyTiles][kKeyCols * 8];
  using QueryFragment = float[kQueryTiles][kQueryCols * 8];

  struct SharedMemory {
    Element k[kBlockN * kHeadDim];  // later dK's staging
    Element v[kBlockN * kHeadDim];  // later dV's staging
    Element q[kQueryStages][kBlockM * kHeadDim];
    Element d_o[kOutStages][kBlockM * kHeadDim];
    Element p[kBlockM * kBlockN];
    Element d_s[kBlockM * kBlockN];
    float lse2[2][kBlockM];
    float delta[2][kBlockM];
    Band band;   // kept here, since only boundary blocks use it
    int number;  // see block_number()
  };
};

// What runs beside a matrix product: called after every step with its number, to issue instructions that use other
// units while the tensor cores work.
struct Nothing {
  __device__ __forceinline__ void operator()(int) const {}
};

// acc += A B, 16-bit pieces read on the way: a(fragment, row tile, step), b(fragment, 16-column piece, step).
template <class Element, int kSteps, int kRowTiles, int kFloats, class ReadA, class ReadB, class Beside>
__device__ __forceinline__ void multiply(float (&acc)[kRowTiles][kFloats], const ReadA& a, const ReadB& b,
                                         const Beside& beside) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t fragment_a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) a(fragment_a[m], m, step);
#pragma unroll
    for (int n = 0; n < kFloats / 8; ++n) {
      uint32_t fragment_b[4];
      b(fragment_b, n, step);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        ptx::mma_m16n8k16(acc[m] + 8 * n, fragment_a[m], fragment_b[0], fragment_b[1], Element{});
        ptx::mma_m16n8k16(acc[m] + 8 * n + 4, fragment_a[m], fragment_b[2], fragment_b[3], Element{});
      }
    }
    beside(step);
  }
}

template <int kRowTiles, int kFloats>
__device__ __forceinline__ void clear(float (&acc)[kRowTiles][kFloats]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < kFloats; ++i) acc[m][i] = 0.0f;
  }
}

// A thread's place, made anew where it is used: registers are what bounds the main loop.
struct Place {
  int lane, warp;
  __device__ __forceinline__ Place() {
    const int thread = ptx::launder(threadIdx.x);
    lane = thread % 32;
    warp = thread / 32;
  }
};

// First row and column of a warp's part of S and dP.
template <class Config>
__device__ __forceinline__ int score_row(int warp) {
  return warp / Config::kScoreColWarps * 16 * Config::kScoreTiles;
}
template <class Config>
__device__ __forceinline__ int score_col(int warp) {
  return warp % Config::kScoreColWarps * Config::kScoreCols;
}

// S = Q K^T or dP = dO V^T.
template <class Config, class Beside>
__device__ __forceinline__ void multiply_scores(typename Config::ScoreFragment& acc, uint32_t sQueries, uint32_t sKeys,
                                                const Beside& beside) {
  constexpr int kD = Config::kHeadDim;
  const Place place;
  const TileReader<kD, true, false> queries(sQueries, score_row<Config>(place.warp), 0, place.lane);
  const TileReader<kD, false, false> keys(sKeys, score_col<Config>(place.warp), 0, place.lane);
  clear(acc);
  multiply<typename Config::Element, kD / 16>(
      acc, [&](uint32_t (&f)[4], int m, int step) { queries.read(f, m * 16, step * 16); },
      [&](uint32_t (&f)[4], int n, int step) { keys.read(f, n * 16, step * 16); }, beside);
}

// dV += P^T dO or dK += dS^T Q.
template <class Config, class Beside>
__device__ __forceinline__ void accumulate_keys(typename Config::KeyFragment& acc, uint32_t sWeights, uint32_t sQueries,
                                                const Beside& beside) {
  const Place place;
  const int first_key = place.warp / Config::kKeyColWarps * 16 * Config::kKeyTiles;
  const TileReader<Config::kBlockN, false, true> weights(sWeights, 0, first_key / 8, place.lane);
  const TileReader<Config::kHeadDim, true, true> queries(sQueries, 0, place.warp % Config::kKeyColWarps * 2,
                                                         place.lane);
  multiply<typename Config::Element, Config::kBlockM / 16>(
      acc, [&](uint32_t (&f)[4], int m, int step) { weights.read(f, step * 16, m * 16); },
      [&](uint32_t (&f)[4], int n, int step) { queries.read(f, step * 16, n * Config::kKeyColWarps * 16); }, beside);
}

// Where element 4 * n + e of row tile m of a warp's dQ fragment stands in its tile of the workspace: a warp's accesses
// are whole lines, 512 bytes in one vector reduction where the GPU has it, else 128.
template <class Config>
struct QueryGradientLayout {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  static constexpr bool kVector = true;
#else
  static constexpr bool kVector = false;
#endif
  static constexpr int kGroups = Config::kQueryTiles * Config::kQueryCols * 2;  // of four floats a lane

  __device__ __forceinline__ static int base(int warp, int lane) {
    return warp * kGroups * 128 + (kVector ? lane * 4 : lane);
  }
  __device__ __forceinline__ static int group(int m, int n) { return (m * Config::kQueryCols * 2 + n) * 128; }
  __device__ __forceinline__ static int element(int e) { return kVector ? e : e * 32; }
};

// dQ += dS K, into a tile of the workspace.
template <class Config>
__device__ __forceinline__ void add_query_gradient(float* gTile, uint32_t sWeights, uint32_t sKeys) {
  using Layout = QueryGradientLayout<Config>;
  const Place place;
  const int first_query = place.warp / Config::kQueryColWarps * 16 * Config::kQueryTiles;
  const TileReader<Config::kBlockN, true, false> weights(sWeights, first_query, 0, place.lane);
  const TileReader<Config::kHeadDim, true, true> keys(sKeys, 0, place.warp % Config::kQueryColWarps * 2, place.lane);
  typename Config::QueryFragment acc;
  clear(acc);
  multiply<typename Config::Element, Config::kBlockN / 16>(
      acc, [&](uint32_t (&f)[4], int m, int step) { weights.read(f, m * 16, step * 16); },
      [&](uint32_t (&f)[4], int n, int step) { keys.read(f, step * 16, n * Config::kQueryColWarps * 16); }, Nothing());
  gTile += Layout::base(place.warp, place.lane);
#pragma unroll
  for (int m = 0; m < Config::kQueryTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Config::kQueryCols * 2; ++n) {
      const float* x = acc[m] + 4 * n;
      if constexpr (Layout::kVector) {
        ptx::red_add_v4(gTile + Layout::group(m, n), x[0], x[1], x[2], x[3]);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) ptx::red_add(gTile + Layout::group(m, n) + Layout::element(e), x[e]);
      }
    }
  }
}

// Rounds a block's dK or dV and writes it through shared memory, whole rows at a time.
template <class Config>
__device__ __forceinline__ void store_key_gradient(uint32_t tile, void* target, const typename Config::KeyFragment& acc,
                                                   int64_t offset, int64_t stride, int rows, int head_dim,
                                                   bool aligned) {
  using Element = typename Config::Element;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int row = warp / Config::kKeyColWarps * 16 * Config::kKeyTiles;
#pragma unroll
  for (int m = 0; m < Config::kKeyTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Config::kKeyCols; ++n) {
      const int col = (n * Config::kKeyColWarps + warp % Config::kKeyColWarps) * 16;
      float piece[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) piece[i] = acc[m][8 * n + i];
      store_fragment<Element, Config::kHeadDim>(tile, piece, row + 16 * m, col, lane);
    }
  }
  __syncthreads();
  store_rows<Element, Config::kHeadDim, Config::kThreads>(tile, static_cast<Element*>(target) + offset, stride, 0,
                                                          Config::kBlockN, rows, head_dim, aligned, thread);
}

}  // namespace jax_flash::sm80
