// The addresses that instructions on shared memory take.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

// cvta.to.shared: a 32-bit offset into the shared window.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace jax_flash::ptx
