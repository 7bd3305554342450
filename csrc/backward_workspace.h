// How much scratch memory a backward call needs. XLA plans it as a result of the call; it arrives uninitialised. Python
// has the coefficients as _native.backward_workspace().
#pragma once

#include "params.h"

namespace jax_flash {

// The head dims that CUDA's attention kernels are built for; a smaller one runs in the next.
constexpr int64_t head_dim_bucket(int64_t H) {
  return H <= 64 ? 64 : H <= 96 ? 96 : H <= 128 ? 128 : H <= 192 ? 192 : 256;
}

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Bytes for each KV head of each sequence: so many, so many for each 128 queries of each query head, and where query
// heads share the KV head so many for each 128 keys; begun ones count whole.
struct BackwardWorkspaceSize {
  static constexpr int64_t kRows = 128;
  int64_t per_kv_head, per_rows, per_keys;

  constexpr int64_t bytes(const Shape& s) const {
    const int64_t rows = round_up(s.T, kRows) / kRows, keys = s.G > 1 ? round_up(s.S, kRows) / kRows : 0;
    return s.B * s.K * (per_kv_head + s.G * rows * per_rows + keys * per_keys);
  }
};

// Per query head: a float32 dQ accumulator [T', H'], two float32 row statistics [T'] and an int32 for every 64 rows, T'
// being T rounded up to 128 and H' the bucket. Per KV head 256 bytes more, so that the parts can be aligned, and where
// query heads share it float32 accumulators of dK and dV [S', H'].
constexpr BackwardWorkspaceSize backward_workspace_size(int64_t H) {
  constexpr int64_t kRows = BackwardWorkspaceSize::kRows;
  const int64_t bucket = head_dim_bucket(H);
  return {256, kRows * (bucket + 2) * 4 + kRows / 16, kRows * bucket * 8};
}

constexpr int64_t backward_workspace_bytes(const Shape& s) { return backward_workspace_size(s.H).bytes(s); }

}  // namespace jax_flash
