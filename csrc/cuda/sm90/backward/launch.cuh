// Launches the backward kernels of one Config; each (dtype, head dim) is a small .cu of its own that instantiates it.
#pragma once

#include <algorithm>

#include "cuda/device.h"
#include "cuda/sm90/backward/convert.cuh"
#include "cuda/sm90/backward/split_keys.cuh"
#include "cuda/sm90/backward/split_roles.cuh"
#include "cuda/sm90/backward/stats.cuh"
#include "cuda/sm90/tensor_map.h"

namespace jax_flash::sm90 {

// A [batch, rows, heads, H] array fetched or stored as 64 columns by box_rows rows of one head.
inline cudaError_t encode_rows(CUtensorMap* map, const void* base, DType dtype, int64_t batch, int64_t rows,
                               int64_t heads, int64_t H, int box_rows) {
  const TileShape<4> tile = {
      {H, heads, rows, batch}, {1, H, heads * H, rows * heads * H}, {kPanelColumns, 1, box_rows, 1}};
  return encode_tensor_map(map, base, dtype, ptx::Swizzle::k128Bytes, tile);
}

template <class... Arguments>
cudaError_t launch(void (*kernel)(Arguments...), int64_t blocks, int threads, size_t shared_bytes, bool overlap,
                   cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// How many parts a group of query heads is taken in: 1, or G, each head apart. Apart is dearer, as dK and dV are added
// up in the workspace, but thread blocks whose tiles differ in number are soon in different heads of a group, and then
// Q, dO and the sums of dQ of all heads of all groups that are begun have to stay in L2.
inline int64_t group_parts(const BackwardParams& p, int64_t key_blocks, int64_t tickets_at_once) {
  constexpr int64_t kL2Bytes = 48 << 20;
  const Shape& s = p.shape;
  const bool differ = (p.band.left <= kMaxLength) != (p.band.right <= kMaxLength);
  if (!differ || p.deterministic) return 1;
  // Pairs have been seen to do it where every ticket has tiles; at a head dim of 192 it gains nothing.
  const bool every_ticket_has_tiles = s.T == s.S && !p.band.q_lengths && !p.band.kv_lengths && !p.band.diagonal;
  if (s.H > 128 && (head_dim_bucket(s.H) == 192 || !every_ticket_has_tiles)) return 1;
  const int64_t groups = std::min(s.B * s.K, tickets_at_once / key_blocks + 1);
  return groups * s.G * s.T * head_dim_bucket(s.H) * 8 > kL2Bytes ? s.G : 1;
}

using BackwardKernel = void (*)(BackwardArguments);

// The main kernel is that of C or of its like with ranges, which share the other two.
template <class C>
cudaError_t launch_backward(const BackwardParams& p, const Device& device, BackwardKernel kernel, int shared_bytes,
                            cudaStream_t stream) {
  const Shape& s = p.shape;
  BackwardArguments args = {};
  cudaError_t error = cudaSuccess;
  const auto encode = [&](CUtensorMap* map, const void* base, int64_t rows, int64_t heads, int box_rows) {
    if (error == cudaSuccess) error = encode_rows(map, base, p.dtype, s.B, rows, heads, s.H, box_rows);
  };
  encode(&args.q, p.q, s.T, s.N(), C::kM);
  encode(&args.d_o, p.d_o, s.T, s.N(), C::kM);
  encode(&args.k, p.k, s.S, s.K, C::kN);
  encode(&args.v, p.v, s.S, s.K, C::kN);
  encode(&args.dq, p.dq, s.T, s.N(), 64);
  encode(&args.dk, p.dk, s.S, s.K, 64);
  encode(&args.dv, p.dv, s.S, s.K, 64);
  if (error != cudaSuccess) return error;

  args.shape = s;
  args.band = p.band;
  const ScoreTransform transform = ScoreTransform::make(p.score.softmax_scale, p.score.softcap);
  args.softmax_scale = p.score.softmax_scale;
  args.softcap = transform.softcap;
  args.tanh_scale = transform.scale_in;
  args.log2_scale = transform.softcap > 0 ? transform.log2_scale : p.score.softmax_scale * kLog2e;
  args.key_blocks = static_cast<int32_t>((s.S + kSumKeys - 1) / kSumKeys);
  const int64_t tickets_at_once = device.multiprocessors / C::kBlocks;
  args.parts = static_cast<int32_t>(group_parts(p, args.key_blocks, tickets_at_once));
  args.part_heads = static_cast<int32_t>(s.G / args.parts);
  const int64_t parts = s.B * s.K * args.parts;
  args.tickets = static_cast<int32_t>(parts * args.key_blocks);
  // Enough of them that their work fills all blocks for longer than the longest ticket takes.
  const int64_t parts_at_end = (2 * tickets_at_once + args.key_blocks - 1) / args.key_blocks;
  args.last_parts = p.band.right > kMaxLength ? 1 : static_cast<int32_t>(std::min(parts_at_end, parts));
  args.deterministic = p.deterministic;
  args.workspace = make_backward_workspace(p.workspace, s);
  args.gO = p.o;
  args.gDo = p.d_o;
  args.gLse = p.lse;
  args.gDlse = p.d_lse;

  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  const int64_t rows = s.B * s.N() * args.workspace.rows;
  const int64_t sum_rows = rows + (args.parts > 1 ? s.B * s.K * 2 * args.workspace.keys : 0);
  error = launch(backward_stats_kernel<C>, sum_rows / kStatsRows, kStatsThreads, 0, false, stream, args);
  if (error != cudaSuccess) return error;
  const int64_t clusters = std::min<int64_t>(args.tickets, tickets_at_once);
  error = launch(kernel, clusters * C::kBlocks, C::kThreads, shared_bytes, true, stream, args);
  if (error != cudaSuccess) return error;
  return launch(backward_convert_kernel<C>, sum_rows / C::kM, C::kDqParts * 128, 0, true, stream, args);
}

template <class T, int kHeadDim>
cudaError_t launch_instance(const BackwardParams& p, const Device& device, cudaStream_t stream) {
  const bool capped = p.score.softcap > 0, ranges = p.band.key_ranges != nullptr;
  const auto choose = [&](auto plain_capped, auto plain, auto ranges_capped, auto with_ranges) {
    return ranges ? capped ? ranges_capped : with_ranges : capped ? plain_capped : plain;
  };
  if constexpr (kHeadDim <= 128) {
    using C = SplitKeysConfig<T, kHeadDim, false>;
    using WithRanges = SplitKeysConfig<T, kHeadDim, true>;
    return launch_backward<C>(
        p, device,
        choose(backward_split_keys_kernel<C, true>, backward_split_keys_kernel<C, false>,
               backward_split_keys_kernel<WithRanges, true>, backward_split_keys_kernel<WithRanges, false>),
        ranges ? sizeof(SplitKeysShared<WithRanges>) : sizeof(SplitKeysShared<C>), stream);
  } else {
    using C = SplitRolesConfig<T, kHeadDim, false>;
    using WithRanges = SplitRolesConfig<T, kHeadDim, true>;
    return launch_backward<C>(
        p, device,
        choose(backward_split_roles_kernel<C, true>, backward_split_roles_kernel<C, false>,
               backward_split_roles_kernel<WithRanges, true>, backward_split_roles_kernel<WithRanges, false>),
        ranges ? sizeof(SplitRolesShared<WithRanges>) : sizeof(SplitRolesShared<C>), stream);
  }
}

}  // namespace jax_flash::sm90
