#include "cuda/instances.h"
#include "cuda/sm80/launch.h"

namespace jax_flash::sm80 {

// Its explicit instances are made of cuda/instance.cu.in.
template <class Element, int kHeadDim>
cudaError_t launch_instance(const ForwardParams& params, const Device& device, cudaStream_t stream);
template <class Element, int kHeadDim>
cudaError_t launch_instance(const BackwardParams& params, const Device& device, cudaStream_t stream);

namespace {

bool accepts(DType dtype, const Shape& shape, const Device& device) {
  return device.compute_capability >= 80 && (dtype == DType::kFloat16 || dtype == DType::kBFloat16) && shape.H >= 1 &&
         shape.H <= 256;
}

template <class Params>
cudaError_t launch(const Params& params, const Device& device, cudaStream_t stream) {
  return with_instance<64, 96, 128, 192, 256>(params.dtype, params.shape.H, [&](auto element, auto bucket) {
    return launch_instance<decltype(element), decltype(bucket)::value>(params, device, stream);
  });
}

}  // namespace

bool accepts_forward(const ForwardParams& params, const Device& device) {
  return accepts(params.dtype, params.shape, device);
}

bool accepts_backward(const BackwardParams& params, const Device& device) {
  return accepts(params.dtype, params.shape, device);
}

cudaError_t forward(const ForwardParams& params, const Device& device, cudaStream_t stream) {
  if (!accepts_forward(params, device)) return cudaErrorInvalidValue;
  return launch(params, device, stream);
}

cudaError_t backward(const BackwardParams& params, const Device& device, cudaStream_t stream) {
  if (!accepts_backward(params, device)) return cudaErrorInvalidValue;
  return launch(params, device, stream);
}

}  // namespace jax_flash::sm80
