// Sums and flags that blocks share through global memory: additions, and loads and stores that order what comes after
// and before them. sm_70.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

// ld.acquire.gpu.global.u16
__device__ __forceinline__ uint16_t load_acquire(const uint16_t* gPointer) {
  uint16_t x;
  asm volatile("ld.acquire.gpu.global.u16 %0, [%1];" : "=h"(x) : "l"(gPointer) : "memory");
  return x;
}

// st.release.gpu.global.u16
__device__ __forceinline__ void store_release(uint16_t* gPointer, uint16_t x) {
  asm volatile("st.release.gpu.global.u16 [%0], %1;" ::"l"(gPointer), "h"(x) : "memory");
}

// atom.acq_rel.gpu.global.add.u64: returns the value before
__device__ __forceinline__ uint64_t add_acquire_release(uint64_t* gPointer, uint64_t x) {
  uint64_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;" : "=l"(before) : "l"(gPointer), "l"(x) : "memory");
  return before;
}

// atom.relaxed.gpu.global.add.u32: returns the value before
__device__ __forceinline__ uint32_t fetch_add(uint32_t* gPointer, uint32_t x) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(gPointer), "r"(x) : "memory");
  return before;
}

// red.relaxed.gpu.global.add.f32
__device__ __forceinline__ void red_add(float* address, float a) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address), "f"(a) : "memory");
}

// ld.acquire.gpu.global.b32
__device__ __forceinline__ int load_acquire(const int* address) {
  int value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// st.release.gpu.global.b32: what this thread saw done before, through barriers too, is visible to whoever acquires it.
__device__ __forceinline__ void store_release(int* address, int value) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

}  // namespace jax_flash::ptx
