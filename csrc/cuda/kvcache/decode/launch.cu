#include "cuda/instances.h"
#include "cuda/kvcache/decode/config.h"
#include "cuda/kvcache/decode/launch.h"

namespace jax_flash::decode {

// Its explicit instances are made of cuda/instance.cu.in.
template <class Element, int kHeadDim>
cudaError_t launch_instance(const KvcacheParams& params, const Device& device, cudaStream_t stream);

int64_t workspace_bytes(const KvcacheParams& params) { return workspace_layout(params).bytes(); }

cudaError_t launch(const KvcacheParams& params, const Device& device, cudaStream_t stream) {
  if (params.B == 0 || params.T == 0 || params.K == 0 || params.G == 0) return cudaSuccess;
  if (cache_capacity(params) > kMaxLength) return cudaErrorInvalidValue;
  if (params.workspace_bytes < workspace_bytes(params)) return cudaErrorInvalidValue;
  return with_instance<64, 128, 256>(params.dtype, params.H, [&](auto element, auto bucket) {
    return launch_instance<decltype(element), decltype(bucket)::value>(params, device, stream);
  });
}

}  // namespace jax_flash::decode
