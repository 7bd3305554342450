// The forward configurations, one or two for each head-dim bucket, and their launch.
#pragma once

#include "cuda/device.h"
#include "cuda/launch_kernel.h"
#include "cuda/sm80/forward/kernel.cuh"

namespace jax_flash::sm80 {

template <class Config>
cudaError_t launch_forward_config(const ForwardParams& params, cudaStream_t stream) {
  const auto kernel = forward_kernel<Config>;
  constexpr int kBytes = sizeof(typename Config::SharedMemory);
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes))
    return error;
  const Shape& shape = params.shape;
  const int64_t query_blocks = (shape.T + Config::kBlockM - 1) / Config::kBlockM;
  if (!countable({query_blocks, shape.B, shape.K, shape.G})) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>(query_blocks * shape.B * shape.N());
  if (blocks == 0) return cudaSuccess;
  const auto on_16_bytes = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool aligned = shape.H % 8 == 0 && on_16_bytes(params.q) && on_16_bytes(params.k) && on_16_bytes(params.v) &&
                       on_16_bytes(params.o);
  const ScoreTransform transform = ScoreTransform::make(params.score.softmax_scale, params.score.softcap);
  return launch_kernel(kernel, {blocks, Config::kThreads, kBytes}, stream, params, transform,
                       static_cast<int>(query_blocks), aligned);
}

// <element, bucket, queries, keys, warps, stages, blocks per SM, Q in registers, where>. Two blocks of a large
// configuration fit sm_80's 164 KB, and two of a small one 100 KB where the registers allow it.
template <class Element, int kHeadDim>
struct ForwardTable;
template <class Element>
struct ForwardTable<Element, 64> {
  using Large = ForwardConfig<Element, 64, 128, 64, 4, 2, 2, true, Fits::kEverywhere>;
  using Small = Large;
};
template <class Element>
struct ForwardTable<Element, 96> {
  using Large = ForwardConfig<Element, 96, 128, 64, 4, 2, 2, false, Fits::kLarge>;
  using Small = ForwardConfig<Element, 96, 128, 64, 4, 1, 2, false, Fits::kSmall>;
};
template <class Element>
struct ForwardTable<Element, 128> {
  using Large = ForwardConfig<Element, 128, 128, 48, 4, 2, 2, false, Fits::kLarge>;
  using Small = ForwardConfig<Element, 128, 128, 32, 4, 1, 2, false, Fits::kSmall>;
};
template <class Element>
struct ForwardTable<Element, 192> {
  using Large = ForwardConfig<Element, 192, 64, 64, 4, 1, 2, true, Fits::kEverywhere>;
  using Small = Large;
};
template <class Element>
struct ForwardTable<Element, 256> {
  using Large = ForwardConfig<Element, 256, 64, 48, 4, 1, 2, false, Fits::kEverywhere>;
  using Small = Large;
};

template <class Element, int kHeadDim>
cudaError_t launch_instance(const ForwardParams& params, const Device& device, cudaStream_t stream) {
  using Table = ForwardTable<Element, kHeadDim>;
  static_assert(sizeof(typename Table::Small::SharedMemory) <= kSmallSharedMemory);
  static_assert(sizeof(typename Table::Large::SharedMemory) <= kLargeSharedMemory);
  if (takes_small(device)) return launch_forward_config<typename Table::Small>(params, stream);
  return launch_forward_config<typename Table::Large>(params, stream);
}

}  // namespace jax_flash::sm80
