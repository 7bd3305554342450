// The one table from (architecture, dtype, head dim, features) to a kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device.h"
#include "params.h"

namespace jax_flash {

struct ForwardKernel {
  const char* name;
  bool (*accepts)(const ForwardParams&, const Device&);
  cudaError_t (*launch)(const ForwardParams&, const Device&, cudaStream_t);
};

struct BackwardKernel {
  const char* name;
  bool (*accepts)(const BackwardParams&, const Device&);
  cudaError_t (*launch)(const BackwardParams&, const Device&, cudaStream_t);
};

// The first row that takes the call; null where none does.
const ForwardKernel* find_forward_kernel(const ForwardParams& params, const Device& device);
const BackwardKernel* find_backward_kernel(const BackwardParams& params, const Device& device);

}  // namespace jax_flash
