// XLA's buffers and attributes -> plain params, with every dimension checked: a mis-partitioned call would corrupt
// memory.
#pragma once

#include <string>

#include "ffi/xla_ffi.h"
#include "kvcache_plan.h"
#include "params.h"

namespace jax_flash {

// Every call is bound alike: operands and results in the order of the operand table, and the attributes of options.h.
template <class Context>
auto binding() {
  return ffi::Ffi::Bind().Ctx<Context>().RemainingArgs().RemainingRets().Attrs();
}

struct Buffers {
  ffi::RemainingArgs operands;
  ffi::RemainingRets results;
  ffi::Dictionary attributes;
};

// XLA's partitioner drops the aliases of the calls that it splits: then updated caches are buffers of their own, which
// the handler fills with what k_from and v_from hold before the call. Null where the caches are updated in place.
struct KvcacheCall {
  KvcacheParams params;
  KvcacheKernel kernel;  // of the CUDA kernels
  const void *k_from, *v_from;
  size_t cache_bytes;
};

ffi::ErrorOr<ForwardParams> unpack_forward(const Buffers& buffers);
ffi::ErrorOr<BackwardParams> unpack_backward(const Buffers& buffers);
ffi::ErrorOr<KvcacheCall> unpack_kvcache(const Buffers& buffers);

// "forward (bfloat16 B=2 K=4 G=2 T=128 S=128 H=64)", for messages.
std::string describe(const ForwardParams& params);
std::string describe(const BackwardParams& params);
std::string describe(const KvcacheParams& params);

}  // namespace jax_flash
