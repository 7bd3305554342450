// The decode kernel. Every warp of a block runs its own pipeline of tiles (load, scores, softmax, values) with no
// barrier but its own; blocks are persistent and walk the pieces that the schedule gives them.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/kvcache/decode/combine.cuh"
#include "cuda/kvcache/decode/config.h"
#include "cuda/ptx/dependent_launch.cuh"

namespace jax_flash::decode {

template <class Config>
__global__ void __launch_bounds__(Config::kMaxWarps * 32, 1)
    decode_kernel(const __grid_constant__ KvcacheParams passed, int32_t row_blocks, int64_t counter_bytes,
                  bool single) {
#if __CUDA_ARCH__ >= 900
  ptx::wait_for_previous_kernel();  // the launcher lets this one be launched meanwhile
#endif
  // A copy whose address nothing takes: what is inlined here reads its members as constants.
  const KvcacheParams params = passed;
  extern __shared__ __align__(1024) unsigned char sStages[];
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  auto& shared = *reinterpret_cast<SharedState<Config>*>(sStages + SharedState<Config>::stage_bytes(warps));
  const uint32_t sOwn = ptx::shared_address(sStages + warp * Config::kStages * Config::kStageBytes);
  const ScoreTransform transform = ScoreTransform::make(params.score.softmax_scale, params.score.softcap);
  constexpr uint32_t kAll = Config::kKeys == 32 ? ~0u : (1u << (Config::kKeys % 32)) - 1;

  if (warp == warps - 1) shared.keep(passed);
  if (warp == 0) shared.schedule.start(params, row_blocks, single);
  __syncthreads();
  Loader<Config> loader(params, shared.params, shared.schedule, warps, sOwn);
  WarpState<Config> state;
  for (;;) {
    // The queries of the first piece are asked for before the queue of tiles that would delay them.
    const bool early = state.reads_directly(params);
    if (early && shared.schedule.count > 0) {
      state.load_queries(params, shared.params, shared.schedule.pieces[0], shared.q);
    }
    // Which positions hold a key, for the tile at hand (element 0) and those on their way.
    uint32_t present[Config::kStages];
    int stage = 0;
#pragma unroll 1
    for (int s = 0; s < Config::kStages - 1; ++s) {
#pragma unroll
      for (int i = 0; i + 1 < Config::kStages; ++i) present[i] = present[i + 1];
      present[Config::kStages - 2] = loader.issue(s);
    }
#pragma unroll 1
    for (int index = 0; index < shared.schedule.count; ++index) {
      const Piece& piece = shared.schedule.pieces[index];
      const ArrivalCounter counter(static_cast<uint64_t*>(params.workspace) + piece.segment);
      const bool arrives = piece.parts > 1 && threadIdx.x == 0;
      const uint64_t word = arrives ? counter.peek() : 0;
      // Between these every query sees every key.
      const int32_t open_begin = piece.sequence.key_begin(params.T - 1), open_end = piece.sequence.key_end(0);
      const int32_t tile_end = piece.tile_end;
      if (!early) state.load_queries(params, shared.params, piece, shared.q);
      state.clear();
#pragma unroll 1
      for (int32_t tile = piece.tile_begin + warp; tile < tile_end; tile += warps) {
        present[Config::kStages - 1] = loader.issue(stage == 0 ? Config::kStages - 1 : stage - 1);
        ptx::cp_async_wait<Config::kStages - 1>();
        __syncwarp();
        const bool masked =
            present[0] != kAll || tile * Config::kKeys < open_begin || (tile + 1) * Config::kKeys > open_end;
        state.visit(transform, piece, params.G, sOwn + stage * Config::kStageBytes, tile, present[0], masked);
        __syncwarp();
#pragma unroll
        for (int s = 0; s + 1 < Config::kStages; ++s) present[s] = present[s + 1];
        stage = stage + 1 == Config::kStages ? 0 : stage + 1;
      }
      if (early && index + 1 < shared.schedule.count) {
        state.load_queries(params, shared.params, shared.schedule.pieces[index + 1], shared.q);
      }
      if (arrives) counter.prepare(word);
      combine_warps<Config>(params, counter_bytes, piece, state, sStages, stage == 0 ? Config::kStages - 1 : stage - 1,
                            shared);
      if (piece.parts > 1) {
        if (arrives) shared.last = counter.arrive(piece.parts) == piece.parts - 1;
        __syncthreads();
        if (shared.last) {
          const int rows = min_i32(Config::kRows, params.T * params.G - piece.row_block * Config::kRows);
          combine_blocks<Config>(params, counter_bytes, piece, rows);
        }
      }
    }
    if (!shared.schedule.more) break;
    __syncthreads();
    if (warp == 0) shared.schedule.refill(params, row_blocks);
    __syncthreads();
    loader.restart();
  }
}

}  // namespace jax_flash::decode
