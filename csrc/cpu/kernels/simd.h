// Vectors of float lanes in GCC's vector extension, with intrinsics only where the extension has no word for an
// instruction. One source serves AVX-512, AVX2 and everything else: kLanes is what differs.
//
// This header and all others of this folder are compiled once per instruction set, each time inside the namespace
// JAX_FLASH_ISA. They use no inline function of the standard library: the linker keeps one copy of such a function for
// the whole program, and that copy could be the one with instructions this machine lacks.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
// GCC 12 takes the deliberately undefined operands of its own intrinsics for a mistake.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#define JAX_FLASH_INLINE static inline __attribute__((always_inline))

namespace jax_flash::cpu::JAX_FLASH_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16Vec __attribute__((vector_size(2 * kLanes)));
typedef Vec LooseVec __attribute__((aligned(2), may_alias));  // rows of 2-byte elements, too
typedef UVec LooseUVec __attribute__((aligned(1), may_alias));
typedef U16Vec LooseU16Vec __attribute__((aligned(1), may_alias));
typedef uint32_t LooseU32 __attribute__((aligned(1), may_alias));

inline constexpr float kInfinity = __builtin_inff();
inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

JAX_FLASH_INLINE Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
JAX_FLASH_INLINE void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
JAX_FLASH_INLINE UVec splat_bits(uint32_t x) { return UVec{} + x; }
JAX_FLASH_INLINE UVec bits(Vec v) { return reinterpret_cast<UVec>(v); }
JAX_FLASH_INLINE Vec from_bits(UVec v) { return reinterpret_cast<Vec>(v); }
// By its bits: XLA's threads flush denormals, and a word of two bfloat16 of which the second is 0 looks like one.
JAX_FLASH_INLINE Vec splat(float x) {
  uint32_t word;
  __builtin_memcpy(&word, &x, sizeof(word));
  return from_bits(splat_bits(word));
}

JAX_FLASH_INLINE IVec lane_index() {
  IVec index{};
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index;
}

JAX_FLASH_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// A NaN in b, not in a, comes through.
JAX_FLASH_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

JAX_FLASH_INLINE float horizontal_max(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

JAX_FLASH_INLINE float horizontal_sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#elif defined(__AVX2__)
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
  return (v[0] + v[1]) + (v[2] + v[3]);
#endif
}

// 2^x for x <= 127, within 1.5 ulp; below -127 it is 0. NaN stays NaN.
JAX_FLASH_INLINE Vec exp2(Vec x) {
#if defined(__AVX512F__)
  const Vec n = _mm512_roundscale_ps(_mm512_max_ps(splat(-200.0f), x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec f = _mm512_max_ps(splat(-200.0f), x) - n;
#else
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits; 127 more make it the exponent of 2^n, or of
  // 0.
  const Vec magic = splat(12582912.0f + 127.0f);
  const Vec shifted = max(splat(-127.0f), x) + magic;
  const Vec f = max(splat(-127.0f), x) - (shifted - magic);
#endif
  // Minimax on [-1/2, 1/2] in relative error with p(0) = 1: 9e-8 before rounding.
  Vec p = splat(0.00132647273f);
  p = fma(p, f, splat(0.00967151299f));
  p = fma(p, f, splat(0.0555073358f));
  p = fma(p, f, splat(0.240222424f));
  p = fma(p, f, splat(0.693147004f));
  p = fma(p, f, splat(1.0f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  return p * from_bits(bits(shifted) << 23);
#endif
}

JAX_FLASH_INLINE Vec tanh(Vec x) {
  const Vec magnitude = from_bits(bits(x) & splat_bits(0x7fffffffu));
  // tanh|x| = 1 - 2 / (1 + e^2|x|) loses digits near 0, where an odd polynomial takes over (4e-9 on |x| <= 5/8).
  const Vec clamped = magnitude > splat(10.0f) ? splat(10.0f) : magnitude;
  const Vec large = splat(1.0f) - splat(2.0f) / (splat(1.0f) + exp2(clamped * splat(2.0f * kLog2E)));
  const Vec y = magnitude * magnitude;
  Vec p = splat(-0.00570494682f);
  p = fma(p, y, splat(0.0206390526f));
  p = fma(p, y, splat(-0.0537397042f));
  p = fma(p, y, splat(0.133314416f));
  p = fma(p, y, splat(-0.333332807f));
  const Vec small = fma(p * y, magnitude, magnitude);
  const Vec t = magnitude < splat(0.625f) ? small : large;
  return from_bits(bits(t) | (bits(x) & splat_bits(0x80000000u)));
}

// The lanes of the first, respectively second, halves of a and b, in turns.
JAX_FLASH_INLINE Vec zip_low(Vec a, Vec b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}

JAX_FLASH_INLINE Vec zip_high(Vec a, Vec b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// Transposes a square of 32-bit words: log2(kLanes) rounds that zip the first half of the rows with the second.
JAX_FLASH_INLINE void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    Vec zipped[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      zipped[2 * i] = zip_low(rows[i], rows[i + kLanes / 2]);
      zipped[2 * i + 1] = zip_high(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = zipped[i];
  }
}

}  // namespace jax_flash::cpu::JAX_FLASH_ISA
