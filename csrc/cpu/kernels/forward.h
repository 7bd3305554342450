// Forward for many rows: a task keeps its rows' queries and outputs in its cache, and streams the keys and values past
// them, block by block. Each block is packed once per task; each strip of kTileRows rows then does
//     scores = q k^T,  probabilities = softmax of it,  o += probabilities v.
#pragma once

#include "cpu/kernels/scratch.h"
#include "cpu/kernels/softmax.h"

namespace jax_flash::cpu::JAX_FLASH_ISA {

// Keys and values of a block, with the rows' queries and outputs, fill about half of a 1 MB second-level cache.
JAX_FLASH_INLINE int64_t forward_key_block(int64_t H) { return H <= 64 ? 256 : 128; }

struct ForwardScratch {
  float *q, *kt, *v, *scores, *probabilities;
  int64_t ld_q, ld_kt, ld_v, ld_scores, ld_probabilities;
  RowState state;
  int64_t bytes;
};

template <class Words>
static inline ForwardScratch cut_forward(void* base, int64_t rows, int64_t H) {
  const int64_t block = forward_key_block(H), words = word_count<Words>(H);
  Scratch scratch(base);
  ForwardScratch s;
  s.ld_q = padded_stride(words);
  s.ld_kt = padded_stride(block);
  s.ld_v = padded_stride(H);
  s.ld_scores = padded_stride(block);
  s.ld_probabilities = padded_stride(block / Words::kPair);
  s.q = scratch.take(rows * s.ld_q);
  s.kt = scratch.take(words * s.ld_kt);
  s.v = scratch.take(block / Words::kPair * s.ld_v);
  s.scores = scratch.take(kTileRows * s.ld_scores);
  s.probabilities = Words::kPair == 1 ? s.scores : scratch.take(kTileRows * s.ld_probabilities);
  s.state = {scratch.take(rows), scratch.take(rows), scratch.take(rows * padded_stride(H)), padded_stride(H)};
  s.bytes = scratch.used;
  return s;
}

template <class T>
static inline void forward_strip(const ForwardParams& params, const Sequence& seq, const ForwardScratch& s,
                                 int64_t row_begin, int64_t row, int64_t rows, int64_t key, int64_t n) {
  using Words = typename WordsOf<T>::Type;
  const Columns columns = visible_columns(seq, row, rows, key, n);
  if (columns.begin >= columns.end) return;
  const int64_t H = params.shape.H, cols = round_up(H, kLanes), width = columns.end - columns.begin;
  const ScoreUnits units = score_units(params.score);
  const RowState state = state_at(s.state, row - row_begin);
  multiply<Words, ALayout::kByRow, Result::kStore>(rows, width, word_count<Words>(H), s.q + (row - row_begin) * s.ld_q,
                                                   s.ld_q, s.kt + columns.begin, s.ld_kt, s.scores + columns.begin,
                                                   s.ld_scores, units.product);
  if (params.score.softcap > 0) cap_scores(rows, columns, s.scores, s.ld_scores);
  if (columns.masked) mask_scores(seq, row, rows, key, columns, s.scores, s.ld_scores);
  softmax_strip<Words>(rows, columns, s.scores, s.ld_scores, units.base2, s.probabilities, s.ld_probabilities, state,
                       cols);
  const int64_t word = columns.begin / Words::kPair;
  multiply<Words, ALayout::kByRow, Result::kAdd>(rows, cols, width / Words::kPair, s.probabilities + word,
                                                 s.ld_probabilities, s.v + word * s.ld_v, s.ld_v, state.o, state.ld);
}

template <class T>
static inline void forward_head(const ForwardParams& params, const ForwardTask& task, int64_t kh, ForwardScratch s,
                                float headroom = 0) {
  const Sequence seq = make_sequence(params, task.b, kh);
  const int64_t H = params.shape.H, block = forward_key_block(H), rows = task.row_end - task.row_begin;
  const int64_t valid_end = task.row_end < seq.valid_rows() ? task.row_end : seq.valid_rows();
  const int64_t cols = round_up(H, kLanes), stride = partial_stride(H);
  float* partial = task.partial ? task.partial + (kh - task.kh_begin) * rows * stride : nullptr;
  s.state.headroom = headroom;
  start(task, partial, stride, rows, cols, s.state);
  if (task.row_begin < valid_end) {
    pack_rows(s.q, s.ld_q, seq.queries<T>(params.q), task.row_begin, valid_end, H);
    const BlockRange range =
        key_blocks(seq.band, seq.query(task.row_begin), seq.query(valid_end - 1) + 1, static_cast<int32_t>(block));
    const int64_t begin = task.key_begin / block, end = (task.key_end + block - 1) / block;
    const int64_t first = range.begin > begin ? range.begin : begin, last = range.end < end ? range.end : end;
    const Rows<T> k = seq.keys<T>(params.k), v = seq.keys<T>(params.v);
    for (int64_t j = first; j < last; ++j) {
      const int64_t key = j * block, n = seq.band.S - key < block ? seq.band.S - key : block;
      const int64_t padded = round_up(n, kTileCols);
      pack_transposed(s.kt, s.ld_kt, k, key, key + n, padded, H);
      pack_zipped(s.v, s.ld_v, v, key, key + n, padded, H);
      // Each strip asks for its share of the next block.
      const int64_t strips = (valid_end - task.row_begin + kTileRows - 1) / kTileRows,
                    share = (block + strips - 1) / strips;
      const int64_t next_end = j + 1 < last ? (key + 2 * block < seq.band.S ? key + 2 * block : seq.band.S) : 0;
      int64_t next = key + block;
      for (int64_t row = task.row_begin; row < valid_end; row += kTileRows, next += share) {
        const int64_t strip = valid_end - row < kTileRows ? valid_end - row : kTileRows;
        prefetch_rows(k, next, next + share < next_end ? next + share : next_end, H);
        prefetch_rows(v, next, next + share < next_end ? next + share : next_end, H);
        forward_strip<T>(params, seq, s, task.row_begin, row, strip, key, n);
      }
    }
  }
  if (headroom == 0 && overflowed(rows, cols, s.state)) return forward_head<T>(params, task, kh, s, kHeadroom);
  if (partial) {
    write_partial(partial, stride, rows, cols, s.state);
  } else {
    write_rows<T>(params, seq, task.row_begin, rows, s.state);
  }
}

template <class T>
static inline void forward_many_rows(const ForwardParams& params, const ForwardTask& task, void* scratch) {
  const ForwardScratch s =
      cut_forward<typename WordsOf<T>::Type>(scratch, task.row_end - task.row_begin, params.shape.H);
  for (int64_t kh = task.kh_begin; kh < task.kh_end; ++kh) forward_head<T>(params, task, kh, s);
}

}  // namespace jax_flash::cpu::JAX_FLASH_ISA
