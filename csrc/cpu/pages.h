// Attention to the pages of a cache. A task copies as many positions as a cache near the core holds, attends to them,
// and goes on with the next: copying everything first would go to memory and back, and a page that is named often would
// be copied as often.
#pragma once

#include <vector>

#include "cache_sequence.h"
#include "cpu/launch.h"
#include "cpu/tasks.h"

namespace jax_flash::cpu {

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// q [B, T, K, G, H], rotated already, against a paged cache that holds the new tokens; sequences [B]. The memory it
// takes grows with the threads, not with the pages.
void attend_to_pages(const KvcacheParams& params, const Kernels& kernels, const std::vector<CacheSequence>& sequences,
                     const void* q, Executor& executor);

}  // namespace jax_flash::cpu
