// Rotary embedding of one head. It touches the new tokens and the queries alone, which are few beside the cache.
#pragma once

#include "cpu/kernels/storage.h"
#include "cpu/tasks.h"

namespace jax_flash::cpu::JAX_FLASH_ISA {

template <class T, class Table>
static inline void rotate_pairs(const RotaryTask& task) {
  const int64_t half = task.half;
  // With room for the vectors that load_row() rounds up to.
  float x[256 + kLanes], cos[128 + kLanes], sin[128 + kLanes];
  load_row(x, static_cast<const T*>(task.x), 2 * half);
  load_row(cos, static_cast<const Table*>(task.cos), half);
  load_row(sin, static_cast<const Table*>(task.sin), half);
  const int64_t step = task.interleaved ? 2 : 1, apart = task.interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    float &first = x[i * step], &second = x[i * step + apart];
    const float x0 = first, x1 = second;
    first = x0 * cos[i] - x1 * sin[i];
    second = x1 * cos[i] + x0 * sin[i];
  }
  store_row(static_cast<T*>(task.y), x, 1.0f, 2 * half);
}

template <class T>
static inline void rotate_head(const RotaryTask& task) {
  if (task.float_tables) {
    rotate_pairs<T, float>(task);
  } else {
    rotate_pairs<T, T>(task);
  }
}

}  // namespace jax_flash::cpu::JAX_FLASH_ISA
