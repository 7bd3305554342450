// Thread blocks that stay: the producer takes key blocks and tells the others what they are.
#pragma once

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/sm90/backward/work.cuh"

namespace jax_flash::sm90 {

inline constexpr int kWorkSlots = 4;

// What a thread block does, and what comes next. Everybody reads a description where it is, for registers are scarce.
// round counts key blocks.
template <class C>
struct WorkQueue {
  uint64_t full[kWorkSlots], empty[kWorkSlots];
  BackwardWork<C> work[kWorkSlots];  // count -1: no more

  // readers: those who call end().
  __device__ __forceinline__ void init(int readers) {
    for (int i = 0; i < kWorkSlots; ++i) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], readers);
    }
  }

  // The producer: describes the work of a ticket, or that there is none.
  __device__ __forceinline__ const BackwardWork<C>& describe(const BackwardArguments& args, int32_t round,
                                                             int32_t ticket, int32_t rank) {
    BackwardWork<C>& next = work[round % kWorkSlots];
    ptx::mbarrier_wait(&empty[round % kWorkSlots], round / kWorkSlots & 1 ^ 1);
    if (ticket < args.tickets) {
      next = BackwardWork<C>::make(args, ticket, rank);
    } else {
      next.count = -1;
    }
    ptx::mbarrier_arrive(&full[round % kWorkSlots]);
    return next;
  }

  __device__ __forceinline__ const BackwardWork<C>& wait(int32_t round) {
    ptx::mbarrier_wait(&full[round % kWorkSlots], round / kWorkSlots & 1);
    return work[round % kWorkSlots];
  }

  // One thread for every reader, when it needs the description no more.
  __device__ __forceinline__ void end(int32_t round) { ptx::mbarrier_arrive(&empty[round % kWorkSlots]); }
};

}  // namespace jax_flash::sm90
