// XLA's buffers and attributes -> KvcacheParams, with every dimension checked.
#pragma once

#include "cache_sequence.h"
#include "ffi/xla_ffi.h"

namespace jax_flash {

// Operands: q, k_cache, v_cache, then those present of k_new, v_new, lengths, batch_index, leftpad, block_table, cos,
// sin. Results: o, lse, workspace, then k_cache and v_cache where new tokens are appended (by aliasing the same buffers
// as the operands).
template <class Context>
auto kvcache_binding() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<ffi::AnyBuffer>()  // q
      .template Arg<ffi::AnyBuffer>()  // k_cache
      .template Arg<ffi::AnyBuffer>()  // v_cache
      .RemainingArgs()
      .template Ret<ffi::AnyBuffer>()  // o
      .template Ret<ffi::AnyBuffer>()  // lse
      .template Ret<ffi::AnyBuffer>()  // workspace
      .RemainingRets()                 // k_cache, v_cache
      .Attrs();
}

// A call has two attributes: `score`, float32, is softmax_scale and softcap, and `options`, int64, has a value for each
// of these. XLA finds attributes by name, and fifteen searches took half of the handler's time in a decode step.
enum KvcacheOption : size_t {
  kPresent,  // a bit for each optional operand, in the order above
  kTimeMajor,
  kLeft,
  kRight,
  kNumSplits,
  kRotaryInterleaved,
  kKvcacheOptions
};

struct KvcacheBuffers {
  ffi::AnyBuffer q, k_cache, v_cache, o, lse, workspace;
};

// XLA's partitioner drops the aliases of the calls that it splits: then the results are buffers of their own, which the
// handler fills with what k_from and v_from hold before the call. Null where the caches are updated in place.
struct KvcacheCall {
  KvcacheParams params;
  const void *k_from, *v_from;
  size_t cache_bytes;
};

ffi::ErrorOr<KvcacheCall> decode_kvcache(const KvcacheBuffers& buffers, ffi::RemainingArgs rest,
                                         ffi::RemainingRets caches, ffi::Dictionary attrs);

// For messages.
std::string describe(const KvcacheParams& params);

}  // namespace jax_flash
