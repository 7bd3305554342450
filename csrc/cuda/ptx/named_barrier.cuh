// The sixteen hardware barriers of a block; 0 is __syncthreads().
#pragma once

namespace jax_flash::ptx {

// bar.sync: waits until `threads` threads (a multiple of 32) have arrived, this one included
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// bar.arrive: counts this thread and goes on
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace jax_flash::ptx
