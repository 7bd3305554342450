// The CUDA handlers: unpack, find the kernel, launch it on XLA's stream.
#include <cuda_runtime_api.h>

#include "cuda/device.h"
#include "cuda/kvcache/decode/launch.h"
#include "cuda/kvcache/prefill/prefill.h"
#include "cuda/kvcache/prefill/workspace.h"
#include "cuda/launchers.h"
#include "ffi/handlers.h"
#include "ffi/unpack.h"

namespace jax_flash {
namespace {

using Stream = ffi::PlatformStream<cudaStream_t>;

template <class Params>
ffi::Error failed(const Params& params, const std::string& why) {
  return ffi::Error(ffi::ErrorCode::kInternal, describe(params) + ": " + why);
}

template <class Params>
ffi::Error launch(const Params& params, cudaStream_t stream) {
  if (params.shape.B == 0 || params.shape.K == 0 || params.shape.G == 0) return ffi::Error::Success();
  Device device;
  if (const cudaError_t status = current_device(&device)) return failed(params, cudaGetErrorString(status));
  const Launcher<Params>* launcher = find_launcher(params, device);
  if (!launcher) {
    return failed(params, "no kernel was built for compute capability " +
                              std::to_string(device.compute_capability / 10) + "." +
                              std::to_string(device.compute_capability % 10) + " that takes this call");
  }
  if (const cudaError_t status = launcher->launch(params, device, stream)) {
    return failed(params, std::string(launcher->name) + ": " + cudaGetErrorString(status));
  }
  return ffi::Error::Success();
}

ffi::Error forward(cudaStream_t stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                   ffi::Dictionary attributes) {
  const auto params = unpack_forward({operands, results, attributes});
  return params.has_value() ? launch(params.value(), stream) : params.error();
}

ffi::Error backward(cudaStream_t stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                    ffi::Dictionary attributes) {
  const auto params = unpack_backward({operands, results, attributes});
  return params.has_value() ? launch(params.value(), stream) : params.error();
}

ffi::Error kvcache(cudaStream_t stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                   ffi::Dictionary attributes) {
  const auto unpacked = unpack_kvcache({operands, results, attributes});
  if (!unpacked.has_value()) return unpacked.error();
  const KvcacheCall& call = unpacked.value();
  const KvcacheParams& params = call.params;
  const bool decodes = call.kernel == KvcacheKernel::kDecode;
  const int64_t needed = decodes ? decode::workspace_bytes(params) : prefill::make_workspace(params).bytes;
  if (params.workspace_bytes < needed) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, describe(params) + ": the workspace must hold " +
                                                            std::to_string(needed) + " bytes; got " +
                                                            std::to_string(params.workspace_bytes));
  }
  Device device;
  if (const cudaError_t status = current_device(&device)) return failed(params, cudaGetErrorString(status));
  const auto copy = [&](void* to, const void* from) {
    return from ? cudaMemcpyAsync(to, from, call.cache_bytes, cudaMemcpyDeviceToDevice, stream) : cudaSuccess;
  };
  if (const cudaError_t status = copy(params.k_cache, call.k_from)) return failed(params, cudaGetErrorString(status));
  if (const cudaError_t status = copy(params.v_cache, call.v_from)) return failed(params, cudaGetErrorString(status));
  const Kernel& kernel = decodes ? kDecodeKernel : kPrefillKernel;
  if (!takes(kernel, Call::kKvcache, device.compute_capability, params.dtype, params.H, needs(params))) {
    return failed(params, std::string(kernel.name) + " does not take this call on this device");
  }
  if (decodes) {
    const cudaError_t status = decode::launch(params, device, stream);
    return status ? failed(params, cudaGetErrorString(status)) : ffi::Error::Success();
  }
  ForwardParams forward;
  if (const cudaError_t status = prefill::prepare(params, stream, &forward)) {
    return failed(params, cudaGetErrorString(status));
  }
  return launch(forward, stream);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_cuda_forward, forward, binding<Stream>(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_cuda_backward, backward, binding<Stream>(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_cuda_kvcache, kvcache, binding<Stream>(), {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flash
