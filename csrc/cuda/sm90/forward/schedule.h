// In which order the tiles are worked on. Persistent blocks take them by ticket: the first of each block is its own
// number, later ones come from a counter, so that whoever is done first takes the next, whatever tiles cost and however
// many blocks run.
//
// With a band, the tiles of a head take the longer the later their queries are. Heads go in sections, the tiles of a
// section longest first, so that the last tiles to be taken are short ones. A section has about two tiles for each
// block, so that as few K and V as possible are in use at a time: with twice as many, memory was the limit at 1024
// keys.
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
  int32_t chunk;         // tiles of a ticket: 1, unless there are more than the counter counts

  // `sharing`: so many heads in a row share K and V.
  static ForwardSchedule make(int32_t query_tiles, int32_t heads, int32_t batches, int32_t sharing, bool band,
                              int32_t multiprocessors, int32_t most_tickets) {
    ForwardSchedule s;
    s.query_tiles = query_tiles;
    s.heads = heads;
    s.heads_in_all = heads * batches;
    s.chunk = (s.tiles() - 1) / most_tickets + 1;
    const int32_t of_two_rounds = ceil_div(2 * multiprocessors, query_tiles);
    const int32_t sections = of_two_rounds < s.heads_in_all ? s.heads_in_all / of_two_rounds : 1;
    s.section = band ? ceil_div(ceil_div(s.heads_in_all, sections), sharing) * sharing : 0;
    return s;
  }

  JAX_FLASH_HOST_DEVICE int32_t tiles() const { return query_tiles * heads_in_all; }
  JAX_FLASH_HOST_DEVICE int32_t tickets() const { return (tiles() - 1) / chunk + 1; }

  JAX_FLASH_HOST_DEVICE ForwardTileIndex tile(int32_t index) const {
    if (section == 0) return at(index / query_tiles, index % query_tiles);
    const int32_t first_head = index / (section * query_tiles) * section;
    const int32_t here = min_i32(section, heads_in_all - first_head);
    const int32_t rest = index - first_head * query_tiles;
    const int32_t row = rest / here;
    return at(first_head + rest - row * here, query_tiles - 1 - row);
  }

 private:
  JAX_FLASH_HOST_DEVICE ForwardTileIndex at(int32_t head, int32_t query_tile) const {
    const int32_t batch = head / heads;
    return {query_tile, batch, head - batch * heads};
  }
};

}  // namespace jax_flash::sm90
