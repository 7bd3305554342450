// The one definition of which contiguous range of keys a query sees, and of which blocks a tile visits. Every kernel,
// CPU and CUDA, uses it.
//
// Causal and sliding windows, lengths, and tables of ranges (packed sequences, prefixes, chunks) all leave a query a
// contiguous range of keys, and a key a contiguous range of queries: a Band. What is not a band (boolean masks) is
// decided element by element inside the visited blocks: mask.h.
#pragma once

#include "params.h"

#if defined(__CUDACC__)
#define JAX_FLASH_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always inlined: the CPU kernels compile this file once per instruction set, and the linker must not let one copy with
// AVX-512 in it serve them all.
#define JAX_FLASH_HOST_DEVICE inline __attribute__((always_inline))
#else
#define JAX_FLASH_HOST_DEVICE inline
#endif

namespace jax_flash {

// Positions stay below this, so that sums of three of them fit 32 bits.
inline constexpr int32_t kMaxLength = 1 << 29;

JAX_FLASH_HOST_DEVICE int32_t min_i32(int32_t a, int32_t b) { return a < b ? a : b; }
JAX_FLASH_HOST_DEVICE int32_t max_i32(int32_t a, int32_t b) { return a > b ? a : b; }
JAX_FLASH_HOST_DEVICE int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

struct Range {
  int32_t begin, end;
  JAX_FLASH_HOST_DEVICE bool empty() const { return begin >= end; }
};

// The closed form: what lies between two diagonals. Ranges of queries and keys that do not exist may come out with
// begin > end.
struct DiagonalBand {
  int32_t T, S;         // valid queries and keys of this sequence
  int32_t first, last;  // query i sees keys i + first ... i + last, as far as they exist

  JAX_FLASH_HOST_DEVICE Range keys(int32_t i) const { return Range{key_begin(i), key_end(i)}; }
  JAX_FLASH_HOST_DEVICE int32_t key_begin(int32_t i) const { return max_i32(0, i + first); }
  JAX_FLASH_HOST_DEVICE int32_t key_end(int32_t i) const { return i < T ? min_i32(S, i + last + 1) : 0; }
  JAX_FLASH_HOST_DEVICE int32_t query_begin(int32_t j) const { return max_i32(0, j - last); }
  JAX_FLASH_HOST_DEVICE int32_t query_end(int32_t j) const { return j < S ? min_i32(T, j - first + 1) : 0; }
};

// Of t valid queries and s valid keys, the diagonal d keys to the right of the top left. Sides beyond kMaxLength do not
// limit.
JAX_FLASH_HOST_DEVICE DiagonalBand make_diagonal_band(int32_t t, int32_t s, int32_t d, int64_t left, int64_t right) {
  constexpr int64_t kMost = kMaxLength;
  const auto side = [](int64_t x) { return static_cast<int32_t>(x < -kMost ? -kMost : x); };
  return DiagonalBand{t, s, left > kMost ? -2 * kMaxLength : d - side(left),
                      right > kMost ? 2 * kMaxLength : d + side(right)};
}

// That, cut by the tables of ranges where a call has them.
struct Band : DiagonalBand {
  const int32_t* key_ranges;    // [T, 2] or null
  const int32_t* query_ranges;  // [S, 2] or null

  // Both ends at once: where instructions are dear, so that the tables cost one branch.
  JAX_FLASH_HOST_DEVICE Range keys(int32_t i) const {
    Range range = DiagonalBand::keys(i);
    if (key_ranges && i >= 0 && i < T) {
      range.begin = max_i32(range.begin, key_ranges[2 * i]);
      range.end = min_i32(range.end, key_ranges[2 * i + 1]);
    }
    return range;
  }
  JAX_FLASH_HOST_DEVICE int32_t key_begin(int32_t i) const {
    const int32_t begin = DiagonalBand::key_begin(i);
    return key_ranges && i >= 0 && i < T ? max_i32(begin, key_ranges[2 * i]) : begin;
  }
  JAX_FLASH_HOST_DEVICE int32_t key_end(int32_t i) const {
    const int32_t end = DiagonalBand::key_end(i);
    return key_ranges && i >= 0 && i < T ? min_i32(end, key_ranges[2 * i + 1]) : end;
  }
  JAX_FLASH_HOST_DEVICE int32_t query_begin(int32_t j) const {
    const int32_t begin = DiagonalBand::query_begin(j);
    return query_ranges && j >= 0 && j < S ? max_i32(begin, query_ranges[2 * j]) : begin;
  }
  JAX_FLASH_HOST_DEVICE int32_t query_end(int32_t j) const {
    const int32_t end = DiagonalBand::query_end(j);
    return query_ranges && j >= 0 && j < S ? min_i32(end, query_ranges[2 * j + 1]) : end;
  }
};

// The closed form for sequence b and KV head kh. What is read on the device is clamped: lengths to [0, T] and [0, S].
JAX_FLASH_HOST_DEVICE DiagonalBand make_diagonal_band(const Shape& shape, const BandParams& params, int64_t b,
                                                      int64_t kh) {
  const int64_t row = b * shape.K + kh;
  int32_t t = static_cast<int32_t>(shape.T), s = static_cast<int32_t>(shape.S);
  if (params.q_lengths) t = max_i32(0, min_i32(t, params.q_lengths[row]));
  if (params.kv_lengths) s = max_i32(0, min_i32(s, params.kv_lengths[row]));
  int32_t d = params.top_left ? 0 : s - t;
  if (params.diagonal) d = max_i32(-kMaxLength, min_i32(kMaxLength, params.diagonal[row]));
  return make_diagonal_band(t, s, d, params.left, params.right);
}

// That, and the tables.
JAX_FLASH_HOST_DEVICE Band make_band(const Shape& shape, const BandParams& params, int64_t b, int64_t kh) {
  const int64_t row = b * shape.K + kh;
  return Band{make_diagonal_band(shape, params, b, kh),
              params.key_ranges ? params.key_ranges + row * shape.T * 2 : nullptr,
              params.query_ranges ? params.query_ranges + row * shape.S * 2 : nullptr};
}

// Whether the band's ranges differ from query to query, so that tiles have different amounts of work.
JAX_FLASH_HOST_DEVICE bool is_bounded(const BandParams& params) {
  return params.left <= kMaxLength || params.right <= kMaxLength || params.key_ranges;
}

// Blocks [begin, end) hold something to see, or lie between such; of these, [full_begin, full_end) hold nothing that
// the band hides.
//
// Whether a tile of queries visits a block of keys and whether the block is visited by the tile have to be one
// question, or sums that are added in order wait for ever: so a range counts as empty only where no block is left of
// it, and not where begin >= end, as for a tile whose queries all see nothing and stand inside a block.
struct BlockRange {
  int32_t begin, end, full_begin, full_end;
};

JAX_FLASH_HOST_DEVICE BlockRange block_range(int32_t any_begin, int32_t any_end, int32_t limit, int32_t all_begin,
                                             int32_t all_end, int32_t block) {
  if (any_begin >= limit || any_end <= 0) return BlockRange{0, 0, 0, 0};
  BlockRange r;
  r.begin = any_begin / block;
  r.end = max_i32(r.begin, ceil_div(any_end, block));
  r.full_begin = min_i32(r.end, max_i32(r.begin, ceil_div(all_begin, block)));
  r.full_end = max_i32(r.full_begin, min_i32(r.end, all_end / block));
  return r;
}

// The key blocks that queries [i0, i1) visit. Queries past T see nothing and do not count.
template <class AnyBand>
JAX_FLASH_HOST_DEVICE BlockRange key_blocks(const AnyBand& band, int32_t i0, int32_t i1, int32_t block) {
  i1 = min_i32(i1, band.T);
  if (i0 >= i1) return BlockRange{0, 0, 0, 0};
  const Range first = band.keys(i0), last = band.keys(i1 - 1);
  return block_range(first.begin, last.end, band.S, last.begin, max_i32(0, first.end), block);
}

// The query blocks that keys [j0, j1) visit. A key block that reaches past S is full nowhere.
template <class AnyBand>
JAX_FLASH_HOST_DEVICE BlockRange query_blocks(const AnyBand& band, int32_t j0, int32_t j1, int32_t block) {
  const int32_t valid = min_i32(j1, band.S);
  if (j0 >= valid) return BlockRange{0, 0, 0, 0};
  const int32_t all_end = valid < j1 ? 0 : max_i32(0, band.query_end(j0));
  return block_range(band.query_begin(j0), band.query_end(valid - 1), band.T, band.query_begin(valid - 1), all_end,
                     block);
}

}  // namespace jax_flash
