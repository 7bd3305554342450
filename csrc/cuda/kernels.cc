#include "cuda/kernels.h"

#include "cuda/sm80/launch.h"
#include "cuda/sm90/launch.h"

namespace jax_flash {
namespace {

// Fastest first. A row takes a call when the device and the call suit it.
constexpr ForwardKernel kForwardKernels[] = {
    {"sm90", sm90::accepts_forward, sm90::forward},
    {"sm80", sm80::accepts_forward, sm80::forward},
};

constexpr BackwardKernel kBackwardKernels[] = {
    {"sm90", sm90::accepts_backward, sm90::backward},
    {"sm80", sm80::accepts_backward, sm80::backward},
};

template <class Kernel, size_t count, class Params>
const Kernel* first_that_accepts(const Kernel (&kernels)[count], const Params& params, const Device& device) {
  for (const Kernel& kernel : kernels) {
    if (kernel.accepts(params, device)) return &kernel;
  }
  return nullptr;
}

}  // namespace

const ForwardKernel* find_forward_kernel(const ForwardParams& params, const Device& device) {
  return first_that_accepts(kForwardKernels, params, device);
}

const BackwardKernel* find_backward_kernel(const BackwardParams& params, const Device& device) {
  return first_that_accepts(kBackwardKernels, params, device);
}

}  // namespace jax_flash
