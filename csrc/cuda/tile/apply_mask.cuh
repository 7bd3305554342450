// Hides what a query may not see in an accumulator fragment (softmax.cuh says which element a lane holds). band.h
// and mask.h alone decide what that is.
#pragma once

#include <cstdint>

#include "cuda/tile/softmax.cuh"
#include "mask.h"

namespace jax_flash {

// Keeps columns [begin[r], end[r]) of row r, counted from the lane's own first column; `hidden` replaces the rest.
template <int kFloats>
__device__ __forceinline__ void keep_columns(float (&acc)[kFloats], const int (&begin)[2], const int (&end)[2],
                                             float hidden) {
#pragma unroll
  for (int i = 0; i < kFloats; ++i) {
    const int row = i / 2 % 2;
    const int column = i / 4 * 8 + i % 2;
    if (column < begin[row] || column >= end[row]) acc[i] = hidden;
  }
}

// Rows are queries, columns are keys. `i` is the query of acc[0] (lane / 4 included), `j0` the key of column 0.
template <int kFloats>
__device__ __forceinline__ void apply_band(float (&acc)[kFloats], const Band& band, int32_t i, int32_t j0, int lane) {
  const int32_t first = j0 + lane % 4 * 2;
  const int begin[2] = {band.key_begin(i) - first, band.key_begin(i + 8) - first};
  const int end[2] = {band.key_end(i) - first, band.key_end(i + 8) - first};
  keep_columns(acc, begin, end, -infinity());
}

// The boolean mask of one sequence and query head, addressed by query.
struct MaskBits {
  const uint32_t* words;  // [T or 1, ceil(S / 32)], null where there is no mask
  int64_t row_stride;     // words from query to query; 0 where all share one row
  int32_t T, S;           // queries and keys that have bits

  __device__ __forceinline__ static MaskBits make(const Shape& shape, const MaskParams& mask, int64_t b, int64_t kh,
                                                  int64_t g) {
    MaskBits bits;
    bits.words = mask_row(shape, mask, b, kh, g, 0);
    bits.row_stride = mask.T > 1 ? (shape.S + 31) / 32 : 0;
    bits.T = static_cast<int32_t>(shape.T);
    bits.S = static_cast<int32_t>(shape.S);
    return bits;
  }

  // Word j / 32 of query i; 0 past the end.
  __device__ __forceinline__ uint32_t word(int32_t i, int32_t j) const {
    return i < T && j < S ? __ldg(words + i * row_stride + (j >> 5)) : 0u;
  }
};

// Rows are queries, columns are keys; j0 is a multiple of kAlignment, which takes a load for every so many columns (8,
// 16 or 32).
template <int kAlignment, int kFloats>
__device__ __forceinline__ void apply_bits(float (&acc)[kFloats], const MaskBits& bits, int32_t i, int32_t j0,
                                           int lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t word = 0;
#pragma unroll
    for (int n = 0; n < kFloats / 4; ++n) {
      const int32_t j = j0 + 8 * n;
      if (8 * n % kAlignment == 0) word = bits.word(i + 8 * r, j) >> (j % 32 + lane % 4 * 2);
      if (!(word >> 8 * n % kAlignment & 1)) acc[4 * n + 2 * r] = -infinity();
      if (!(word >> 8 * n % kAlignment & 2)) acc[4 * n + 2 * r + 1] = -infinity();
    }
  }
}

}  // namespace jax_flash
