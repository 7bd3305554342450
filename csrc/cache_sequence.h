// The one definition of what a sequence's cache holds: which positions exist, where they lie, and what is appended.
// Every kernel, CPU and CUDA, uses it.
#pragma once

#include <cstdint>

#include "band.h"
#include "params.h"

namespace jax_flash {

// Positions that a sequence of this call can hold.
JAX_FLASH_HOST_DEVICE int32_t cache_capacity(const KvcacheParams& params) {
  return params.pages ? params.pages * params.S : params.S;
}

// The cache of one sequence. Values from the device are clamped here, so that nothing outside the buffers is ever
// touched: a length outside [0, capacity] is clamped, a new token past the capacity is neither written nor seen, a
// sequence whose batch_index names no row has an empty cache, and a page that block_table does not name reads as zeros
// and is not written.
struct CacheSequence {
  int32_t length;  // positions filled before the call
  int32_t end;     // and with the new tokens that fit
  int32_t begin;   // leftpad, at most end
  int32_t row;     // of the cache, counted over all groups: contiguous: this sequence's; paged: the group's first page
  DiagonalBand band;  // which positions each query sees, leftpad aside

  JAX_FLASH_HOST_DEVICE int32_t key_begin(int32_t i) const { return max_i32(begin, band.key_begin(i)); }
  JAX_FLASH_HOST_DEVICE int32_t key_end(int32_t i) const { return band.key_end(i); }
  // The positions that have to be visited: seen by a query, or to be written.
  JAX_FLASH_HOST_DEVICE int32_t visit_begin() const { return min_i32(key_begin(0), end > length ? length : end); }
  JAX_FLASH_HOST_DEVICE int32_t visit_end() const { return end > length ? end : key_end(band.T - 1); }
};

JAX_FLASH_HOST_DEVICE CacheSequence make_cache_sequence(const KvcacheParams& params, int32_t b) {
  const int32_t capacity = cache_capacity(params);
  const int64_t entry = static_cast<int64_t>(b) * params.sequence_stride;
  const int32_t group = params.groups == 1 ? 0 : b / (params.B / params.groups);
  CacheSequence s;
  s.length = params.lengths ? max_i32(0, min_i32(params.lengths[entry], capacity)) : capacity;
  s.end = min_i32(s.length + params.T_new, capacity);
  s.row = group * params.rows;
  if (!params.pages) {
    const int32_t index = params.batch_index ? params.batch_index[entry] : b - group * (params.B / params.groups);
    if (index < 0 || index >= params.rows) {
      s.length = s.end = 0;
    } else {
      s.row += index;
    }
  }
  s.begin = params.leftpad ? max_i32(0, min_i32(params.leftpad[entry], s.end)) : 0;
  s.band = make_diagonal_band(params.T, s.end, s.end - params.T, params.left, params.right);
  return s;
}

// Where position j < capacity of a sequence lies: a row of the cache (of one group) and a position in it.
struct CachePlace {
  int32_t row, offset;
};

JAX_FLASH_HOST_DEVICE CachePlace cache_place(const KvcacheParams& params, int32_t b, int32_t j) {
  if (!params.pages) return CachePlace{0, j};
  const int32_t entry = j / params.S;
  return CachePlace{params.block_table[static_cast<int64_t>(b) * params.pages + entry], j - entry * params.S};
}

// The same, counted over all positions of the cache; -1 where block_table names no page. `row` is the sequence's.
JAX_FLASH_HOST_DEVICE int32_t cache_position(const KvcacheParams& params, int32_t row, const CachePlace& place) {
  if (params.pages && (place.row < 0 || place.row >= params.rows)) return -1;
  return (row + place.row) * params.S + place.offset;
}

}  // namespace jax_flash
