// Compile-time choices of the backward kernels.
#pragma once

#include <cstdint>
#include <type_traits>

#include "band.h"
#include "cuda/tile/convert.cuh"

namespace jax_flash::sm90 {

// Tiles travel in panels: 64 elements (128 bytes, the widest swizzle) of the head dim by the tile's rows.
inline constexpr int kPanelColumns = 64;
inline constexpr int kPanelRowBytes = 128;

// The keys whose share of dQ is added at a time: those of one block, or of a pair of blocks.
inline constexpr int kSumKeys = 128;

// The unit in which dQ is shared out and kept in the workspace: 64 queries by 64 columns, 32 floats a thread.
inline constexpr int kDqPartFloats = 64 * 64;

// kRanges: the band has tables of ranges. In instances of their own, for they cost registers that other calls lack.
template <class T_, int kHeadDim_, bool kRanges_, int kQueries, int kKeys>
struct BackwardTile {
  using T = T_;
  static constexpr bool kRanges = kRanges_;
  using Band = std::conditional_t<kRanges, jax_flash::Band, DiagonalBand>;
  static constexpr int kH = kHeadDim_;            // head dim bucket
  static constexpr int kM = kQueries;             // queries of a tile
  static constexpr int kN = kKeys;                // keys of a block
  static constexpr int kStages = 2;               // Q and dO tiles in flight
  static constexpr int kPanels = (kH + 63) / 64;  // panels of a Q, K, V or dO tile
  static constexpr int kQueryPanels = kM / 64;    // panels of dSᵀ
  static constexpr int kDsBuffers = 2;
  static constexpr int kDqParts = kQueryPanels * kPanels;
  static constexpr int kConsumers = 2 * 128;  // two warpgroups
  static constexpr int kThreads = kConsumers + 128;
  // Together no more than the 168 a thread that a block of 384 gets at launch: asking for more waits forever.
  static constexpr int kConsumerRegisters = 240;
  static constexpr int kProducerRegisters = 24;
  static_assert(2 * kConsumerRegisters + kProducerRegisters <= 3 * 168, "registers of a block");

  // The last part of a head dim of 96 is half as wide.
  __host__ __device__ static constexpr int dq_floats(int part) {
    return kH % 64 == 0 || part % kPanels < kPanels - 1 ? 32 : kH % 64 / 2;
  }
  __host__ __device__ static constexpr int dq_row(int part) { return part / kPanels * 64; }
  __host__ __device__ static constexpr int dq_column(int part) { return part % kPanels * 64; }
};

// Head dims up to 128: each consumer owns 64 of the block's 128 keys, and half of dQ.
template <class T, int kHeadDim, bool kRanges>
struct SplitKeysConfig : BackwardTile<T, kHeadDim, kRanges, kHeadDim <= 64 ? 128 : 64, 128> {
  static constexpr int kBlocks = 1;                // of a cluster
  static constexpr bool kDqFirst = kHeadDim > 64;  // dQ before dK: see take_tile
  // dS in shared memory: a row is a query and a panel the keys of a consumer, or else a row is a key, a panel 64
  // queries.
  static constexpr bool kDsByQuery = kHeadDim <= 64;
};

// Head dims above: a pair of blocks owns 64 keys each. Of a block's consumers one computes P and dV, the other dS and
// dK.
template <class T, int kHeadDim, bool kRanges>
struct SplitRolesConfig : BackwardTile<T, kHeadDim, kRanges, 64, 64> {
  static constexpr int kBlocks = 2;
};

}  // namespace jax_flash::sm90
