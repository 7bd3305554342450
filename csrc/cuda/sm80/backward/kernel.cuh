// Attention backward: a block owns kBlockN keys of one KV head and walks over the queries that see them, of all query
// heads that share the KV head. dK and dV stay in registers; dQ is summed over blocks in the workspace, in float32.
//
// With S = Q K^T, P = exp(S - lse):  dV = P^T dO,  dP = dO V^T,  dS = P * (dP - delta),  dQ = dS K,  dK = dS^T Q.
// S and dP are split over the warps differently from dK, dV and dQ, so P and dS go through shared memory. The
// exponentials run beside dP's matrix product, and dS is made beside dV's.
#pragma once

#include "cuda/sm80/backward/tile.cuh"
#include "cuda/sm80/backward/workspace.h"

namespace jax_flash::sm80 {

// The steps of a block: query block by query block, query head by query head.
struct Step {
  int g, block;
  __device__ __forceinline__ void advance(const BlockRange& range) {
    if (++block == range.end) {
      block = range.begin;
      ++g;
    }
  }
};

// Where dQ is summed in order, key blocks take turns, the last one first: under causal masks and windows that is the
// order in which they reach a query. A counter is shared by 64 queries, which may be two tiles; a block adds to one
// after the other. How many additions come before key_block's to the tile at query i0?
template <class Config>
__device__ __forceinline__ int additions_before(const Band& band, int32_t i0, int key_block) {
  int count = 0;
  for (int32_t i = i0 / 64 * 64; i < i0 / 64 * 64 + 64; i += Config::kBlockM) {
    const BlockRange visitors = key_blocks(band, i, i + Config::kBlockM, Config::kBlockN);
    count += max_i32(0, visitors.end - max_i32(visitors.begin, i < i0 ? key_block : key_block + 1));
  }
  return count;
}

// Which part of the work is this block's. Where blocks add in order they draw numbers as they start: nothing says in
// which order that is, and one must not wait for another that has no place to run. (Without queries there is no
// preparation, whose first row clears the counter, and nothing to add.)
template <class SharedMemory>
__device__ __forceinline__ int block_number(SharedMemory& shared_memory, const BackwardParams& params,
                                            const BackwardWorkspace& workspace) {
  if (!params.deterministic || params.shape.T == 0) return blockIdx.x;
  if (threadIdx.x == 0) shared_memory.number = static_cast<int>(ptx::fetch_add(workspace.next_block, 1));
  __syncthreads();
  return shared_memory.number;
}

// This lane's two rows of every tile of S.
template <class Config>
__device__ __forceinline__ void read_statistic(float (&out)[Config::kScoreTiles][2], const float* sStatistic) {
  const Place place;
  const int row = score_row<Config>(place.warp) + place.lane / 4;
#pragma unroll
  for (int m = 0; m < Config::kScoreTiles; ++m) {
    out[m][0] = sStatistic[row + 16 * m];
    out[m][1] = sStatistic[row + 16 * m + 8];
  }
}

// Turns products into scores: softcap, band, boolean mask. `i0` and `j0` are the tile's first query and key.
template <class Config>
__device__ __forceinline__ void apply_score_and_mask(typename Config::ScoreFragment& acc, const BackwardParams& params,
                                                     const ScoreTransform& transform, const Band* band, bool needs_band,
                                                     int kv_head, int g, int32_t i0, int32_t j0) {
  if (transform.needed) {
#pragma unroll
    for (int m = 0; m < Config::kScoreTiles; ++m) transform.apply(acc[m]);
  }
  if (needs_band) {
    const Place place;
    const int32_t i = i0 + score_row<Config>(place.warp) + place.lane / 4;
    const int32_t j = j0 + score_col<Config>(place.warp);
#pragma unroll
    for (int m = 0; m < Config::kScoreTiles; ++m) apply_band(acc[m], *band, i + 16 * m, j, place.lane);
  }
  if (params.mask.words) {
    const Place place;
    const int32_t i = i0 + score_row<Config>(place.warp) + place.lane / 4;
    const int32_t j = j0 + score_col<Config>(place.warp);
    const int K = static_cast<int>(params.shape.K), head = ptx::launder(kv_head);
    const MaskBits bits = MaskBits::make(params.shape, params.mask, head / K, head % K, g);
#pragma unroll
    for (int m = 0; m < Config::kScoreTiles; ++m) {
      apply_bits<Config::kScoreCols % 32 == 0 ? 32 : 16>(acc[m], bits, i + 16 * m, j, place.lane);
    }
  }
}

// P *= d tanh(x) = 1 - tanh(x)^2. The tanh follows from P, and where P is 0 it does not matter.
template <class Config>
__device__ __forceinline__ void multiply_softcap_derivative(typename Config::ScoreFragment& p,
                                                            const float (&lse2)[Config::kScoreTiles][2],
                                                            float log2_scale) {
  const float inverse = 1.0f / log2_scale;
#pragma unroll
  for (int m = 0; m < Config::kScoreTiles; ++m) {
#pragma unroll
    for (int e = 0; e < Config::kScoreFloats; ++e) {
      const float tanh = (ptx::lg2(p[m][e]) + lse2[m][e / 2 % 2]) * inverse;
      p[m][e] = p[m][e] == 0.0f ? 0.0f : p[m][e] * (1.0f - tanh * tanh);  // NaN stays
    }
  }
}

// Rows of Q and dO that see no key become zero: a gradient that comes back to one may be NaN, and 0 * NaN is not 0. By
// the whole block, where all of the tile has come; `rows`: that exist in it.
template <class Config>
__device__ __forceinline__ void clear_unseen_rows(uint32_t sQueries, uint32_t sOut, const float* sLse2, int rows) {
  using Layout = TileLayout<Config::kHeadDim>;
  const int thread = ptx::launder(threadIdx.x);
  const bool unseen = thread < Config::kBlockM && thread < rows && sLse2[thread] == infinity();
  if (!__syncthreads_or(unseen)) return;
  if (unseen) {
#pragma unroll 1
    for (int chunk = 0; chunk < Config::kHeadDim / 8; ++chunk) {
      ptx::st_shared(sQueries + Layout::offset(thread, chunk), make_uint4(0, 0, 0, 0));
      ptx::st_shared(sOut + Layout::offset(thread, chunk), make_uint4(0, 0, 0, 0));
    }
  }
  __syncthreads();
}

template <class Config>
__device__ __forceinline__ void store_scores(uint32_t tile, const typename Config::ScoreFragment& acc) {
  const Place place;
#pragma unroll
  for (int m = 0; m < Config::kScoreTiles; ++m) {
    store_fragment<typename Config::Element, Config::kBlockN>(tile, acc[m], score_row<Config>(place.warp) + 16 * m,
                                                              score_col<Config>(place.warp), place.lane);
  }
}

// f(row tile, element) for the step-th of kSteps shares of a fragment of S.
template <class Config, int kSteps, class Function>
__device__ __forceinline__ void for_share(int step, const Function& f) {
  constexpr int kAll = Config::kScoreTiles * Config::kScoreFloats;
  constexpr int kMost = (kAll + kSteps - 1) / kSteps;  // a constant, or the loop would be unrolled too late
#pragma unroll
  for (int n = 0; n < kMost; ++n) {
    const int i = kAll * step / kSteps + n;
    if (i < kAll * (step + 1) / kSteps) f(i / Config::kScoreFloats, i % Config::kScoreFloats);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardParams params, const __grid_constant__ ScoreTransform transform,
                    const __grid_constant__ BackwardWorkspace workspace, const int key_block_count,
                    const bool aligned) {
  if constexpr (!compiled_here(Config::kFits)) return;
  using Element = typename Config::Element;
  using SharedMemory = typename Config::SharedMemory;
  constexpr int kM = Config::kBlockM, kN = Config::kBlockN, kD = Config::kHeadDim;
  // Where Q or dO has one buffer, the next step's load waits until all warps are done with it, and runs under dQ.
  constexpr bool kLoadEarly = Config::kQueryStages == 2 && Config::kOutStages == 2;
  constexpr uint32_t kTileBytes = kM * kD * sizeof(Element);
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  SharedMemory& shared_memory = *reinterpret_cast<SharedMemory*>(shared_bytes);
  const uint32_t shared = ptx::shared_address(shared_bytes);
  const uint32_t sK = shared + offsetof(SharedMemory, k), sV = shared + offsetof(SharedMemory, v);
  const uint32_t sP = shared + offsetof(SharedMemory, p), sS = shared + offsetof(SharedMemory, d_s);

  const int thread = threadIdx.x;
  const Shape& shape = params.shape;

  // Key blocks of one head follow each other: they share Q, dO and the dQ sums in L2. The first ones go first: under a
  // causal mask they take longest. Where they add in order, they go in that order.
  const int number = block_number(shared_memory, params, workspace);
  const int kv_head = number / key_block_count;  // over [B, K]
  const int position = number % key_block_count;
  const int key_block = params.deterministic ? key_block_count - 1 - position : position;
  const int j0 = key_block * kN;
  const int G = static_cast<int>(shape.G), head_dim = static_cast<int>(shape.H);
  const int b = kv_head / static_cast<int>(shape.K), kh = kv_head % static_cast<int>(shape.K);
  const int64_t query_stride = shape.K * shape.G * head_dim, key_stride = shape.K * head_dim;
  const int64_t query_offset = b * shape.T * query_stride + kh * shape.G * head_dim;
  const int64_t key_offset = (b * shape.S + j0) * key_stride + kh * head_dim;
  const Band band = make_band(shape, params.band, b, kh);
  const BlockRange range = query_blocks(band, j0, j0 + kN, kM);

  typename Config::KeyFragment acc_k, acc_v;
  clear(acc_k);
  clear(acc_v);

  if (range.begin < range.end) {
    using Copy = TileCopy<Element, kD, Config::kThreads>;
    const auto query_tile = [&](int parity) {
      return shared + static_cast<uint32_t>(offsetof(SharedMemory, q)) + parity % Config::kQueryStages * kTileBytes;
    };
    const auto out_tile = [&](int parity) {
      return shared + static_cast<uint32_t>(offsetof(SharedMemory, d_o)) + parity % Config::kOutStages * kTileBytes;
    };
    const auto load_queries = [&](int parity, const Step& step) {
      const Copy copy(ptx::launder(thread), head_dim, aligned, query_stride);
      const int64_t offset = query_offset + step.g * head_dim + int64_t{step.block} * kM * query_stride;
      const int rows = shared_memory.band.T - step.block * kM;
      copy.template load<kM>(query_tile(parity), static_cast<const Element*>(params.q) + offset, rows);
      copy.template load<kM>(out_tile(parity), static_cast<const Element*>(params.d_o) + offset, rows);
      if (thread < kM / 2) {
        const int64_t row = (int64_t{kv_head} * G + step.g) * workspace.rows + step.block * kM;
        const bool second = thread >= kM / 4;
        const int i = thread % (kM / 4) * 4;
        float* target = (second ? shared_memory.delta[parity] : shared_memory.lse2[parity]) + i;
        ptx::cp_async_16(ptx::shared_address(target), (second ? workspace.delta : workspace.lse2) + row + i);
      }
    };
    if (thread == 0) shared_memory.band = band;
    __syncthreads();
    const Copy key_copy(thread, head_dim, aligned, key_stride);
    key_copy.template load<kN>(sK, static_cast<const Element*>(params.k) + key_offset, band.S - j0);
    key_copy.template load<kN>(sV, static_cast<const Element*>(params.v) + key_offset, band.S - j0);
    Step step{0, range.begin};
    load_queries(0, step);
    ptx::cp_async_commit();

    int parity = 0;
    int* semaphore = nullptr;  // of the dQ tile that this block has added to and must release
    int released = 0;
#pragma unroll 1
    while (step.g < G) {
      const Step now = step;
      step.advance(range);
      const int i0 = now.block * kM;
      const int64_t head = int64_t{kv_head} * G + now.g;

      // This step's tiles are here, and every warp is past the previous step.
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (semaphore && thread == 0) ptx::store_release(semaphore, released);
      const bool needs_band = now.block < range.full_begin || now.block >= range.full_end;
      if (params.mask.words || needs_band) {
        clear_unseen_rows<Config>(query_tile(parity), out_tile(parity), shared_memory.lse2[parity],
                                  shared_memory.band.T - i0);
      }
      if (kLoadEarly && step.g < G) load_queries(parity ^ 1, step);
      if (kLoadEarly) ptx::cp_async_commit();

      typename Config::ScoreFragment p, d_s;
      multiply_scores<Config>(p, query_tile(parity), sK, Nothing());
      apply_score_and_mask<Config>(p, params, transform, &shared_memory.band, needs_band, kv_head, now.g, i0, j0);

      float lse2[Config::kScoreTiles][2];
      read_statistic<Config>(lse2, shared_memory.lse2[parity]);
      multiply_scores<Config>(d_s, out_tile(parity), sV, [&](int k_step) {
        for_share<Config, kD / 16>(
            k_step, [&](int m, int e) { p[m][e] = ptx::ex2(p[m][e] * transform.log2_scale - lse2[m][e / 2 % 2]); });
      });
      store_scores<Config>(sP, p);
      if (transform.softcap > 0) multiply_softcap_derivative<Config>(p, lse2, transform.log2_scale);
      float delta[Config::kScoreTiles][2];
      read_statistic<Config>(delta, shared_memory.delta[parity]);
      __syncthreads();  // P is complete

      accumulate_keys<Config>(acc_v, sP, out_tile(parity), [&](int k_step) {
        for_share<Config, kM / 16>(k_step,
                                   [&](int m, int e) { d_s[m][e] = p[m][e] * (d_s[m][e] - delta[m][e / 2 % 2]); });
      });
      store_scores<Config>(sS, d_s);
      if (params.deterministic) {
        semaphore = workspace.dq_semaphores + head * (workspace.rows / 64) + i0 / 64;
        const int expected = additions_before<Config>(shared_memory.band, i0, key_block);
        released = expected + 1;
        if (thread == 0) {
          while (ptx::load_acquire(semaphore) != expected) {
          }
        }
      }
      __syncthreads();  // dS is complete

      float* gTile = workspace.dq + (head * workspace.rows + i0) * kD;
      if constexpr (kLoadEarly) {
        add_query_gradient<Config>(gTile, sS, sK);
        accumulate_keys<Config>(acc_k, sS, query_tile(parity), Nothing());
      } else {
        accumulate_keys<Config>(acc_k, sS, query_tile(parity), Nothing());
        __syncthreads();  // every warp is done with Q and dO
        if (step.g < G) load_queries(parity ^ 1, step);
        ptx::cp_async_commit();
        add_query_gradient<Config>(gTile, sS, sK);
      }
      parity ^= 1;
    }
    __syncthreads();  // every warp is done with K and V, which become staging
    if (semaphore && thread == 0) ptx::store_release(semaphore, released);
  }

#pragma unroll
  for (int m = 0; m < Config::kKeyTiles; ++m) {
#pragma unroll
    for (int e = 0; e < Config::kKeyCols * 8; ++e) acc_k[m][e] *= params.score.softmax_scale;
  }
  const int rows = static_cast<int>(shape.S) - j0;
  store_key_gradient<Config>(sV, params.dv, acc_v, key_offset, key_stride, rows, head_dim, aligned);
  store_key_gradient<Config>(sK, params.dk, acc_k, key_offset, key_stride, rows, head_dim, aligned);
}

}  // namespace jax_flash::sm80
