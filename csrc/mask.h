// The boolean mask, one bit a key.
#pragma once

#include "band.h"

namespace jax_flash {

// The mask words of query i of group member g, or null where there is no mask.
JAX_FLASH_HOST_DEVICE const uint32_t* mask_row(const Shape& shape, const MaskParams& mask, int64_t b, int64_t kh,
                                               int64_t g, int64_t i) {
  if (!mask.words) return nullptr;
  const int64_t words = (shape.S + 31) / 32;
  const int64_t row = ((b * shape.K + kh) * mask.G + (mask.G > 1 ? g : 0)) * mask.T + (mask.T > 1 ? i : 0);
  return mask.words + row * words;
}

JAX_FLASH_HOST_DEVICE bool mask_bit(const uint32_t* row, int32_t j) { return row[j >> 5] >> (j & 31) & 1; }

}  // namespace jax_flash
