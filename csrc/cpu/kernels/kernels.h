// The table of one instruction set's kernels: what a source file that picks the set includes, and nothing else.
#pragma once

#include "cpu/kernels/backward.h"
#include "cpu/kernels/decode.h"
#include "cpu/kernels/forward.h"
#include "cpu/kernels/prepare.h"
#include "cpu/kernels/rotary.h"

#define JAX_FLASH_STRING_OF(name) #name
#define JAX_FLASH_STRING(name) JAX_FLASH_STRING_OF(name)

namespace jax_flash::cpu::JAX_FLASH_ISA {

// Calls f with a value of the element type.
template <class F>
JAX_FLASH_INLINE auto with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
    default:
      return f(float{});
  }
}

static int64_t forward_scratch(const ForwardParams& params, int64_t heads, int64_t rows) noexcept {
  return with_type(params.dtype, [&](auto element) {
    using Words = typename WordsOf<decltype(element)>::Type;
    return rows <= kFewRows ? cut_decode<Words>(nullptr, heads, rows, params.shape.H).bytes
                            : cut_forward<Words>(nullptr, rows, params.shape.H).bytes;
  });
}

static void forward(const ForwardParams& params, const ForwardTask& task, void* scratch) noexcept {
  with_type(params.dtype, [&](auto element) {
    if (task.row_end - task.row_begin <= kFewRows) {
      forward_few_rows<decltype(element)>(params, task, scratch);
    } else {
      forward_many_rows<decltype(element)>(params, task, scratch);
    }
  });
}

static void combine(const ForwardParams& params, const CombineTask& task) noexcept {
  with_type(params.dtype, [&](auto element) { combine_row<decltype(element)>(params, task); });
}

static int64_t backward_scratch(const BackwardParams& params) noexcept {
  return with_type(params.dtype, [&](auto element) {
    return cut_backward<typename WordsOf<decltype(element)>::Type>(nullptr, params.shape.H).bytes;
  });
}

static int64_t backward_row_block(const BackwardParams&) noexcept { return kBackwardRows; }

static int64_t backward_key_block(const BackwardParams& params) noexcept { return backward_keys(params.shape.H); }

static int64_t prepare_scratch(const BackwardParams& params) noexcept {
  return params.dtype == DType::kFloat32 ? cut_prepare(nullptr, params.shape.H).bytes : 0;
}

static void prepare(const BackwardParams& params, const PrepareTask& task, void* scratch) noexcept {
  with_type(params.dtype, [&](auto element) { prepare_rows<decltype(element)>(params, task, scratch); });
}

static void backward(const BackwardParams& params, const BackwardTask& task, void* scratch) noexcept {
  with_type(params.dtype, [&](auto element) { backward_keys_task<decltype(element)>(params, task, scratch); });
}

static void rotate(DType dtype, const RotaryTask& task) noexcept {
  with_type(dtype, [&](auto element) { rotate_head<decltype(element)>(task); });
}

const Kernels kKernels = {JAX_FLASH_STRING(JAX_FLASH_ISA),
                          kFewRows,
                          forward_scratch,
                          forward,
                          combine,
                          backward_scratch,
                          backward_row_block,
                          backward_key_block,
                          prepare_scratch,
                          prepare,
                          backward,
                          rotate};

}  // namespace jax_flash::cpu::JAX_FLASH_ISA
