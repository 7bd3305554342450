// The arithmetic of one warp: scores of a tile, online softmax, values.
//
// Products are taken transposed: keys and head dims are the 16 rows of an mma, query rows its 8 columns. A decode step
// has few query rows (G, times the tokens of a speculative step), so that eight of them waste less than sixteen would.
// Scores come out as acc[.][4]: elements 0 and 2 belong to query row 2 * (lane % 4) and keys lane / 4 and lane / 4 + 8;
// 1 and 3 to the next query row. The output accumulator has head dims where scores have keys, so both agree on a lane's
// two query rows.
#pragma once

#include "cuda/kvcache/decode/loader.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/movmatrix.cuh"
#include "cuda/tile/softmax.cuh"

namespace jax_flash::decode {

__device__ __forceinline__ float column_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 4));
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 8));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 16));
}

__device__ __forceinline__ float column_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 4);
  x += __shfl_xor_sync(~0u, x, 8);
  return x + __shfl_xor_sync(~0u, x, 16);
}

// The query that row `index` of a segment belongs to.
__device__ __forceinline__ int32_t query_of(const KvcacheParams& params, int32_t index) {
  return params.T == 1 ? index >= params.G : divide(index, params.G);
}

template <class Config>
struct WarpState {
  using Element = typename Config::Element;
  static constexpr int kColumns = 2 * Config::kRowTiles;  // query rows of a lane

  uint32_t rQ[Config::kRowTiles][Config::kDim / 16][2];
  float rO[Config::kRowTiles][Config::kDim / 16][4];
  float maximum[kColumns];  // exponent of 2
  float sum[kColumns];      // of this lane's keys

  // The query row within the row block of this lane's column c.
  __device__ __forceinline__ static int row_of(int c) { return c / 2 * 8 + 2 * (threadIdx.x % 4) + c % 2; }

  __device__ __forceinline__ static bool reads_directly(const KvcacheParams& params) {
    return params.rotary.dim == 0 && params.H % 2 == 0;
  }

  // Queries that cannot be read as they are (rotary, or heads of odd size) go through shared memory, sQ [kRows, kDim]:
  // each thread of the block prepares a part. A barrier separates this from the last use of sQ.
  __device__ __forceinline__ void load_queries(const KvcacheParams& params, const KvcacheParams& sParams,
                                               const Piece& piece, Element* sQ) {
    const int32_t H = params.H;
    const int lane = threadIdx.x % 32;
    const bool direct = reads_directly(params);
    const auto query = [&](int row, int32_t* t) {
      const int32_t index = piece.row_block * Config::kRows + row;
      *t = query_of(params, index);
      const int64_t head = (static_cast<int64_t>(piece.b) * params.T + *t) * params.K + piece.kh;
      return static_cast<const Element*>(params.q) + (head * params.G + index - *t * params.G) * H;
    };
    if (!direct) {
#pragma unroll 1
      for (int i = threadIdx.x; i < Config::kRows * Config::kChunks; i += blockDim.x) {
        const int row = i / Config::kChunks, d = i % Config::kChunks * 8;
        int32_t t;
        const Element* gQ = query(row, &t);
        uint4 chunk = make_uint4(0, 0, 0, 0);
        if (t < params.T) {
          chunk = load_rotated_chunk(sParams, piece.b, piece.kh, piece.sequence.length, params.rotary.per_query ? t : 0,
                                     gQ, d);
        }
        *reinterpret_cast<uint4*>(sQ + i * 8) = chunk;
      }
      __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < Config::kRowTiles; ++n) {
      const int row = 8 * n + lane / 4;
      int32_t t = 0;
      const Element* source = direct ? query(row, &t) : sQ + row * Config::kDim;
      const int32_t valid = !direct ? Config::kDim : t < params.T ? H : 0;  // elements of the row
#pragma unroll
      for (int i = 0; i < Config::kDim / 8; ++i) {
        const int32_t d = 8 * i + 2 * (lane % 4);
        rQ[n][i / 2][i % 2] = d < valid ? *reinterpret_cast<const uint32_t*>(source + d) : 0;
      }
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < Config::kRowTiles; ++n) {
#pragma unroll
      for (int i = 0; i < Config::kDim / 16; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) rO[n][i][e] = 0.0f;
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      maximum[c] = -infinity();
      sum[c] = 0.0f;
    }
  }

  // `masked`: some position of the tile may not be seen by some query. `present`: positions that hold a key.
  __device__ __forceinline__ void visit(const ScoreTransform& transform, const Piece& piece, int32_t G, uint32_t sKeys,
                                        int32_t tile, uint32_t present, bool masked) {
    constexpr int kBlocks = Config::kKeys / 16;
    const int lane = threadIdx.x % 32, r = lane % 8, matrix = lane / 8;
    float rS[kBlocks][Config::kRowTiles][4];
    // Two chains of products for each score block: the latency of one would be in the way.
    float rS2[kBlocks][Config::kRowTiles][4];
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) {
#pragma unroll
      for (int n = 0; n < Config::kRowTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) rS[k][n][e] = rS2[k][n][e] = 0.0f;
      }
#pragma unroll
      for (int i = 0; i < Config::kDim / 16; ++i) {
        uint32_t a[4];
        ptx::ldmatrix_x4(a, sKeys + tile_offset<Config>(16 * k + matrix % 2 * 8 + r, 2 * i + matrix / 2));
#pragma unroll
        for (int n = 0; n < Config::kRowTiles; ++n) {
          ptx::mma_m16n8k16(i % 2 ? rS2[k][n] : rS[k][n], a, rQ[n][i][0], rQ[n][i][1], Element{});
        }
      }
#pragma unroll
      for (int n = 0; n < Config::kRowTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) rS[k][n][e] += rS2[k][n][e];
        if (transform.needed) transform.apply(rS[k][n]);
      }
    }
    if (masked) mask(piece, G, rS, tile, present);
    apply_transform(transform, rS);

    const uint32_t sValues = sKeys + Config::kTileBytes;
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) {
      uint32_t rP[Config::kRowTiles][2];
#pragma unroll
      for (int n = 0; n < Config::kRowTiles; ++n) {
        rP[n][0] = ptx::movmatrix_trans(pack<Element>(rS[k][n][0], rS[k][n][1]));
        rP[n][1] = ptx::movmatrix_trans(pack<Element>(rS[k][n][2], rS[k][n][3]));
      }
#pragma unroll
      for (int i = 0; i < Config::kDim / 16; ++i) {
        uint32_t a[4];
        ptx::ldmatrix_x4_trans(a, sValues + tile_offset<Config>(16 * k + matrix / 2 * 8 + r, 2 * i + matrix % 2));
#pragma unroll
        for (int n = 0; n < Config::kRowTiles; ++n) ptx::mma_m16n8k16(rO[n][i], a, rP[n][0], rP[n][1], Element{});
      }
    }
  }

 private:
  template <int kBlocks>
  __device__ __forceinline__ void mask(const Piece& piece, int32_t G, float (&rS)[kBlocks][Config::kRowTiles][4],
                                       int32_t tile, uint32_t present) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int32_t t = divide(piece.row_block * Config::kRows + row_of(c), G);
      const int32_t begin = piece.sequence.key_begin(t), end = piece.sequence.key_end(t);
#pragma unroll
      for (int k = 0; k < kBlocks; ++k) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int in_tile = 16 * k + 8 * h + lane / 4;
          const int32_t j = tile * Config::kKeys + in_tile;
          if (!(present >> in_tile & 1) || j < begin || j >= end) rS[k][c / 2][2 * h + c % 2] = -infinity();
        }
      }
    }
  }

  // Scores to probabilities, against the running maximum.
  template <int kBlocks>
  __device__ __forceinline__ void apply_transform(const ScoreTransform& transform,
                                                  float (&rS)[kBlocks][Config::kRowTiles][4]) {
    float factor[kColumns];
    bool grown = false;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      float most = -infinity();
#pragma unroll
      for (int k = 0; k < kBlocks; ++k) most = fmaxf(most, fmaxf(rS[k][c / 2][c % 2], rS[k][c / 2][2 + c % 2]));
      most = fmaxf(maximum[c], column_max(most) * transform.log2_scale);
      const float zero = most == -infinity() ? 0.0f : most;  // -inf - -inf is no number
      factor[c] = ptx::ex2(maximum[c] - zero);
      grown |= most != maximum[c];
      maximum[c] = most;
      float added = 0.0f;
#pragma unroll
      for (int k = 0; k < kBlocks; ++k) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& s = rS[k][c / 2][2 * h + c % 2];
          s = ptx::ex2(s * transform.log2_scale - zero);
          added += s;
        }
      }
      sum[c] = sum[c] * factor[c] + added;
    }
    if (!__any_sync(~0u, grown)) return;
#pragma unroll
    for (int n = 0; n < Config::kRowTiles; ++n) {
#pragma unroll
      for (int i = 0; i < Config::kDim / 16; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) rO[n][i][e] *= factor[2 * n + e % 2];
      }
    }
  }
};

}  // namespace jax_flash::decode
