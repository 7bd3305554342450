// Attention over a KV cache on the CPU: appends the new tokens, then runs the forward kernels on what the cache holds.
#pragma once

#include "cache_sequence.h"
#include "cpu/launch.h"

namespace jax_flash::cpu {

// num_splits is left to the forward kernels' own plan; the workspace is not used.
void kvcache(const KvcacheParams& params, Executor& executor);

}  // namespace jax_flash::cpu
