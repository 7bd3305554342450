// The backward configurations, one or two for each head-dim bucket, and their launch.
#pragma once

#include "cuda/device.h"
#include "cuda/launch_kernel.h"
#include "cuda/sm80/backward/rows.cuh"

namespace jax_flash::sm80 {

template <class Config>
cudaError_t launch_backward_config(const BackwardParams& params, cudaStream_t stream) {
  using Element = typename Config::Element;
  constexpr int kBytes = sizeof(typename Config::SharedMemory);
  const auto kernel = backward_kernel<Config>;
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes))
    return error;
  const Shape& shape = params.shape;
  const BackwardWorkspace workspace = BackwardWorkspace::make(params.workspace, shape);
  if (backward_workspace_bytes(shape) > params.workspace_bytes) return cudaErrorInvalidValue;

  constexpr int kPrepareRows = kPrepareThreads / prepare_lanes(Config::kHeadDim);
  const int64_t prepare_blocks = workspace.rows / kPrepareRows;
  const int64_t key_blocks = (shape.S + Config::kBlockN - 1) / Config::kBlockN;
  const int64_t query_blocks = (shape.T + Config::kBlockM - 1) / Config::kBlockM;
  for (const int64_t blocks : {prepare_blocks, key_blocks, query_blocks}) {
    if (!countable({blocks, shape.B, shape.K, shape.G})) return cudaErrorInvalidValue;
  }
  const int64_t heads = shape.B * shape.N();

  bool aligned = shape.H % 8 == 0;
  for (const void* array : {params.q, params.k, params.v, params.o, params.d_o, static_cast<const void*>(params.dq),
                            static_cast<const void*>(params.dk), static_cast<const void*>(params.dv)}) {
    aligned = aligned && reinterpret_cast<uintptr_t>(array) % 16 == 0;
  }
  const auto enqueue = [&](auto kernel, int64_t blocks, int threads, size_t shared_bytes, const auto&... arguments) {
    if (blocks == 0) return cudaSuccess;
    return launch_kernel(kernel, {static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared_bytes}, stream,
                         params, arguments...);
  };
  cudaError_t error = enqueue(backward_prepare_kernel<Element, Config::kHeadDim>, heads * prepare_blocks,
                              kPrepareThreads, 0, workspace, static_cast<int>(prepare_blocks), aligned);
  if (error != cudaSuccess) return error;
  const ScoreTransform transform = ScoreTransform::make(params.score.softmax_scale, params.score.softcap);
  error = enqueue(kernel, shape.B * shape.K * key_blocks, Config::kThreads, kBytes, transform, workspace,
                  static_cast<int>(key_blocks), aligned);
  if (error != cudaSuccess) return error;
  return enqueue(backward_finish_kernel<Config>, heads * query_blocks, Config::kThreads, 0, workspace,
                 static_cast<int>(query_blocks), aligned);
}

// <element, bucket, queries, keys, warps, of these along S' queries, dK's keys, dQ's queries, stages of Q, of dO,
// where>
template <class Element, int kHeadDim>
struct BackwardTable;
template <class Element>
struct BackwardTable<Element, 64> {
  using Large = BackwardConfig<Element, 64, 128, 128, 8, 2, 4, 4, 2, 2, Fits::kLarge>;
  using Small = BackwardConfig<Element, 64, 64, 128, 8, 2, 4, 4, 2, 2, Fits::kSmall>;
};
template <class Element>
struct BackwardTable<Element, 96> {
  using Large = BackwardConfig<Element, 96, 64, 128, 8, 2, 4, 4, 2, 2, Fits::kLarge>;
  using Small = BackwardConfig<Element, 96, 64, 64, 8, 2, 4, 4, 2, 2, Fits::kSmall>;
};
template <class Element>
struct BackwardTable<Element, 128> {
  using Large = BackwardConfig<Element, 128, 64, 128, 8, 2, 4, 2, 2, 2, Fits::kLarge>;
  using Small = BackwardConfig<Element, 128, 64, 64, 8, 2, 2, 2, 2, 1, Fits::kSmall>;
};
template <class Element>
struct BackwardTable<Element, 192> {
  using Large = BackwardConfig<Element, 192, 64, 64, 8, 2, 2, 2, 2, 1, Fits::kLarge>;
  using Small = BackwardConfig<Element, 192, 32, 64, 8, 2, 2, 2, 2, 1, Fits::kSmall>;
};
template <class Element>
struct BackwardTable<Element, 256> {
  using Large = BackwardConfig<Element, 256, 64, 64, 8, 2, 2, 2, 1, 1, Fits::kLarge>;
  using Small = BackwardConfig<Element, 256, 32, 32, 4, 2, 1, 1, 2, 1, Fits::kSmall>;
};

template <class Element, int kHeadDim>
cudaError_t launch_instance(const BackwardParams& params, const Device& device, cudaStream_t stream) {
  using Table = BackwardTable<Element, kHeadDim>;
  static_assert(sizeof(typename Table::Small::SharedMemory) <= kSmallSharedMemory);
  static_assert(sizeof(typename Table::Large::SharedMemory) <= kLargeSharedMemory);
  if (takes_small(device)) {
    return launch_backward_config<typename Table::Small>(params, stream);
  }
  return launch_backward_config<typename Table::Large>(params, stream);
}

}  // namespace jax_flash::sm80
