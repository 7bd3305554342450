// Host side of the Hopper forward for one element type and head-dim bucket.
#pragma once

#include "cuda/device.h"
#include "cuda/launch_kernel.h"
#include "cuda/sm90/forward/kernel.cuh"
#include "cuda/sm90/tensor_map.h"
#include "params.h"

namespace jax_flash::sm90 {

// Whether the query heads of a KV head share a tile's rows: where that leaves fewer tiles.
inline int32_t packed_heads(const Shape& shape, int rows) {
  if (shape.G == 1 || shape.G > 64) return 1;
  const int64_t alone = shape.G * ((shape.T + rows - 1) / rows);
  const int64_t queries = rows / 64 * (64 / shape.G);
  const int64_t together = (shape.T + queries - 1) / queries;
  return together < alone ? static_cast<int32_t>(shape.G) : 1;
}

template <class Config>
inline cudaError_t launch_forward(const ForwardParams& params, bool band, const Device& device, cudaStream_t stream) {
  const Shape& shape = params.shape;
  const int64_t N = shape.N(), keys = shape.S > 0 ? shape.S : 1;
  ForwardArguments a;
  a.shape = shape;
  a.band = params.band;
  a.transform = ScoreTransform::make(params.score.softmax_scale, params.score.softcap);
  a.packed = packed_heads(shape, Config::kWarpgroups * 64);
  a.queries = 64 / a.packed;
  a.heads = static_cast<int32_t>(N);
  a.o_stride = N * shape.H;
  a.sinks = params.sinks;
  a.o = params.o;
  a.lse = params.lse;

  const int64_t heads = N / a.packed;
  const TileShape<5> q{{shape.H, a.packed, shape.T, heads, shape.B},
                       {1, shape.H, N * shape.H, a.packed * shape.H, shape.T * N * shape.H},
                       {Config::kPanelColumns, a.packed, a.queries, 1, 1}};
  const TileShape<4> kv{{shape.H, shape.K, keys, shape.B},
                        {1, shape.H, shape.K * shape.H, keys * shape.K * shape.H},
                        {Config::kPanelColumns, 1, Config::kKeys, 1}};
  cudaError_t error = encode_tensor_map(&a.q, params.q, params.dtype, Config::kSwizzle, q);
  if (error == cudaSuccess) error = encode_tensor_map(&a.k, params.k, params.dtype, Config::kSwizzle, kv);
  if (error == cudaSuccess) error = encode_tensor_map(&a.v, params.v, params.dtype, Config::kSwizzle, kv);
  if (error != cudaSuccess) return error;

  const int64_t tile_queries = Config::kWarpgroups * a.queries;
  const int64_t query_tiles = (shape.T + tile_queries - 1) / tile_queries;
  if (!countable({query_tiles, shape.B, shape.K, shape.G})) return cudaErrorInvalidValue;
  a.schedule = ForwardSchedule::make(static_cast<int32_t>(query_tiles), static_cast<int32_t>(heads),
                                     static_cast<int32_t>(shape.B), static_cast<int32_t>(heads / shape.K), band,
                                     device.multiprocessors, ArrivalCounter::kMostArrivals);
  a.counter = static_cast<uint64_t*>(params.workspace);
  const int32_t blocks = min_i32(a.schedule.tickets(), device.multiprocessors);

  const auto kernel = forward_kernel<Config>;
  constexpr int kSharedBytes = sizeof(ForwardShared<Config>);
  static_assert(kSharedBytes <= Config::kSharedLimit);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, {blocks, Config::kThreads, kSharedBytes}, stream, a);
}

template <class Element, int kHeadDim>
cudaError_t launch_instance(const ForwardParams& params, const Device& device, cudaStream_t stream) {
  const bool band = is_bounded(params.band);
  const auto few_blocks = launch_forward<ForwardConfig<Element, kHeadDim, true>>;
  if constexpr (same_tiles(kHeadDim)) {
    return few_blocks(params, band, device, stream);
  } else {
    const auto longer = launch_forward<ForwardConfig<Element, kHeadDim, false>>;
    return (few_key_blocks(band, params.shape.S) ? few_blocks : longer)(params, band, device, stream);
  }
}

}  // namespace jax_flash::sm90
