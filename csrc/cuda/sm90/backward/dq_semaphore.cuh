// Deterministic dQ sums: who may add to a tile.
#pragma once

#include "cuda/ptx/ordered.cuh"
#include "cuda/sm90/backward/work.cuh"

namespace jax_flash::sm90 {

// For every tile, and either half of its columns or queries, the number of the key block that added last, plus one. Key
// blocks add in the order in which they are taken, so that nobody waits for a block that may not be running yet.
// Without a causal mask that is from the first key block to the last, each one tile behind the block before. With one,
// the first tile of a block lies on the diagonal, and nobody but the block itself begins there, if the last goes first.
struct DqSemaphore {
  int32_t n;                // this key block, of kSumKeys
  int32_t before;           // the one that adds before
  BlockRange before_tiles;  // that it visits: as ranges move monotonically, no other can come right before

  template <class C>
  __device__ __forceinline__ static DqSemaphore make(const BackwardArguments& args, const BackwardWork<C>& work) {
    DqSemaphore semaphore;
    semaphore.n = work.n0 / kSumKeys;
    semaphore.before = last_first(args) ? semaphore.n + 1 : semaphore.n - 1;
    semaphore.before_tiles = semaphore.before < 0 ? BlockRange{0, 0, 0, 0}
                                                  : query_blocks(work.band, semaphore.before * kSumKeys,
                                                                 (semaphore.before + 1) * kSumKeys, C::kM);
    return semaphore;
  }

  template <class C>
  __device__ __forceinline__ static uint16_t* slot(const BackwardArguments& args, const BackwardWork<C>& work,
                                                   int32_t m, int32_t g, int half) {
    return args.workspace.dq_semaphores + sum_row<C>(args, work, m, g) / 32 + half;
  }

  template <class C>
  __device__ __forceinline__ void wait(const BackwardArguments& args, const BackwardWork<C>& work, int32_t m, int32_t g,
                                       int half) const {
    const bool follows = m >= before_tiles.begin && m < before_tiles.end;
    const uint16_t expected = static_cast<uint16_t>(follows ? before + 1 : 0);
    while (ptx::load_acquire(slot<C>(args, work, m, g, half)) != expected) {
    }
  }

  template <class C>
  __device__ __forceinline__ void release(const BackwardArguments& args, const BackwardWork<C>& work, int32_t m,
                                          int32_t g, int half) const {
    ptx::store_release(slot<C>(args, work, m, g, half), static_cast<uint16_t>(n + 1));
  }
};

}  // namespace jax_flash::sm90
