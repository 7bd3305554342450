// How a tile walks over its key blocks: found once by the producer, for all warpgroups.
#pragma once

#include <cstdint>

#include "band.h"
#include "cuda/sm90/forward/shared.cuh"

namespace jax_flash::sm90 {

// The key blocks that queries [i0, i1) visit, of which those below 0 do not exist.
__device__ __forceinline__ BlockRange visited_blocks(const Band& band, int32_t i0, int32_t i1, int32_t keys) {
  return i1 > 0 ? key_blocks(band, max(i0, 0), i1, keys) : BlockRange{0, 0, 0, 0};
}

// Needs work.band and work.query. `queries` are a warpgroup's.
template <class Config>
__device__ __forceinline__ void plan_steps(ForwardWork& work, int32_t queries, bool transform) {
  constexpr int kKeys = Config::kKeys;
  constexpr bool kForward = Config::kTile.forward;
  const Band& band = work.band;
  const BlockRange all = visited_blocks(band, work.query, work.query + Config::kWarpgroups * queries, kKeys);
  work.steps = all.end - all.begin;
  work.first_key = (kForward ? all.begin : all.end - 1) * kKeys;
  work.key_step = kForward ? kKeys : -kKeys;
#pragma unroll
  for (int w = 0; w < Config::kWarpgroups; ++w) {
    const int32_t i0 = max(work.query + w * queries, 0), i1 = work.query + (w + 1) * queries;
    const BlockRange some = visited_blocks(band, i0, i1, kKeys);
    ForwardSteps& own = work.own[w];
    if (kForward) {
      const int32_t first_steady = band.key_begin(min(i1, band.T) - 1) / kKeys;  // no row's first key is later
      own = ForwardSteps{some.begin - all.begin, some.end - all.begin, some.full_begin - all.begin,
                         some.full_end - all.begin, first_steady + 1 - all.begin};
    } else {
      const int32_t first_steady = max(band.key_end(i0) - 1, 0) / kKeys;  // no row's last key is earlier
      own = ForwardSteps{all.end - some.end, all.end - some.begin, all.end - some.full_end, all.end - some.full_begin,
                         all.end - first_steady};
    }
    if (transform || own.steady > own.end) own.steady = own.end;
  }
}

}  // namespace jax_flash::sm90
