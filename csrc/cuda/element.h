// The 16-bit element types, as tags with the size of what they name: kernels move bits and convert in tile/convert.cuh
// alone. (cuda_fp16.h and cuda_bf16.h would double the time to compile a kernel.)
#pragma once

#include <cstdint>

namespace jax_flash {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace jax_flash
