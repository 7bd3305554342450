// What the backward kernels pass to each other through the workspace.
#pragma once

#include "backward_workspace.h"
#include "params.h"

namespace jax_flash::sm80 {

// T' is T rounded up to 128, so that no tile ends early. Rows from the sequence's length on have lse2 = inf, delta = 0.
struct BackwardWorkspace {
  float* dq;             // [B, K, G, T', bucket], unscaled sum; the elements of a tile in the order of its fragments
  float* lse2;           // [B, K, G, T'], log2 of the sum of the exponentials; inf for a row that sees no key
  float* delta;          // [B, K, G, T'], rowsum(dO * O) - dlse
  int* dq_semaphores;    // [B, K, G, T' / 64]: how many key blocks have added to a dQ tile, for those that add in order
  uint32_t* next_block;  // how many blocks have drawn a number, where they add in order
  int64_t rows;          // T'

  static BackwardWorkspace make(void* workspace, const Shape& shape) {
    BackwardWorkspace w;
    w.rows = round_up(shape.T, 128);
    const int64_t all_rows = shape.B * shape.N() * w.rows;
    w.dq = static_cast<float*>(workspace);
    w.lse2 = w.dq + all_rows * head_dim_bucket(shape.H);
    w.delta = w.lse2 + all_rows;
    w.dq_semaphores = reinterpret_cast<int*>(w.delta + all_rows);
    w.next_block = reinterpret_cast<uint32_t*>(w.dq_semaphores + all_rows / 64);
    return w;
  }
};

}  // namespace jax_flash::sm80
