// What backward needs to know of every row before the main pass: the LSE, or what takes its place, and delta =
// rowsum(dO * O) - dlse, and the workspace they live in beside dq's sums and semaphores.
#pragma once

#include "cpu/kernels/scratch.h"
#include "cpu/kernels/sequence.h"

namespace jax_flash::cpu::JAX_FLASH_ISA {

// Rows of a tile; the workspace has room for one semaphore every 64 rows. A multiple of kTileRows.
inline constexpr int64_t kBackwardRows = 96;

// Keys of a tile: with five arrays of keys and four of rows, H wide, it fills about half of a 1 MB second-level cache.
JAX_FLASH_INLINE int64_t backward_keys(int64_t H) { return H <= 128 ? 128 : 64; }

// Why the rows of a block are not as they were packed: see weigh_rows.
enum : uint8_t {
  kUnseen = 1,      // some see no key
  kNormalised = 2,  // some have a weight
};

// Of one (b, kh), in the workspace; every row [0, G * T) has a place.
struct RowStatistics {
  float* dq;            // [rows, padded_head_dim(H)], unscaled sum
  float* reference;     // [rows], of the probabilities, base 2: the LSE; +inf for a row that sees no key
  float* delta;         // [rows], times the row's weight
  int32_t* semaphores;  // [row blocks], the key block that may add to dq next
  uint8_t* weighed;     // [row blocks], 0 as a rule
};

template <class Params>
static inline RowStatistics row_statistics(const Params& params, int64_t b, int64_t kh) {
  const int64_t rows = params.shape.G * params.shape.T;
  auto cut = [&](char* base, RowStatistics& statistics) {
    Scratch scratch(base);
    statistics.dq = scratch.take_exactly(rows * padded_head_dim(params.shape.H));
    statistics.reference = scratch.take_exactly(rows);
    statistics.delta = scratch.take_exactly(rows);
    // An int32 and a byte for 96 rows, and what rounding up to lines takes, fit the int32 for 64 rows and the 256 bytes
    // that the workspace has for them.
    const int64_t blocks = (rows + kBackwardRows - 1) / kBackwardRows;
    statistics.semaphores = reinterpret_cast<int32_t*>(scratch.take_exactly(blocks));
    statistics.weighed = reinterpret_cast<uint8_t*>(scratch.take_exactly((blocks + 3) / 4));
    return scratch.used;
  };
  RowStatistics statistics;
  const int64_t bytes = cut(nullptr, statistics);
  cut(static_cast<char*>(params.workspace) + (b * params.shape.K + kh) * bytes, statistics);
  return statistics;
}

// The key blocks that rows [row, row + rows), with valid queries, add up dq over.
JAX_FLASH_INLINE BlockRange row_key_blocks(const Sequence& seq, int64_t row, int64_t rows) {
  return key_blocks(seq.band, seq.query(row), seq.query(row + rows - 1) + 1,
                    static_cast<int32_t>(backward_keys(seq.shape.H)));
}

// float32 only: the weight of a row stands where its dq will, until the last of its key blocks writes that.
JAX_FLASH_INLINE float* row_weight(const BackwardParams& params, const Sequence& seq, int64_t row) {
  return const_cast<float*>(seq.queries<float>(params.dq)[row]);
}

}  // namespace jax_flash::cpu::JAX_FLASH_ISA
