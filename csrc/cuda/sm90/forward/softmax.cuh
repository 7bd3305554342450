// The softmax of the Hopper forward: as in cuda/tile/softmax.cuh, with two economies. The running maximum may lag
// behind the true one by a bounded amount, which mostly spares rescaling the output; and part of the exponentials is
// computed on the FMA pipe, because at small head dims the exponential unit is as busy as the tensor cores.
#pragma once

#include <cstdint>

#include "cuda/ptx/math.cuh"
#include "cuda/tile/softmax.cuh"

namespace jax_flash::sm90 {

// 2^x on the FMA pipe, relative error 7.5e-5 (a bfloat16 probability is rounded to 2e-3, a float16 one to 2.4e-4).
// x = n + f with f in [-1/2, 1/2]: adding 1.5 * 2^23 leaves n in the low mantissa bits, from where it is shifted into
// the exponent. Below 2^-126 the result stays there: not 0, but nothing beside a row's largest probability. NaN comes
// out as a number (the shift makes it one), and is found before it gets here: see update_steady().
__device__ __forceinline__ float exp2_polynomial(float x) {
  constexpr float kRound = 12582912.0f;
  x = fmaxf(x, -126.0f);
  const float shifted = x + kRound;
  const float f = x - (shifted - kRound);
  float p = fmaf(0.0551716685f, f, 0.2426111251f);
  p = fmaf(p, f, 0.6932609677f);
  p = fmaf(p, f, 0.9999280572f);
  return __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23));
}

// Spreads kPolynomial of 16 evenly.
template <int kPolynomial>
__host__ __device__ constexpr bool on_fma_pipe(int i) {
  return (i % 16 + 1) * kPolynomial / 16 != (i % 16) * kPolynomial / 16;
}

// The running state of this lane's two rows. Exponents are powers of two: product * log2_scale.
struct LaggingSoftmax {
  // The output is rescaled once a row's maximum has grown by this: probabilities stay below 2^8 of float16's 2^16, and
  // float32 sums do not mind.
  static constexpr float kLag = 8.0f;

  float log2_scale;  // positive
  float base[2];     // the exponent that counts as 0: the maximum, or up to kLag below; -inf before any visible key;
                     // +inf or NaN where there is none at all
  float sum[2];      // of this lane's columns

  __device__ __forceinline__ explicit LaggingSoftmax(float log2_scale) : log2_scale(log2_scale) {}

  // A row that sees nothing has no say in when a warp rescales, or what lies past the lengths would show in the last
  // bits of its neighbours.
  __device__ __forceinline__ void init(const bool (&sees)[2]) {
    base[0] = sees[0] ? -infinity() : infinity();
    base[1] = sees[1] ? -infinity() : infinity();
    sum[0] = sum[1] = 0.0f;
  }

  // Turns products into probabilities relative to `base`. True where what was accumulated before has to be multiplied
  // by `correction` (the same answer in the whole warp). Rows may have seen nothing yet, and see nothing here.
  template <int kFloats>
  __device__ __forceinline__ bool update(float (&acc)[kFloats], float (&correction)[2]) {
    float block_max[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      block_max[r] = fmaxf(acc[2 * r], acc[2 * r + 1]);
#pragma unroll
      for (int i = 4; i < kFloats; i += 4)
        block_max[r] = fmaxf(block_max[r], fmaxf(acc[i + 2 * r], acc[i + 2 * r + 1]));
      block_max[r] = quad_max(block_max[r]) * log2_scale;
    }
    // -inf + kLag < x holds for every finite x.
    const bool rescale = __any_sync(~0u, block_max[0] > base[0] + kLag || block_max[1] > base[1] + kLag);
    if (rescale) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float before = base[r];
        base[r] = fmaxf(before, block_max[r]);
        correction[r] = before == -infinity() ? 0.0f : ptx::ex2(before - base[r]);
        sum[r] *= correction[r];
      }
    }
#pragma unroll
    for (int i = 0; i < kFloats; ++i) {
      // A row that has seen nothing yet subtracts 0: -inf - -inf would be NaN.
      const float row_base = base[i / 2 % 2] == -infinity() ? 0.0f : base[i / 2 % 2];
      acc[i] = acc[i] * log2_scale - row_base;
    }
    exponentiate<0>(acc);
    return rescale;
  }

  // Whether a row has a key to see and has seen none above -inf: then it is not ready for update_steady().
  __device__ __forceinline__ bool not_steady() const { return base[0] == -infinity() || base[1] == -infinity(); }

  // The same where every row has seen a key before: the maximum itself is not needed, only whether an exponent exceeds
  // kLag. Positive floats compare like integers and negative ones are below them, so the three-way integer maximum
  // serves, and lanes ask each other nothing before one of them says so. NaN, as arithmetic makes it, is the greatest
  // integer: it comes through to `growth`, and then makes all of its row NaN.
  template <int kPolynomial, int kFloats>
  __device__ __forceinline__ bool update_steady(float (&acc)[kFloats], float (&correction)[2]) {
    int grown[2][2] = {{0, 0}, {0, 0}};
#pragma unroll
    for (int i = 0; i < kFloats; i += 2) {
      const int r = i / 2 % 2;
      acc[i] = acc[i] * log2_scale - base[r];
      acc[i + 1] = acc[i + 1] * log2_scale - base[r];
      int& g = grown[r][i / 4 % 2];
      g = __vimax3_s32(g, __float_as_int(acc[i]), __float_as_int(acc[i + 1]));
    }
    const float growth[2] = {__int_as_float(max(grown[0][0], grown[0][1])),
                             __int_as_float(max(grown[1][0], grown[1][1]))};
    const bool rescale = __any_sync(~0u, !(ptx::max_nan(growth[0], growth[1]) <= kLag));
    if (rescale) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float row_growth = quad_max_nan(growth[r]);
        if (row_growth <= kLag) row_growth = 0.0f;  // a row is none of another's business: that may be NaN
        row_growth += row_growth * 0.0f;            // and so is a row that sees +inf
        base[r] += row_growth;
        correction[r] = ptx::ex2(-row_growth);
        sum[r] *= correction[r];
#pragma unroll
        for (int i = 0; i < kFloats; i += 4) {
          acc[i + 2 * r] -= row_growth;
          acc[i + 2 * r + 1] -= row_growth;
        }
      }
    }
    exponentiate<kPolynomial>(acc);
    return rescale;
  }

  // Row r sees nothing.
  __device__ __forceinline__ void forget(int r) { base[r] = -infinity(), sum[r] = 0.0f; }

  // One score more for row r, at its end. In each of the quad's four sums, a quarter of it.
  __device__ __forceinline__ void add_sink(int r, float sink) {
    const float exponent = sink * kLog2e, above = exponent - base[r];
    if (exponent == -infinity()) return;
    if (above <= 64.0f) {
      sum[r] += 0.25f * ptx::ex2(above);
    } else {  // beside it the rest is nothing: its inverse is flushed to 0
      base[r] = exponent - 127.0f;
      sum[r] = 0.25f * 0x1p127f;
    }
  }

  // What row r's accumulated output is to be multiplied by (0 if it saw nothing), and its LSE, natural log.
  __device__ __forceinline__ void finish(int r, float& inverse, float& lse) const {
    const float total = quad_sum(sum[r]);
    const bool seen = base[r] != -infinity() || total != total;
    inverse = seen ? ptx::rcp(total) : 0.0f;
    lse = seen ? (base[r] + ptx::lg2(total)) * kLn2 : -infinity();
  }

 private:
  template <int kPolynomial, int kFloats>
  __device__ __forceinline__ void exponentiate(float (&acc)[kFloats]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float block_sum[2] = {0.0f, 0.0f};
#pragma unroll
      for (int i = 2 * r; i < kFloats; i += 4) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          acc[i + e] =
              on_fma_pipe<kPolynomial>(i / 4 * 2 + e + 8 * r) ? exp2_polynomial(acc[i + e]) : ptx::ex2(acc[i + e]);
          block_sum[e] += acc[i + e];
        }
      }
      sum[r] += block_sum[0] + block_sum[1];
    }
  }
};

}  // namespace jax_flash::sm90
