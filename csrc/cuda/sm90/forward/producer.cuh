// The producer of the Hopper forward kernel: a thread that finds the block's tiles and loads their Q, and one that
// loads K and V. (Finding a tile takes as long as a step or two, and K and V must not wait for it.)
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/arrival_counter.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/forward/shared.cuh"
#include "cuda/sm90/forward/steps.cuh"

namespace jax_flash::sm90 {

// The tiles that a block works on, one after the other.
class TileQueue {
 public:
  __device__ __forceinline__ explicit TileQueue(const ForwardArguments& a)
      : a(a), ticket(static_cast<int32_t>(blockIdx.x)) {}

  // False where there is none left; then it is not asked again.
  __device__ __forceinline__ bool next(ForwardTileIndex* tile) {
    const int32_t tickets = a.schedule.tickets(), blocks = static_cast<int32_t>(gridDim.x);
    if (taken == a.schedule.chunk || ticket * a.schedule.chunk + taken == a.schedule.tiles()) {
      if (tickets == blocks) return false;  // then nobody draws
      const ArrivalCounter counter(a.counter);
      if (ticket == static_cast<int32_t>(blockIdx.x)) counter.prepare(counter.peek());
      // All that are drawn, blocks of them in vain, are as many as there are.
      ticket = blocks + counter.arrive(tickets);
      taken = 0;
      if (ticket >= tickets) return false;
    }
    *tile = a.schedule.tile(ticket * a.schedule.chunk + taken++);
    return true;
  }

 private:
  const ForwardArguments& a;
  int32_t ticket, taken = 0;
};

template <class Config>
__device__ __forceinline__ ForwardWork next_work(const ForwardArguments& a, TileQueue& queue) {
  ForwardWork work;
  work.last = !queue.next(&work.tile);
  work.steps = 0;
  if (work.last) return work;
  work.kv_head = a.packed > 1 ? work.tile.head : work.tile.head / static_cast<int32_t>(a.shape.G);
  work.band = make_band(a.shape, a.band, work.tile.batch, work.kv_head);
  // Tiles are laid from the last query backwards: where they do not divide T, the first one is short. Under a causal
  // mask that is the one with the fewest keys.
  const int32_t queries = Config::kWarpgroups * a.queries;
  work.query = static_cast<int32_t>(a.shape.T) - (a.schedule.query_tiles - work.tile.query_tile) * queries;
  plan_steps<Config>(work, a.queries, a.transform.needed);
  return work;
}

// Q of a tile, after its description; the bare arrival where there is nothing to load.
template <class Config>
__device__ __forceinline__ void load_queries(ForwardShared<Config>& shared, const ForwardArguments& a, int32_t round) {
  const ForwardWork& work = shared.work[round % shared.kWorks];
  const Slot<Config::kQStages> slot(round);
  for (int w = 0; w < Config::kWarpgroups; ++w) {
    uint64_t* const full = &shared.q_full[slot.stage][w];
    ptx::mbarrier_wait(&shared.q_empty[slot.stage][w], slot.empty_parity);
    if (work.empty()) {
      ptx::mbarrier_arrive(full);
      continue;
    }
    ptx::mbarrier_arrive_expect(full, a.packed * a.queries * Config::kPanelBytes * Config::kPanels);
#pragma unroll
    for (int p = 0; p < Config::kPanels; ++p) {
      ptx::tma_load_5d(shared.sQ[slot.stage][w][p], &a.q, full, p * Config::kPanelColumns, 0,
                       work.query + w * a.queries, work.tile.head, work.tile.batch, ptx::L2Policy::kEvictFirst);
    }
  }
}

template <class Config>
__device__ __forceinline__ void load_keys(typename Config::Element (*sTile)[Config::kKeys * Config::kPanelColumns],
                                          const CUtensorMap* map, uint64_t* full, uint64_t* empty,
                                          uint32_t empty_parity, int32_t kv_head, int32_t key, int32_t batch) {
  ptx::mbarrier_wait(empty, empty_parity);
  ptx::mbarrier_arrive_expect(full, Config::kKeys * Config::kPanelBytes * Config::kPanels);
#pragma unroll
  for (int p = 0; p < Config::kPanels; ++p) {
    ptx::tma_load_4d(sTile[p], map, full, p * Config::kPanelColumns, kv_head, key, batch, ptx::L2Policy::kEvictLast);
  }
}

// Finds the tiles, tells of them, and loads their Q.
template <class Config>
__device__ __forceinline__ void produce_tiles(ForwardShared<Config>& shared, const ForwardArguments& a) {
  TileQueue queue(a);
  for (int32_t round = 0;; ++round) {
    const Slot<ForwardShared<Config>::kWorks> slot(round);
    ForwardWork& work = shared.work[slot.stage];
    // Not taken before it has to be, or it might wait for a block that still has long to do.
    if (round > 0) ptx::mbarrier_wait(&shared.near_end, (round - 1) & 1);
    work = next_work<Config>(a, queue);
    ptx::mbarrier_arrive(&shared.work_told[slot.stage]);
    load_queries<Config>(shared, a, round);
    if (work.last) break;
  }
}

// Loads K and V in the order in which they are needed, the K of a step before its V, across tiles too.
template <class Config>
__device__ __forceinline__ void produce_keys(ForwardShared<Config>& shared, const ForwardArguments& a) {
  using KVSlot = Slot<Config::kStages>;
  struct Tile {
    int32_t steps, first_key, key_step, kv_head, batch;
    bool last;
  };
  const auto open = [&](int32_t round) {
    const Slot<ForwardShared<Config>::kWorks> slot(round);
    ptx::mbarrier_wait(&shared.work_told[slot.stage], slot.full_parity);
    const ForwardWork& work = shared.work[slot.stage];
    const Tile tile{work.steps, work.first_key, work.key_step, work.kv_head, work.tile.batch, work.last};
    return tile;
  };
  uint32_t k_use = 0, v_use = 0;
  const auto load_k = [&](const Tile& tile, int32_t step) {
    const KVSlot slot(k_use++);
    load_keys<Config>(shared.sK[slot.stage], &a.k, &shared.k_full[slot.stage], &shared.k_empty[slot.stage],
                      slot.empty_parity, tile.kv_head, tile.first_key + step * tile.key_step, tile.batch);
  };
  const auto load_v = [&](const Tile& tile, int32_t step) {
    const KVSlot slot(v_use++);
    load_keys<Config>(shared.sV[slot.stage], &a.v, &shared.v_full[slot.stage], &shared.v_empty[slot.stage],
                      slot.empty_parity, tile.kv_head, tile.first_key + step * tile.key_step, tile.batch);
  };
  Tile tile = open(0);
  if (tile.steps > 0) load_k(tile, 0);
  for (int32_t round = 1; !tile.last; ++round) {
    // A ticket and a tile's plan take about as long as a step.
    if (tile.steps < 4) ptx::mbarrier_arrive(&shared.near_end);
    for (int32_t n = 1; n < tile.steps; ++n) {
      if (tile.steps >= 4 && n == tile.steps - 2) ptx::mbarrier_arrive(&shared.near_end);
      load_k(tile, n);
      load_v(tile, n - 1);
    }
    const Tile next = open(round);
    if (next.steps > 0) load_k(next, 0);
    if (tile.steps > 0) load_v(tile, tile.steps - 1);
    tile = next;
  }
}

}  // namespace jax_flash::sm90
