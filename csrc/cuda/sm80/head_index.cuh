// Where a query head lies.
#pragma once

#include "params.h"

namespace jax_flash::sm80 {

// A number over [B, K, G], taken apart.
struct HeadIndex {
  int b, kh, g;
  __device__ __forceinline__ HeadIndex(const Shape& shape, int linear) {
    const int G = static_cast<int>(shape.G), K = static_cast<int>(shape.K);
    b = linear / G / K;
    kh = linear / G % K;
    g = linear % G;
  }
};

}  // namespace jax_flash::sm80
