#include "cuda/instances.h"
#include "cuda/sm80/launch.h"

namespace jax_flash::sm80 {

// Its explicit instances are made of cuda/instance.cu.in.
template <class Element, int kHeadDim>
cudaError_t launch_instance(const ForwardParams& params, const Device& device, cudaStream_t stream);
template <class Element, int kHeadDim>
cudaError_t launch_instance(const BackwardParams& params, const Device& device, cudaStream_t stream);

namespace {

template <class Params>
cudaError_t launch(const Params& params, const Device& device, cudaStream_t stream) {
  return with_instance<64, 96, 128, 192, 256>(params.dtype, params.shape.H, [&](auto element, auto bucket) {
    return launch_instance<decltype(element), decltype(bucket)::value>(params, device, stream);
  });
}

}  // namespace

cudaError_t forward(const ForwardParams& params, const Device& device, cudaStream_t stream) {
  return launch(params, device, stream);
}

cudaError_t backward(const BackwardParams& params, const Device& device, cudaStream_t stream) {
  return launch(params, device, stream);
}

}  // namespace jax_flash::sm80
