// The pieces of work that a call is divided into, and the table of functions that do them with one instruction set.
// launch.cc plans and hands out tasks; kernels/ computes them. Neither knows the other's insides.
#pragma once

#include <cstdint>

#include "cache_sequence.h"
#include "cpu/launch.h"

namespace jax_flash::cpu {

// Rows of one KV head are the queries of its G heads, interleaved: row = query * G + g.

// Key limits that divide a sequence between tasks are multiples of this; every key block of a kernel divides it.
inline constexpr int64_t kKeyUnit = 256;

JAX_FLASH_HOST_DEVICE int64_t padded_head_dim(int64_t H) { return (H + 15) / 16 * 16; }

struct ForwardTask {
  int64_t b;
  int64_t kh_begin, kh_end;
  int64_t row_begin, row_end;
  int64_t key_begin, key_end;  // multiples of kKeyUnit
  // Null: the task sees all keys of its rows and writes o and lse. Else it writes its share of each row here, for
  // combine(): [kh_end - kh_begin, row_end - row_begin, partial_stride(H)] floats.
  float* partial;
  bool resume = false;  // partial holds a share already, of other keys, and this task's are added to it
};

// An unnormalised row of o, then its maximum (base 2) and its sum.
JAX_FLASH_HOST_DEVICE int64_t partial_stride(int64_t H) { return padded_head_dim(H) + 16; }

struct CombineTask {
  int64_t b, kh, row;
  const float* partial;  // of the first share; the next stands split_stride floats on
  int64_t splits, split_stride;
};

// A range of rows: their statistics for the main pass, and zeros in dq where no key is seen.
struct PrepareTask {
  int64_t b, kh;
  int64_t row_block_begin, row_block_end;
};

// One block of keys against all rows that see it.
struct BackwardTask {
  int64_t b, kh;
  int64_t key_block;
};

// Of one head, elements [0, 2 * half) of x turned by the angles whose cosines and sines these are; written to y.
struct RotaryTask {
  const void* x;
  void* y;
  const void *cos, *sin;  // [half]
  int64_t half;
  bool float_tables;  // else cos and sin have the dtype of x
  bool interleaved;   // pairs (0, 1), (2, 3), ...; else (i, i + half)
};

// They allocate nothing and throw nothing.
struct Kernels {
  const char* name;

  // A task of at most this many rows takes all KV heads in one pass over the keys; it wants them together.
  int64_t few_rows;
  // Bytes of scratch for a task with this many KV heads and rows.
  int64_t (*forward_scratch)(const ForwardParams&, int64_t heads, int64_t rows) noexcept;
  void (*forward)(const ForwardParams&, const ForwardTask&, void* scratch) noexcept;
  void (*combine)(const ForwardParams&, const CombineTask&) noexcept;

  int64_t (*backward_scratch)(const BackwardParams&) noexcept;
  int64_t (*backward_row_block)(const BackwardParams&) noexcept;
  int64_t (*backward_key_block)(const BackwardParams&) noexcept;
  int64_t (*prepare_scratch)(const BackwardParams&) noexcept;
  void (*prepare)(const BackwardParams&, const PrepareTask&, void* scratch) noexcept;
  // Tasks of one (b, kh) add to dq in the order of their key blocks and wait for each other there: whoever runs them
  // starts them in that order.
  void (*backward)(const BackwardParams&, const BackwardTask&, void* scratch) noexcept;

  void (*rotate)(DType, const RotaryTask&) noexcept;
};

namespace avx512bf16 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace portable {
extern const Kernels kKernels;
}

// The machine's best.
const Kernels& selected_kernels();

// A call with a given table: the public entries of launch.h and kvcache.h take the machine's best.
void forward(const ForwardParams& params, Executor& executor, const Kernels& kernels);
void backward(const BackwardParams& params, Executor& executor, const Kernels& kernels);
void kvcache(const KvcacheParams& params, Executor& executor, const Kernels& kernels);

// Returns once *semaphore is at least `value`; what was written before it was set is then visible.
void wait_for_semaphore(const int32_t* semaphore, int32_t value);

}  // namespace jax_flash::cpu
