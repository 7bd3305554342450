// The CPU handlers: decode, then run the kernels on XLA's own threads.
#include "cpu/launch.h"
#include "ffi/decode.h"
#include "ffi/executor.h"
#include "ffi/handlers.h"

namespace jax_flash {
namespace {

ffi::Error forward(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::RemainingArgs rest,
                   ffi::Result<ffi::AnyBuffer> o, ffi::Result<ffi::AnyBuffer> lse, ffi::Dictionary attrs) {
  const auto params = decode_forward(q, k, v, rest, *o, *lse, attrs);
  if (!params.has_value()) return params.error();
  const ForwardParams& p = params.value();
  return run_on(
      pool, [&](cpu::Executor& executor) { cpu::forward(p, executor); },
      [&] { return "jax_flash forward (" + describe(p.dtype, p.shape) + ")"; });
}

ffi::Error backward(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer o,
                    ffi::AnyBuffer lse, ffi::AnyBuffer d_o, ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> dq,
                    ffi::Result<ffi::AnyBuffer> dk, ffi::Result<ffi::AnyBuffer> dv,
                    ffi::Result<ffi::AnyBuffer> workspace, ffi::Dictionary attrs) {
  const auto params = decode_backward({q, k, v, o, lse, d_o, *dq, *dk, *dv, *workspace}, rest, attrs);
  if (!params.has_value()) return params.error();
  const BackwardParams& p = params.value();
  return run_on(
      pool, [&](cpu::Executor& executor) { cpu::backward(p, executor); },
      [&] { return "jax_flash backward (" + describe(p.dtype, p.shape) + ")"; });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_cpu_forward, forward, forward_binding<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flash_cpu_backward, backward, backward_binding<ffi::ThreadPool>());

}  // namespace jax_flash
