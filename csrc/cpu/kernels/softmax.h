// The online softmax of a strip of at most kTileRows rows, and what becomes of a row when all its keys are done.
#pragma once

#include "cpu/kernels/sequence.h"

namespace jax_flash::cpu::JAX_FLASH_ISA {

// What a row has seen so far: its reference (the maximum in base 2, and headroom), the sum of 2^(score * base2 -
// reference), and o weighted with that.
//
// Special values, as in reference.py: a row that sees a score of NaN or +inf is NaN, o and lse. (In base 2 a score may
// overflow to +inf that did not before: from 2.3e38 on.) A key whose score is -inf is not seen.
struct RowState {
  float* max;  // [rows]
  float* sum;  // [rows]
  float* o;    // [rows, ld]
  int64_t ld;
  // Values near the largest float32 add up to more than that before they are divided by the sum. Rows to which that
  // happens are computed again with this much above their maxima, and so with probabilities of at most 2^-headroom.
  float headroom = 0;
};

inline constexpr float kHeadroom = 32;  // of any number of keys, then, the sum is below 1

JAX_FLASH_INLINE RowState state_at(RowState state, int64_t row) {
  return {state.max + row, state.sum + row, state.o + row * state.ld, state.ld, state.headroom};
}

static inline void clear(RowState state, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    state.max[r] = -kInfinity;
    state.sum[r] = 0;
  }
  zero_row(state.o, rows * state.ld);
}

// Whether some o has overflowed, or is infinite or NaN because a value is. Rows whose probabilities are NaN do not
// count.
static inline bool overflowed(int64_t rows, int64_t cols, RowState state) {
  for (int64_t r = 0; r < rows; ++r) {
    if (!(state.sum[r] < kInfinity)) continue;
    Vec zero{};  // NaN where o is not finite
    for (int64_t c = 0; c < cols; c += kLanes) zero = fma(load(state.o + r * state.ld + c), splat(0.0f), zero);
    if (horizontal_sum(zero) != 0) return true;
  }
  return false;
}

// A mean of values is at most the largest of them, but o / sum, being rounded, may overflow where o is finite and sum
// is below 1.
static inline void keep_finite(float* o, int64_t cols, float sum) {
  const Vec most = splat(0x1.fffff0p127f * sum);
  for (int64_t c = 0; c < cols; c += kLanes) {
    const Vec x = load(o + c), magnitude = from_bits(bits(x) & splat_bits(0x7fffffffu));
    const Vec limit = from_bits(bits(most) | (bits(x) & splat_bits(0x80000000u)));
    store(o + c, ((magnitude > most) & (magnitude < splat(kInfinity))) ? limit : x);
  }
}

// Raises the maxima to those of the scores and scales what was summed below the old ones. Returns in reference what to
// subtract: the maxima; 0 for a row that has seen nothing, NaN for one that has seen +inf.
JAX_FLASH_INLINE void raise_maxima(int64_t rows, Columns columns, const float* scores, int64_t ld, float base2,
                                   RowState state, int64_t cols, float* reference) {
  static_assert(kTileRows <= 16, "the strip's statistics are padded to 16");
  float old_max[16] = {}, new_max[16] = {}, factor[16];
  for (int64_t r = 0; r < rows; ++r) {
    Vec m = load(scores + r * ld + columns.begin);
    for (int64_t c = columns.begin + kLanes; c < columns.end; c += kLanes) m = max(load(scores + r * ld + c), m);
    const float m_row = horizontal_max(m) * base2 + state.headroom;
    old_max[r] = state.max[r];
    new_max[r] = m_row > old_max[r] ? m_row : old_max[r];
  }
  for (int64_t r = 0; r < 16; r += kLanes) {
    const Vec m = load(new_max + r);
    Vec ref = m == splat(-kInfinity) ? splat(0) : m;
    ref = m == splat(kInfinity) ? splat(__builtin_nanf("")) : ref;
    store(reference + r, ref);
    store(factor + r, exp2(load(old_max + r) - ref));
  }
  for (int64_t r = 0; r < rows; ++r) {
    if (new_max[r] == old_max[r]) continue;
    state.max[r] = new_max[r];
    state.sum[r] *= factor[r];
    for (int64_t c = 0; c < cols; c += kLanes) {
      float* o = state.o + r * state.ld + c;
      store(o, load(o) * splat(factor[r]));
    }
  }
}

// probabilities, as words along the keys, replace the scores of [columns.begin, columns.end); they may share the
// buffer.
template <class Words>
static __attribute__((noinline)) void softmax_strip(int64_t rows, Columns columns, const float* scores, int64_t ld,
                                                    float base2, float* probabilities, int64_t ld_words, RowState state,
                                                    int64_t cols) {
  float reference[16];
  raise_maxima(rows, columns, scores, ld, base2, state, cols, reference);
  const Vec unit = splat(base2);
  for (int64_t r = 0; r < rows; ++r) {
    const Vec m = splat(-reference[r]);
    Vec sum_first{}, sum_second{};
    for (int64_t c = columns.begin; c < columns.end; c += 2 * kLanes) {
      const Vec first = exp2(fma(load(scores + r * ld + c), unit, m));
      const Vec second = exp2(fma(load(scores + r * ld + c + kLanes), unit, m));
      sum_first = sum_first + first;
      sum_second = sum_second + second;
      Words::store_row_words(probabilities + r * ld_words + c / Words::kPair, first, second);
    }
    state.sum[r] += horizontal_sum(sum_first + sum_second);
  }
}

// One score more, without a value, in a row's softmax.
static inline void add_sink(float sink, int64_t cols, RowState state) {
  const float score = sink * kLog2E;
  if (score == -kInfinity) return;
  if (state.sum[0] == 0) {  // the row sees no key
    state.max[0] = score;
    state.sum[0] = 1;
    return zero_row(state.o, cols);
  }
  const float most = score > state.max[0] ? score : state.max[0];
  const Vec factor = exp2(splat(state.max[0] - most));
  state.sum[0] = state.sum[0] * factor[0] + exp2(splat(score - most))[0];
  state.max[0] = most;
  for (int64_t c = 0; c < cols; c += kLanes) store(state.o + c, load(state.o + c) * factor);
}

// o and lse of n rows from row on, from their finished state. Rows without a valid query are 0 and -inf, and so are
// those without a visible key where there is no sink.
template <class T>
static inline void write_rows(const ForwardParams& params, const Sequence& seq, int64_t row, int64_t n,
                              RowState state) {
  const Rows<T> o = seq.queries<T>(params.o);
  const int64_t valid = seq.valid_rows(), cols = round_up(seq.shape.H, kLanes);
  for (int64_t r = 0; r < n; ++r) {
    if (params.sinks) add_sink(params.sinks[seq.head(row + r)], cols, state_at(state, r));
    T* out = const_cast<T*>(o[row + r]);
    float& lse = params.lse[seq.statistic(row + r)];
    if (row + r >= valid || state.sum[r] == 0) {
      zero_row(out, seq.shape.H);
      lse = -kInfinity;
    } else {
      if (state.sum[r] < 1) keep_finite(state.o + r * state.ld, cols, state.sum[r]);
      store_row(out, state.o + r * state.ld, 1.0f / state.sum[r], seq.shape.H);
      lse = state.max[r] * kLn2 + __builtin_logf(state.sum[r]);
    }
  }
}

static inline void write_partial(float* partial, int64_t stride, int64_t n, int64_t cols, RowState state) {
  for (int64_t r = 0; r < n; ++r) {
    float* out = partial + r * stride;
    for (int64_t c = 0; c < cols; c += kLanes) store(out + c, load(state.o + r * state.ld + c));
    out[stride - 16] = state.max[r];
    out[stride - 15] = state.sum[r];
  }
}

static inline void read_partial(const float* partial, int64_t stride, int64_t n, int64_t cols, RowState state) {
  for (int64_t r = 0; r < n; ++r) {
    const float* in = partial + r * stride;
    for (int64_t c = 0; c < cols; c += kLanes) store(state.o + r * state.ld + c, load(in + c));
    state.max[r] = in[stride - 16];
    state.sum[r] = in[stride - 15];
  }
}

// The state that a task's rows begin with; partial is the task's for these rows.
static inline void start(const ForwardTask& task, const float* partial, int64_t stride, int64_t n, int64_t cols,
                         RowState state) {
  if (task.resume) {
    read_partial(partial, stride, n, cols, state);
  } else {
    clear(state, n);
  }
}

// The sum of a row's shares, in state.
static inline void add_shares(const CombineTask& task, int64_t cols, int64_t at, RowState state) {
  clear(state, 1);
  for (int64_t s = 0; s < task.splits; ++s) {
    const float share = task.partial[s * task.split_stride + at];
    state.max[0] = share > state.max[0] ? share : state.max[0];
  }
  state.max[0] += state.headroom;
  for (int64_t s = 0; s < task.splits; ++s) {
    const float* share = task.partial + s * task.split_stride;
    if (share[at + 1] == 0) continue;
    const Vec factor = exp2(splat(share[at] - state.max[0]));
    state.sum[0] += share[at + 1] * factor[0];
    for (int64_t c = 0; c < cols; c += kLanes) store(state.o + c, fma(load(share + c), factor, load(state.o + c)));
  }
}

// The shares of a row, computed by several tasks, become one.
template <class T>
static inline void combine_row(const ForwardParams& params, const CombineTask& task) {
  const Sequence seq = make_sequence(params, task.b, task.kh);
  const int64_t cols = round_up(params.shape.H, kLanes), at = partial_stride(params.shape.H) - 16;
  float max, sum, o[256];
  RowState state{&max, &sum, o, 256};
  add_shares(task, cols, at, state);
  if (overflowed(1, cols, state)) {
    state.headroom = kHeadroom;
    add_shares(task, cols, at, state);
  }
  write_rows<T>(params, seq, task.row, 1, state);
}

}  // namespace jax_flash::cpu::JAX_FLASH_ISA
