// The CPU handler of attention over a cache.
#include <cstring>

#include "cpu/kvcache.h"
#include "ffi/executor.h"
#include "ffi/handlers.h"
#include "ffi/kvcache.h"

namespace jax_flash {
namespace {

ffi::Error kvcache(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k_cache, ffi::AnyBuffer v_cache,
                   ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> o, ffi::Result<ffi::AnyBuffer> lse,
                   ffi::Result<ffi::AnyBuffer> workspace, ffi::RemainingRets caches, ffi::Dictionary attrs) {
  const auto decoded = decode_kvcache({q, k_cache, v_cache, *o, *lse, *workspace}, rest, caches, attrs);
  if (!decoded.has_value()) return decoded.error();
  const KvcacheCall& call = decoded.value();
  if (call.k_from) std::memcpy(call.params.k_cache, call.k_from, call.cache_bytes);
  if (call.v_from) std::memcpy(call.params.v_cache, call.v_from, call.cache_bytes);
  return run_on(
      pool, [&](cpu::Executor& executor) { cpu::kvcache(call.params, executor); },
      [&] { return "jax_flash kvcache (" + describe(call.params) + ")"; });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_cpu_kvcache, kvcache, kvcache_binding<ffi::ThreadPool>());

}  // namespace jax_flash
