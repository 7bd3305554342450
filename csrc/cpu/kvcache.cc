#include "cpu/kvcache.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/pages.h"
#include "cpu/parallel.h"

namespace jax_flash::cpu {
namespace {

// Copies the head x [H] to y, turned by the angles of query or new key i of sequence b.
void rotate(const KvcacheParams& params, const Kernels& kernels, int32_t b, int64_t kh, int32_t length, int32_t i,
            const char* x, char* y) {
  const int64_t size = element_size(params.dtype);
  const RotaryParams& rotary = params.rotary;
  const int64_t turned = rotary.dim * size;
  std::memcpy(y + turned, x + turned, params.H * size - turned);
  if (!rotary.dim) return;
  const int64_t half = rotary.dim / 2;
  int64_t row = std::min(rotary.per_sequence ? i : length + i, rotary.rows - 1);
  if (rotary.per_sequence) row += (static_cast<int64_t>(b) * params.K + kh) * rotary.rows;
  const int64_t at = row * half * element_size(rotary.dtype);
  kernels.rotate(params.dtype,
                 {x, y, static_cast<const char*>(rotary.cos) + at, static_cast<const char*>(rotary.sin) + at, half,
                  rotary.dtype == DType::kFloat32, rotary.interleaved});
}

// Writes the new tokens of sequence b.
void append(const KvcacheParams& params, const Kernels& kernels, int32_t b, const CacheSequence& sequence) {
  const int64_t head = params.H * element_size(params.dtype), row = params.K * head;
  for (int32_t j = sequence.length; j < sequence.end; ++j) {
    const int64_t position = cache_position(params, sequence.row, cache_place(params, b, j));
    if (position < 0) continue;
    const int32_t t = j - sequence.length;
    const int64_t source = (static_cast<int64_t>(b) * params.T_new + t) * row;
    for (int64_t kh = 0; kh < params.K; ++kh) {
      rotate(params, kernels, b, kh, sequence.length, t, static_cast<const char*>(params.k_new) + source + kh * head,
             static_cast<char*>(params.k_cache) + position * row + kh * head);
    }
    std::memcpy(static_cast<char*>(params.v_cache) + position * row, static_cast<const char*>(params.v_new) + source,
                row);
  }
}

// The queries of sequence b, rotated.
void rotate_queries(const KvcacheParams& params, const Kernels& kernels, int32_t b, const CacheSequence& sequence,
                    char* out) {
  const int64_t head = params.H * element_size(params.dtype);
  int64_t at = static_cast<int64_t>(b) * params.T * params.K * params.G * head;
  for (int32_t t = 0; t < params.T; ++t) {
    for (int64_t kh = 0; kh < params.K; ++kh) {
      for (int32_t g = 0; g < params.G; ++g, at += head) {
        rotate(params, kernels, b, kh, sequence.length, params.rotary.per_query ? t : 0,
               static_cast<const char*>(params.q) + at, out + at);
      }
    }
  }
}

// Sequence b's queries against its row of a contiguous cache.
void attend_to_row(const KvcacheParams& params, const Kernels& kernels, int32_t b, const CacheSequence& sequence,
                   const void* q, Executor& executor) {
  const int64_t size = element_size(params.dtype), K = params.K, H = params.H, rows = K * params.G * params.T;
  const int32_t begin = std::min(sequence.key_begin(0), sequence.end), end = sequence.end;
  const int64_t at = (static_cast<int64_t>(sequence.row) * params.S + begin) * K * H * size;
  ForwardParams forward{};
  forward.dtype = params.dtype;
  forward.shape = Shape{1, K, params.G, params.T, end - begin, H};
  forward.score = params.score;
  if (params.sinks) forward.sinks = params.sinks + b * K * params.G;
  forward.band.left = params.left;
  forward.band.right = params.right;
  forward.q = static_cast<const char*>(q) + b * rows * H * size;
  forward.k = static_cast<const char*>(params.k_cache) + at;
  forward.v = static_cast<const char*>(params.v_cache) + at;
  forward.o = static_cast<char*>(params.o) + b * rows * H * size;
  forward.lse = params.lse + b * rows;
  cpu::forward(forward, executor, kernels);
}

}  // namespace

void kvcache(const KvcacheParams& params, Executor& executor, const Kernels& kernels) {
  std::vector<CacheSequence> sequences;
  bool whole =
      !params.pages && params.groups == 1 && params.rows == params.B;  // rows in order, each from its first position
  for (int32_t b = 0; b < params.B; ++b) {
    sequences.push_back(make_cache_sequence(params, b));
    const CacheSequence& s = sequences.back();
    whole &= s.row == b && s.begin == 0;
  }
  const int64_t work = static_cast<int64_t>(params.T) * params.K * params.G * params.H;
  std::unique_ptr<char[]> rotated;
  if (params.rotary.dim) rotated.reset(new char[params.B * work * element_size(params.dtype)]);
  parallel_for(executor, 1 + params.B * work / (1 << 16), params.B, 0, [&](int64_t task, void*) {
    const auto b = static_cast<int32_t>(task);
    append(params, kernels, b, sequences[b]);
    if (rotated) rotate_queries(params, kernels, b, sequences[b], rotated.get());
  });
  if (params.B * work == 0) return;
  const void* q = rotated ? rotated.get() : params.q;
  if (params.pages) {
    attend_to_pages(params, kernels, sequences, q, executor);
    return;
  }
  if (!whole) {
    for (int32_t b = 0; b < params.B; ++b) attend_to_row(params, kernels, b, sequences[b], q, executor);
    return;
  }
  std::vector<int32_t> lengths;
  for (const CacheSequence& s : sequences) lengths.insert(lengths.end(), params.K, s.end);
  ForwardParams forward{};
  forward.dtype = params.dtype;
  forward.shape = Shape{params.B, params.K, params.G, params.T, params.S, params.H};
  forward.band.left = params.left;
  forward.band.right = params.right;
  forward.band.kv_lengths = lengths.data();
  forward.score = params.score;
  forward.sinks = params.sinks;
  forward.q = q;
  forward.k = params.k_cache;
  forward.v = params.v_cache;
  forward.o = params.o;
  forward.lse = params.lse;
  cpu::forward(forward, executor, kernels);
}

void kvcache(const KvcacheParams& params, Executor& executor) { kvcache(params, executor, selected_kernels()); }

}  // namespace jax_flash::cpu
