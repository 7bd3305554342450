// Before the backward kernel: what it needs to know of each query row, and a clear workspace.
#pragma once

#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/sm90/backward/arguments.h"
#include "cuda/sm90/backward/config.h"
#include "cuda/tile/softmax.cuh"

namespace jax_flash::sm90 {

inline constexpr int kStatsRows = 128;
inline constexpr int kStatsThreads = 256;

template <class T>
__device__ __forceinline__ float dot(uint4 a, uint4 b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum += unpack_low<T>(x[i]) * unpack_low<T>(y[i]) + unpack_high<T>(x[i]) * unpack_high<T>(y[i]);
  }
  return sum;
}

// A clear 128 rows of sums.
template <class C>
__device__ __forceinline__ void clear_sums(float* gRows) {
  float4* gSums = reinterpret_cast<float4*>(gRows);
#pragma unroll 8
  for (int i = threadIdx.x; i < kStatsRows * C::kH / 4; i += kStatsThreads) {
    gSums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
}

// One block takes 128 rows of a query head; more blocks clear 128 rows each of the sums of dK and dV. Eight elements a
// lane, so H is a multiple of 8.
template <class C>
__global__ void __launch_bounds__(kStatsThreads) backward_stats_kernel(const __grid_constant__ BackwardArguments args) {
  constexpr int kLanes = C::kH <= 64 ? 8 : C::kH <= 128 ? 16 : 32;  // of a row
  constexpr int kRowsAtOnce = kStatsThreads / kLanes;
  ptx::launch_next_kernel();

  const int blocks = static_cast<int>(args.workspace.rows / kStatsRows);
  const int64_t head = blockIdx.x / blocks;  // (b K + kh) G + g
  const int i0 = blockIdx.x % blocks * kStatsRows;
  const int64_t N = args.shape.K * args.shape.G;
  const int64_t b = head / N, n = head % N;
  if (b >= args.shape.B) {
    clear_sums<C>(args.workspace.key_sums + (blockIdx.x - args.shape.B * N * blocks) * (kStatsRows * C::kH));
    return;
  }
  const DiagonalBand band = make_diagonal_band(args.shape, args.band, b, n / args.shape.G);
  const int column = threadIdx.x % kLanes * 8;

  if (blockIdx.x == 0 && threadIdx.x == 0) *args.workspace.next_block = 0;
  const int64_t row0 = head * args.workspace.rows + i0;
  if (threadIdx.x < kStatsRows / 32) args.workspace.dq_semaphores[row0 / 32 + threadIdx.x] = 0;
  clear_sums<C>(args.workspace.dq + row0 * C::kH);

#pragma unroll 4
  for (int r = threadIdx.x / kLanes; r < kStatsRows; r += kRowsAtOnce) {
    const int i = i0 + r;
    uint4 o{0, 0, 0, 0}, d_o{0, 0, 0, 0};
    if (i < band.T && column < args.shape.H) {
      const int64_t offset = ((b * args.shape.T + i) * N + n) * args.shape.H + column;
      o = __ldg(reinterpret_cast<const uint4*>(static_cast<const typename C::T*>(args.gO) + offset));
      d_o = __ldg(reinterpret_cast<const uint4*>(static_cast<const typename C::T*>(args.gDo) + offset));
    }
    float delta = dot<typename C::T>(o, d_o);
#pragma unroll
    for (int lane = kLanes / 2; lane > 0; lane /= 2) delta += __shfl_xor_sync(~0u, delta, lane);
    if (column == 0) {
      const float lse = i < band.T ? args.gLse[head * args.shape.T + i] : -infinity();
      const bool seen = lse != -infinity();
      if (seen && args.gDlse) delta -= args.gDlse[head * args.shape.T + i];
      args.workspace.lse2[row0 + r] = seen ? lse * kLog2e : infinity();
      args.workspace.minus_delta[row0 + r] = seen ? -delta : 0.0f;
    }
  }
}

}  // namespace jax_flash::sm90
