// Which tile a block works on next. Static: tiles are dealt to the persistent blocks in rounds, and nothing is kept in
// memory.
//
// With a band, the tiles of a head take the longer the later their queries are. They are dealt in pairs of one head,
// the n-th last with the n-th first, which all take about the same time; what is left of the last round of pairs is
// dealt one by one, longest first, every second round backwards. Heads go in sections that make up a round of pairs, so
// that as few K and V as possible are in use at a time: with twice as many, memory was the limit at 1024 keys.
#pragma once

#include <cstdint>

#include "band.h"

namespace jax_flash::sm90 {

struct ForwardTileIndex {
  int32_t query_tile;  // which kWarpgroups * rows of queries
  int32_t batch;
  int32_t head;  // query head, or KV head where the group is packed into the rows
};

struct ForwardSchedule {
  int32_t query_tiles;   // per head
  int32_t heads;         // per batch
  int32_t heads_in_all;  // heads * batches
  int32_t section;       // heads; 0 without a band
  int32_t paired;        // pairs that are dealt as pairs: full rounds of them; 0 without a band
  int32_t pair_rounds;   // how many

  // `sharing`: so many heads in a row share K and V.
  JAX_FLASH_HOST_DEVICE static ForwardSchedule make(int32_t query_tiles, int32_t heads, int32_t batches,
                                                    int32_t sharing, bool band, int32_t blocks) {
    ForwardSchedule s;
    s.query_tiles = query_tiles;
    s.heads = heads;
    s.heads_in_all = heads * batches;
    const int32_t rows = query_tiles / 2;
    const int32_t one_round = rows > 0 ? ceil_div(ceil_div(blocks, rows), sharing) * sharing : s.heads_in_all;
    s.section = band ? min_i32(one_round, s.heads_in_all) : 0;
    s.pair_rounds = band ? static_cast<int32_t>(int64_t{rows} * s.heads_in_all / blocks) : 0;
    s.paired = s.pair_rounds * blocks;
    return s;
  }

  JAX_FLASH_HOST_DEVICE int32_t tiles() const { return query_tiles * heads_in_all; }

  // The tile of this block's round; false when there is none left.
  JAX_FLASH_HOST_DEVICE bool tile(int32_t round, int32_t block, int32_t blocks, ForwardTileIndex* tile) const {
    if (section == 0) {
      // One further each round, or a block would always get the same tile of a head where heads divide the round.
      const int32_t index = round * blocks + (block + round) % blocks;
      if (index >= tiles()) return false;
      set(index / query_tiles, index % query_tiles, tile);
      return true;
    }
    if (round < 2 * pair_rounds) {
      set_pair(round / 2 * blocks + block, round % 2 == 0, tile);
      return true;
    }
    round -= 2 * pair_rounds;
    const int32_t index = round * blocks + (round % 2 ? blocks - 1 - block : block);
    const int32_t left = tiles() - 2 * paired;
    const int32_t pairs = query_tiles / 2 * heads_in_all - paired;
    if (index >= left) return false;
    if (index < pairs) {
      set_pair(paired + index, true, tile);
    } else if (index < left - pairs) {
      set(index - pairs, query_tiles / 2, tile);
    } else {
      set_pair(paired + left - 1 - index, false, tile);
    }
    return true;
  }

 private:
  JAX_FLASH_HOST_DEVICE void set(int32_t head, int32_t query_tile, ForwardTileIndex* tile) const {
    tile->query_tile = query_tile;
    tile->batch = head / heads;
    tile->head = head - tile->batch * heads;
  }

  JAX_FLASH_HOST_DEVICE void set_pair(int32_t pair, bool longer, ForwardTileIndex* tile) const {
    const int32_t rows = query_tiles / 2;
    // The last section takes the heads that do not make up one.
    const int32_t which = min_i32(pair / (section * rows), heads_in_all / section - 1);
    const int32_t first_head = which * section;
    const int32_t rest = pair - first_head * rows;
    const int32_t here = which == heads_in_all / section - 1 ? heads_in_all - first_head : section;
    const int32_t row = rest / here;
    set(first_head + rest - row * here, longer ? query_tiles - 1 - row : row, tile);
  }
};

}  // namespace jax_flash::sm90
