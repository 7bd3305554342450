// The one table of kernels: which devices, dtypes, head dims and features each one takes. It is the same in every
// build; cuda/launchers.cc has the CUDA kernels' launchers. Python has it as _native.kernels(), from which come the
// errors at call time, the doctor's answers, what the tests skip and the README's matrix.
#pragma once

#include "needs.h"
#include "operands.h"

namespace jax_flash {

struct Kernel {
  const char* name;
  Call call;
  int first_capability, last_capability;  // compute capabilities, 10 * major + minor; 0: the CPU
  uint32_t dtypes;                        // a bit for each DType
  int32_t head_dim_multiple, most_head_dim;
  Features supports;
};

constexpr uint32_t dtype_bit(DType dtype) { return 1u << static_cast<int>(dtype); }

inline constexpr uint32_t kHalfTypes = dtype_bit(DType::kFloat16) | dtype_bit(DType::kBFloat16);
inline constexpr uint32_t kAllTypes = kHalfTypes | dtype_bit(DType::kFloat32);

inline constexpr Features kForwardFeatures = kNeedsBand | kNeedsDiagonal | kNeedsLengths | kNeedsRanges | kNeedsMask |
                                             kNeedsSoftcap | kNeedsSinks | kNeedsUnaligned;
inline constexpr Features kBackwardFeatures =
    kForwardFeatures | kNeedsLseGradient | kNeedsDeterministic | kNeedsManyOrdered;
inline constexpr Features kKvcacheFeatures = kNeedsBand | kNeedsLengths | kNeedsSoftcap | kNeedsUnaligned |
                                             kNeedsAppend | kNeedsRotary | kNeedsPages | kNeedsBatchIndex |
                                             kNeedsLeftpad | kNeedsSplits | kNeedsSinks;
// TMA wants tensors that begin at multiples of 16 bytes. The ordered sums of Hopper's backward count their key blocks
// in 16 bits.
inline constexpr Features kNotOnHopper = kNeedsMask | kNeedsUnaligned;
inline constexpr Features kNotInHoppersBackward = kNotOnHopper | kNeedsManyOrdered;

inline constexpr Kernel kDecodeKernel = {"decode", Call::kKvcache, 80, 999, kHalfTypes, 1, 256, kKvcacheFeatures};
inline constexpr Kernel kPrefillKernel = {"prefill", Call::kKvcache, 80, 999, kHalfTypes, 1, 256, kKvcacheFeatures};

// The first that takes a call has it: the fastest come first. (Which of its two a KV cache call gets is its plan:
// kvcache_plan.h.)
inline constexpr Kernel kKernels[] = {
    {"sm90", Call::kForward, 90, 90, kHalfTypes, 8, 256, kForwardFeatures & ~kNotOnHopper},
    {"sm80", Call::kForward, 80, 999, kHalfTypes, 1, 256, kForwardFeatures},
    {"cpu", Call::kForward, 0, 0, kAllTypes, 1, 256, kForwardFeatures},
    {"sm90", Call::kBackward, 90, 90, kHalfTypes, 8, 256, kBackwardFeatures & ~kNotInHoppersBackward},
    {"sm80", Call::kBackward, 80, 999, kHalfTypes, 1, 256, kBackwardFeatures},
    {"cpu", Call::kBackward, 0, 0, kAllTypes, 1, 256, kBackwardFeatures},
    kDecodeKernel,
    kPrefillKernel,
    {"cpu", Call::kKvcache, 0, 0, kAllTypes, 1, 256, kKvcacheFeatures},
};

constexpr bool takes(const Kernel& kernel, Call call, int capability, DType dtype, int64_t H, Features needs) {
  return kernel.call == call && capability >= kernel.first_capability && capability <= kernel.last_capability &&
         (kernel.dtypes & dtype_bit(dtype)) && H >= 1 && H <= kernel.most_head_dim &&
         H % kernel.head_dim_multiple == 0 && (needs & ~kernel.supports) == 0;
}

// Null where no kernel takes the call.
constexpr const Kernel* find_kernel(Call call, int capability, DType dtype, int64_t H, Features needs) {
  for (const Kernel& kernel : kKernels) {
    if (takes(kernel, call, capability, dtype, H, needs)) return &kernel;
  }
  return nullptr;
}

inline const Kernel* find_kernel(const ForwardParams& params, int capability) {
  return find_kernel(Call::kForward, capability, params.dtype, params.shape.H, needs(params));
}

inline const Kernel* find_kernel(const BackwardParams& params, int capability) {
  return find_kernel(Call::kBackward, capability, params.dtype, params.shape.H, needs(params));
}

}  // namespace jax_flash
