// Which of the Hopper backward's kernels a call gets.
#include "backward_workspace.h"
#include "cuda/instances.h"
#include "cuda/sm90/launch.h"

namespace jax_flash::sm90 {

// Its explicit instances are made of cuda/instance.cu.in.
template <class Element, int kHeadDim>
cudaError_t launch_instance(const BackwardParams& params, const Device& device, cudaStream_t stream);

cudaError_t backward(const BackwardParams& p, const Device& device, cudaStream_t stream) {
  const Shape& s = p.shape;
  const size_t q_bytes = 2 * s.B * s.T * s.N() * s.H, k_bytes = 2 * s.B * s.S * s.K * s.H;
  if (q_bytes == 0 || k_bytes == 0) {  // nothing attends to anything
    cudaError_t error = cudaMemsetAsync(p.dq, 0, q_bytes, stream);
    if (error == cudaSuccess) error = cudaMemsetAsync(p.dk, 0, k_bytes, stream);
    if (error == cudaSuccess) error = cudaMemsetAsync(p.dv, 0, k_bytes, stream);
    return error;
  }
  if (p.workspace_bytes < backward_workspace_bytes(s)) return cudaErrorInvalidValue;
  return with_instance<64, 96, 128, 192, 256>(p.dtype, s.H, [&](auto element, auto bucket) {
    return launch_instance<decltype(element), decltype(bucket)::value>(p, device, stream);
  });
}

}  // namespace jax_flash::sm90
