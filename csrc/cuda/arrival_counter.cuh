// A counter of arrivals in uninitialised memory.
#pragma once

#include <cstdint>

#include "cuda/ptx/ordered.cuh"

namespace jax_flash {

// It carries its own proof of being initialised: the upper 48 bits are a hash of its address, the lower 16 count
// arrivals. A word without the right hash is garbage and counts as zero. Counters are left at zero, so memory that
// comes back from an earlier call is right as it is. (A call thus stays one kernel launch: clearing the counters would
// be a second node of a CUDA graph. That garbage carries the hash has a chance of 2^-48.)
class ArrivalCounter {
 public:
  static constexpr int32_t kMostArrivals = 0xFFFF;

  __device__ __forceinline__ explicit ArrivalCounter(uint64_t* word) : word_(word) {
    uint64_t hash = reinterpret_cast<uint64_t>(word_) * 0x9E3779B97F4A7C15ull;
    hash ^= hash >> 29;
    zero_ = (hash * 0xBF58476D1CE4E5B9ull) & ~0xFFFFull;
  }

  // What the word holds. It is asked for early and looked at late, in prepare().
  __device__ __forceinline__ uint64_t peek() const { return *static_cast<volatile uint64_t*>(word_); }

  // By everyone who arrives, before that. `now`: from peek().
  __device__ __forceinline__ void prepare(uint64_t now) const {
    if ((now & ~0xFFFFull) == zero_) return;
    atomicCAS(reinterpret_cast<unsigned long long*>(word_), now, zero_);  // fails where another one was first
  }

  // How many of `expected` arrived before. What they wrote before a barrier before that is visible to this one.
  __device__ __forceinline__ int32_t arrive(int32_t expected) const {
    const int32_t before = static_cast<int32_t>(ptx::add_acquire_release(word_, 1) & 0xFFFF);
    if (before == expected - 1) *static_cast<volatile uint64_t*>(word_) = zero_;
    return before;
  }

 private:
  uint64_t* word_;
  uint64_t zero_;
};

}  // namespace jax_flash
