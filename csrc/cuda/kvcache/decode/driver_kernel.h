// A kernel as the driver knows it. The runtime looks a kernel up at every launch, and the host's part of a decode step
// is short enough to notice: about 1 us of 12 in a loop over single calls.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>

#include "cuda/device.h"
#include "cuda/driver.h"

namespace jax_flash::decode {

class DriverKernel {
 public:
  // `shared_bytes`: of dynamic shared memory, the most that it will be launched with on a device.
  cudaError_t find(const void* kernel, const Device& device, int shared_bytes, CUfunction* function) {
    const bool remembers = device.ordinal < kDevices;
    *function = remembers ? functions_[device.ordinal].load(std::memory_order_acquire) : nullptr;
    if (*function) return cudaSuccess;
    constexpr auto kAttribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (cudaError_t status = cudaFuncSetAttribute(kernel, kAttribute, shared_bytes)) return status;
    cudaFunction_t found = nullptr;
    if (cudaError_t status = cudaGetFuncBySymbol(&found, kernel)) return status;
    *function = found;
    if (remembers) functions_[device.ordinal].store(found, std::memory_order_release);
    return cudaSuccess;
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<CUfunction> functions_[kDevices] = {};
};

inline cudaError_t launch_kernel(const CUlaunchConfig& config, CUfunction function, void** arguments) {
  using Launch = CUresult (*)(const CUlaunchConfig*, CUfunction, void**, void**);
  static const auto launch = reinterpret_cast<Launch>(driver_function("cuLaunchKernelEx"));
  if (!launch) return cudaErrorNotSupported;
  return static_cast<cudaError_t>(launch(&config, function, arguments, nullptr));  // the numbers are the same
}

}  // namespace jax_flash::decode
