// What the prefill kernels and the forward kernels behind them pass to each other through the workspace.
#pragma once

#include "cache_sequence.h"

namespace jax_flash::prefill {

struct Workspace {
  bool copies_keys;
  int64_t q, k, v, forward, bytes;  // offsets; the lengths [B, K] come first, that of the forward kernels last
};

// Where a sequence's positions do not lie in order from the start of a row.
constexpr bool copies_keys(bool pages, bool batch_index, bool leftpad) { return pages || batch_index || leftpad; }

// Elements have 16 bits.
constexpr int64_t query_bytes_per_head(int64_t T, int64_t G, int64_t H, bool rotary) {
  return rotary ? 2 * T * G * H : 0;
}
constexpr int64_t key_bytes_per_position(int64_t H) { return 2 * H; }
constexpr int64_t kAlignment = 256;

inline Workspace make_workspace(const KvcacheParams& p) {
  const auto align = [](int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; };
  const int64_t heads = int64_t{p.B} * p.K;
  Workspace w;
  w.copies_keys = copies_keys(p.pages, p.batch_index, p.leftpad);
  const int64_t keys = w.copies_keys ? heads * cache_capacity(p) * key_bytes_per_position(p.H) : 0;
  w.q = align(heads * 4);
  w.k = w.q + align(heads * query_bytes_per_head(p.T, p.G, p.H, p.rotary.dim != 0));
  w.v = w.k + align(keys);
  w.forward = w.v + align(keys);
  w.bytes = w.forward + kForwardWorkspaceBytes;
  return w;
}

}  // namespace jax_flash::prefill
