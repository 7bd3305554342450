// Where a thread block of the backward kernels is in the problem.
#pragma once

#include "cuda/sm90/backward/arguments.h"
#include "cuda/sm90/backward/config.h"

namespace jax_flash::sm90 {

// A key block and the query tiles that it meets: tile m of group member g, member by member.
struct BackwardWork {
  int32_t b, kh;      // sequence, KV head
  int32_t n0;         // first key
  DiagonalBand band;  // no tables of ranges: they would cost registers that all calls lack
  BlockRange tiles;
  int32_t count;        // tiles to walk, over the whole group
  int32_t first_short;  // the first query tile that passes the sequence's length but not the array's

  // Deterministic sums under a causal mask take key blocks from the last to the first: see SumTurn.
  __device__ __forceinline__ static bool last_first(const BackwardArguments& args) {
    return args.deterministic && args.band.right <= kMaxLength;
  }

  // cluster: the number of a block or pair in the order in which they are taken; rank: a block's place in its pair.
  template <class C>
  __device__ __forceinline__ static BackwardWork make(const BackwardArguments& args, int32_t cluster, int32_t rank) {
    BackwardWork w;
    // Heads are taken one after the other, so that Q, dO and the sums of dQ stay in L2; the last ones together, so that
    // where walks have different lengths the short ones come at the very end.
    const int32_t rest = cluster - (args.all_key_blocks - args.last_heads * args.key_blocks);
    const int32_t head =
        rest < 0 ? cluster / args.key_blocks : args.all_key_blocks / args.key_blocks - 1 - rest % args.last_heads;
    w.b = head / static_cast<int32_t>(args.shape.K);
    w.kh = head % static_cast<int32_t>(args.shape.K);
    // args.key_blocks counts clusters.
    const int32_t n = rest < 0 ? cluster % args.key_blocks : rest / args.last_heads;
    const int32_t first = (last_first(args) ? args.key_blocks - 1 - n : n) * kSumKeys;
    w.n0 = first + rank * C::kN;
    w.band = make_diagonal_band(args.shape, args.band, w.b, w.kh);
    // The blocks of a cluster walk together, over what any of them sees.
    w.tiles = query_blocks(w.band, w.n0, w.n0 + C::kN, C::kM);
    const BlockRange all = query_blocks(w.band, first, first + kSumKeys, C::kM);
    w.tiles.begin = all.begin;
    w.tiles.end = all.end;
    w.count = (w.tiles.end - w.tiles.begin) * static_cast<int32_t>(args.shape.G);
    w.first_short = w.band.T < args.shape.T ? w.band.T / C::kM : INT32_MAX;
    return w;
  }
};

// A position in that walk. tile: tiles that the thread block has met, in all its walks; it says which buffer is whose.
struct BackwardStep {
  int32_t m, g, index, tile;
  __device__ __forceinline__ explicit BackwardStep(const BackwardWork& work, int32_t tile = 0)
      : m(work.tiles.begin), g(0), index(0), tile(tile) {}
  __device__ __forceinline__ void next(const BackwardWork& work) {
    ++index;
    ++tile;
    if (++m == work.tiles.end) {
      m = work.tiles.begin;
      ++g;
    }
  }
  template <class C>
  __device__ __forceinline__ int stage() const {
    return tile % C::kStages;
  }
  template <class C>
  __device__ __forceinline__ uint32_t parity() const {
    return tile / C::kStages & 1;
  }
};

__device__ __forceinline__ int64_t query_head(const BackwardArguments& args, const BackwardWork& work, int32_t g) {
  return (static_cast<int64_t>(work.b) * args.shape.K + work.kh) * args.shape.G + g;
}

// The first row of a tile among the rows of the dQ sums.
template <class C>
__device__ __forceinline__ int64_t sum_row(const BackwardArguments& args, const BackwardWork& work, int32_t m,
                                           int32_t g) {
  return query_head(args, work, g) * args.workspace.rows + static_cast<int64_t>(m) * C::kM;
}

// A dQ tile's sums lie in the workspace as the consumers hold them: part (64 queries by 64 columns), four floats,
// thread.
template <class C>
__device__ __forceinline__ float* dq_part(const BackwardArguments& args, const BackwardWork& work, int32_t m, int32_t g,
                                          int part) {
  return args.workspace.dq + sum_row<C>(args, work, m, g) * C::kH + part * kDqPartFloats;
}

}  // namespace jax_flash::sm90
