// What is static in a call, as XLA hands it to a handler: the attribute `options`, int64, and the attribute `score`,
// float32, with a value for each name here. (XLA finds attributes by name, and fifteen searches took half of the
// handler's time in a decode step.) Python has the names as _native.OPTIONS and _native.SCORE.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jax_flash {

enum Option : size_t {
  kPresent,      // a bit for each row of the operand table that this call has as an operand
  kMemoryOrder,  // the arrays' axes are stated in the order of memory, not in the logical one
  kLeft,
  kRight,
  kTopLeft,
  kDeterministic,
  kNumSplits,
  kRotaryInterleaved,
  kKvcacheKernel,  // see kvcache_plan.h
  kOptionCount,
};

inline constexpr const char* kOptionNames[] = {"present",    "memory_order",       "left",
                                               "right",      "top_left",           "deterministic",
                                               "num_splits", "rotary_interleaved", "kvcache_kernel"};
static_assert(sizeof(kOptionNames) / sizeof(char*) == kOptionCount);

enum Score : size_t { kSoftmaxScale, kSoftcap, kScoreCount };

inline constexpr const char* kScoreNames[] = {"softmax_scale", "softcap"};
static_assert(sizeof(kScoreNames) / sizeof(char*) == kScoreCount);

}  // namespace jax_flash
