// Host side of TMA: descriptors that say how a tile of an array is fetched. Encoded at each launch and passed as kernel
// parameters, so there is no state to keep.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/driver.h"
#include "cuda/ptx/wgmma.cuh"
#include "params.h"

namespace jax_flash::sm90 {

// A tile of a 16-bit array. size, box: elements, innermost axis first; stride[i]: elements from one index of axis i to
// the next, stride[0] = 1, the others a multiple of 8 (16 bytes). A box's innermost extent is as wide as the swizzle.
// What the box reaches beyond `size` is read as zero and not written.
template <int kRank>
struct TileShape {
  int64_t size[kRank];
  int64_t stride[kRank];
  int box[kRank];
};

template <int kRank>
inline cudaError_t encode_tensor_map(CUtensorMap* map, const void* base, DType dtype, ptx::Swizzle swizzle,
                                     const TileShape<kRank>& tile) {
  static const auto encode =
      reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(driver_function("cuTensorMapEncodeTiled"));
  if (!encode) return cudaErrorNotSupported;
  cuuint64_t size[kRank], stride_bytes[kRank];
  cuuint32_t box[kRank], element_stride[kRank];
  for (int i = 0; i < kRank; ++i) {
    size[i] = static_cast<cuuint64_t>(tile.size[i]);
    if (i > 0) stride_bytes[i - 1] = static_cast<cuuint64_t>(tile.stride[i]) * 2;
    box[i] = static_cast<cuuint32_t>(tile.box[i]);
    element_stride[i] = 1;
  }
  const CUtensorMapDataType type =
      dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUtensorMapSwizzle bytes = swizzle == ptx::Swizzle::k128Bytes  ? CU_TENSOR_MAP_SWIZZLE_128B
                                   : swizzle == ptx::Swizzle::k64Bytes ? CU_TENSOR_MAP_SWIZZLE_64B
                                                                       : CU_TENSOR_MAP_SWIZZLE_32B;
  const CUresult result = encode(map, type, kRank, const_cast<void*>(base), size, stride_bytes, box, element_stride,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, bytes, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace jax_flash::sm90
