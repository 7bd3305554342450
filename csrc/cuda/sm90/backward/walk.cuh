// Thread blocks that stay: the producer takes key blocks and tells the others what they are.
#pragma once

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/sm90/backward/work.cuh"

namespace jax_flash::sm90 {

inline constexpr int kWalkSlots = 4;

// What a thread block does, and what comes next. Everybody reads a description where it is, for registers are scarce.
// turn counts key blocks.
template <class C>
struct BackwardWalks {
  uint64_t full[kWalkSlots], empty[kWalkSlots];
  BackwardWork<C> work[kWalkSlots];  // count -1: no more

  // readers: those who call end().
  __device__ __forceinline__ void init(int readers) {
    for (int i = 0; i < kWalkSlots; ++i) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], readers);
    }
  }

  // The producer: describes walk number `walk`, or that there is none.
  __device__ __forceinline__ const BackwardWork<C>& describe(const BackwardArguments& args, int32_t turn, int32_t walk,
                                                             int32_t rank) {
    BackwardWork<C>& next = work[turn % kWalkSlots];
    ptx::mbarrier_wait(&empty[turn % kWalkSlots], turn / kWalkSlots & 1 ^ 1);
    if (walk < args.all_walks) {
      next = BackwardWork<C>::make(args, walk, rank);
    } else {
      next.count = -1;
    }
    ptx::mbarrier_arrive(&full[turn % kWalkSlots]);
    return next;
  }

  __device__ __forceinline__ const BackwardWork<C>& wait(int32_t turn) {
    ptx::mbarrier_wait(&full[turn % kWalkSlots], turn / kWalkSlots & 1);
    return work[turn % kWalkSlots];
  }

  // One thread for every reader, when it needs the description no more.
  __device__ __forceinline__ void end(int32_t turn) { ptx::mbarrier_arrive(&empty[turn % kWalkSlots]); }
};

}  // namespace jax_flash::sm90
