// mbarrier: the shared-memory barrier that counts arrivals and the bytes of bulk copies. sm_90.
//
// A barrier completes phase after phase; a waiter names the parity (0, 1, 0, ...) of the phase it waits for, and a
// fresh barrier counts as having completed a phase of parity 1.
#pragma once

#include <cstdint>

#include "cuda/ptx/shared_address.cuh"

namespace jax_flash::ptx {

// mbarrier.init
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// mbarrier.arrive
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// mbarrier.arrive, on the same barrier of another block of the cluster. Says that something has been read and hands no
// data over: a release at the cluster's scope would wait for this thread's additions to global memory.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t block_rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(block_rank)
      : "memory");
}

// mbarrier.arrive.expect_tx: arrives, and makes the phase wait for this many bytes more
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// mbarrier.try_wait: may suspend the thread for a while; true once the phase is complete
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t complete;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}"
      : "=r"(complete)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return complete != 0;
}

__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

}  // namespace jax_flash::ptx
