// Where a thread block of the backward kernels is in the problem.
#pragma once

#include "cuda/sm90/backward/arguments.h"
#include "cuda/sm90/backward/config.h"

namespace jax_flash::sm90 {

// Deterministic sums under a causal mask take key blocks from the last to the first: see DqSemaphore.
__device__ __forceinline__ bool last_first(const BackwardArguments& args) {
  return args.deterministic && args.band.right <= kMaxLength;
}

// A key block and the query tiles that it meets: tile m of group member g, member by member.
template <class C>
struct alignas(16) BackwardWork {
  int32_t b, kh;  // sequence, KV head
  int32_t g;      // the first member
  int32_t n0;     // first key
  typename C::Band band;
  BlockRange tiles;
  int32_t count;                   // tiles, over all members
  int32_t whole_begin, whole_end;  // query tiles whose rows all see something, or lie past the array's end

  // ticket: its number in the order in which they are taken; rank: a block's place in its pair.
  __device__ __forceinline__ static BackwardWork make(const BackwardArguments& args, int32_t ticket, int32_t rank) {
    BackwardWork w;
    // Parts are taken one after the other, so that Q, dO and the sums of dQ stay in L2; the last ones together, so that
    // where key blocks have different numbers of tiles the short ones come at the very end.
    const int32_t rest = ticket - (args.tickets - args.last_parts * args.key_blocks);
    const int32_t part =
        rest < 0 ? ticket / args.key_blocks : args.tickets / args.key_blocks - 1 - rest % args.last_parts;
    const int32_t head = part / args.parts;
    w.g = part % args.parts;  // a part is all members or one
    w.b = head / static_cast<int32_t>(args.shape.K);
    w.kh = head % static_cast<int32_t>(args.shape.K);
    // args.key_blocks counts clusters.
    const int32_t n = rest < 0 ? ticket % args.key_blocks : rest / args.last_parts;
    const int32_t first = (last_first(args) ? args.key_blocks - 1 - n : n) * kSumKeys;
    w.n0 = first + rank * C::kN;
    if constexpr (C::kRanges) {
      w.band = make_band(args.shape, args.band, w.b, w.kh);
    } else {
      w.band = make_diagonal_band(args.shape, args.band, w.b, w.kh);
    }
    // The blocks of a cluster go together, over what any of them sees.
    w.tiles = query_blocks(w.band, w.n0, w.n0 + C::kN, C::kM);
    const BlockRange all = query_blocks(w.band, first, first + kSumKeys, C::kM);
    w.tiles.begin = all.begin;
    w.tiles.end = all.end;
    w.count = (w.tiles.end - w.tiles.begin) * args.part_heads;
    if constexpr (C::kRanges) {
      w.whole_begin = w.tiles.full_begin;
      w.whole_end = w.tiles.full_end;
    } else {
      const int32_t seen_end = w.band.first > w.band.last ? 0 : min_i32(w.band.T, w.band.S - w.band.first);
      w.whole_begin = ceil_div(max_i32(0, -w.band.last), C::kM);
      w.whole_end = seen_end < args.shape.T ? seen_end / C::kM : INT32_MAX;
    }
    return w;
  }

  // Whether a tile may have rows that see nothing.
  __device__ __forceinline__ bool careful(int32_t m) const { return m < whole_begin || m >= whole_end; }
};

// A position among those. tile: tiles that the thread block has met, for all its tickets; it says which buffer is
// whose.
struct BackwardStep {
  int32_t m, g, index, tile;
  template <class C>
  __device__ __forceinline__ explicit BackwardStep(const BackwardWork<C>& work, int32_t tile = 0)
      : m(work.tiles.begin), g(work.g), index(0), tile(tile) {}
  template <class C>
  __device__ __forceinline__ void next(const BackwardWork<C>& work) {
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

template <class C>
__device__ __forceinline__ int64_t query_head(const BackwardArguments& args, const BackwardWork<C>& work, int32_t g) {
  return (static_cast<int64_t>(work.b) * args.shape.K + work.kh) * args.shape.G + g;
}

// The first row of a tile among the rows of the dQ sums.
template <class C>
__device__ __forceinline__ int64_t sum_row(const BackwardArguments& args, const BackwardWork<C>& work, int32_t m,
                                           int32_t g) {
  return query_head(args, work, g) * args.workspace.rows + static_cast<int64_t>(m) * C::kM;
}

// A dQ tile's sums lie in the workspace as the consumers hold them: part (64 queries by 64 columns), four floats,
// thread.
template <class C>
__device__ __forceinline__ float* dq_part(const BackwardArguments& args, const BackwardWork<C>& work, int32_t m,
                                          int32_t g, int part) {
  return args.workspace.dq + sum_row<C>(args, work, m, g) * C::kH + part * kDqPartFloats;
}

// The sums of dK (which: 0) or dV (1) of 64 keys, row0 ..., where parts of a group add to them: panel, four floats,
// thread.
template <class C>
__device__ __forceinline__ float* key_sums(const BackwardArguments& args, int64_t kv_head, int which, int32_t row0) {
  return args.workspace.key_sums + ((kv_head * 2 + which) * args.workspace.keys + row0) * C::kH;
}

}  // namespace jax_flash::sm90
