// The bulk copy engine (TMA): tensor tiles and plain spans between global and shared memory. sm_90.
//
// Loads complete on an mbarrier by bytes; stores and reductions complete by bulk groups of the issuing thread. One
// thread issues. Coordinates count elements, innermost axis first.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"

namespace jax_flash::ptx {

// prefetch.tensormap
__device__ __forceinline__ void tma_prefetch_descriptor(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// How long a loaded line should stay in L2; the encodings that createpolicy.fractional gives for a fraction of 1.
enum class L2Policy : uint64_t {
  kEvictNormal = 0x1000000000000000,
  kEvictFirst = 0x12F0000000000000,
  kEvictLast = 0x14F0000000000000,
};

// cp.async.bulk.tensor.4d.shared::cluster.global
__device__ __forceinline__ void tma_load_4d(void* sDst, const CUtensorMap* map, uint64_t* barrier, int c0, int c1,
                                            int c2, int c3, L2Policy policy = L2Policy::kEvictNormal) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(sDst)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
      "l"(static_cast<uint64_t>(policy))
      : "memory");
}

// cp.async.bulk.tensor.5d.shared::cluster.global
__device__ __forceinline__ void tma_load_5d(void* sDst, const CUtensorMap* map, uint64_t* barrier, int c0, int c1,
                                            int c2, int c3, int c4, L2Policy policy = L2Policy::kEvictNormal) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(sDst)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4),
      "l"(static_cast<uint64_t>(policy))
      : "memory");
}

// cp.async.bulk.tensor.4d.global.shared::cta
__device__ __forceinline__ void tma_store_4d(const CUtensorMap* map, const void* sSrc, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
                   reinterpret_cast<uint64_t>(map)),
               "r"(shared_address(sSrc)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

// cp.async.bulk.shared::cluster.global: `bytes` (a multiple of 16) from 16-byte aligned global memory
__device__ __forceinline__ void bulk_load(void* sDst, const void* gSrc, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(sDst)),
               "l"(gSrc), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// cp.reduce.async.bulk.global.shared::cta.add.f32
__device__ __forceinline__ void bulk_reduce_add_f32(float* gDst, const void* sSrc, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(gDst),
               "r"(shared_address(sSrc)), "r"(bytes)
               : "memory");
}

// cp.async.bulk.shared::cluster.shared::cta: to another block of the cluster, whose barrier gets the bytes; both
// addresses are cluster_address()es
__device__ __forceinline__ void bulk_copy_to_block(uint32_t remote_dst, const void* sSrc, uint32_t bytes,
                                                   uint32_t remote_barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(remote_dst),
      "r"(shared_address(sSrc)), "r"(bytes), "r"(remote_barrier)
      : "memory");
}

// cp.async.bulk.commit_group
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// cp.async.bulk.wait_group.read: at most kPending groups still read shared memory
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// cp.async.bulk.wait_group: at most kPending groups are not yet complete in global memory
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace jax_flash::ptx
