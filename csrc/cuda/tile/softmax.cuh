// Online softmax on accumulator fragments.
//
// A fragment is flat, float acc[kFloats], two rows a lane: acc[4 * n + {0, 1}] belong to row lane / 4, columns
// 8 * n + 2 * (lane % 4) + {0, 1}; acc[4 * n + {2, 3}] to row lane / 4 + 8, same columns. The four lanes of a quad
// share their rows.
#pragma once

#include <cstdint>

#include "cuda/ptx/math.cuh"

namespace jax_flash {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_max_nan(float x) {
  x = ptx::max_nan(x, __shfl_xor_sync(~0u, x, 1));
  return ptx::max_nan(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// tanh to about 2^-22 absolute. (tanh.approx has 2^-11, which a softcap of 30 turns into a percent of the probability.)
__device__ __forceinline__ float tanh_accurate(float x) {
  return 1.0f - 2.0f * ptx::rcp(1.0f + ptx::ex2(2.0f * kLog2e * x));
}

// By how much, in powers of two, the maximum that a row's exponentials are taken relative to may lag behind the true
// one. Raising it means rescaling the output, which so happens a few times a row and not at every block. Probabilities
// stay below 2^8 of float16's 2^16, and float32 sums do not mind.
inline constexpr float kMaximumLag = 8.0f;

// How raw products become exponents: exponent of 2 = scores * log2_scale, after an optional softcap. A scale that is
// not positive goes through apply() too, so that the running maximum can be taken of the raw products.
struct ScoreTransform {
  float scale_in;    // raw product -> argument of tanh, or -> score where there is no cap
  float softcap;     // 0: none
  float log2_scale;  // what apply() leaves (raw products where it is not needed) -> exponent of 2; positive
  float lag;         // kMaximumLag in units of what apply() leaves
  bool needed;

  __host__ __device__ static ScoreTransform make(float softmax_scale, float softcap) {
    ScoreTransform t;
    t.needed = softcap > 0 || !(softmax_scale > 0);
    t.softcap = softcap > 0 ? softcap : 0.0f;
    t.scale_in = softcap > 0 ? softmax_scale / softcap : softmax_scale;
    t.log2_scale = softcap > 0 ? softcap * kLog2e : t.needed ? kLog2e : softmax_scale * kLog2e;
    t.lag = kMaximumLag / t.log2_scale;
    return t;
  }

  // With a softcap, log2_scale carries the cap: the fragment becomes tanh(...) alone.
  template <int kFloats>
  __device__ __forceinline__ void apply(float (&acc)[kFloats]) const {
#pragma unroll
    for (int i = 0; i < kFloats; ++i) acc[i] = softcap > 0 ? tanh_accurate(acc[i] * scale_in) : acc[i] * scale_in;
  }
};

// acc[row of lane] *= factor[row]
template <int kFloats>
__device__ __forceinline__ void scale_rows(float (&acc)[kFloats], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kFloats; ++i) acc[i] *= factor[i / 2 % 2];
}

// The running state of this lane's two rows.
struct OnlineSoftmax {
  float max[2];  // of the products seen so far or up to the lag below it, -inf before any
  float sum[2];  // of this lane's columns; finish() adds the quad's

  // A sink, in the unit of the products, is as a product that the rows have seen; -inf: none.
  __device__ __forceinline__ void init(float sink, int lane) {
    max[0] = max[1] = sink;
    sum[0] = sum[1] = sink != -infinity() && lane % 4 == 0 ? 1.0f : 0.0f;
  }

  // The largest products of this lane in the next block; true where one is beyond the lag. If that is so in any lane of
  // the warp, all call raise() before exponentiate(). Hidden products are -inf.
  template <int kFloats>
  __device__ __forceinline__ bool observe(const float (&acc)[kFloats], float lag, float (&lane_max)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      lane_max[r] = fmaxf(acc[2 * r], acc[2 * r + 1]);
#pragma unroll
      for (int i = 4; i < kFloats; i += 4) lane_max[r] = fmaxf(lane_max[r], fmaxf(acc[i + 2 * r], acc[i + 2 * r + 1]));
    }
    // Before the first visible key, -inf + lag < x holds for every finite x.
    return lane_max[0] > max[0] + lag || lane_max[1] > max[1] + lag;
  }

  // Raises the maxima to the true ones; says by how much what was accumulated before has to shrink.
  __device__ __forceinline__ void raise(const float (&lane_max)[2], float log2_scale, float (&correction)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float before = max[r];
      max[r] = fmaxf(before, quad_max(lane_max[r]));
      correction[r] = before == -infinity() ? 0.0f : ptx::ex2((before - max[r]) * log2_scale);
      sum[r] *= correction[r];
    }
  }

  // Turns products into probabilities relative to the running maxima.
  template <int kFloats>
  __device__ __forceinline__ void exponentiate(float (&acc)[kFloats], float log2_scale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // A row that has seen nothing yet subtracts 0: -inf - -inf would be NaN.
      const float base = max[r] == -infinity() ? 0.0f : max[r] * log2_scale;
      float block_sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kFloats; i += 4) {
        acc[i + 2 * r] = ptx::ex2(acc[i + 2 * r] * log2_scale - base);
        acc[i + 2 * r + 1] = ptx::ex2(acc[i + 2 * r + 1] * log2_scale - base);
        block_sum += acc[i + 2 * r] + acc[i + 2 * r + 1];
      }
      sum[r] += block_sum;
    }
  }

  // What the accumulated output is to be multiplied by (0 for a row that saw nothing, but for its sink), and the LSE,
  // natural log.
  __device__ __forceinline__ void finish(float log2_scale, float sink, float (&inverse)[2], float (&lse)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = quad_sum(sum[r]);
      const bool any = total > 0.0f || total != total, seen = any && !(total == 1.0f && max[r] == sink);
      inverse[r] = seen ? 1.0f / total : 0.0f;
      lse[r] = any ? (max[r] * log2_scale + log2f(total)) * kLn2 : -infinity();
    }
  }
};

}  // namespace jax_flash
