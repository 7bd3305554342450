// Which backward calls the Hopper kernels take, and which of them runs.
#include "backward_workspace.h"
#include "cuda/instances.h"
#include "cuda/sm90/launch.h"

namespace jax_flash::sm90 {

// Its explicit instances are made of cuda/instance.cu.in.
template <class Element, int kHeadDim>
cudaError_t launch_instance(const BackwardParams& params, const Device& device, cudaStream_t stream);

namespace {

// Turns of deterministic sums are key blocks (of 128) counted in 16 bits.
constexpr int64_t kMaxOrderedKeys = 128 * 65534;

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

// TMA wants rows that are multiples of 16 bytes.
bool accepts_backward(const BackwardParams& p, const Device& device) {
  const Shape& s = p.shape;
  const bool type = p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16;
  const bool pointers = aligned(p.q) && aligned(p.k) && aligned(p.v) && aligned(p.o) && aligned(p.d_o) &&
                        aligned(p.dq) && aligned(p.dk) && aligned(p.dv);
  return device.compute_capability == 90 && type && pointers && s.H % 8 == 0 && s.H <= 256 && !p.mask.words &&
         !(p.deterministic && s.S > kMaxOrderedKeys);
}

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
