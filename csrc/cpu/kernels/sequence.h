// One KV head of one sequence: where its rows lie, which keys they see, and what the mask does to a strip of scores.
#pragma once

#include "cpu/kernels/pack.h"
#include "cpu/tasks.h"
#include "mask.h"

namespace jax_flash::cpu::JAX_FLASH_ISA {

struct Sequence {
  Shape shape;
  MaskParams mask;
  int64_t b, kh;
  Band band;

  // q, o, d_o, dq: [B, T, K, G, H]
  template <class T>
  inline __attribute__((always_inline)) Rows<T> queries(const void* data) const {
    const int64_t H = shape.H, GH = shape.G * H;
    return {static_cast<const T*>(data) + (b * shape.T * shape.K + kh) * GH, shape.K * GH, shape.G, H};
  }
  // k, v, dk, dv: [B, S, K, H]
  template <class T>
  inline __attribute__((always_inline)) Rows<T> keys(const void* data) const {
    return {static_cast<const T*>(data) + (b * shape.S * shape.K + kh) * shape.H, shape.K * shape.H};
  }
  // sinks: [B, K, G]
  inline __attribute__((always_inline)) int64_t head(int64_t row) const {
    return (b * shape.K + kh) * shape.G + row % shape.G;
  }
  // lse, d_lse: [B, K, G, T]
  inline __attribute__((always_inline)) int64_t statistic(int64_t row) const {
    return head(row) * shape.T + row / shape.G;
  }
  inline __attribute__((always_inline)) int32_t query(int64_t row) const { return static_cast<int32_t>(row / shape.G); }
  // Rows with a valid query.
  inline __attribute__((always_inline)) int64_t valid_rows() const { return band.T * shape.G; }
};

template <class Params>
JAX_FLASH_INLINE Sequence make_sequence(const Params& params, int64_t b, int64_t kh) {
  return {params.shape, params.mask, b, kh, make_band(params.shape, params.band, b, kh)};
}

// The columns of a key block that a strip of rows has to compute: whole tiles around all that one of them sees.
struct Columns {
  int64_t begin, end;
  bool masked;  // some row does not see some of them
};

// Rows [row, row + rows), with valid queries, against n keys from key on.
JAX_FLASH_INLINE Columns visible_columns(const Sequence& seq, int64_t row, int64_t rows, int64_t key, int64_t n) {
  const int32_t first = seq.query(row), last = seq.query(row + rows - 1);
  const int64_t from = seq.band.key_begin(first) - key, to = seq.band.key_end(last) - key;
  Columns columns;
  columns.begin = (from < 0 ? 0 : from) / kTileCols * kTileCols;
  columns.end = round_up(to < n ? to : n, kTileCols);
  columns.masked = seq.mask.words != nullptr || seq.band.key_begin(last) - key > columns.begin ||
                   seq.band.key_end(first) - key < columns.end;
  return columns;
}

// Scores that the band or the boolean mask hides become -inf. key is a multiple of 32.
static __attribute__((noinline)) void mask_scores(const Sequence& seq, int64_t row, int64_t rows, int64_t key,
                                                  Columns columns, float* scores, int64_t ld) {
  const IVec lane = lane_index();
  const Vec hidden = splat(-kInfinity);
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t i = seq.query(row + r);
    const int32_t from = seq.band.key_begin(i) - static_cast<int32_t>(key);
    const int32_t to = seq.band.key_end(i) - static_cast<int32_t>(key);
    const uint32_t* words = mask_row(seq.shape, seq.mask, seq.b, seq.kh, (row + r) % seq.shape.G, i);
    for (int64_t c = columns.begin; c < columns.end; c += kLanes) {
      float* out = scores + r * ld + c;
      const int32_t c32 = static_cast<int32_t>(c);
      if (c32 < from || c32 + kLanes > to) {
        const IVec column = lane + c32;
        store(out, ((column >= from) & (column < to)) ? load(out) : hidden);
      }
      // The words end at S; columns behind it are hidden already.
      if (words && key + c < seq.shape.S) {
        const UVec seen = (splat_bits(words[(key + c) >> 5] >> (c & 31)) >> reinterpret_cast<UVec>(lane)) & 1u;
        store(out, seen != 0u ? load(out) : hidden);
      }
    }
  }
}

// scores hold score / softcap and become the tanh of it.
JAX_FLASH_INLINE void cap_scores(int64_t rows, Columns columns, float* scores, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = columns.begin; c < columns.end; c += kLanes) {
      store(scores + r * ld + c, tanh(load(scores + r * ld + c)));
    }
  }
}

// The scores of a strip are q.k times `product`, or the tanh of that where there is a softcap. A probability is 2 to
// the power of (score * base2 - the row's reference), rounded once: rounded to base 2 first, scores that are large and
// nearly equal would lose what they differ in. A scale of 0 or less stands in product, so that hidden scores are -inf
// and the largest score has the largest probability.
struct ScoreUnits {
  float product, base2;
};

JAX_FLASH_INLINE ScoreUnits score_units(const ScoreParams& score) {
  const float scale = score.softmax_scale;
  if (score.softcap > 0) return {scale / score.softcap, score.softcap * kLog2E};
  if (scale == 0) return {0.0f, 1.0f};
  return {scale > 0 ? 1.0f : -1.0f, (scale > 0 ? scale : -scale) * kLog2E};
}

}  // namespace jax_flash::cpu::JAX_FLASH_ISA
