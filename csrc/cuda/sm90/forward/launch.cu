// Which of the Hopper forward's kernels a call gets.
#include "cuda/instances.h"
#include "cuda/sm90/launch.h"

namespace jax_flash::sm90 {

// Its explicit instances are made of cuda/instance.cu.in.
template <class Element, int kHeadDim>
cudaError_t launch_instance(const ForwardParams& params, const Device& device, cudaStream_t stream);

cudaError_t forward(const ForwardParams& params, const Device& device, cudaStream_t stream) {
  const Shape& shape = params.shape;
  if (shape.B == 0 || shape.T == 0 || shape.N() == 0) return cudaSuccess;
  return with_instance<64, 96, 128, 192, 256>(params.dtype, shape.H, [&](auto element, auto bucket) {
    return launch_instance<decltype(element), decltype(bucket)::value>(params, device, stream);
  });
}

}  // namespace jax_flash::sm90
