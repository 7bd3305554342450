// The CUDA handler of attention over a cache.
#include <cuda_runtime_api.h>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/kvcache/decode/launch.h"
#include "cuda/kvcache/prefill/prefill.h"
#include "ffi/handlers.h"
#include "ffi/kvcache.h"

namespace jax_flash {
namespace {

ffi::Error kvcache(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k_cache, ffi::AnyBuffer v_cache,
                   ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> o, ffi::Result<ffi::AnyBuffer> lse,
                   ffi::Result<ffi::AnyBuffer> workspace, ffi::RemainingRets caches, ffi::Dictionary attrs) {
  const auto decoded = decode_kvcache({q, k_cache, v_cache, *o, *lse, *workspace}, rest, caches, attrs);
  if (!decoded.has_value()) return decoded.error();
  const KvcacheCall& call = decoded.value();
  const KvcacheParams& params = call.params;
  const auto failed = [&](const std::string& why) {
    return ffi::Error(ffi::ErrorCode::kInternal, "jax_flash kvcache (" + describe(params) + "): " + why);
  };
  const bool many = prefill::wanted(params);
  if (!many && params.workspace_bytes < decode::workspace_bytes(params)) {
    return failed("the workspace must hold " + std::to_string(decode::workspace_bytes(params)) + " bytes");
  }
  // Decode's blocks read their queries before one of them writes the rows; the forward kernels promise no such thing.
  if (many && params.o == params.q && params.B > 0) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                      "jax_flash kvcache (" + describe(params) + "): o may take the buffer of q for few queries only");
  }
  Device device;
  if (const cudaError_t status = current_device(&device)) return failed(cudaGetErrorString(status));
  const auto copy = [&](void* to, const void* from) {
    return from ? cudaMemcpyAsync(to, from, call.cache_bytes, cudaMemcpyDeviceToDevice, stream) : cudaSuccess;
  };
  if (const cudaError_t status = copy(params.k_cache, call.k_from)) return failed(cudaGetErrorString(status));
  if (const cudaError_t status = copy(params.v_cache, call.v_from)) return failed(cudaGetErrorString(status));
  if (!many) {
    if (!decode::accepts(params, device)) return failed("no kernel takes this call on this device");
    if (const cudaError_t status = decode::launch(params, device, stream)) return failed(cudaGetErrorString(status));
    return ffi::Error::Success();
  }
  ForwardParams forward;
  if (const cudaError_t status = prefill::prepare(params, stream, &forward)) return failed(cudaGetErrorString(status));
  const ForwardKernel* kernel = find_forward_kernel(forward, device);
  if (!kernel) return failed("no kernel takes this call on this device");
  if (const cudaError_t status = kernel->launch(forward, device, stream)) return failed(cudaGetErrorString(status));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_cuda_kvcache, kvcache, kvcache_binding<ffi::PlatformStream<cudaStream_t>>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flash
