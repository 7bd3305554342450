// Compile-time choices of the decode kernel and the layout of its workspace, shared by launcher and kernel.
#pragma once

#include <cstdint>

#include "cache_sequence.h"

namespace jax_flash::decode {

// A segment is all keys of one sequence and one KV head, for one block of at most kRows rows; row t * G + g is query t
// of group member g. Its keys are cut into tiles of kKeys; a warp works on one tile at a time.
template <class Element_, int kDim_, int kRowTiles_>
struct Config {
  using Element = Element_;
  static constexpr int kDim = kDim_;  // bucket of the head dim
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kRows = 8 * kRowTiles;
  static constexpr int kKeys = kDim == 64 ? 32 : 16;
  static constexpr int kChunks = kDim / 8;  // 16-byte chunks of a row
  static constexpr int kTileBytes = kKeys * kDim * 2;
  static constexpr int kStageBytes = 2 * kTileBytes;  // keys, then values
  // Three tiles in flight for each of up to 8 warps: 192 KB of an H100's 227 KB.
  static constexpr int kStages = 3;
  static constexpr int kMaxWarps = 8;
};

// More blocks than this are never launched, so that the workspace's size does not depend on the device.
inline constexpr int kMaxBlocks = 256;

inline int head_dim_bucket(int32_t H) { return H <= 64 ? 64 : H <= 128 ? 128 : 256; }

// Tiles of 8 rows: as many as the registers hold accumulators for. More rows are left to further row blocks.
constexpr int most_row_tiles(int dim) { return dim == 64 ? 4 : dim == 128 ? 2 : 1; }

inline int row_tiles(int64_t rows, int32_t H) {
  const int most = most_row_tiles(head_dim_bucket(H));
  int tiles = 1;
  while (tiles < most && 8 * tiles < rows) tiles *= 2;
  return tiles;
}

// Work that several blocks share leaves partial results in slots: kRows x kDim float32 accumulators, then kRows maxima
// and kRows sums. Blocks of the balanced schedule leave at most two each (where their range begins and where it ends).
// One 64-bit arrival counter per segment comes first.
struct WorkspaceLayout {
  int64_t segments, slots, slot_floats;
  int64_t counter_bytes() const { return (segments * 8 + 255) / 256 * 256; }
  int64_t bytes() const { return counter_bytes() + slots * slot_floats * 4; }
};

inline WorkspaceLayout workspace_layout(const KvcacheParams& params) {
  const int64_t all_rows = int64_t{params.T} * params.G;
  const int rows = 8 * row_tiles(all_rows, params.H);
  WorkspaceLayout layout;
  layout.segments = int64_t{params.B} * params.K * ((all_rows + rows - 1) / rows);
  layout.slots = params.num_splits > 0 ? layout.segments * params.num_splits : 2 * kMaxBlocks;
  layout.slot_floats = rows * (head_dim_bucket(params.H) + 2);
  return layout;
}

}  // namespace jax_flash::decode
