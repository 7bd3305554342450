// The kernels that run on every GPU from sm_80 on: cp.async, ldmatrix, mma.sync.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device.h"
#include "params.h"

namespace jax_flash::sm80 {

// Enqueue on `stream`; no allocation, no synchronisation.
cudaError_t forward(const ForwardParams& params, const Device& device, cudaStream_t stream);
cudaError_t backward(const BackwardParams& params, const Device& device, cudaStream_t stream);

}  // namespace jax_flash::sm80
