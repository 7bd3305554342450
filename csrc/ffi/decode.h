// XLA's buffers and attributes -> plain params, with every dimension checked: a mis-partitioned call would corrupt
// memory.
#pragma once

#include "ffi/xla_ffi.h"
#include "params.h"

namespace jax_flash {

// Operands: q, k, v, then those present of mask, q_lengths, kv_lengths. Attributes: see decode.cc.
template <class Context>
auto forward_binding() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<ffi::AnyBuffer>()  // q
      .template Arg<ffi::AnyBuffer>()  // k
      .template Arg<ffi::AnyBuffer>()  // v
      .RemainingArgs()                 // mask, q_lengths, kv_lengths
      .template Ret<ffi::AnyBuffer>()  // o
      .template Ret<ffi::AnyBuffer>()  // lse
      .Attrs();
}

ffi::ErrorOr<ForwardParams> decode_forward(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                                           ffi::RemainingArgs rest, ffi::AnyBuffer o, ffi::AnyBuffer lse,
                                           ffi::Dictionary attrs);

// Operands: q, k, v, o, lse, d_o, then those present of d_lse, mask, q_lengths, kv_lengths.
template <class Context>
auto backward_binding() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<ffi::AnyBuffer>()  // q
      .template Arg<ffi::AnyBuffer>()  // k
      .template Arg<ffi::AnyBuffer>()  // v
      .template Arg<ffi::AnyBuffer>()  // o
      .template Arg<ffi::AnyBuffer>()  // lse
      .template Arg<ffi::AnyBuffer>()  // d_o
      .RemainingArgs()                 // d_lse, mask, q_lengths, kv_lengths
      .template Ret<ffi::AnyBuffer>()  // dq
      .template Ret<ffi::AnyBuffer>()  // dk
      .template Ret<ffi::AnyBuffer>()  // dv
      .template Ret<ffi::AnyBuffer>()  // workspace
      .Attrs();
}

struct BackwardBuffers {
  ffi::AnyBuffer q, k, v, o, lse, d_o, dq, dk, dv, workspace;
};

ffi::ErrorOr<BackwardParams> decode_backward(const BackwardBuffers& buffers, ffi::RemainingArgs rest,
                                             ffi::Dictionary attrs);

// "bfloat16 B=2 K=4 G=2 T=128 S=128 H=64", for messages.
std::string describe(DType dtype, const Shape& shape);

}  // namespace jax_flash
