// What the backward kernels keep between them, and where it lies in the workspace.
#pragma once

#include <cstdint>

#include "backward_workspace.h"

namespace jax_flash::sm90 {

struct BackwardWorkspace {
  float* dq;           // [B, K, G, T' / M, M * H'] float32 sums; a tile in parts, see dq_part
  float* key_sums;     // [B, K, 2, S' / 64, 64 * H'] of dK and dV, in parts likewise; only where G > 1
  float* lse2;         // [B, K, G, T'] lse * log2(e); +inf for a row that sees nothing, so that its probabilities are 0
  float* minus_delta;  // [B, K, G, T'] dlse - rowsum(dO * O)
  uint16_t* dq_semaphores;  // [B, K, G, T' / 64, 2] who added to a tile last, for deterministic sums; see DqSemaphore
  uint32_t* next_block;     // the key block that nobody has taken yet
  int64_t rows, keys;       // T', S': T and S rounded up to 128
};

inline BackwardWorkspace make_backward_workspace(void* base, const Shape& shape) {
  BackwardWorkspace w;
  w.rows = round_up(shape.T, 128);
  w.keys = round_up(shape.S, 128);
  const int64_t rows = shape.B * shape.N() * w.rows, bucket = head_dim_bucket(shape.H);
  w.dq = static_cast<float*>(base);
  w.key_sums = w.dq + rows * bucket;
  w.lse2 = w.key_sums + (shape.G > 1 ? shape.B * shape.K * 2 * w.keys * bucket : 0);
  w.minus_delta = w.lse2 + rows;
  w.dq_semaphores = reinterpret_cast<uint16_t*>(w.minus_delta + rows);
  w.next_block = reinterpret_cast<uint32_t*>(w.dq_semaphores + rows / 32);
  return w;
}

}  // namespace jax_flash::sm90
