// Forward for a few rows against many keys, the decoding of a language model: every key and value is used so little
// that reading it is the cost. Nothing is packed. A task streams a range of keys once, of all its KV heads together,
// since those lie side by side in memory, and serves all rows of a head from each block while it is in the cache.
#pragma once

#include "cpu/kernels/scratch.h"
#include "cpu/kernels/softmax.h"

namespace jax_flash::cpu::JAX_FLASH_ISA {

inline constexpr int64_t kFewRows = 8;
inline constexpr int64_t kDecodeKeyBlock = 128;
inline constexpr int64_t kDecodeChunk = 16;

struct DecodeScratch {
  float *q, *scores, *probabilities;
  int64_t ld_q, ld_scores, head_rows;
  RowState state;
  int64_t bytes;
};

template <class Words>
static inline DecodeScratch cut_decode(void* base, int64_t heads, int64_t rows, int64_t H) {
  Scratch scratch(base);
  DecodeScratch s;
  s.head_rows = rows;
  s.ld_q = padded_stride(word_count<Words>(H));
  s.ld_scores = padded_stride(kDecodeKeyBlock);
  s.q = scratch.take(heads * rows * s.ld_q);
  s.scores = scratch.take(rows * s.ld_scores);
  s.probabilities = Words::kPair == 1 ? s.scores : scratch.take(rows * s.ld_scores);
  s.state = {scratch.take(heads * rows), scratch.take(heads * rows), scratch.take(heads * rows * padded_stride(H)),
             padded_stride(H)};
  s.bytes = scratch.used;
  return s;
}

// Adds up the lanes of kLanes vectors; lane i of the result is the sum of acc[i].
JAX_FLASH_INLINE Vec sum_each(Vec (&acc)[kLanes]) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) acc[i] = zip_low(acc[i], acc[i + half]) + zip_high(acc[i], acc[i + half]);
  }
  return acc[0];
}

// What is read after the rows at hand. Memory is asked for kAhead keys before it is used, across the ends of blocks.
inline constexpr int64_t kAhead = 2 * kDecodeChunk;

template <class T>
struct Stream {
  const T* rows;  // [n, stride], of which H are read
  int64_t stride, n;
  const T* next;  // the rows after them

  inline __attribute__((always_inline)) const T* ahead(int64_t j) const {
    return j + kAhead < n ? rows + (j + kAhead) * stride : next + (j + kAhead - n) * stride;
  }
};

// One line of a row, in the order in which the loops below come by.
template <class T>
JAX_FLASH_INLINE void prefetch_line(const T* row, int64_t element) {
  __builtin_prefetch(row + element, 0, 2);
}

// acc[r][i] += lanes of row r times lanes of key i, of which left elements remain.
template <class T, int kRows, int kKeys, bool kPrefetch>
JAX_FLASH_INLINE void decode_dots_step(Vec (&acc)[kRows][kKeys], const float* q, int64_t ld_q, const T* k,
                                       int64_t stride, const T* ahead, int64_t left) {
  using Words = typename WordsOf<T>::Type;
  Vec key[kKeys];
#pragma GCC unroll 4
  for (int i = 0; i < kKeys; ++i) {
    key[i] = Words::row_word_lanes(k + i * stride, 0, left);
    if (kPrefetch) prefetch_line(ahead + i * stride, 0);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const Vec row = load(q + r * ld_q);
#pragma GCC unroll 4
    for (int i = 0; i < kKeys; ++i) acc[r][i] = Words::dot(acc[r][i], row, key[i]);
  }
}

// Lanes that sum up to row r times key i go to lanes[r * ld + i].
template <class T, int kRows, int kKeys, bool kPrefetch>
JAX_FLASH_INLINE void decode_dots(const float* q, int64_t ld_q, const T* k, int64_t stride, const T* ahead, int64_t H,
                                  Vec* lanes, int64_t ld) {
  constexpr int kPair = WordsOf<T>::Type::kPair, kStep = kLanes * kPair;
  Vec acc[kRows][kKeys] = {};
  int64_t h = 0;
  for (; h + kStep <= H; h += kStep) {
    decode_dots_step<T, kRows, kKeys, kPrefetch>(acc, q + h / kPair, ld_q, k + h, stride, ahead + h, kStep);
  }
  if (h < H) decode_dots_step<T, kRows, kKeys, kPrefetch>(acc, q + h / kPair, ld_q, k + h, stride, ahead + h, H - h);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kKeys; ++i) lanes[r * ld + i] = acc[r][i];
  }
}

// scores[r][0 : kKeys] of kRows rows; the sums of all pairs are added up together.
template <class T, int kRows, int kKeys, bool kPrefetch>
JAX_FLASH_INLINE void decode_scores_tile(const float* q, int64_t ld_q, const T* k, int64_t stride, const T* ahead,
                                         int64_t H, float factor, float* scores, int64_t ld) {
  // With more keys at a time than this their addresses do not fit the machine's registers.
  constexpr int kGroup = kKeys < 4 ? kKeys : 4;
  Vec lanes[kLanes];
#pragma GCC unroll 16
  for (int i = kRows * kKeys; i < kLanes; ++i) lanes[i] = Vec{};
#pragma GCC unroll 4
  for (int i = 0; i < kKeys; i += kGroup) {
    decode_dots<T, kRows, kGroup, kPrefetch>(q, ld_q, k + i * stride, stride, ahead + i * stride, H, lanes + i, kKeys);
  }
  float sums[kLanes];
  store(sums, sum_each(lanes) * splat(factor));
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) __builtin_memcpy(scores + r * ld, sums + r * kKeys, kKeys * sizeof(float));
}

template <class T, int kRows, bool kPrefetch>
static __attribute__((noinline)) void decode_scores_rows(const float* q, int64_t ld_q, const T* k, int64_t stride,
                                                         int64_t n, const T* ahead, int64_t H, float factor,
                                                         float* scores, int64_t ld) {
  constexpr int kKeys = kLanes / kRows;
  int64_t c = 0;
  for (; c + kKeys <= n; c += kKeys) {
    decode_scores_tile<T, kRows, kKeys, kPrefetch>(q, ld_q, k + c * stride, stride, ahead + c * stride, H, factor,
                                                   scores + c, ld);
  }
  for (; c < n; ++c) {
    decode_scores_tile<T, kRows, 1, kPrefetch>(q, ld_q, k + c * stride, stride, ahead + c * stride, H, factor,
                                               scores + c, ld);
  }
}

// scores[r][0 : n] of all rows.
template <class T>
static inline void decode_scores(const float* q, int64_t ld_q, int64_t rows, Stream<T> k, int64_t H, float factor,
                                 float* scores, int64_t ld) {
  for (int64_t c = 0; c < k.n; c += kDecodeChunk) {
    const int64_t n = k.n - c < kDecodeChunk ? k.n - c : kDecodeChunk;
    const T *at = k.rows + c * k.stride, *ahead = k.ahead(c);
    int64_t r = 0;
    auto tiles = [&](auto count) __attribute__((always_inline)) {
      constexpr int kRows = decltype(count)::kValue;
      for (; r + kRows <= rows; r += kRows) {
        if (r == 0) {
          decode_scores_rows<T, kRows, true>(q, ld_q, at, k.stride, n, ahead, H, factor, scores + c, ld);
        } else {
          decode_scores_rows<T, kRows, false>(q + r * ld_q, ld_q, at, k.stride, n, ahead, H, factor,
                                              scores + r * ld + c, ld);
        }
      }
    };
    tiles(Count<4>{});
    tiles(Count<2>{});
    tiles(Count<1>{});
  }
}

// acc += probabilities[r][j] v[j], for kRows rows and a word of keys; the last key of an odd number has no other.
template <class T, int kRows, int kVecs>
JAX_FLASH_INLINE void decode_values_step(Vec (&acc)[kRows][kVecs], const float* probabilities, int64_t ld,
                                         const T* even, const T* odd, int64_t left) {
  using Words = typename WordsOf<T>::Type;
  Vec lanes[kVecs];
  Words::zip_row(lanes, even, odd, left);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const Vec p = splat(probabilities[r * ld]);
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) acc[r][i] = Words::dot(acc[r][i], p, lanes[i]);
  }
}

// o[r][0 : kVecs * kLanes] += probabilities[r] v, for kRows rows and n keys, of the last vector only left elements.
template <class T, int kRows, int kVecs, bool kPrefetch>
JAX_FLASH_INLINE void decode_values_tile(const float* probabilities, int64_t ld, const T* v, int64_t stride, int64_t n,
                                         const T* ahead, int64_t left, float* o, int64_t ld_o) {
  constexpr int kPair = WordsOf<T>::Type::kPair, kElementsPerLine = 64 / sizeof(T);
  Vec acc[kRows][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) acc[r][i] = load(o + r * ld_o + i * kLanes);
  }
  for (int64_t j = 0; j + kPair <= n; j += kPair) {
    if (kPrefetch) {
#pragma GCC unroll 4
      for (int at = 0; at < kVecs * kLanes; at += kElementsPerLine) {
        for (int i = 0; i < kPair; ++i) prefetch_line(ahead + (j + i) * stride, at);
      }
    }
    const T* even = v + j * stride;
    decode_values_step<T, kRows, kVecs>(acc, probabilities + j / kPair, ld, even, even + (kPair - 1) * stride, left);
  }
  if (n % kPair != 0) {
    decode_values_step<T, kRows, kVecs>(acc, probabilities + n / kPair, ld, v + (n - 1) * stride,
                                        static_cast<const T*>(nullptr), left);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) store(o + r * ld_o + i * kLanes, acc[r][i]);
  }
}

template <class T, int kVecs>
static __attribute__((noinline)) void decode_values_panel(const float* probabilities, int64_t ld, int64_t rows,
                                                          const T* v, int64_t stride, int64_t n, const T* ahead,
                                                          int64_t left, float* o, int64_t ld_o) {
  int64_t r = 0;
  auto tiles = [&](auto count) __attribute__((always_inline)) {
    constexpr int kRows = decltype(count)::kValue;
    for (; r + kRows <= rows; r += kRows) {
      if (r == 0) {
        decode_values_tile<T, kRows, kVecs, true>(probabilities, ld, v, stride, n, ahead, left, o, ld_o);
      } else {
        decode_values_tile<T, kRows, kVecs, false>(probabilities + r * ld, ld, v, stride, n, ahead, left, o + r * ld_o,
                                                   ld_o);
      }
    }
  };
  if constexpr (kTileRows >= 12) tiles(Count<4>{});
  tiles(Count<2>{});
  tiles(Count<1>{});
}

// o[r][0 : H] += probabilities[r] v; the probabilities are words along the keys.
template <class T>
static inline void decode_values(const float* probabilities, int64_t ld, int64_t rows, Stream<T> v, int64_t H, float* o,
                                 int64_t ld_o) {
  constexpr int kPair = WordsOf<T>::Type::kPair;
  for (int64_t c = 0; c < v.n; c += kDecodeChunk) {
    const int64_t n = v.n - c < kDecodeChunk ? v.n - c : kDecodeChunk;
    const T *at = v.rows + c * v.stride, *ahead = v.ahead(c);
    const float* p = probabilities + c / kPair;
    int64_t h = 0;
    for (; h + 4 * kLanes <= H; h += 4 * kLanes) {
      decode_values_panel<T, 4>(p, ld, rows, at + h, v.stride, n, ahead + h, H - h, o + h, ld_o);
    }
    for (; h < H; h += kLanes) {
      decode_values_panel<T, 1>(p, ld, rows, at + h, v.stride, n, ahead + h, H - h, o + h, ld_o);
    }
  }
}

// The rows of one head against the keys [key, key + n) that some row sees. next_k is read after them.
template <class T>
static inline void decode_block(const ForwardParams& params, const Sequence& seq, const DecodeScratch& s, int64_t head,
                                int64_t row_begin, int64_t rows, int64_t key, int64_t n, const T* next_k) {
  const int64_t H = params.shape.H, first = head * s.head_rows;
  const RowState state = state_at(s.state, first);
  const ScoreUnits units = score_units(params.score);
  const Rows<T> k = seq.keys<T>(params.k), v = seq.keys<T>(params.v);
  decode_scores(s.q + first * s.ld_q, s.ld_q, rows, Stream<T>{k[key], k.stride, n, v[key]}, H, units.product, s.scores,
                s.ld_scores);
  const Columns columns{0, round_up(n, kTileCols), true};
  if (params.score.softcap > 0) cap_scores(rows, columns, s.scores, s.ld_scores);
  mask_scores(seq, row_begin, rows, key, columns, s.scores, s.ld_scores);
  softmax_strip<typename WordsOf<T>::Type>(rows, columns, s.scores, s.ld_scores, units.base2, s.probabilities,
                                           s.ld_scores, state, round_up(H, kLanes));
  decode_values(s.probabilities, s.ld_scores, rows, Stream<T>{v[key], v.stride, n, next_k}, H, state.o, state.ld);
}

template <class T>
static inline void forward_few_rows(const ForwardParams& params, const ForwardTask& task, void* scratch,
                                    float headroom = 0) {
  using Words = typename WordsOf<T>::Type;
  const int64_t H = params.shape.H, rows = task.row_end - task.row_begin, heads = task.kh_end - task.kh_begin;
  DecodeScratch s = cut_decode<Words>(scratch, heads, rows, H);
  s.state.headroom = headroom;
  const int64_t cols = round_up(H, kLanes), stride = partial_stride(H);
  start(task, task.partial, stride, heads * rows, cols, s.state);
  for (int64_t head = 0; head < heads; ++head) {
    const Sequence seq = make_sequence(params, task.b, task.kh_begin + head);
    const int64_t valid_end = task.row_end < seq.valid_rows() ? task.row_end : seq.valid_rows();
    if (task.row_begin >= valid_end) continue;
    pack_rows(s.q + head * rows * s.ld_q, s.ld_q, seq.queries<T>(params.q), task.row_begin, valid_end, H);
  }
  const int64_t keys = task.key_end < params.shape.S ? task.key_end : params.shape.S;
  for (int64_t block = task.key_begin; block < keys; block += kDecodeKeyBlock) {
    for (int64_t head = 0; head < heads; ++head) {
      const Sequence seq = make_sequence(params, task.b, task.kh_begin + head);
      const int64_t valid_end = task.row_end < seq.valid_rows() ? task.row_end : seq.valid_rows();
      if (task.row_begin >= valid_end) continue;
      const int64_t first = seq.band.key_begin(seq.query(task.row_begin)),
                    last = seq.band.key_end(seq.query(valid_end - 1));
      const int64_t end = block + kDecodeKeyBlock < last ? block + kDecodeKeyBlock : last;
      if (first < block + kDecodeKeyBlock && block < end) {
        const Rows<T> k = seq.keys<T>(params.k);
        const T* next_k = head + 1 < heads ? k[block] + H : k[end] - head * H;
        decode_block<T>(params, seq, s, head, task.row_begin, valid_end - task.row_begin, block, end - block, next_k);
      }
    }
  }
  if (headroom == 0 && overflowed(heads * rows, cols, s.state)) {
    return forward_few_rows<T>(params, task, scratch, kHeadroom);
  }
  if (task.partial) {
    write_partial(task.partial, stride, heads * rows, cols, s.state);
    return;
  }
  for (int64_t head = 0; head < heads; ++head) {
    const Sequence seq = make_sequence(params, task.b, task.kh_begin + head);
    write_rows<T>(params, seq, task.row_begin, rows, state_at(s.state, head * rows));
  }
}

}  // namespace jax_flash::cpu::JAX_FLASH_ISA
