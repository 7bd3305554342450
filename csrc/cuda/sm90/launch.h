// The Hopper kernels (compute capability 9.0): TMA, mbarriers, wgmma.
//
// accepts_* says whether these kernels take a call; the sm80 class takes every one. The launchers neither allocate nor
// synchronise, keep no state, and can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device.h"
#include "params.h"

namespace jax_flash::sm90 {

bool accepts_forward(const ForwardParams& params, const Device& device);
cudaError_t forward(const ForwardParams& params, const Device& device, cudaStream_t stream);

bool accepts_backward(const BackwardParams& params, const Device& device);
cudaError_t backward(const BackwardParams& params, const Device& device, cudaStream_t stream);

}  // namespace jax_flash::sm90
