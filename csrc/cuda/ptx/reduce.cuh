// Reductions into global memory without a result. sm_90.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

// red.global.add.v4.f32: 16-byte aligned
__device__ __forceinline__ void red_add_v4(float* gDst, float x, float y, float z, float w) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(gDst), "f"(x), "f"(y), "f"(z), "f"(w)
               : "memory");
}

}  // namespace jax_flash::ptx
