// Asynchronous copies from global to shared memory (sm_80). One instruction per function.
#pragma once

#include <cstdint>

#include "cuda/ptx/shared_address.cuh"

namespace jax_flash::ptx {

// cp.async.cg.shared.global, 16 bytes past L1; the source is not read and zeros are written where `valid` is false.
// The clobber keeps the copy between the barriers around it.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}

// cp.async.cg.shared.global, 16 bytes past L1.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// cp.async.commit_group
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group: until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace jax_flash::ptx
