// The launchers of the kernel table's CUDA rows.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device.h"
#include "kernel_table.h"

namespace jax_flash {

template <class Params>
struct Launcher {
  const char* name;
  cudaError_t (*launch)(const Params&, const Device&, cudaStream_t);
};

// Of the kernel that takes the call on this device; null where none does.
const Launcher<ForwardParams>* find_launcher(const ForwardParams& params, const Device& device);
const Launcher<BackwardParams>* find_launcher(const BackwardParams& params, const Device& device);

}  // namespace jax_flash
