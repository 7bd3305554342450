// 8x8 matrices of 16-bit elements, transposed between the registers of a warp (sm_75).
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

// movmatrix.sync.aligned.m8n8.trans.b16: lane l holds elements 2 * (l % 4) and + 1 of row l / 4, before and after.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

}  // namespace jax_flash::ptx
