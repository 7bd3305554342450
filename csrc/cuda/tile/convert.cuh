// Conversions between the 16-bit element types and float32 fragments.
#pragma once

#include <cstdint>

#include "cuda/element.h"
#include "cuda/ptx/math.cuh"

namespace jax_flash {

// Two floats, rounded to nearest even, as one register; `low` comes first in memory.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  return ptx::cvt_bf16x2(low, high);
}
template <>
__device__ __forceinline__ uint32_t pack<Float16>(float low, float high) {
  return ptx::cvt_f16x2(low, high);
}

__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(Float16 x) { return ptx::cvt_f32_f16(x.bits); }

template <class T>
__device__ __forceinline__ float unpack_low(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
__device__ __forceinline__ float unpack_high(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

// An accumulator fragment as operand: columns 16 * k ... 16 * k + 15 become the A fragment out[4 * k ... 4 * k + 3] of
// both mma.sync m16n8k16 and wgmma.
template <class T, int kFloats>
__device__ __forceinline__ void pack_fragment(const float (&acc)[kFloats], uint32_t (&out)[kFloats / 2]) {
#pragma unroll
  for (int i = 0; i < kFloats / 2; ++i) out[i] = pack<T>(acc[2 * i], acc[2 * i + 1]);
}

}  // namespace jax_flash
