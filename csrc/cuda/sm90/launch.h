// The Hopper kernels (compute capability 9.0): TMA, mbarriers, wgmma.
//
// The launchers neither allocate nor synchronise, keep no state, and can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device.h"
#include "params.h"

namespace jax_flash::sm90 {

cudaError_t forward(const ForwardParams& params, const Device& device, cudaStream_t stream);
cudaError_t backward(const BackwardParams& params, const Device& device, cudaStream_t stream);

}  // namespace jax_flash::sm90
