// The CUDA handlers: decode, find the kernel, launch it on XLA's stream.
#include <cuda_runtime_api.h>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "ffi/decode.h"
#include "ffi/handlers.h"

namespace jax_flash {
namespace {

using Stream = ffi::PlatformStream<cudaStream_t>;

template <class Params, class Kernel>
ffi::Error launch(const Params& params, const Kernel* (*find)(const Params&, const Device&), const char* direction,
                  cudaStream_t stream) {
  if (params.shape.B == 0 || params.shape.K == 0 || params.shape.G == 0) return ffi::Error::Success();
  const auto failed = [&](const std::string& kernel, const std::string& why) {
    return ffi::Error(ffi::ErrorCode::kInternal,
                      kernel + " " + direction + " (" + describe(params.dtype, params.shape) + "): " + why);
  };
  Device device;
  if (const cudaError_t status = current_device(&device)) return failed("jax_flash", cudaGetErrorString(status));
  const Kernel* kernel = find(params, device);
  if (!kernel) {
    return failed("jax_flash", "no kernel was built for compute capability " +
                                   std::to_string(device.compute_capability / 10) + "." +
                                   std::to_string(device.compute_capability % 10) + " that takes this call");
  }
  if (const cudaError_t status = kernel->launch(params, device, stream)) {
    return failed(std::string("jax_flash ") + kernel->name, cudaGetErrorString(status));
  }
  return ffi::Error::Success();
}

ffi::Error forward(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::RemainingArgs rest,
                   ffi::Result<ffi::AnyBuffer> o, ffi::Result<ffi::AnyBuffer> lse, ffi::Dictionary attrs) {
  const auto params = decode_forward(q, k, v, rest, *o, *lse, attrs);
  if (!params.has_value()) return params.error();
  return launch(params.value(), find_forward_kernel, "forward", stream);
}

ffi::Error backward(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer o,
                    ffi::AnyBuffer lse, ffi::AnyBuffer d_o, ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> dq,
                    ffi::Result<ffi::AnyBuffer> dk, ffi::Result<ffi::AnyBuffer> dv,
                    ffi::Result<ffi::AnyBuffer> workspace, ffi::Dictionary attrs) {
  const auto params = decode_backward({q, k, v, o, lse, d_o, *dq, *dk, *dv, *workspace}, rest, attrs);
  if (!params.has_value()) return params.error();
  return launch(params.value(), find_backward_kernel, "backward", stream);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_cuda_forward, forward, forward_binding<Stream>(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_cuda_backward, backward, backward_binding<Stream>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flash
