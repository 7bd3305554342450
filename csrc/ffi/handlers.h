// The handlers that the module registers with XLA.
#pragma once

#include "ffi/xla_ffi.h"

extern "C" {
XLA_FFI_Error* jax_flash_cpu_forward(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_flash_cpu_backward(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_flash_cpu_kvcache(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_flash_cuda_forward(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_flash_cuda_backward(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* jax_flash_cuda_kvcache(XLA_FFI_CallFrame* call_frame);
}
