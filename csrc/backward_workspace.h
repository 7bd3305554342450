// How much scratch memory a backward call needs. XLA plans it as a result of the call; it arrives uninitialised.
#pragma once

#include "params.h"

namespace jax_flash {

// The head dims that CUDA kernels are built for; a smaller one runs in the next.
inline int64_t head_dim_bucket(int64_t H) {
  for (int64_t bucket : {64, 96, 128, 192}) {
    if (H <= bucket) return bucket;
  }
  return 256;
}

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Per query head: a float32 dQ accumulator [T', H'], two float32 row statistics [T'] and an int32 for every 64 rows, T'
// being T rounded up to 128 and H' the bucket. Per KV head 256 bytes more, so that the parts can be aligned.
inline int64_t backward_workspace_bytes(const Shape& s) {
  const int64_t rows = round_up(s.T, 128);
  return s.B * s.K * (256 + s.G * (rows * (head_dim_bucket(s.H) + 2) * 4 + rows / 16));
}

}  // namespace jax_flash
