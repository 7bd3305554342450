// The epilogue of the Hopper forward kernel: O and the LSE go from registers to global memory.
#pragma once

#include <cstdint>

#include "cuda/sm90/forward/shared.cuh"
#include "cuda/sm90/forward/softmax.cuh"
#include "cuda/tile/convert.cuh"

namespace jax_flash::sm90 {

// Lane q of each quad gives words[i] of 8-column group i and receives the four words of group q: 16 bytes to store at
// once.
__device__ __forceinline__ void quad_transpose(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t received = __shfl_xor_sync(~0u, upper ? words[i] : words[i + bit], bit);
      if (upper) {
        words[i] = received;
      } else {
        words[i + bit] = received;
      }
    }
  }
}

// Where row r of this lane's two goes, and whether it is to be written at all.
struct RowTarget {
  bool exists;
  int64_t output, lse;  // offsets

  template <class Config>
  __device__ __forceinline__ RowTarget(const ForwardArguments& a, const ForwardShared<Config>& shared,
                                       const ForwardWork& work, int32_t first_query, int row) {
    const int32_t i = first_query + shared.row_query[row];
    const int32_t n = work.tile.head * a.packed + shared.row_head[row];
    exists = i >= 0 && i < a.shape.T;
    output = (work.tile.batch * a.shape.T + i) * a.o_stride + n * a.shape.H;
    lse = (static_cast<int64_t>(work.tile.batch) * a.heads + n) * a.shape.T + i;
  }
};

// The sink of a row's head; -inf, which is none, for a row without a valid query.
template <class Config>
__device__ __forceinline__ float sink_of(const ForwardArguments& a, const ForwardShared<Config>& shared,
                                         const ForwardWork& work, int32_t first_query, int row) {
  const int32_t i = first_query + shared.row_query[row];
  if (!a.sinks || i < 0 || i >= work.band.T) return -infinity();
  return a.sinks[work.tile.batch * a.heads + work.tile.head * a.packed + shared.row_head[row]];
}

template <class Config>
__device__ __forceinline__ void store_output(const ForwardArguments& a, const ForwardShared<Config>& shared,
                                             const ForwardWork& work, int32_t first_query, int row0,
                                             const float (&rO)[Config::kHeadDim / 2], LaggingSoftmax softmax,
                                             int lane) {
  const int32_t H = static_cast<int32_t>(a.shape.H);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float inverse, lse;
    if (a.sinks) softmax.add_sink(r, sink_of(a, shared, work, first_query, row0 + 8 * r));
    softmax.finish(r, inverse, lse);
    const RowTarget row(a, shared, work, first_query, row0 + 8 * r);
    if (row.exists && lane % 4 == 0) a.lse[row.lse] = lse;
    uint16_t* const gO = static_cast<uint16_t*>(a.o) + row.output;
#pragma unroll
    for (int c = 0; c < Config::kHeadDim / 32; ++c) {
      uint32_t words[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int at = 4 * (4 * c + n) + 2 * r;
        // A choice and not a product where there is nothing: what was accumulated may be NaN.
        words[n] = inverse != 0.0f ? pack<typename Config::Element>(rO[at] * inverse, rO[at + 1] * inverse) : 0;
      }
      quad_transpose(words, lane);
      const int column = 32 * c + 8 * (lane % 4);
      if (row.exists && column < H) {
        *reinterpret_cast<uint4*>(gO + column) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

// For a warpgroup none of whose rows sees a key.
template <class Config>
__device__ __forceinline__ void store_nothing(const ForwardArguments& a, const ForwardShared<Config>& shared,
                                              const ForwardWork& work, int32_t first_query, int row0, int lane) {
  for (int r = 0; r < 2; ++r) {
    const RowTarget row(a, shared, work, first_query, row0 + 8 * r);
    if (!row.exists) continue;
    uint16_t* const gO = static_cast<uint16_t*>(a.o) + row.output;
    for (int column = 8 * (lane % 4); column < a.shape.H; column += 32) {
      *reinterpret_cast<uint4*>(gO + column) = make_uint4(0, 0, 0, 0);
    }
    if (lane % 4 == 0) a.lse[row.lse] = sink_of(a, shared, work, first_query, row0 + 8 * r);
  }
}

}  // namespace jax_flash::sm90
