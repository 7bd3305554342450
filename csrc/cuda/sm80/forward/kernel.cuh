// Attention forward: a block owns kBlockM queries of one head and walks over the keys they see, from the last block to
// the first. Each warp owns kBlockM / kWarps whole rows, so the softmax needs no shared memory and P never leaves
// registers.
#pragma once

#include "cuda/ptx/mma.cuh"
#include "cuda/sm80/fits.h"
#include "cuda/sm80/head_index.cuh"
#include "cuda/sm80/shared_tile.cuh"
#include "cuda/tile/apply_mask.cuh"
#include "cuda/tile/softmax.cuh"
#include "mask.h"
#include "params.h"

namespace jax_flash::sm80 {

template <class Element_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, int kStages_, int kBlocksPerSm_,
          bool kQueryInRegisters_, Fits kFits_>
struct ForwardConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;  // bucket: the head dim, rounded up
  static constexpr int kBlockM = kBlockM_;    // queries of a block
  static constexpr int kBlockN = kBlockN_;    // keys of a step
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kStages = kStages_;  // of K and of V: 2 keeps a whole step in flight, 1 fits more blocks
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr bool kQueryInRegisters = kQueryInRegisters_;
  static constexpr Fits kFits = kFits_;
  static constexpr int kRowTiles = kBlockM / (16 * kWarps);  // 16-row tiles of a warp

  struct SharedMemory {
    Element q[kBlockM * kHeadDim];  // later the output's staging; every warp touches its own rows only
    Element k[kStages][kBlockN * kHeadDim];
    Element v[kStages][kBlockN * kHeadDim];
    Band band;  // kept here, since only boundary blocks use it
  };
};

// S = Q K^T for this warp's rows: kBlockN columns.
template <class Config, class QueryReader, class KeyReader>
__device__ __forceinline__ void multiply_query_key(float (&acc)[Config::kRowTiles][Config::kBlockN / 2],
                                                   const QueryReader& query, const KeyReader& key) {
  constexpr int kSteps = Config::kHeadDim / 16;
#pragma unroll
  for (int m = 0; m < Config::kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < Config::kBlockN / 2; ++i) acc[m][i] = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[Config::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < Config::kRowTiles; ++m) query.read(a[m], m * 16, step * 16);
#pragma unroll
    for (int n = 0; n < Config::kBlockN / 16; ++n) {
      uint32_t b[4];
      key.read(b, n * 16, step * 16);
#pragma unroll
      for (int m = 0; m < Config::kRowTiles; ++m) {
        ptx::mma_m16n8k16(acc[m] + 8 * n, a[m], b[0], b[1], typename Config::Element{});
        ptx::mma_m16n8k16(acc[m] + 8 * n + 4, a[m], b[2], b[3], typename Config::Element{});
      }
    }
  }
}

// O += P V.
template <class Config, class ValueReader>
__device__ __forceinline__ void multiply_value(float (&acc)[Config::kRowTiles][Config::kHeadDim / 2],
                                               const uint32_t (&p)[Config::kRowTiles][Config::kBlockN / 4],
                                               const ValueReader& value) {
#pragma unroll
  for (int step = 0; step < Config::kBlockN / 16; ++step) {
#pragma unroll
    for (int n = 0; n < Config::kHeadDim / 16; ++n) {
      uint32_t b[4];
      value.read(b, step * 16, n * 16);
#pragma unroll
      for (int m = 0; m < Config::kRowTiles; ++m) {
        ptx::mma_m16n8k16(acc[m] + 8 * n, p[m] + 4 * step, b[0], b[1], typename Config::Element{});
        ptx::mma_m16n8k16(acc[m] + 8 * n + 4, p[m] + 4 * step, b[2], b[3], typename Config::Element{});
      }
    }
  }
}

// This warp's queries, read once and kept.
template <class Config>
struct QueryFragments {
  uint32_t fragment[Config::kRowTiles][Config::kHeadDim / 16][4];

  template <class Reader>
  __device__ __forceinline__ void fill(const Reader& reader) {
#pragma unroll
    for (int m = 0; m < Config::kRowTiles; ++m) {
#pragma unroll
      for (int step = 0; step < Config::kHeadDim / 16; ++step) reader.read(fragment[m][step], m * 16, step * 16);
    }
  }

  __device__ __forceinline__ void read(uint32_t (&out)[4], int row, int col) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = fragment[row / 16][col / 16][i];
  }
};

// Turns products into what the softmax takes: softcap, band, boolean mask. `i` and `j0` are the warp's first query and
// key.
template <class Config>
__device__ __forceinline__ void apply_score_and_mask(float (&acc)[Config::kRowTiles][Config::kBlockN / 2],
                                                     const ForwardParams& params, const ScoreTransform& transform,
                                                     const Band* band, bool needs_band, int linear_head, int32_t i,
                                                     int32_t j0) {
  if (transform.needed) {
#pragma unroll
    for (int m = 0; m < Config::kRowTiles; ++m) transform.apply(acc[m]);
  }
  if (needs_band) {
    const int lane = ptx::launder(threadIdx.x) % 32;
#pragma unroll
    for (int m = 0; m < Config::kRowTiles; ++m) apply_band(acc[m], *band, i + lane / 4 + 16 * m, j0, lane);
  }
  if (params.mask.words) {
    const int lane = ptx::launder(threadIdx.x) % 32;
    const HeadIndex head(params.shape, ptx::launder(linear_head));
    const MaskBits bits = MaskBits::make(params.shape, params.mask, head.b, head.kh, head.g);
#pragma unroll
    for (int m = 0; m < Config::kRowTiles; ++m)
      apply_bits<Config::kBlockN % 32 == 0 ? 32 : 16>(acc[m], bits, i + lane / 4 + 16 * m, j0, lane);
  }
}

// The queries of a block. Blocks of one head follow each other, so that its K and V stay in L2; the last queries go
// first: under a causal mask they take longest, and short blocks fill the tail.
template <class Config>
struct ForwardTile {
  int linear_head;  // over [B, K, G]
  int i0;           // first query
  HeadIndex head;
  int64_t stride, offset;  // of q and o, in elements

  __device__ __forceinline__ ForwardTile(const Shape& shape, int block, int query_blocks)
      : linear_head(block / query_blocks),
        i0((query_blocks - 1 - block % query_blocks) * Config::kBlockM),
        head(shape, linear_head),
        stride(shape.K * shape.G * shape.H),
        offset((head.b * shape.T + i0) * stride + (head.kh * shape.G + head.g) * shape.H) {}
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    forward_kernel(const __grid_constant__ ForwardParams params, const __grid_constant__ ScoreTransform transform,
                   const int query_blocks, const bool aligned) {
  if constexpr (!compiled_here(Config::kFits)) return;
  using Element = typename Config::Element;
  using SharedMemory = typename Config::SharedMemory;
  constexpr int kM = Config::kBlockM, kN = Config::kBlockN, kD = Config::kHeadDim, kTiles = Config::kRowTiles;
  constexpr bool kTwoStages = Config::kStages == 2;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  SharedMemory& shared_memory = *reinterpret_cast<SharedMemory*>(shared_bytes);
  const uint32_t shared = ptx::shared_address(shared_bytes);
  const uint32_t sQ = shared;
  const uint32_t sK = shared + offsetof(SharedMemory, k);
  const uint32_t sV = shared + offsetof(SharedMemory, v);
  constexpr uint32_t kStageBytes = kN * kD * sizeof(Element);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const Shape& shape = params.shape;
  const int head_dim = static_cast<int>(shape.H);

  const ForwardTile<Config> tile(shape, blockIdx.x, query_blocks);
  const int64_t key_stride = shape.K * shape.H;
  const int64_t key_offset = tile.head.b * shape.S * key_stride + tile.head.kh * shape.H;
  const Band band = make_band(shape, params.band, tile.head.b, tile.head.kh);
  const BlockRange range = key_blocks(band, tile.i0, tile.i0 + kM, kN);

  const int warp_row = warp * 16 * kTiles;
  float acc_o[kTiles][kD / 2];
  OnlineSoftmax softmax[kTiles];
  const float sink = params.sinks ? params.sinks[tile.linear_head] * (kLog2e / transform.log2_scale) : -infinity();
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    softmax[m].init(sink, lane);
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) acc_o[m][i] = 0.0f;
  }

  if (range.begin < range.end) {
    using Copy = TileCopy<Element, kD, Config::kThreads>;
    // Registers are what bounds this loop: addresses are made anew in every step.
    const auto load_keys = [&](uint32_t tile, const void* source, int block, int rows) {
      const Copy copy(ptx::launder(thread), head_dim, aligned, key_stride);
      copy.template load<kN>(tile, static_cast<const Element*>(source) + key_offset + int64_t{block} * kN * key_stride,
                             rows);
    };
    const int last_rows = band.S - (range.end - 1) * kN;  // of the last block; all others are whole
    if (thread == 0) shared_memory.band = band;
    Copy(thread, head_dim, aligned, tile.stride)
        .template load<kM>(sQ, static_cast<const Element*>(params.q) + tile.offset, band.T - tile.i0);
    load_keys(sK, params.k, range.end - 1, last_rows);
    if (kTwoStages) load_keys(sV, params.v, range.end - 1, last_rows);
    ptx::cp_async_commit();

    QueryFragments<Config> query_fragments;
    if constexpr (Config::kQueryInRegisters) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      query_fragments.fill(TileReader<kD, true, false>(sQ, warp_row, 0, lane));
    }

    uint32_t stage = 0;  // byte offset of the stage in use
#pragma unroll 1
    for (int block = range.end - 1; block >= range.begin; --block) {
      // This step's keys are here, and every warp is past the previous step.
      ptx::cp_async_wait<0>();
      __syncthreads();
      const uint32_t now = stage;
      if constexpr (kTwoStages) {
        stage ^= kStageBytes;
        if (block > range.begin) {
          load_keys(sK + stage, params.k, block - 1, kN);
          load_keys(sV + stage, params.v, block - 1, kN);
        }
      } else {
        load_keys(sV, params.v, block, block == range.end - 1 ? last_rows : kN);
      }
      ptx::cp_async_commit();

      float acc_s[kTiles][kN / 2];
      const TileReader<kD, false, false> key(sK + now, 0, 0, ptx::launder(thread) % 32);
      if constexpr (Config::kQueryInRegisters) {
        multiply_query_key<Config>(acc_s, query_fragments, key);
      } else {
        multiply_query_key<Config>(acc_s, TileReader<kD, true, false>(sQ, warp_row, 0, ptx::launder(thread) % 32), key);
      }
      apply_score_and_mask<Config>(acc_s, params, transform, &shared_memory.band,
                                   block < range.full_begin || block >= range.full_end, tile.linear_head,
                                   tile.i0 + warp_row, block * kN);

      float lane_max[kTiles][2];
      bool grown = false;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) grown |= softmax[m].observe(acc_s[m], transform.lag, lane_max[m]);
      if (__any_sync(~0u, grown)) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          float correction[2];
          softmax[m].raise(lane_max[m], transform.log2_scale, correction);
          scale_rows(acc_o[m], correction);
        }
      }
      uint32_t p[kTiles][kN / 4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        softmax[m].exponentiate(acc_s[m], transform.log2_scale);
        pack_fragment<Element>(acc_s[m], p[m]);
      }
      if constexpr (!kTwoStages) {
        // The values are here, and every warp is done with the keys.
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (block > range.begin) load_keys(sK, params.k, block - 1, kN);
        ptx::cp_async_commit();
      }
      multiply_value<Config>(acc_o, p, TileReader<kD, true, true>(sV + now, 0, 0, ptx::launder(thread) % 32));
    }
  }

  // A block that saw no key has not touched shared memory yet; one that did is done with its own rows of Q. Where to
  // write is found out again rather than held in registers.
  const ForwardTile<Config> target(shape, ptx::launder(blockIdx.x), query_blocks);
  const int valid_rows = make_band(shape, params.band, target.head.b, target.head.kh).T - target.i0;
  const int rows = static_cast<int>(shape.T) - target.i0;
  float* gLse = params.lse + int64_t{target.linear_head} * shape.T + target.i0;
  if constexpr (!Config::kQueryInRegisters) __syncwarp();  // the output goes where the warp has read its Q
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    float inverse[2], lse[2];
    softmax[m].finish(transform.log2_scale, sink, inverse, lse);
    const int row = warp_row + 16 * m + lane / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Queries past the sequence's length were computed with the rest where the band hides nothing.
      const bool valid = row + 8 * r < valid_rows;
      if (!valid) inverse[r] = 0.0f;
      if (lane % 4 == 0 && row + 8 * r < rows) gLse[row + 8 * r] = valid ? lse[r] : -infinity();
    }
    // A choice and not a product where there is nothing: what was accumulated may be NaN.
#pragma unroll
    for (int e = 0; e < kD / 2; ++e) {
      acc_o[m][e] = inverse[e / 2 % 2] == 0.0f ? 0.0f : acc_o[m][e] * inverse[e / 2 % 2];
    }
    store_fragment<Element, kD>(sQ, acc_o[m], warp_row + 16 * m, 0, lane);
  }
  __syncwarp();
  store_rows<Element, kD, 32>(sQ, static_cast<Element*>(params.o) + target.offset, target.stride, warp_row,
                              warp_row + 16 * kTiles, rows, head_dim, aligned, lane);
}

}  // namespace jax_flash::sm80
