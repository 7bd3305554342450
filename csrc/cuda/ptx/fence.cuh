// Fences between the generic proxy (ordinary loads and stores) and the async proxy (TMA, wgmma). sm_90.
#pragma once

namespace jax_flash::ptx {

// fence.proxy.async: this thread's shared-memory writes become visible to TMA and wgmma (after a barrier, to anybody's)
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// fence.proxy.async, for global memory: orders ordinary accesses with bulk copies and reductions of the same bytes
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// fence.mbarrier_init: initialised barriers become visible to the async proxy and to the cluster
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

}  // namespace jax_flash::ptx
