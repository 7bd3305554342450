// Which tiles of which segment a block works on, decided on the device from the sequences' actual lengths.
#pragma once

#include "cache_sequence.h"
#include "cuda/kvcache/decode/config.h"

namespace jax_flash::decode {

// One copy of the twenty instructions: code that runs once is mostly waited for.
__device__ __noinline__ inline int32_t divide(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
}

// A run of tiles of one segment.
struct Piece {
  int32_t b, kh, row_block;
  CacheSequence sequence;
  int32_t visit_begin, visit_end;  // positions that the segment visits
  int32_t tile_begin, tile_end;    // tile i holds positions i * kKeys ... (i + 1) * kKeys - 1
  int32_t segment;
  int32_t parts;       // pieces that this segment is cut into
  int32_t slot;        // of this piece
  int32_t first_slot;  // of the segment's first piece
  bool explicit_split;

  __device__ __forceinline__ int32_t part_slot(int32_t part) const {
    if (explicit_split) return first_slot + part;
    return part == 0 ? first_slot : (first_slot & ~1) + 2 * part;
  }
};

// The tiles of each segment of a sequence.
struct Tiles {
  int32_t first, count;
};

template <int kKeys>
__device__ __forceinline__ Tiles tiles_of(const CacheSequence& s) {
  const int32_t lo = s.visit_begin(), hi = s.visit_end();
  if (lo >= hi) return Tiles{0, 1};  // an empty segment is one tile of nothing: it writes its zeros
  return Tiles{lo / kKeys, ceil_div(hi, kKeys) - lo / kKeys};
}

__device__ __forceinline__ CacheSequence shuffle(const CacheSequence& s, int lane) {
  const auto from = [lane](int32_t x) { return __shfl_sync(~0u, x, lane); };
  return CacheSequence{from(s.length), from(s.end), from(s.begin), from(s.row),
                       DiagonalBand{from(s.band.T), from(s.band.S), from(s.band.first), from(s.band.last)}};
}

// The next pieces of a block, in shared memory. One warp fills it; the others wait at a barrier.
//
// Balanced: all tiles of all segments stand in one line, cut into equal ranges, one for each block; a range may end in
// the middle of a segment and hold several. Split: every segment is cut into equal pieces, dealt to the blocks in turn.
// This is for an explicit num_splits, and, with one piece a segment, for many long sequences of about one length: what
// the blocks read at one time then lies close together, which memory serves 2 % faster. Single: one sequence, whose
// segments are cut into one piece for each block, without more ado.
template <int kKeys>
struct Schedule {
  static constexpr int kPieces = 32;
  static constexpr int kLongTiles = 64;  // a piece worth a place of its own
  static constexpr int kShareUnit = 8;   // tiles: about one for each warp of a block

  Piece pieces[kPieces];
  int32_t count;  // of pieces
  bool more;      // when these are done

  // Where the next filling goes on.
  int32_t splits;   // of each segment; 0: balanced
  int32_t at, end;  // balanced: tiles in the line; split: pieces
  int32_t share;    // balanced: tiles of a block
  int32_t b, base;  // balanced: the sequence that holds tile `at`, and its first tile in the line

  __device__ __forceinline__ void start(const KvcacheParams& params, int32_t row_blocks, bool single) {
    if (single) return fill_single(params, row_blocks);
    const int lane = threadIdx.x % 32;
    const int32_t per_sequence = params.K * row_blocks;  // segments
    if (params.num_splits > 0) return start_split(params, row_blocks, params.num_splits);
    int32_t total = 0, shortest = INT32_MAX, longest = 0;  // tiles
    Chunk chunk;
#pragma unroll 1
    for (int32_t first = (params.B - 1) / 32 * 32; first >= 0; first -= 32) {
      chunk.load(params, first);
      total += __reduce_add_sync(~0u, chunk.tiles.count);
      const int32_t count = chunk.tiles.count;
      shortest = min_i32(shortest, __reduce_min_sync(~0u, count > 0 ? count : INT32_MAX));
      longest = max_i32(longest, __reduce_max_sync(~0u, count));
    }
    if (longest >= kLongTiles && longest - shortest <= longest / 16) {
      const int32_t segments = params.B * per_sequence, blocks = gridDim.x;
      const int32_t rounds = divide(segments + blocks - 1, blocks);
      if (rounds >= 4 && segments >= rounds * blocks / 16 * 15) return start_split(params, row_blocks, 1);
    }
    total *= per_sequence;
    const int32_t own_share = (divide(total + gridDim.x - 1, gridDim.x) + kShareUnit - 1) / kShareUnit * kShareUnit;
    const int32_t begin = min_i32(blockIdx.x * own_share, total);
    // The sequence that holds tile `begin`: the chunk at hand is the first.
    int32_t line = 0, holder = 0;
    if (begin < total) {
#pragma unroll 1
      for (;;) {
        const int32_t own = chunk.tiles.count * per_sequence;
        int32_t up_to = own;  // inclusive prefix sum
#pragma unroll
        for (int i = 1; i < 32; i *= 2) {
          const int32_t below = __shfl_up_sync(~0u, up_to, i);
          if (lane >= i) up_to += below;
        }
        const unsigned holds = __ballot_sync(~0u, line + up_to > begin);
        if (holds) {
          const int source = __ffs(holds) - 1;
          line += __shfl_sync(~0u, up_to - own, source);
          holder = chunk.first + source;
          break;
        }
        line += __shfl_sync(~0u, up_to, 31);
        chunk.load(params, chunk.first + 32);
      }
    }
    if (lane == 0) {
      splits = 0;
      at = begin;
      end = min_i32(begin + own_share, total);
      share = own_share;
      b = holder;
      base = line;
    }
    __syncwarp();
    fill_balanced(params, row_blocks, chunk);
  }

  __device__ __forceinline__ void refill(const KvcacheParams& params, int32_t row_blocks) {
    if (splits > 0) {
      fill_split(params, row_blocks);
    } else {
      Chunk chunk;
      chunk.load(params, b / 32 * 32);
      fill_balanced(params, row_blocks, chunk);
    }
  }

 private:
  // 32 sequences, one a lane.
  struct Chunk {
    int32_t first;
    CacheSequence sequence;
    Tiles tiles;

    __device__ __forceinline__ void load(const KvcacheParams& params, int32_t chunk_first) {
      first = chunk_first;
      const int32_t own = first + static_cast<int32_t>(threadIdx.x % 32);
      sequence = make_cache_sequence(params, min_i32(own, params.B - 1));
      tiles = tiles_of<kKeys>(sequence);
      if (own >= params.B) tiles.count = 0;
    }
  };

  __device__ __forceinline__ void fill_balanced(const KvcacheParams& params, int32_t row_blocks, Chunk& chunk) {
    const int lane = threadIdx.x % 32;
    const int32_t per_sequence = params.K * row_blocks, stop = end, own_share = share;
    int32_t here = at, holder = b, line = base, filled = 0;
#pragma unroll 1
    while (here < stop && filled < kPieces) {
      if (holder >= chunk.first + 32) chunk.load(params, chunk.first + 32);
      const int source = holder - chunk.first;
      const CacheSequence sequence = shuffle(chunk.sequence, source);
      const int32_t tiles = __shfl_sync(~0u, chunk.tiles.count, source);
      const int32_t first_tile = __shfl_sync(~0u, chunk.tiles.first, source);
      // The lanes take one segment each.
      const int32_t segment = divide(here - line, tiles) + lane, start = line + segment * tiles;
      const bool takes = segment < per_sequence && start < stop && filled + lane < kPieces;
      if (takes) {
        Piece& piece = pieces[filled + lane];
        int32_t first_block = blockIdx.x;
        piece.parts = 1;
        if (start < at || start + tiles > stop) {
          first_block = divide(start, own_share);
          piece.parts = divide(start + tiles - 1, own_share) - first_block + 1;
        }
        piece.first_slot = 2 * first_block + (first_block * own_share < start);
        piece.explicit_split = false;
        set(piece, params, row_blocks, holder, sequence, segment, first_tile + max_i32(here - start, 0),
            first_tile + min_i32(tiles, stop - start), blockIdx.x - first_block);
      }
      const int32_t taken = __popc(__ballot_sync(~0u, takes));
      filled += taken;
      const int32_t next = __shfl_sync(~0u, segment, 0) + taken;
      here = min_i32(stop, line + next * tiles);
      if (next == per_sequence) {
        line += per_sequence * tiles;
        ++holder;
      }
    }
    __syncwarp();
    if (lane == 0) {
      at = here;
      b = holder;
      base = line;
      count = filled;
      more = here < stop;
    }
    __syncwarp();
  }

  // One sequence: all segments are equally long, and block (x, y) takes part x of segment y.
  __device__ __forceinline__ void fill_single(const KvcacheParams& params, int32_t row_blocks) {
    const CacheSequence sequence = make_cache_sequence(params, 0);
    const Tiles tiles = tiles_of<kKeys>(sequence);
    const Cut cut(tiles, gridDim.x);
    const int32_t part = blockIdx.x;
    if (threadIdx.x == 0) {
      Piece& piece = pieces[0];
      piece.first_slot = blockIdx.y * gridDim.x;
      piece.parts = cut.parts;
      piece.explicit_split = true;
      set(piece, params, row_blocks, 0, sequence, blockIdx.y, cut.begin(part), cut.begin(part + 1), part);
      count = part < cut.parts;
      more = false;
    }
  }

  // The tiles of a segment in `parts` pieces, whose sizes differ by one at most.
  struct Cut {
    int32_t first, parts, each, longer;  // the first `longer` pieces have one tile more
    __device__ __forceinline__ Cut(const Tiles& tiles, int32_t most)
        : first(tiles.first), parts(min_i32(most, tiles.count)) {
      each = divide(tiles.count, parts);
      longer = tiles.count - each * parts;
    }
    __device__ __forceinline__ int32_t begin(int32_t part) const { return first + each * part + min_i32(part, longer); }
  };

  __device__ __forceinline__ void start_split(const KvcacheParams& params, int32_t row_blocks, int32_t n) {
    if (threadIdx.x == 0) {
      splits = n;
      at = blockIdx.x;
      end = params.B * params.K * row_blocks * n;
    }
    __syncwarp();
    fill_split(params, row_blocks);
  }

  __device__ __forceinline__ void fill_split(const KvcacheParams& params, int32_t row_blocks) {
    const int lane = threadIdx.x % 32;
    const int32_t per_sequence = params.K * row_blocks, n = splits;
    const int32_t index = at + lane * static_cast<int32_t>(gridDim.x), place_in_line = divide(index, per_sequence);
    const int32_t holder = divide(place_in_line, n), part = place_in_line - holder * n;
    const int32_t segment = index - place_in_line * per_sequence;  // of the sequence
    const CacheSequence sequence = make_cache_sequence(params, min_i32(holder, params.B - 1));
    const Cut cut(tiles_of<kKeys>(sequence), n);
    // Not where the segment has fewer tiles than pieces were asked for.
    const unsigned taken = __ballot_sync(~0u, index < end && part < cut.parts);
    if (taken >> lane & 1) {
      Piece& piece = pieces[__popc(taken & ((1u << lane) - 1))];
      piece.first_slot = (holder * per_sequence + segment) * n;
      piece.parts = cut.parts;
      piece.explicit_split = true;
      set(piece, params, row_blocks, holder, sequence, segment, cut.begin(part), cut.begin(part + 1), part);
    }
    __syncwarp();
    if (lane == 0) {
      count = __popc(taken);
      at += 32 * gridDim.x;
      more = at < end;
    }
    __syncwarp();
  }

  __device__ __forceinline__ static void set(Piece& piece, const KvcacheParams& params, int32_t row_blocks, int32_t b,
                                             const CacheSequence& sequence, int32_t segment, int32_t tile_begin,
                                             int32_t tile_end, int32_t part) {
    piece.b = b;
    piece.kh = row_blocks == 1 ? segment : divide(segment, row_blocks);
    piece.row_block = segment - piece.kh * row_blocks;
    piece.sequence = sequence;
    piece.visit_begin = sequence.visit_begin();
    piece.visit_end = sequence.visit_end();
    piece.tile_begin = tile_begin;
    piece.tile_end = tile_end;
    piece.segment = b * params.K * row_blocks + segment;
    piece.slot = piece.part_slot(part);
  }
};

}  // namespace jax_flash::decode
