// The load half of a warp: runs up to three tiles ahead of the arithmetic, across pieces, and appends the new tokens.
#pragma once

#include "cuda/kvcache/decode/chunk.cuh"
#include "cuda/kvcache/decode/schedule.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldmatrix.cuh"

namespace jax_flash::decode {

// A shared tile is kKeys rows of kDim elements; 16-byte chunk c of row r lies at chunk c ^ (r % 8), so that the eight
// rows that ldmatrix reads together fall on different banks.
template <class Config>
__device__ __forceinline__ uint32_t tile_offset(int row, int chunk) {
  return row * (Config::kDim * 2) + ((chunk ^ (row & 7)) << 4);
}

// Where one tile of one segment goes to and comes from.
struct TileCopy {
  int32_t b, kh;
  int32_t first;     // position of the tile's row 0
  int32_t length;    // of the cache before the call
  int32_t position;  // of row lane % kKeys, among all positions of the cache; -1: the row is to be zeros
  uint32_t fresh;    // a bit for each row that is a new token
  bool write;        // new tokens go to the cache as well
  uint32_t sKeys;    // the stage
};

// The rows of the tile that are new tokens: from k_new and v_new, rotated, to shared memory, and to the cache, which no
// other block reads there. Where a segment has several row blocks, each reads the new tokens and the first writes them.
template <class Config>
__device__ __noinline__ void append_rows(const KvcacheParams& params, TileCopy tile) {
  using Element = typename Config::Element;
  const int32_t H = params.H;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int i = 0; i < Config::kKeys * Config::kChunks / 32; ++i) {
    const int row = (i * 32 + lane) / Config::kChunks, d = lane % Config::kChunks * 8;
    const int32_t to = __shfl_sync(~0u, tile.position, row);
    if (!(tile.fresh >> row & 1)) continue;
    const int32_t t = tile.first + row - tile.length;
    const int64_t source = ((static_cast<int64_t>(tile.b) * params.T_new + t) * params.K + tile.kh) * H;
    const Element* gK = static_cast<const Element*>(params.k_new) + source;
    const Element* gV = static_cast<const Element*>(params.v_new) + source;
    const uint4 value = load_chunk(gV, d, H);
    const uint4 key = load_rotated_chunk(params, tile.b, tile.kh, tile.length, t, gK, d);
    const uint32_t offset = tile_offset<Config>(row, d / 8);
    ptx::st_shared(tile.sKeys + offset, key);
    ptx::st_shared(tile.sKeys + Config::kTileBytes + offset, value);
    if (tile.write && d < H) {
      const int64_t place = (static_cast<int64_t>(to) * params.K + tile.kh) * H;
      store_chunk(static_cast<Element*>(params.k_cache) + place, d, H, key);
      store_chunk(static_cast<Element*>(params.v_cache) + place, d, H, value);
    }
  }
}

// The rows that the cache holds already, where heads are not 16-byte aligned (H not a multiple of 8).
template <class Config>
__device__ __noinline__ void copy_unaligned(const KvcacheParams& params, TileCopy tile) {
  using Element = typename Config::Element;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int i = 0; i < Config::kKeys * Config::kChunks / 32; ++i) {
    const int row = (i * 32 + lane) / Config::kChunks, chunk = lane % Config::kChunks;
    const int32_t from = __shfl_sync(~0u, tile.position, row);
    if (tile.fresh >> row & 1) continue;
    const int64_t offset = from >= 0 ? (static_cast<int64_t>(from) * params.K + tile.kh) * params.H : 0;
    const int32_t H = from >= 0 ? params.H : 0;
    const uint32_t to = tile.sKeys + tile_offset<Config>(row, chunk);
    ptx::st_shared(to, load_chunk(static_cast<const Element*>(params.k_cache) + offset, chunk * 8, H));
    ptx::st_shared(to + Config::kTileBytes,
                   load_chunk(static_cast<const Element*>(params.v_cache) + offset, chunk * 8, H));
  }
}

template <class Config>
class Loader {
 public:
  using Element = typename Config::Element;

  // `sParams` is `params` in shared memory, for what is not inlined.
  __device__ __forceinline__ Loader(const KvcacheParams& params, const KvcacheParams& sParams,
                                    const Schedule<Config::kKeys>& sSchedule, int warps, uint32_t sStages)
      : params_(params), sParams_(sParams), sSchedule_(sSchedule), warps_(warps), sStages_(sStages) {
    restart();
  }

  // Begins with the schedule's first piece.
  __device__ __forceinline__ void restart() {
    next_ = 0;
    tile_ = tile_end_ = 0;
    settle();
  }

  // Starts the copy of this warp's next tile, as one group. Returns a bit for each of its positions that holds a key.
  __device__ __forceinline__ uint32_t issue(int stage) {
    uint32_t present = 0;
    if (tile_ < tile_end_) {
      present = load_tile(sStages_ + stage * Config::kStageBytes);
      tile_ += warps_;
      settle();
    }
    ptx::cp_async_commit();
    return present;
  }

 private:
  // Goes to the next piece that has a tile for this warp, and asks for the page that its next load needs.
  __device__ __forceinline__ void settle() {
    while (tile_ >= tile_end_) {
      if (next_ == sSchedule_.count) return;
      const Piece& piece = sSchedule_.pieces[next_++];
      b_ = piece.b;
      kh_ = piece.kh;
      write_ = piece.row_block == 0;
      length_ = piece.sequence.length;
      row_ = piece.sequence.row;
      visit_begin_ = piece.visit_begin;
      visit_end_ = piece.visit_end;
      tile_ = piece.tile_begin + static_cast<int32_t>(threadIdx.x / 32);
      tile_end_ = piece.tile_end;
    }
    const int32_t j = lane_key();
    place_ = CachePlace{-1, 0};
    if (j >= visit_begin_ && j < visit_end_) place_ = cache_place(params_, b_, j);
  }

  // Lane r looks after row r of the tile.
  __device__ __forceinline__ int32_t lane_key() const {
    return tile_ * Config::kKeys + static_cast<int32_t>(threadIdx.x % Config::kKeys);
  }

  __device__ __forceinline__ uint32_t load_tile(uint32_t sKeys) {
    const int32_t j = lane_key();
    const bool exists = j >= visit_begin_ && j < visit_end_;
    const int32_t position = exists ? cache_position(params_, row_, place_) : -1;
    const uint32_t present = __ballot_sync(~0u, exists);
    const uint32_t fresh = __ballot_sync(~0u, position >= 0 && j >= length_);
    if (params_.H % 8 == 0) {
      copy(sKeys, position, fresh);
    } else {
      copy_unaligned<Config>(sParams_, tile_copy(sKeys, position, fresh));
    }
    if (fresh) append_rows<Config>(sParams_, tile_copy(sKeys, position, fresh));
    return Config::kKeys == 32 ? present : present & ((1u << (Config::kKeys % 32)) - 1);
  }

  __device__ __forceinline__ void copy(uint32_t sKeys, int32_t position, uint32_t fresh) {
    constexpr int kRowsAtOnce = 32 / Config::kChunks;
    const int lane = threadIdx.x % 32, chunk = lane % Config::kChunks, first = lane / Config::kChunks;
    const int64_t row_bytes = static_cast<int64_t>(params_.K) * params_.H * 2;
    const int64_t column = (static_cast<int64_t>(kh_) * params_.H + chunk * 8) * 2;
    const bool inside = chunk * 8 < params_.H;
    const char* gK = static_cast<const char*>(params_.k_cache) + (inside ? column : 0);
    const char* gV = static_cast<const char*>(params_.v_cache) + (inside ? column : 0);
    const int32_t begin = tile_ * Config::kKeys;
    if (!params_.pages && Config::kDim == params_.H && begin >= visit_begin_ &&
        begin + Config::kKeys <= min_i32(visit_end_, length_)) {
      // Nearly all tiles of a cache without pages: rows that follow one another, all there.
      const int64_t from = (static_cast<int64_t>(row_) * params_.S + begin + first) * row_bytes;
      const int64_t step = kRowsAtOnce * row_bytes;
      gK += from;
      gV += from;
#pragma unroll
      for (int i = 0; i < Config::kKeys / kRowsAtOnce; ++i) {
        const uint32_t to = sKeys + tile_offset<Config>(i * kRowsAtOnce + first, chunk);
        ptx::cp_async_16(to, gK);
        ptx::cp_async_16(to + Config::kTileBytes, gV);
        gK += step;
        gV += step;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < Config::kKeys / kRowsAtOnce; ++i) {
      const int row = i * kRowsAtOnce + first;
      const int32_t from = __shfl_sync(~0u, position, row);
      const bool valid = from >= 0 && inside;
      const int64_t offset = max_i32(from, 0) * row_bytes;
      const uint32_t to = sKeys + tile_offset<Config>(row, chunk);
      if (!(fresh >> row & 1)) {
        ptx::cp_async_16(to, gK + offset, valid);
        ptx::cp_async_16(to + Config::kTileBytes, gV + offset, valid);
      }
    }
  }

  __device__ __forceinline__ TileCopy tile_copy(uint32_t sKeys, int32_t position, uint32_t fresh) const {
    return TileCopy{b_, kh_, tile_ * Config::kKeys, length_, position, fresh, write_, sKeys};
  }

  const KvcacheParams& params_;
  const KvcacheParams& sParams_;
  const Schedule<Config::kKeys>& sSchedule_;
  const int32_t warps_;
  const uint32_t sStages_;
  int32_t next_;  // piece
  int32_t tile_, tile_end_;
  // Of the piece at hand.
  int32_t b_, kh_, length_, row_, visit_begin_, visit_end_;
  bool write_;
  CachePlace place_;  // of this lane's row of the next tile
};

}  // namespace jax_flash::decode
