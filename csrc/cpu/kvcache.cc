#include "cpu/kvcache.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/tasks.h"

namespace jax_flash::cpu {
namespace {

int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

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

// Copies positions [begin, end) of sequence b, of all heads, from their pages to k and v.
void gather(const KvcacheParams& params, int32_t b, const CacheSequence& sequence, int32_t begin, int32_t end, char* k,
            char* v) {
  const int64_t row = static_cast<int64_t>(params.K) * params.H * element_size(params.dtype);
  for (int32_t j = begin; j < end;) {
    const int32_t next = std::min(end, (j / params.S + 1) * params.S);
    const int64_t position = cache_position(params, sequence.row, cache_place(params, b, j)), bytes = (next - j) * row;
    if (position < 0) {
      std::memset(k, 0, bytes);
      std::memset(v, 0, bytes);
    } else {
      std::memcpy(k, static_cast<const char*>(params.k_cache) + position * row, bytes);
      std::memcpy(v, static_cast<const char*>(params.v_cache) + position * row, bytes);
    }
    k += bytes;
    v += bytes;
    j = next;
  }
}

// A few queries against pages: each task copies as many positions as a cache near the core holds, and attends to them;
// the shares are combined in the end. (Copying everything first would be slower by far, for it goes to memory and
// back.)
void attend_to_pages(const KvcacheParams& params, const std::vector<CacheSequence>& sequences, const void* q,
                     Executor& executor) {
  constexpr int64_t kChunkBytes = 512 * 1024;
  const Kernels& kernels = selected_kernels();
  const int64_t row_bytes = static_cast<int64_t>(params.K) * params.H * element_size(params.dtype);
  const int64_t rows = static_cast<int64_t>(params.T) * params.G, shares_of = params.K * rows;
  const int64_t stride = partial_stride(params.H), share = shares_of * stride;
  const auto length = static_cast<int32_t>(std::clamp<int64_t>(kChunkBytes / (2 * row_bytes) / 32 * 32, 32, kKeyUnit));
  ForwardParams forward{};
  forward.dtype = params.dtype;
  forward.shape = Shape{params.B, params.K, params.G, params.T, length, params.H};
  forward.band.left = params.left;
  forward.band.right = params.right;
  forward.score = params.score;
  forward.q = q;
  forward.o = params.o;
  forward.lse = params.lse;

  struct Chunk {
    int32_t b, begin, end;
  };
  std::vector<Chunk> chunks;
  std::vector<int64_t> first_chunk;
  for (int32_t b = 0; b < params.B; ++b) {
    const CacheSequence& s = sequences[b];
    first_chunk.push_back(static_cast<int64_t>(chunks.size()));
    int32_t begin = std::min(s.key_begin(0), s.end);
    do {  // one at least, which writes the zeros of a sequence that sees nothing
      const int32_t end = std::min(s.end, (begin / length + 1) * length);
      chunks.push_back({b, begin, end});
      begin = end;
    } while (begin < s.end);
  }
  first_chunk.push_back(static_cast<int64_t>(chunks.size()));
  const auto count = static_cast<int64_t>(chunks.size());
  const std::unique_ptr<float[]> partials(new float[count * share]);
  const int64_t copied = (2 * length * row_bytes + 63) / 64 * 64;
  const int64_t workers = std::min(executor.num_threads(), count);
  parallel_for(
      executor, workers, count, copied + kernels.forward_scratch(forward, params.K, rows),
      [&](int64_t index, void* memory) {
        const Chunk& chunk = chunks[index];
        const CacheSequence& s = sequences[chunk.b];
        const int32_t keys = chunk.end - chunk.begin;
        char* k = static_cast<char*>(memory);
        gather(params, chunk.b, s, chunk.begin, chunk.end, k, k + length * row_bytes);
        // The chunk as a sequence of its own, in which the diagonal keeps its place.
        ForwardParams piece = forward;
        piece.shape.B = 1;
        const std::vector<int32_t> kv_lengths(params.K, keys), diagonal(params.K, s.end - params.T - chunk.begin);
        piece.band.kv_lengths = kv_lengths.data();
        piece.band.diagonal = diagonal.data();
        piece.q = static_cast<const char*>(q) + chunk.b * params.T * params.G * row_bytes;
        piece.k = k;
        piece.v = k + length * row_bytes;
        kernels.forward(piece, {0, 0, params.K, 0, rows, 0, kKeyUnit, partials.get() + index * share}, k + copied);
      });
  parallel_for(
      executor, 1 + params.B * shares_of * params.H / (1 << 16), params.B * shares_of, 0, [&](int64_t task, void*) {
        const int64_t b = task / shares_of, at = task % shares_of;
        kernels.combine(forward, {b, at / rows, at % rows, partials.get() + first_chunk[b] * share + at * stride,
                                  first_chunk[b + 1] - first_chunk[b], share});
      });
}

// Sequence b's queries against its cache.
void attend(const KvcacheParams& params, int32_t b, const CacheSequence& sequence, const void* q, Executor& executor) {
  const int64_t size = element_size(params.dtype), N = static_cast<int64_t>(params.K) * params.G;
  const int32_t begin = std::min(sequence.key_begin(0), sequence.end), end = sequence.end;
  const int64_t row = params.K * params.H * size, bytes = (end - begin) * row;
  const char *k = static_cast<const char*>(params.k_cache), *v = static_cast<const char*>(params.v_cache);
  std::unique_ptr<char[]> copy;
  if (params.pages) {
    copy.reset(new char[2 * bytes]);
    gather(params, b, sequence, begin, end, copy.get(), copy.get() + bytes);
    k = copy.get();
    v = k + bytes;
  } else {
    const int64_t at = (static_cast<int64_t>(sequence.row) * params.S + begin) * row;
    k += at;
    v += at;
  }
  ForwardParams forward{};
  forward.dtype = params.dtype;
  forward.shape = Shape{1, params.K, params.G, params.T, end - begin, params.H};
  forward.score = params.score;
  forward.band.left = params.left;
  forward.band.right = params.right;
  forward.q = static_cast<const char*>(q) + b * params.T * N * params.H * size;
  forward.k = k;
  forward.v = v;
  forward.o = static_cast<char*>(params.o) + b * params.T * N * params.H * size;
  forward.lse = params.lse + b * N * params.T;
  cpu::forward(forward, executor);
}

}  // namespace

void kvcache(const KvcacheParams& params, Executor& executor) {
  const Kernels& kernels = selected_kernels();
  std::vector<CacheSequence> sequences;
  bool whole =
      !params.pages && params.groups == 1 && params.rows == params.B;  // rows in order, each from its first position
  for (int32_t b = 0; b < params.B; ++b) {
    sequences.push_back(make_cache_sequence(params, b));
    const CacheSequence& s = sequences.back();
    whole &= s.row == b && s.begin == 0;
  }
  std::unique_ptr<char[]> rotated;
  if (params.rotary.dim) {
    rotated.reset(new char[static_cast<int64_t>(params.B) * params.T * params.K * params.G * params.H *
                           element_size(params.dtype)]);
  }
  const int64_t work = static_cast<int64_t>(params.T) * params.K * params.G * params.H;
  parallel_for(executor, 1 + params.B * work / (1 << 16), params.B, 0, [&](int64_t task, void*) {
    const auto b = static_cast<int32_t>(task);
    append(params, kernels, b, sequences[b]);
    if (rotated) rotate_queries(params, kernels, b, sequences[b], rotated.get());
  });
  const void* q = rotated ? rotated.get() : params.q;
  if (params.pages && static_cast<int64_t>(params.T) * params.G <= kernels.few_rows) {
    attend_to_pages(params, sequences, q, executor);
    return;
  }
  if (!whole) {
    for (int32_t b = 0; b < params.B; ++b) attend(params, b, sequences[b], q, executor);
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
  forward.q = q;
  forward.k = params.k_cache;
  forward.v = params.v_cache;
  forward.o = params.o;
  forward.lse = params.lse;
  cpu::forward(forward, executor);
}

}  // namespace jax_flash::cpu
