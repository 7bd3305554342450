// The CPU handlers: unpack, then run the kernels on XLA's own threads.
#include <cstring>

#include "cpu/kvcache.h"
#include "cpu/launch.h"
#include "ffi/executor.h"
#include "ffi/handlers.h"
#include "ffi/unpack.h"

namespace jax_flash {
namespace {

ffi::Error forward(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results,
                   ffi::Dictionary attributes) {
  const auto params = unpack_forward({operands, results, attributes});
  if (!params.has_value()) return params.error();
  return run_on(
      pool, [&](cpu::Executor& executor) { cpu::forward(params.value(), executor); },
      [&] { return describe(params.value()); });
}

ffi::Error backward(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results,
                    ffi::Dictionary attributes) {
  const auto params = unpack_backward({operands, results, attributes});
  if (!params.has_value()) return params.error();
  return run_on(
      pool, [&](cpu::Executor& executor) { cpu::backward(params.value(), executor); },
      [&] { return describe(params.value()); });
}

ffi::Error kvcache(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results,
                   ffi::Dictionary attributes) {
  const auto unpacked = unpack_kvcache({operands, results, attributes});
  if (!unpacked.has_value()) return unpacked.error();
  const KvcacheCall& call = unpacked.value();
  if (call.k_from) std::memcpy(call.params.k_cache, call.k_from, call.cache_bytes);
  if (call.v_from) std::memcpy(call.params.v_cache, call.v_from, call.cache_bytes);
  return run_on(
      pool, [&](cpu::Executor& executor) { cpu::kvcache(call.params, executor); },
      [&] { return describe(call.params); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_cpu_forward, forward, binding<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_cpu_backward, backward, binding<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_cpu_kvcache, kvcache, binding<ffi::ThreadPool>());

}  // namespace jax_flash
