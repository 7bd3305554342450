// What surrounds the backward's main kernel: row statistics and a cleared dQ sum before it, dQ in the caller's type
// after it.
#pragma once

#include "cuda/sm80/backward/kernel.cuh"
#include "cuda/sm80/head_index.cuh"

namespace jax_flash::sm80 {

inline constexpr int kPrepareThreads = 256;

// Lanes that share a row, 8 elements each.
__host__ __device__ constexpr int prepare_lanes(int bucket) { return bucket <= 64 ? 8 : bucket <= 128 ? 16 : 32; }

template <class Element>
__device__ __forceinline__ float dot(uint4 x, uint4 y) {
  const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum +=
        unpack_low<Element>(a[i]) * unpack_low<Element>(b[i]) + unpack_high<Element>(a[i]) * unpack_high<Element>(b[i]);
  }
  return sum;
}

// Row statistics of [B, K, G, T'] and zeros for the sums.
template <class Element, int kBucket>
__global__ void __launch_bounds__(kPrepareThreads)
    backward_prepare_kernel(const __grid_constant__ BackwardParams params,
                            const __grid_constant__ BackwardWorkspace workspace, const int blocks_per_head,
                            const bool aligned) {
  constexpr int kLanes = prepare_lanes(kBucket);
  const int head = blockIdx.x / blocks_per_head;
  const int i = blockIdx.x % blocks_per_head * (kPrepareThreads / kLanes) + threadIdx.x / kLanes;
  const int chunk = threadIdx.x % kLanes;
  const Shape& shape = params.shape;
  const HeadIndex index(shape, head);
  const Band band = make_band(shape, params.band, index.b, index.kh);
  const int head_dim = static_cast<int>(shape.H);
  const int64_t row = head * workspace.rows + i;

  float sum = 0.0f;
  // Rows past the sequence's length may hold anything, and are not read.
  if (i < band.T && chunk * 8 < head_dim) {
    const int64_t offset = (((index.b * shape.T + i) * shape.K + index.kh) * shape.G + index.g) * head_dim + chunk * 8;
    const Element* o = static_cast<const Element*>(params.o) + offset;
    const Element* d_o = static_cast<const Element*>(params.d_o) + offset;
    if (aligned) {
      sum = dot<Element>(*reinterpret_cast<const uint4*>(o), *reinterpret_cast<const uint4*>(d_o));
    } else {
      sum = dot<Element>(gather_chunk(o, head_dim - chunk * 8), gather_chunk(d_o, head_dim - chunk * 8));
    }
  }
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);

  if (chunk == 0) {
    const int64_t stat = int64_t{head} * shape.T + i;
    const float lse = i < band.T ? params.lse[stat] : -infinity();
    const bool seen = lse != -infinity();
    workspace.lse2[row] = seen ? lse * kLog2e : infinity();
    workspace.delta[row] = seen ? sum - (params.d_lse ? params.d_lse[stat] : 0.0f) : 0.0f;
    if (i % 64 == 0) workspace.dq_semaphores[row / 64] = 0;
    if (row == 0) *workspace.next_block = 0;
  }
  if (chunk * 8 < kBucket) {
    float4* dq = reinterpret_cast<float4*>(workspace.dq + row * kBucket + chunk * 8);
    dq[0] = dq[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
}

// dQ of one tile: scaled, rounded, in the caller's order.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    backward_finish_kernel(const __grid_constant__ BackwardParams params,
                           const __grid_constant__ BackwardWorkspace workspace, const int query_block_count,
                           const bool aligned) {
  if constexpr (!compiled_here(Config::kFits)) return;
  using Element = typename Config::Element;
  using Layout = QueryGradientLayout<Config>;
  constexpr int kM = Config::kBlockM, kD = Config::kHeadDim;
  __shared__ __align__(1024) Element staging[kM * kD];
  const uint32_t tile = ptx::shared_address(staging);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const Shape& shape = params.shape;
  const int head = blockIdx.x / query_block_count;
  const int i0 = blockIdx.x % query_block_count * kM;
  const HeadIndex index(shape, head);
  const int head_dim = static_cast<int>(shape.H);

  const float* sums = workspace.dq + (head * workspace.rows + i0) * kD + Layout::base(warp, lane);
#pragma unroll
  for (int m = 0; m < Config::kQueryTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Config::kQueryCols; ++n) {
      float piece[8];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* source = sums + Layout::group(m, 2 * n + half);
        if constexpr (Layout::kVector) {
          const float4 x = *reinterpret_cast<const float4*>(source);
          piece[4 * half] = x.x;
          piece[4 * half + 1] = x.y;
          piece[4 * half + 2] = x.z;
          piece[4 * half + 3] = x.w;
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) piece[4 * half + e] = source[Layout::element(e)];
        }
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) piece[e] *= params.score.softmax_scale;
      store_fragment<Element, kD>(tile, piece, (warp / Config::kQueryColWarps * Config::kQueryTiles + m) * 16,
                                  (n * Config::kQueryColWarps + warp % Config::kQueryColWarps) * 16, lane);
    }
  }
  __syncthreads();
  const int64_t stride = shape.K * shape.G * head_dim;
  Element* dq =
      static_cast<Element*>(params.dq) + (index.b * shape.T + i0) * stride + (index.kh * shape.G + index.g) * head_dim;
  store_rows<Element, kD, Config::kThreads>(tile, dq, stride, 0, kM, static_cast<int>(shape.T) - i0, head_dim, aligned,
                                            thread);
}

}  // namespace jax_flash::sm80
