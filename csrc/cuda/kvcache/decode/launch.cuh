// The launch of the decode kernel: how many blocks, of how many warps.
#pragma once

#include "cuda/kvcache/decode/driver_kernel.h"
#include "cuda/kvcache/decode/kernel.cuh"
#include "cuda/launch_kernel.h"

namespace jax_flash::decode {

template <class Config>
cudaError_t launch_config(const KvcacheParams& params, const Device& device, cudaStream_t stream) {
  const auto kernel = decode_kernel<Config>;
  int warps = Config::kMaxWarps;
  while (warps > 1 && SharedState<Config>::bytes(warps) > device.shared_memory - 1024) --warps;
  const int bytes = SharedState<Config>::bytes(warps);
  static DriverKernel known;
  CUfunction function;
  if (cudaError_t status = known.find(reinterpret_cast<const void*>(kernel), device, bytes, &function)) return status;
  // No more blocks than can have a tile for every warp, were the cache full.
  const int64_t tiles = cache_capacity(params) / Config::kKeys + 2;
  const int64_t row_blocks = (int64_t{params.T} * params.G + Config::kRows - 1) / Config::kRows;
  for (const int64_t parts : {tiles, int64_t{params.num_splits}}) {
    if (!countable({parts, row_blocks, params.B, params.K})) return cudaErrorInvalidValue;
  }
  const int64_t segments = row_blocks * params.B * params.K;
  const bool single = params.B == 1 && params.num_splits == 0 && 2 * segments <= device.multiprocessors;
  int64_t blocks = params.num_splits > 0 ? segments * params.num_splits : segments * ((tiles + warps - 1) / warps);
  const int64_t most = device.multiprocessors < kMaxBlocks ? device.multiprocessors : kMaxBlocks;
  if (blocks > most) blocks = most;
  // From sm_90 on the launch overlaps the end of the kernel before: 1 to 2 us.
  CUlaunchAttribute overlap;
  overlap.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  overlap.value.programmaticStreamSerializationAllowed = 1;
  CUlaunchConfig config{};
  config.gridDimX = static_cast<unsigned>(single ? blocks / segments : blocks);
  config.gridDimY = single ? static_cast<unsigned>(segments) : 1;
  config.gridDimZ = 1;
  config.blockDimX = warps * 32;
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = bytes;
  config.hStream = stream;
  config.attrs = &overlap;
  config.numAttrs = device.compute_capability >= 90 ? 1 : 0;
  // As decode_kernel takes them.
  KvcacheParams first = params;
  int32_t second = static_cast<int32_t>(row_blocks);
  int64_t third = workspace_layout(params).counter_bytes();
  bool fourth = single;
  void* arguments[] = {&first, &second, &third, &fourth};
  return launch_kernel(config, function, arguments);
}

// The row-tile variants of one element type and head-dim bucket.
template <class Element, int kDim>
cudaError_t launch_instance(const KvcacheParams& params, const Device& device, cudaStream_t stream) {
  const int tiles = row_tiles(int64_t{params.T} * params.G, params.H);
  if constexpr (most_row_tiles(kDim) >= 4) {
    if (tiles == 4) return launch_config<Config<Element, kDim, 4>>(params, device, stream);
  }
  if constexpr (most_row_tiles(kDim) >= 2) {
    if (tiles == 2) return launch_config<Config<Element, kDim, 2>>(params, device, stream);
  }
  return launch_config<Config<Element, kDim, 1>>(params, device, stream);
}

}  // namespace jax_flash::decode
