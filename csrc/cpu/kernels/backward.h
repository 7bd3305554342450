// Backward. A task owns a block of keys and walks over the rows that see it:
//     P = exp(score - lse),  dV += P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dK += dS^T Q,  dQ += dS K.
// dK and dV stay in the task's cache. dQ is summed in the workspace, where a semaphore per row block admits the
// tasks of one head in the order of their key blocks, so that the sum is always the same: the first stores, the last
// writes the result.
#pragma once

#include "cpu/kernels/backward_rows.h"

namespace jax_flash::cpu::JAX_FLASH_ISA {

struct BackwardScratch {
  // Of the block of keys. *_t: [word of H, keys]; k: [word of keys, H].
  float *k_t, *v_t, *k, *dk, *dv;
  // Of the block of rows. *_zip: [word of rows, H]; with one element a word they are q and d_o themselves.
  float *q, *d_o, *q_zip, *d_o_zip;
  // Of the tile: p_zip and ds_zip [word of rows, keys]; ds [rows, word of keys], of one strip.
  float *p_zip, *ds_zip, *ds;
  float *scores, *dp;  // [kTileRows, keys], of one strip
  int64_t ld_keys, ld_h, ld_words, ld_ds;
  int64_t bytes;
};

template <class Words>
static inline BackwardScratch cut_backward(void* base, int64_t H) {
  const int64_t keys = backward_keys(H), words = word_count<Words>(H), row_words = kBackwardRows / Words::kPair;
  constexpr bool kZipped = Words::kPair > 1;
  Scratch scratch(base);
  BackwardScratch s;
  s.ld_keys = padded_stride(keys);
  s.ld_h = padded_stride(H);
  s.ld_words = padded_stride(words);
  s.ld_ds = padded_stride(keys / Words::kPair);
  s.k_t = scratch.take(words * s.ld_keys);
  s.v_t = scratch.take(words * s.ld_keys);
  s.k = scratch.take(keys / Words::kPair * s.ld_h);
  s.dk = scratch.take(keys * s.ld_h);
  s.dv = scratch.take(keys * s.ld_h);
  s.q = scratch.take(kBackwardRows * s.ld_words);
  s.d_o = scratch.take(kBackwardRows * s.ld_words);
  s.q_zip = kZipped ? scratch.take(row_words * s.ld_h) : s.q;
  s.d_o_zip = kZipped ? scratch.take(row_words * s.ld_h) : s.d_o;
  s.p_zip = scratch.take(row_words * s.ld_keys);
  s.ds_zip = scratch.take(row_words * s.ld_keys);
  s.ds = kZipped ? scratch.take(kBackwardRows * s.ld_ds) : s.ds_zip;
  s.scores = scratch.take(kTileRows * s.ld_keys);
  s.dp = scratch.take(kTileRows * s.ld_keys);
  s.bytes = scratch.used;
  return s;
}

// What one strip of rows leaves for the products over rows and over keys. A reference of +inf, where the forward saw
// nothing, makes every probability 0.
template <class Words>
static __attribute__((noinline)) void differentiate_strip(const BackwardScratch& s, int64_t strip, int64_t rows,
                                                          Columns columns, const float* reference, const float* delta,
                                                          float base2, bool capped, int64_t keys) {
  constexpr int kPair = Words::kPair;
  for (int64_t r = 0; r < rows; r += kPair) {
    float* p_zip = s.p_zip + (strip + r) / kPair * s.ld_keys;
    float* ds_zip = s.ds_zip + (strip + r) / kPair * s.ld_keys;
    for (int64_t c = 0; c < columns.begin; c += kLanes) {
      store(p_zip + c, Vec{});
      store(ds_zip + c, Vec{});
    }
    for (int64_t c = columns.end; c < keys; c += kLanes) {
      store(p_zip + c, Vec{});
      store(ds_zip + c, Vec{});
    }
    for (int64_t c = columns.begin; c < columns.end; c += kTileCols) {
      Vec p[2][kTileVecs] = {}, ds[2][kTileVecs] = {};
#pragma GCC unroll 2
      for (int i = 0; i < kPair; ++i) {
        if (r + i >= rows) continue;
#pragma GCC unroll 2
        for (int v = 0; v < kTileVecs; ++v) {
          const int64_t at = (r + i) * s.ld_keys + c + v * kLanes;
          const Vec score = load(s.scores + at);
          p[i][v] = exp2(fma(score, splat(base2), splat(-reference[r + i])));
          ds[i][v] = p[i][v] * (load(s.dp + at) - splat(delta[r + i]));
          if (capped) {  // The score is its tanh.
            ds[i][v] = score == splat(-kInfinity) ? splat(0) : ds[i][v] * (splat(1.0f) - score * score);
          }
        }
        if (kPair > 1) Words::store_row_words(s.ds + (strip + r + i) * s.ld_ds + c / kPair, ds[i][0], ds[i][1]);
      }
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; ++v) {
        store(p_zip + c + v * kLanes, Words::zip_lanes(p[0][v], p[1][v]));
        store(ds_zip + c + v * kLanes, Words::zip_lanes(ds[0][v], ds[1][v]));
      }
    }
  }
}

// The rows [row, row + rows) of a block against the task's keys: everything but dQ.
template <class T>
static inline void differentiate_rows(const BackwardParams& params, const Sequence& seq, const BackwardScratch& s,
                                      const RowStatistics& statistics, int64_t row, int64_t rows, int64_t key,
                                      int64_t n) {
  using Words = typename WordsOf<T>::Type;
  constexpr int kPair = Words::kPair;
  const int64_t H = params.shape.H, words = word_count<Words>(H), cols = round_up(H, kLanes);
  const int64_t padded = round_up(n, kTileCols);
  const ScoreUnits units = score_units(params.score);
  const bool capped = params.score.softcap > 0;
  const Rows<T> q = seq.queries<T>(params.q), d_o = seq.queries<T>(params.d_o);
  bool full = true;
  for (int64_t strip = 0; strip < rows; strip += kTileRows) {
    const int64_t count = rows - strip < kTileRows ? rows - strip : kTileRows;
    const int64_t next = row + kBackwardRows + strip,
                  next_end = next + kTileRows < seq.valid_rows() ? next + kTileRows : seq.valid_rows();
    prefetch_rows(q, next, next_end, H);
    prefetch_rows(d_o, next, next_end, H);
    Columns columns = visible_columns(seq, row + strip, count, key, n);
    if (columns.begin >= columns.end) columns = Columns{0, 0, false};
    const int64_t width = columns.end - columns.begin;
    full = full && width == padded;
    multiply<Words, ALayout::kByRow, Result::kStore>(count, width, words, s.q + strip * s.ld_words, s.ld_words,
                                                     s.k_t + columns.begin, s.ld_keys, s.scores + columns.begin,
                                                     s.ld_keys, units.product);
    multiply<Words, ALayout::kByRow, Result::kStore>(count, width, words, s.d_o + strip * s.ld_words, s.ld_words,
                                                     s.v_t + columns.begin, s.ld_keys, s.dp + columns.begin, s.ld_keys);
    if (capped) cap_scores(count, columns, s.scores, s.ld_keys);
    if (columns.masked) mask_scores(seq, row + strip, count, key, columns, s.scores, s.ld_keys);
    differentiate_strip<Words>(s, strip, count, columns, statistics.reference + row + strip,
                               statistics.delta + row + strip, units.base2, capped, padded);
  }
  // Where the band cuts the tile, tiles of keys skip the rows that do not see them.
  const int64_t key_step = full ? n : 2 * kTileRows;
  for (int64_t c = 0; c < n; c += key_step) {
    const int64_t count = n - c < key_step ? n - c : key_step;
    int64_t from = 0, to = rows;
    if (!full) {
      const int64_t first = seq.band.query_begin(static_cast<int32_t>(key + c)) * seq.shape.G - row;
      const int64_t last = seq.band.query_end(static_cast<int32_t>(key + c + count - 1)) * seq.shape.G - row;
      from = (first < 0 ? 0 : first) / kPair;
      to = last < rows ? last : rows;
      if (from * kPair >= to) continue;
    }
    const int64_t depth = word_count<Words>(to) - from;
    multiply<Words, ALayout::kByColumn, Result::kAdd>(count, cols, depth, s.p_zip + from * s.ld_keys + c, s.ld_keys,
                                                      s.d_o_zip + from * s.ld_h, s.ld_h, s.dv + c * s.ld_h, s.ld_h);
    multiply<Words, ALayout::kByColumn, Result::kAdd>(count, cols, depth, s.ds_zip + from * s.ld_keys + c, s.ld_keys,
                                                      s.q_zip + from * s.ld_h, s.ld_h, s.dk + c * s.ld_h, s.ld_h);
  }
}

// Row r of a packed block becomes zeros: it is one half of the words that zip it.
template <class Words>
static inline void drop_row(const BackwardScratch& s, int64_t r, int64_t H) {
  zero_row(s.q + r * s.ld_words, word_count<Words>(H));
  zero_row(s.d_o + r * s.ld_words, word_count<Words>(H));
  if constexpr (Words::kPair > 1) {
    const UVec other = splat_bits(r % 2 ? 0x0000ffffu : 0xffff0000u);
    for (float* zip : {s.q_zip + r / 2 * s.ld_h, s.d_o_zip + r / 2 * s.ld_h}) {
      for (int64_t h = 0; h < H; h += kLanes) store(zip + h, from_bits(bits(load(zip + h)) & other));
    }
  }
}

// Rows of a packed block that see no key are dropped, whatever they hold: it may be NaN, and 0 * NaN is not 0. Rows
// whose probabilities are off by a factor (see normalise_block) have dO divided by it.
template <class T>
static __attribute__((noinline)) void weigh_rows(const BackwardParams& params, const Sequence& seq,
                                                 const BackwardScratch& s, const RowStatistics& statistics, int64_t row,
                                                 int64_t rows) {
  const int64_t H = params.shape.H;
  const uint8_t weighed = statistics.weighed[row / kBackwardRows];
  for (int64_t r = 0; r < rows; ++r) {
    if (statistics.reference[row + r] == kInfinity) {
      drop_row<typename WordsOf<T>::Type>(s, r, H);
    } else if constexpr (sizeof(T) == 4) {
      if (!(weighed & kNormalised)) continue;
      const Vec weight = splat(*row_weight(params, seq, row + r));
      float* d_o = s.d_o + r * s.ld_words;
      for (int64_t h = 0; h < H; h += kLanes) store(d_o + h, load(d_o + h) * weight);
    }
  }
}

template <class T>
static inline void pack_backward_rows(const BackwardParams& params, const Sequence& seq, const BackwardScratch& s,
                                      const RowStatistics& statistics, int64_t row, int64_t rows) {
  using Words = typename WordsOf<T>::Type;
  const int64_t H = params.shape.H;
  const Rows<T> q = seq.queries<T>(params.q), d_o = seq.queries<T>(params.d_o);
  pack_rows(s.q, s.ld_words, q, row, row + rows, H);
  pack_rows(s.d_o, s.ld_words, d_o, row, row + rows, H);
  if constexpr (Words::kPair > 1) {
    const int64_t padded = round_up(rows, Words::kPair);
    pack_zipped(s.q_zip, s.ld_h, q, row, row + rows, padded, H);
    pack_zipped(s.d_o_zip, s.ld_h, d_o, row, row + rows, padded, H);
  }
  if (statistics.weighed[row / kBackwardRows]) weigh_rows<T>(params, seq, s, statistics, row, rows);
}

// dQ of a block of rows: waits for the key blocks before this one, adds, and writes the result if no other follows.
template <class T>
static inline void add_dq(const BackwardParams& params, const Sequence& seq, const BackwardScratch& s,
                          const RowStatistics& statistics, int64_t row, int64_t rows, int64_t key_block, int64_t n) {
  using Words = typename WordsOf<T>::Type;
  const int64_t H = params.shape.H, cols = round_up(H, kLanes), ld = padded_head_dim(H);
  const int64_t key = key_block * backward_keys(H);
  const BlockRange range = row_key_blocks(seq, row, rows);
  int32_t* semaphore = statistics.semaphores + row / kBackwardRows;
  float* dq = statistics.dq + row * ld;
  wait_for_semaphore(semaphore, static_cast<int32_t>(key_block));
  for (int64_t strip = 0; strip < rows; strip += kTileRows) {
    const int64_t count = rows - strip < kTileRows ? rows - strip : kTileRows;
    const Columns columns = visible_columns(seq, row + strip, count, key, n);
    const int64_t width = columns.begin < columns.end ? columns.end - columns.begin : 0;
    const float* ds = s.ds + strip * s.ld_ds + columns.begin / Words::kPair;
    const float* k = s.k + columns.begin / Words::kPair * s.ld_h;
    if (key_block == range.begin) {
      multiply<Words, ALayout::kByRow, Result::kStore>(count, cols, width / Words::kPair, ds, s.ld_ds, k, s.ld_h,
                                                       dq + strip * ld, ld);
    } else if (width > 0) {
      multiply<Words, ALayout::kByRow, Result::kAdd>(count, cols, width / Words::kPair, ds, s.ld_ds, k, s.ld_h,
                                                     dq + strip * ld, ld);
    }
  }
  if (key_block + 1 < range.end) {
    __atomic_store_n(semaphore, static_cast<int32_t>(key_block + 1), __ATOMIC_RELEASE);
    return;
  }
  const Rows<T> out = seq.queries<T>(params.dq);
  for (int64_t r = 0; r < rows; ++r) {
    T* out_row = const_cast<T*>(out[row + r]);
    if (statistics.reference[row + r] == kInfinity) {
      zero_row(out_row, H);  // Not 0 * K, which may be NaN.
    } else {
      store_row(out_row, dq + r * ld, params.score.softmax_scale, H);
    }
  }
}

template <class T>
static inline void backward_keys_task(const BackwardParams& params, const BackwardTask& task, void* scratch) {
  using Words = typename WordsOf<T>::Type;
  const Sequence seq = make_sequence(params, task.b, task.kh);
  const int64_t H = params.shape.H, S = params.shape.S, block = backward_keys(H), key = task.key_block * block;
  const int64_t left = seq.band.S - key, n = left < 0 ? 0 : left < block ? left : block;
  const int64_t padded = round_up(n, kTileCols);
  const BackwardScratch s = cut_backward<Words>(scratch, H);
  const RowStatistics statistics = row_statistics(params, task.b, task.kh);

  const BlockRange queries = query_blocks(seq.band, static_cast<int32_t>(key), static_cast<int32_t>(key + block), 1);
  const int64_t row_begin = queries.begin * seq.shape.G / kBackwardRows * kBackwardRows,
                row_end = queries.end * seq.shape.G;
  if (queries.begin < queries.end) {
    const Rows<T> k = seq.keys<T>(params.k), v = seq.keys<T>(params.v);
    pack_transposed(s.k_t, s.ld_keys, k, key, key + n, padded, H);
    pack_transposed(s.v_t, s.ld_keys, v, key, key + n, padded, H);
    pack_zipped(s.k, s.ld_h, k, key, key + n, padded, H);
  }
  zero_row(s.dk, n * s.ld_h);
  zero_row(s.dv, n * s.ld_h);
  for (int64_t row = row_begin; row < row_end; row += kBackwardRows) {
    const int64_t left_rows = seq.valid_rows() - row, rows = left_rows < kBackwardRows ? left_rows : kBackwardRows;
    pack_backward_rows<T>(params, seq, s, statistics, row, rows);
    differentiate_rows<T>(params, seq, s, statistics, row, rows, key, n);
    add_dq<T>(params, seq, s, statistics, row, rows, task.key_block, n);
  }

  const Rows<T> dk = seq.keys<T>(params.dk), dv = seq.keys<T>(params.dv);
  for (int64_t j = 0; j < block && key + j < S; ++j) {
    T *dk_row = const_cast<T*>(dk[key + j]), *dv_row = const_cast<T*>(dv[key + j]);
    if (j < n) {
      store_row(dk_row, s.dk + j * s.ld_h, params.score.softmax_scale, H);
      store_row(dv_row, s.dv + j * s.ld_h, 1.0f, H);
    } else {
      zero_row(dk_row, H);
      zero_row(dv_row, H);
    }
  }
}

}  // namespace jax_flash::cpu::JAX_FLASH_ISA
