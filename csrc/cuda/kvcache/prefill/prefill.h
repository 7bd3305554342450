// Many query tokens over a cache, as when a prompt is fed in chunks: the new tokens are appended by a kernel of their
// own, and the forward kernels attend. Where a sequence's positions do not lie in order from the start of a row (pages,
// chosen rows, left padding), they are first copied to the workspace: a fraction of what attending costs.
#pragma once

#include <cuda_runtime_api.h>

#include "cache_sequence.h"
#include "cuda/device.h"
#include "params.h"

namespace jax_flash::prefill {

int64_t workspace_bytes(const KvcacheParams& params);

// Enqueues what comes before the forward call, and says what that is.
cudaError_t prepare(const KvcacheParams& params, cudaStream_t stream, ForwardParams* forward);

}  // namespace jax_flash::prefill
