// Arithmetic instructions that C++ does not name.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

// No instruction: `x`, but computed anew for the compiler. What depends on it is not hoisted out of a loop, where
// values that only boundary blocks use would hold registers all along.
__device__ __forceinline__ int launder(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ex2.approx.ftz.f32: 2^x; 0 for -inf.
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// rcp.approx.ftz.f32
__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// lg2.approx.ftz.f32
__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// max.NaN.f32: NaN where either is, which fmaxf drops.
__device__ __forceinline__ float max_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// cvt.rn.bf16x2.f32: `low` into the lower half.
__device__ __forceinline__ uint32_t cvt_bf16x2(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// cvt.rn.f16x2.f32: `low` into the lower half.
__device__ __forceinline__ uint32_t cvt_f16x2(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// cvt.f32.f16
__device__ __forceinline__ float cvt_f32_f16(uint16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

}  // namespace jax_flash::ptx
