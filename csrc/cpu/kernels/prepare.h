// The pass over rows before the main pass of backward. In float32 it also mends probabilities that the LSE is not
// precise enough for.
#pragma once

#include "cpu/kernels/backward_rows.h"

namespace jax_flash::cpu::JAX_FLASH_ISA {

// Beyond this the float32 LSE is off by more than 1e-6, and so are all probabilities of the row that are computed from
// it, by a common factor: 4e-4 at 1e4.
inline constexpr float kExactLse = 32;

struct PrepareScratch {
  float *q, *k_t, *scores;
  int64_t ld_q, ld_keys;
  RowState state;
  int64_t bytes;
};

static inline PrepareScratch cut_prepare(void* base, int64_t H) {
  const int64_t keys = backward_keys(H);
  Scratch scratch(base);
  PrepareScratch s;
  s.ld_q = padded_stride(H);
  s.ld_keys = padded_stride(keys);
  s.q = scratch.take(kBackwardRows * s.ld_q);
  s.k_t = scratch.take(H * s.ld_keys);
  s.scores = scratch.take(kTileRows * s.ld_keys);
  s.state = {scratch.take(kBackwardRows), scratch.take(kBackwardRows), nullptr, 0};
  s.bytes = scratch.used;
  return s;
}

// The maxima and sums of rows [row, row + rows) over all keys that they see: the forward without values.
static inline void sum_probabilities(const BackwardParams& params, const Sequence& seq, const PrepareScratch& s,
                                     int64_t row, int64_t rows) {
  const int64_t H = params.shape.H, block = backward_keys(H);
  const ScoreUnits units = score_units(params.score);
  const Rows<float> k = seq.keys<float>(params.k);
  clear(s.state, rows);
  pack_rows(s.q, s.ld_q, seq.queries<float>(params.q), row, row + rows, H);
  const BlockRange range = row_key_blocks(seq, row, rows);
  for (int64_t j = range.begin; j < range.end; ++j) {
    const int64_t key = j * block, n = seq.band.S - key < block ? seq.band.S - key : block;
    pack_transposed(s.k_t, s.ld_keys, k, key, key + n, round_up(n, kTileCols), H);
    for (int64_t strip = 0; strip < rows; strip += kTileRows) {
      const int64_t count = rows - strip < kTileRows ? rows - strip : kTileRows;
      const Columns columns = visible_columns(seq, row + strip, count, key, n);
      if (columns.begin >= columns.end) continue;
      multiply<FloatWords, ALayout::kByRow, Result::kStore>(count, columns.end - columns.begin, H, s.q + strip * s.ld_q,
                                                            s.ld_q, s.k_t + columns.begin, s.ld_keys,
                                                            s.scores + columns.begin, s.ld_keys, units.product);
      if (params.score.softcap > 0) cap_scores(count, columns, s.scores, s.ld_keys);
      if (columns.masked) mask_scores(seq, row + strip, count, key, columns, s.scores, s.ld_keys);
      softmax_strip<FloatWords>(count, columns, s.scores, s.ld_keys, units.base2, s.scores, s.ld_keys,
                                state_at(s.state, strip), 0);
    }
  }
}

// Of a block of rows [row, row + rows), with valid queries: those with a large LSE get the maximum of their scores for
// a reference, and the weight 1 / sum. P dO and P (dP - delta), all that is made of P, are right when dO and delta have
// that weight, so that the main pass is what it always is.
static __attribute__((noinline)) void normalise_block(const BackwardParams& params, const Sequence& seq,
                                                      const RowStatistics& statistics, const PrepareScratch& s,
                                                      int64_t row, int64_t rows) {
  const auto large = [&](int64_t r) {
    const float lse = __builtin_fabsf(statistics.reference[row + r]);
    return lse > kExactLse * kLog2E && lse < kInfinity;
  };
  bool any = false;
  for (int64_t r = 0; r < rows; ++r) any = any || large(r);
  if (!any) return;
  sum_probabilities(params, seq, s, row, rows);
  statistics.weighed[row / kBackwardRows] |= kNormalised;
  for (int64_t r = 0; r < rows; ++r) {
    float& weight = *row_weight(params, seq, row + r);
    weight = 1;
    if (!large(r) || !(s.state.sum[r] > 0)) continue;
    if (params.sinks) add_sink(params.sinks[seq.head(row + r)], 0, state_at(s.state, r));
    weight = 1 / s.state.sum[r];
    statistics.reference[row + r] = s.state.max[r];
    statistics.delta[row + r] *= weight;
  }
}

template <class T>
static inline float row_product(const T* a, const T* b, int64_t H) {
  Vec sum{};
  int64_t h = 0;
  for (; h + kLanes <= H; h += kLanes) sum = fma(load_lanes(a + h), load_lanes(b + h), sum);
  if (h < H) sum = fma(load_first(a + h, H - h), load_first(b + h, H - h), sum);
  return horizontal_sum(sum);
}

template <class T>
static inline void prepare_rows(const BackwardParams& params, const PrepareTask& task, [[maybe_unused]] void* scratch) {
  const Sequence seq = make_sequence(params, task.b, task.kh);
  const RowStatistics statistics = row_statistics(params, task.b, task.kh);
  const Rows<T> o = seq.queries<T>(params.o), d_o = seq.queries<T>(params.d_o), dq = seq.queries<T>(params.dq);
  const int64_t H = params.shape.H, all = params.shape.G * params.shape.T, valid = seq.valid_rows();
  for (int64_t block = task.row_block_begin; block < task.row_block_end; ++block) {
    const int64_t begin = block * kBackwardRows, end = begin + kBackwardRows < all ? begin + kBackwardRows : all;
    const int64_t valid_end = end < valid ? end : valid;
    const BlockRange range = begin < valid_end ? row_key_blocks(seq, begin, valid_end - begin) : BlockRange{0, 0, 0, 0};
    statistics.semaphores[block] = range.begin;
    statistics.weighed[block] = 0;
    for (int64_t row = begin; row < end; ++row) {
      // A row without a key must not even see its dO and dlse, which may be anything.
      const float lse = row < valid ? params.lse[seq.statistic(row)] : -kInfinity;
      const bool seen = lse != -kInfinity;
      statistics.reference[row] = seen ? lse * kLog2E : kInfinity;
      statistics.delta[row] = 0;
      if (seen) {
        statistics.delta[row] = row_product(o[row], d_o[row], H);
        if (params.d_lse) statistics.delta[row] -= params.d_lse[seq.statistic(row)];
      } else {
        statistics.weighed[block] |= kUnseen;
      }
      // No task comes by to write these.
      if (row >= valid || range.begin == range.end) zero_row(const_cast<T*>(dq[row]), H);
    }
    if constexpr (sizeof(T) == 4) {
      if (range.begin < range.end) {
        normalise_block(params, seq, statistics, cut_prepare(scratch, H), begin, valid_end - begin);
      }
    }
  }
}

}  // namespace jax_flash::cpu::JAX_FLASH_ISA
