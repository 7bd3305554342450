#include <algorithm>

#include "cuda/kvcache/decode/chunk.cuh"
#include "cuda/kvcache/prefill/prefill.h"
#include "cuda/kvcache/prefill/workspace.h"
#include "cuda/launch_kernel.h"

namespace jax_flash::prefill {
namespace {

using decode::load_chunk;
using decode::load_rotated_chunk;
using decode::store_chunk;

// Appends the new tokens, rotates the queries into `q` if that is not null, and writes how many keys each sequence has.
template <class Element>
__global__ void append_kernel(const __grid_constant__ KvcacheParams params, Element* q, int32_t* lengths,
                              bool from_begin) {
  const int32_t H = params.H, chunks = (H + 7) / 8, heads = params.K * params.G;
  for (int32_t b = blockIdx.y; b < params.B; b += gridDim.y) {
    const CacheSequence sequence = make_cache_sequence(params, b);
    const int64_t appended = static_cast<int64_t>(sequence.end - sequence.length) * params.K * chunks;
    const int64_t rotated = q ? static_cast<int64_t>(params.T) * heads * chunks : 0;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (first < params.K) {
      lengths[static_cast<int64_t>(b) * params.K + first] = sequence.end - (from_begin ? sequence.begin : 0);
    }
    for (int64_t i = first; i < appended + rotated; i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
      if (i < appended) {
        const int32_t d = static_cast<int32_t>(i % chunks) * 8, kh = static_cast<int32_t>(i / chunks % params.K);
        const auto t = static_cast<int32_t>(i / chunks / params.K);
        const int64_t source = ((static_cast<int64_t>(b) * params.T_new + t) * params.K + kh) * H;
        const int32_t position = cache_position(params, sequence.row, cache_place(params, b, sequence.length + t));
        if (position < 0) continue;
        const int64_t to = (static_cast<int64_t>(position) * params.K + kh) * H;
        const auto* gK = static_cast<const Element*>(params.k_new) + source;
        store_chunk(static_cast<Element*>(params.k_cache) + to, d, H,
                    load_rotated_chunk(params, b, kh, sequence.length, t, gK, d));
        store_chunk(static_cast<Element*>(params.v_cache) + to, d, H,
                    load_chunk(static_cast<const Element*>(params.v_new) + source, d, H));
      } else {
        const int64_t j = i - appended;
        const auto n = static_cast<int32_t>(j / chunks % heads), t = static_cast<int32_t>(j / chunks / heads);
        const int64_t at = ((static_cast<int64_t>(b) * params.T + t) * heads + n) * H;
        const int32_t d = static_cast<int32_t>(j % chunks) * 8, turn = params.rotary.per_query ? t : 0;
        store_chunk(q + at, d, H,
                    load_rotated_chunk(params, b, n / params.G, sequence.length, turn,
                                       static_cast<const Element*>(params.q) + at, d));
      }
    }
  }
}

// Copies what each sequence may see to k and v [B, capacity, K, H], from position 0 on.
template <class Element>
__global__ void gather_kernel(const __grid_constant__ KvcacheParams params, Element* k, Element* v) {
  const int32_t H = params.H, chunks = (H + 7) / 8, row_chunks = params.K * chunks;
  const int64_t capacity = cache_capacity(params), row = static_cast<int64_t>(params.K) * H;
  for (int32_t b = blockIdx.y; b < params.B; b += gridDim.y) {
    const CacheSequence sequence = make_cache_sequence(params, b);
    const int64_t count = static_cast<int64_t>(sequence.end - sequence.begin) * row_chunks;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
         i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
      const auto j = static_cast<int32_t>(i / row_chunks), c = static_cast<int32_t>(i % row_chunks);
      const int32_t d = c % chunks * 8;
      const int64_t column = static_cast<int64_t>(c / chunks) * H, to = (b * capacity + j) * row + column;
      const int32_t position = cache_position(params, sequence.row, cache_place(params, b, sequence.begin + j));
      const int64_t from = position < 0 ? 0 : position * row + column;
      uint4 key = make_uint4(0, 0, 0, 0), value = key;
      if (position >= 0) {
        key = load_chunk(static_cast<const Element*>(params.k_cache) + from, d, H);
        value = load_chunk(static_cast<const Element*>(params.v_cache) + from, d, H);
      }
      store_chunk(k + to, d, H, key);
      store_chunk(v + to, d, H, value);
    }
  }
}

template <class Element>
cudaError_t enqueue(const KvcacheParams& params, const Workspace& w, cudaStream_t stream) {
  constexpr int kThreads = 256;
  char* base = static_cast<char*>(params.workspace);
  const int64_t chunks = (params.H + 7) / 8, heads = params.K * (params.rotary.dim ? int64_t{1} + params.G : 1);
  // The kernels count the chunks of a token, and its heads, in 32 bits.
  if (!countable({params.K, int64_t{1} + params.G, chunks}) || cache_capacity(params) > kMaxLength) {
    return cudaErrorInvalidValue;
  }
  const auto grid = [&](int64_t threads) {
    const int64_t blocks = std::max<int64_t>(1, std::min<int64_t>((threads + kThreads - 1) / kThreads, 2048));
    return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(std::min(params.B, 65535)));
  };
  const int64_t threads = std::max<int64_t>(params.K, params.T * heads * chunks);
  Element* queries = params.rotary.dim ? reinterpret_cast<Element*>(base + w.q) : nullptr;
  const cudaError_t error = launch_kernel(append_kernel<Element>, {grid(threads), kThreads}, stream, params, queries,
                                          reinterpret_cast<int32_t*>(base), w.copies_keys);
  if (error != cudaSuccess || !w.copies_keys) return error;
  return launch_kernel(gather_kernel<Element>, {grid(int64_t{cache_capacity(params)} * params.K * chunks), kThreads},
                       stream, params, reinterpret_cast<Element*>(base + w.k), reinterpret_cast<Element*>(base + w.v));
}

}  // namespace

int64_t workspace_bytes(const KvcacheParams& params) { return make_workspace(params).bytes; }

cudaError_t prepare(const KvcacheParams& params, cudaStream_t stream, ForwardParams* forward) {
  const Workspace w = make_workspace(params);
  if (params.workspace_bytes < w.bytes) return cudaErrorInvalidValue;
  char* base = static_cast<char*>(params.workspace);
  *forward = ForwardParams{};
  forward->dtype = params.dtype;
  forward->shape = Shape{params.B, params.K, params.G, params.T, cache_capacity(params), params.H};
  forward->band.left = params.left;
  forward->band.right = params.right;
  forward->band.kv_lengths = reinterpret_cast<const int32_t*>(base);
  forward->score = params.score;
  forward->sinks = params.sinks;
  forward->q = params.rotary.dim ? base + w.q : params.q;
  forward->k = w.copies_keys ? base + w.k : params.k_cache;
  forward->v = w.copies_keys ? base + w.v : params.v_cache;
  forward->o = params.o;
  forward->lse = params.lse;
  forward->workspace = base + w.forward;
  const bool bf16 = params.dtype == DType::kBFloat16;
  return bf16 ? enqueue<BFloat16>(params, w, stream) : enqueue<Float16>(params, w, stream);
}

}  // namespace jax_flash::prefill
