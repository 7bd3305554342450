// Functions of the CUDA driver, looked up through the runtime so that nothing links libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace jax_flash {

// The driver's function `name`, or null where the driver lacks it. Callers keep what they get.
inline void* driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else  // the same, before it was renamed
  const cudaError_t status = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr;
}

}  // namespace jax_flash
