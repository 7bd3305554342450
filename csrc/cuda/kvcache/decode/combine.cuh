// Bringing partial results together: the warps of a block through shared memory, the blocks of a segment through the
// workspace.
#pragma once

#include "cuda/arrival_counter.cuh"
#include "cuda/kvcache/decode/warp_state.cuh"
#include "cuda/ptx/ordered.cuh"

namespace jax_flash::decode {

// Shared memory after the stages, [warps][kStages][kStageBytes].
template <class Config>
struct SharedState {
  typename Config::Element q[Config::kRows * Config::kDim];
  float maximum[Config::kMaxWarps][Config::kRows];  // of each warp
  float sum[Config::kMaxWarps][Config::kRows];
  Schedule<Config::kKeys> schedule;
  KvcacheParams params;                   // for what is not inlined, which has to read the kernel's own from memory
  uint8_t free_stage[Config::kMaxWarps];  // holds no tile
  bool last;                              // this block is the last of its segment

  // By one warp. Every lane asks for all of its words before it stores one.
  __device__ __forceinline__ void keep(const KvcacheParams& passed) {
    constexpr int kWords = sizeof(KvcacheParams) / 4, kEach = (kWords + 31) / 32;
    const int lane = threadIdx.x % 32;
    uint32_t words[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (32 * i + lane < kWords) words[i] = reinterpret_cast<const uint32_t*>(&passed)[32 * i + lane];
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (32 * i + lane < kWords) reinterpret_cast<uint32_t*>(&params)[32 * i + lane] = words[i];
    }
  }

  static constexpr int stage_bytes(int warps) { return warps * Config::kStages * Config::kStageBytes; }
  static constexpr int bytes(int warps) { return stage_bytes(warps) + static_cast<int>(sizeof(SharedState)); }
};

// exp2(from - to), 0 for nothing.
__device__ __forceinline__ float rescale(float from, float to) {
  return from == -infinity() ? 0.0f : ptx::ex2(from - to);
}

// Two neighbouring elements of the output of one query row, and the row's statistics.
struct Pair {
  float2 o;
  float maximum, sum;

  __device__ __forceinline__ static Pair nothing() { return Pair{make_float2(0, 0), -infinity(), 0.0f}; }

  __device__ __forceinline__ void scale(float factor) {
    o.x *= factor, o.y *= factor;
    sum *= factor;
  }

  // A score more, without a value; base 2, as the maximum.
  __device__ __forceinline__ void add_sink(float score) {
    if (score == -infinity()) return;
    if (sum == 0.0f) o = make_float2(0, 0), maximum = -infinity();
    const float most = fmaxf(maximum, score);
    scale(rescale(maximum, most));
    sum += ptx::ex2(score - most);
    maximum = most;
  }

  __device__ __forceinline__ void add(const Pair& other) {
    o.x += other.o.x, o.y += other.o.y;
    sum += other.sum;
  }
};

// Writes two elements of one row and, once a row, the LSE. `index`: of the row, t * G + g.
template <class Config>
__device__ __forceinline__ void write_output(const KvcacheParams& params, int32_t b, int32_t kh, int32_t index, int d,
                                             Pair pair) {
  using Element = typename Config::Element;
  const int32_t H = params.H, G = params.G;
  const int32_t t = query_of(params, index), g = index - t * G;
  const int64_t row = (static_cast<int64_t>(b) * params.T + t) * params.K * G + kh * G + g;
  Element* gO = static_cast<Element*>(params.o) + row * H;
  if (params.sinks) pair.add_sink(params.sinks[(static_cast<int64_t>(b) * params.K + kh) * G + g] * kLog2e);
  const bool seen = pair.sum != 0.0f;  // true for NaN: what is not a number stays so
  const float inverse = 1.0f / pair.sum;
  // A choice and not a product where there is nothing: what was accumulated may be NaN.
  const uint32_t elements = seen ? pack<Element>(pair.o.x * inverse, pair.o.y * inverse) : 0;
  if (H % 2 == 0) {
    if (d < H) *reinterpret_cast<uint32_t*>(gO + d) = elements;
  } else {
    if (d < H) gO[d].bits = static_cast<uint16_t>(elements);
    if (d + 1 < H) gO[d + 1].bits = static_cast<uint16_t>(elements >> 16);
  }
  if (d == 0) {
    const int64_t at = ((static_cast<int64_t>(b) * params.K + kh) * G + g) * params.T + t;
    params.lse[at] = seen ? (pair.maximum + log2f(pair.sum)) * kLn2 : -infinity();
  }
}

template <class Config>
__device__ __forceinline__ float* slot_of(const KvcacheParams& params, int64_t counter_bytes, int32_t slot) {
  float* slots = reinterpret_cast<float*>(static_cast<char*>(params.workspace) + counter_bytes);
  return slots + static_cast<int64_t>(slot) * (Config::kRows * (Config::kDim + 2));
}

template <class Config>
__device__ __forceinline__ void write_partial(float* slot, int row, int d, const Pair& pair) {
  __stcg(reinterpret_cast<float2*>(slot + row * Config::kDim + d), pair.o);
  if (d == 0)
    __stcg(reinterpret_cast<float2*>(slot + Config::kRows * Config::kDim) + row, make_float2(pair.maximum, pair.sum));
}

template <class Config>
__device__ __forceinline__ Pair read_partial(const float* slot, int row, int d) {
  const float2 statistics = __ldcg(reinterpret_cast<const float2*>(slot + Config::kRows * Config::kDim) + row);
  return Pair{__ldcg(reinterpret_cast<const float2*>(slot + row * Config::kDim + d)), statistics.x, statistics.y};
}

// The segment's result from the partial results of all its blocks, by the one that came last. Each thread asks for two
// elements of up to kAtOnce partial results before it uses one.
template <class Config>
__device__ __forceinline__ void combine_blocks(const KvcacheParams& params, int64_t counter_bytes, const Piece& piece,
                                               int rows) {
  constexpr int kAtOnce = 16;
  constexpr int64_t kSlot = Config::kRows * (Config::kDim + 2);
  const int32_t parts = piece.parts, step = piece.explicit_split ? 1 : 2;
  const float* first = slot_of<Config>(params, counter_bytes, piece.part_slot(0));
  const float* line =
      slot_of<Config>(params, counter_bytes, piece.part_slot(1) - step);  // part p > 0 lies at p * step slots
  for (int i = threadIdx.x; i < rows * (Config::kDim / 2); i += blockDim.x) {
    const int row = i / (Config::kDim / 2), d = i % (Config::kDim / 2) * 2;
    Pair total = Pair::nothing();
#pragma unroll 1
    for (int begin = 0; begin < parts; begin += kAtOnce) {
      Pair pairs[kAtOnce];
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) {
        const int part = begin + p;
        pairs[p] = Pair::nothing();
        if (part < parts) pairs[p] = read_partial<Config>(part ? line + part * (step * kSlot) : first, row, d);
      }
      float most = total.maximum;
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) most = fmaxf(most, pairs[p].maximum);
      total.scale(rescale(total.maximum, most));
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) {
        pairs[p].scale(rescale(pairs[p].maximum, most));
        total.add(pairs[p]);
      }
      total.maximum = most;
    }
    write_output<Config>(params, piece.b, piece.kh, piece.row_block * Config::kRows + row, d, total);
  }
}

// The block's result from its warps'. Every warp lends the stage that holds none of its tiles as space for 16 query
// rows.
template <class Config>
__device__ __forceinline__ void combine_warps(const KvcacheParams& params, int64_t counter_bytes, const Piece& piece,
                                              WarpState<Config>& state, unsigned char* sStages, int free_stage,
                                              SharedState<Config>& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int rows = min_i32(Config::kRows, params.T * params.G - piece.row_block * Config::kRows);
#pragma unroll
  for (int c = 0; c < WarpState<Config>::kColumns; ++c) {
    const float sum = column_sum(state.sum[c]);
    if (lane < 4) {
      shared.maximum[warp][state.row_of(c)] = state.maximum[c];
      shared.sum[warp][state.row_of(c)] = sum;
    }
  }
  if (lane == 0) shared.free_stage[warp] = static_cast<uint8_t>(free_stage);
  const auto space = [&](int w, int stage) {
    return reinterpret_cast<float*>(sStages + (w * Config::kStages + stage) * Config::kStageBytes);
  };
  float* slot = piece.parts > 1 ? slot_of<Config>(params, counter_bytes, piece.slot) : nullptr;
  // Row r's elements lie with their index's bits 3 and 4 turned by r / 2, so that the lanes of a quad do not meet on a
  // bank.
  const auto swizzle = [](int row, int d) { return row % 16 * Config::kDim + (d ^ (row / 2 % 4 * 8)); };
#pragma unroll
  for (int first = 0; first < Config::kRows; first += 16) {
    float* own = space(warp, free_stage);
#pragma unroll
    for (int n = first / 8; n < first / 8 + 2 && n < Config::kRowTiles; ++n) {
#pragma unroll
      for (int i = 0; i < Config::kDim / 16; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          own[swizzle(state.row_of(2 * n + e % 2), 16 * i + e / 2 * 8 + lane / 4)] = state.rO[n][i][e];
        }
      }
    }
    __syncthreads();
    const int here = min_i32(16, rows - first);
    for (int i = threadIdx.x; i < here * (Config::kDim / 2); i += blockDim.x) {
      const int row = first + i / (Config::kDim / 2), d = i % (Config::kDim / 2) * 2;
      Pair total = Pair::nothing();
#pragma unroll
      for (int w = 0; w < Config::kMaxWarps; ++w) {
        if (w < warps) total.maximum = fmaxf(total.maximum, shared.maximum[w][row]);
      }
#pragma unroll
      for (int w = 0; w < Config::kMaxWarps; ++w) {
        if (w < warps) {
          Pair pair{*reinterpret_cast<const float2*>(space(w, shared.free_stage[w]) + swizzle(row, d)), 0.0f,
                    shared.sum[w][row]};
          pair.scale(rescale(shared.maximum[w][row], total.maximum));
          total.add(pair);
        }
      }
      if (slot) {
        write_partial<Config>(slot, row, d, total);
      } else {
        write_output<Config>(params, piece.b, piece.kh, piece.row_block * Config::kRows + row, d, total);
      }
    }
    __syncthreads();
  }
}

}  // namespace jax_flash::decode
