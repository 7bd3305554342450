// Compile-time choices of the Hopper forward: one ForwardConfig per element type, head-dim bucket and kind of mask.
#pragma once

#include <cstdint>

#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/convert.cuh"

namespace jax_flash::sm90 {

// A tile is `warpgroups` times 64 rows of queries; it walks over blocks of `keys` keys.
struct ForwardTile {
  int warpgroups;
  int keys;
  bool scheduler_barriers;  // named barriers make one warpgroup's softmax run under the others' products
  int polynomial;           // of every 16 exponentials, how many run on the FMA pipe instead of the exponential unit
  int stages;               // of K and of V
  bool forward;             // walks from the first keys to the last, not the other way
};

// Three warpgroups share each K and V that is fetched from L2, which is a seventh of the energy at head dim 128; two
// waste less on a diagonal and at the ends of tiles with few key blocks.
__host__ __device__ constexpr ForwardTile forward_tile(int head_dim, bool few_blocks) {
  switch (head_dim) {
    case 64:
      return {3, 128, true, 2, 4, false};
    case 96:
      return {3, 96, true, 0, 3, false};
    case 128:
      return few_blocks ? ForwardTile{2, 128, true, 0, 2, true} : ForwardTile{3, 80, true, 0, 3, false};
    case 192:
      return {2, 96, true, 0, 2, true};
    default:
      return {2, 80, false, 0, 2, true};
  }
}

// Whether the tiles of a call have few key blocks. (H128 causal on an H100 80GB HBM3: 424 against 404 TFLOP/s at 1024
// keys, 491 against 504 at 2048.)
constexpr bool few_key_blocks(bool band, int64_t keys) { return band && keys < 2048; }

// Whether one kernel serves for both.
__host__ __device__ constexpr bool same_tiles(int head_dim) {
  return forward_tile(head_dim, true).keys == forward_tile(head_dim, false).keys;
}

template <class Element_, int kHeadDim_, bool kFewBlocks_>
struct ForwardConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;  // the bucket; a smaller H is zero-filled

  static constexpr ForwardTile kTile = forward_tile(kHeadDim, kFewBlocks_);
  static constexpr int kWarpgroups = kTile.warpgroups;
  static constexpr int kKeys = kTile.keys;
  static constexpr bool kSchedulerBarriers = kTile.scheduler_barriers;
  static constexpr int kPolynomial = kTile.polynomial;
  static constexpr int kStages = kTile.stages;
  static constexpr int kRows = 64;  // of one warpgroup

  // One producer warpgroup (setmaxnreg works on whole ones) and the consumers share what the block was launched with:
  // 64512 registers for 384 threads, 65536 for 512.
  static constexpr int kThreads = 128 * (1 + kWarpgroups);
  static constexpr int kProducerRegisters = kWarpgroups == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 232 : 160;

  // Tiles lie in shared memory as panels of this many columns, one swizzle wide; 96 columns split into narrower ones.
  static constexpr ptx::Swizzle kSwizzle = kHeadDim % 64 == 0 ? ptx::Swizzle::k128Bytes : ptx::Swizzle::k64Bytes;
  static constexpr int kPanelBytes = kHeadDim % 64 == 0 ? 128 : 64;  // of one row
  static constexpr int kPanelColumns = kPanelBytes / 2;
  static constexpr int kPanels = kHeadDim / kPanelColumns;

  // The next tile's Q comes early where there is room for two.
  static constexpr int kQBytes = kWarpgroups * kRows * kHeadDim * 2;
  static constexpr int kKVBytes = kStages * 2 * kKeys * kHeadDim * 2;
  static constexpr int kSharedLimit = 232448;
  static constexpr int kQStages = 2 * kQBytes + kKVBytes + 4096 <= kSharedLimit ? 2 : 1;
};

}  // namespace jax_flash::sm90
