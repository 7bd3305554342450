// What the launcher tells the Hopper forward kernel, and what its producer and consumers share.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "band.h"
#include "cuda/sm90/forward/config.h"
#include "cuda/sm90/forward/schedule.h"
#include "cuda/tile/softmax.cuh"
#include "params.h"

namespace jax_flash::sm90 {

struct ForwardArguments {
  CUtensorMap q;  // [B, heads, T, packed, H], box 1 x 1 x queries x packed x panel
  CUtensorMap k;  // [B, S, K, H], box 1 x keys x 1 x panel
  CUtensorMap v;  // as k
  Shape shape;
  BandParams band;
  ScoreTransform transform;
  ForwardSchedule schedule;
  int32_t packed;      // query heads in the rows of a tile: 1, or G
  int32_t queries;     // of a warpgroup: 64 / packed; row r is query r / packed of head r % packed
  int32_t heads;       // N
  int64_t o_stride;    // N * H
  uint64_t* counter;   // an ArrivalCounter of tickets
  const float* sinks;  // [B, N] or null
  void* o;             // [B, T, N, H]
  float* lse;          // [B, N, T], natural log
};

// What a warpgroup has of its tile's steps: [begin, end) show its rows something, [full_begin, full_end)
// everything. From step `steady` on, every row that sees a key at all has seen one.
struct ForwardSteps {
  int32_t begin, end, full_begin, full_end, steady;
};

// A tile, as the producer found it and the consumers read it from shared memory. It walks over key blocks, in step n
// over keys [first_key + n * key_step, + kKeys).
struct ForwardWork {
  static constexpr int kMostWarpgroups = 3;

  ForwardTileIndex tile;
  int32_t kv_head;
  int32_t query;  // the tile's first; may be negative
  Band band;
  int32_t steps, first_key, key_step;
  ForwardSteps own[kMostWarpgroups];
  bool last;  // no tile at all: the end

  __device__ __forceinline__ bool empty() const { return steps == 0; }
  __device__ __forceinline__ int32_t key(int32_t step) const { return first_key + step * key_step; }
};

template <class Config>
struct ForwardShared {
  using Element = typename Config::Element;
  // A tile's description is up to three tiles ahead of the slowest warpgroup, since its Q has to have room, and that
  // may still store the tile before its own.
  static constexpr int kWorks = 8;
  // Each panel is [rows][kPanelColumns], swizzled.
  alignas(
      1024) Element sQ[Config::kQStages][Config::kWarpgroups][Config::kPanels][Config::kRows * Config::kPanelColumns];
  alignas(1024) Element sK[Config::kStages][Config::kPanels][Config::kKeys * Config::kPanelColumns];
  alignas(1024) Element sV[Config::kStages][Config::kPanels][Config::kKeys * Config::kPanelColumns];
  // "full": the bytes have come; "empty": every warp that reads them is done.
  alignas(8) uint64_t q_full[Config::kQStages][Config::kWarpgroups], q_empty[Config::kQStages][Config::kWarpgroups];
  uint64_t k_full[Config::kStages], k_empty[Config::kStages];
  uint64_t v_full[Config::kStages], v_empty[Config::kStages];
  // For the producer of K and V; consumers hear of a tile with its Q. It says when it comes to the end of a tile.
  uint64_t work_told[kWorks], near_end;
  // Row r of a warpgroup is query r / packed of head r % packed; past every T where the group leaves a rest. (Looked
  // up, because registers are dear and it is rarely needed.)
  int32_t row_query[Config::kRows], row_head[Config::kRows];
  // What each row sees: once a tile its lanes find it out, and each reads what it wrote itself.
  Range row_keys[Config::kWarpgroups][Config::kRows];
  ForwardWork work[kWorks];
};

// The use-th block that goes through a ring of stages: where it lies, and the parities of its full and empty barriers.
template <int kStages>
struct Slot {
  int stage;
  uint32_t full_parity, empty_parity;
  __device__ __forceinline__ explicit Slot(uint32_t use)
      : stage(static_cast<int>(use % kStages)), full_parity(use / kStages & 1), empty_parity(full_parity ^ 1) {}
};

}  // namespace jax_flash::sm90
