// From a call's dtype and head dim to an instance of a kernel. cmake/cuda.cmake makes a source file of instance.cu.in
// for every element type and head-dim bucket, so that instances compile apart from each other.
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

#include "cuda/element.h"
#include "params.h"

namespace jax_flash {

// Calls launch(Element{}, std::integral_constant<int, bucket>{}) with the smallest of the ascending buckets that holds
// H; a smaller head dim is filled up with zeros.
template <class Element, int kBucket, int... kLarger, class Launch>
cudaError_t with_bucket(int64_t H, const Launch& launch) {
  if constexpr (sizeof...(kLarger) > 0) {
    if (H > kBucket) return with_bucket<Element, kLarger...>(H, launch);
  }
  return launch(Element{}, std::integral_constant<int, kBucket>{});
}

template <int... kBuckets, class Launch>
cudaError_t with_instance(DType dtype, int64_t H, const Launch& launch) {
  return dtype == DType::kFloat16 ? with_bucket<Float16, kBuckets...>(H, launch)
                                  : with_bucket<BFloat16, kBuckets...>(H, launch);
}

}  // namespace jax_flash
