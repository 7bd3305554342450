// Blocks of one cluster, and one lane of a warp. sm_90.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

// %cluster_ctarank
__device__ __forceinline__ uint32_t cluster_block_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// barrier.cluster.arrive
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// barrier.cluster.wait
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// mapa: the shared::cluster address of this shared-memory address in another block of the cluster
__device__ __forceinline__ uint32_t cluster_address(uint32_t address, uint32_t block_rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(block_rank));
  return remote;
}

// st.async.shared::cluster: a word to another block of the cluster, whose barrier gets its 4 bytes; both addresses are
// cluster_address()es
__device__ __forceinline__ void store_to_block(uint32_t remote_dst, uint32_t x, uint32_t remote_barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(remote_dst),
               "r"(x), "r"(remote_barrier)
               : "memory");
}

// elect.sync: true in one lane of a converged warp. The compiler knows such a branch is not divergent, which an
// ordinary lane == 0 does not tell it.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred one;\n"
      "elect.sync _|one, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, one;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

}  // namespace jax_flash::ptx
