// After the backward kernel: the float32 sums become dQ, and where a group was taken in parts dK and dV.
#pragma once

#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/sm90/backward/tile.cuh"

namespace jax_flash::sm90 {

// Where a tile of sums goes.
struct SumTile {
  const float* gSums;
  const CUtensorMap* map;
  float scale;
  int b, head, row;
  int64_t rows;  // of the array
};

// Block number `block`: first all tiles of dQ, then those of dK and dV.
template <class C>
__device__ __forceinline__ SumTile sum_tile(const BackwardArguments& args, int64_t block) {
  const int K = static_cast<int>(args.shape.K), N = K * static_cast<int>(args.shape.G);
  const int tiles = static_cast<int>(args.workspace.rows / C::kM);
  const int64_t key_block = block - args.shape.B * N * tiles;
  if (key_block < 0) {
    const int head = static_cast<int>(block / tiles);
    return {args.workspace.dq + block * C::kM * C::kH, &args.dq,    args.softmax_scale, head / N, head % N,
            static_cast<int>(block % tiles) * C::kM,   args.shape.T};
  }
  const int key_tiles = static_cast<int>(args.workspace.keys / C::kM);
  const int array = static_cast<int>(key_block / key_tiles);  // (b K + kh) 2 + which
  return {args.workspace.key_sums + key_block * C::kM * C::kH,
          array % 2 ? &args.dv : &args.dk,
          array % 2 ? 1.0f : args.softmax_scale,
          array / 2 / K,
          array / 2 % K,
          static_cast<int>(key_block % key_tiles) * C::kM,
          args.shape.S};
}

// One block takes one tile of one head, one warpgroup each part of it. Its threads read the floats that the consumers'
// same threads added up.
template <class C>
__global__ void __launch_bounds__(C::kDqParts * 128)
    backward_convert_kernel(const __grid_constant__ BackwardArguments args) {
  __shared__ __align__(1024) typename C::T sPart[C::kDqParts][64][kPanelColumns];
  ptx::wait_for_previous_kernel();

  const SumTile tile = sum_tile<C>(args, blockIdx.x);
  const int part = threadIdx.x / 128, thread = threadIdx.x % 128;
  const float4* gPart = reinterpret_cast<const float4*>(tile.gSums + part * kDqPartFloats) + thread;
  float sums[32];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float4 x = 4 * i < C::dq_floats(part) ? __ldcs(gPart + i * 128) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    sums[4 * i] = x.x * tile.scale;
    sums[4 * i + 1] = x.y * tile.scale;
    sums[4 * i + 2] = x.z * tile.scale;
    sums[4 * i + 3] = x.w * tile.scale;
  }
  uint32_t words[16];
  pack_fragment<typename C::T>(sums, words);
  store_fragment(sPart[part], 0, words, thread / 32 * 16, thread % 32);
  ptx::fence_async_shared();
  ptx::named_barrier_sync(1 + part, 128);
  if (thread < 32 && ptx::elect_one()) {
    const int row = tile.row + C::dq_row(part);
    const int column = C::dq_column(part);
    if (row < tile.rows && column < args.shape.H) {
      ptx::tma_store_4d(tile.map, sPart[part], column, tile.head, row, tile.b);
    }
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
}

}  // namespace jax_flash::sm90
