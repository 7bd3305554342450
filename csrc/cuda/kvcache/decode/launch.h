// Attention of a few query tokens over a long cache: one launch that appends, attends and combines.
#pragma once

#include <cuda_runtime_api.h>

#include "cache_sequence.h"
#include "cuda/device.h"

namespace jax_flash::decode {

// What params.workspace has to hold, on any device.
int64_t workspace_bytes(const KvcacheParams& params);

// Enqueues one kernel on `stream`; no allocation, no synchronisation.
cudaError_t launch(const KvcacheParams& params, const Device& device, cudaStream_t stream);

}  // namespace jax_flash::decode
