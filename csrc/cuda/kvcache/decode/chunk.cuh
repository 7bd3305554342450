// Chunks of eight elements of a head, as they lie in global memory and turned by a rotary embedding. Angles are applied
// in float32 and the result is rounded once.
#pragma once

#include "cache_sequence.h"
#include "cuda/tile/convert.cuh"

namespace jax_flash::decode {

// Eight elements d ... d + 7 of a head, 0 past H, however it is aligned.
template <class Element>
__device__ __forceinline__ uint4 load_chunk(const Element* x, int32_t d, int32_t H) {
  if (H % 8 == 0) return d < H ? *reinterpret_cast<const uint4*>(x + d) : make_uint4(0, 0, 0, 0);
  uint32_t r[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int32_t e = d + 2 * i;
    r[i] = (e < H ? x[e].bits : 0u) | (e + 1 < H ? static_cast<uint32_t>(x[e + 1].bits) << 16 : 0u);
  }
  return make_uint4(r[0], r[1], r[2], r[3]);
}

template <class Element>
__device__ __forceinline__ void store_chunk(Element* x, int32_t d, int32_t H, uint4 chunk) {
  if (H % 8 == 0) {
    *reinterpret_cast<uint4*>(x + d) = chunk;
    return;
  }
  const uint32_t r[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (d + i < H) x[d + i].bits = static_cast<uint16_t>(r[i / 2] >> (16 * (i % 2)));
  }
}

template <class Element>
__device__ __forceinline__ void unpack_chunk(uint4 chunk, float (&x)[8]) {
  const uint32_t r[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = unpack_low<Element>(r[i]);
    x[2 * i + 1] = unpack_high<Element>(r[i]);
  }
}

// cos and sin of one position, four pairs at a time.
template <class Element>
__device__ __forceinline__ void load_angles(const RotaryParams& rotary, const void* table, int64_t at, float* x) {
  if (rotary.dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = static_cast<const float*>(table)[at + i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = to_float(static_cast<const Element*>(table)[at + i]);
  }
}

// Elements d ... d + 7 of the head x [H] of query or new key i of sequence b, turned. `length`: of its cache before the
// call. Everything is asked for before anything is used: the caller waits for memory once.
template <class Element>
__device__ __noinline__ uint4 load_rotated_chunk(const KvcacheParams& params, int32_t b, int32_t kh, int32_t length,
                                                 int32_t i, const Element* x, int32_t d) {
  const RotaryParams& rotary = params.rotary;
  const int32_t H = params.H, dim = rotary.dim, half = dim / 2;
  if (d >= dim) return load_chunk(x, d, H);
  int64_t row = min_i32(rotary.per_sequence ? i : length + i, rotary.rows - 1);
  if (rotary.per_sequence) row += (static_cast<int64_t>(b) * params.K + kh) * rotary.rows;
  const bool upper = d >= half;
  const int64_t at = row * half + (rotary.interleaved ? d / 2 : upper ? d - half : d);
  const uint4 own_chunk = load_chunk(x, d, H);
  const uint4 other_chunk = rotary.interleaved ? own_chunk : load_chunk(x, upper ? d - half : d + half, H);
  float c[8], s[8], own[8], other[8], y[8];
  load_angles<Element>(rotary, rotary.cos, at, c);
  load_angles<Element>(rotary, rotary.sin, at, s);
  if (!rotary.interleaved) {
    load_angles<Element>(rotary, rotary.cos, at + 4, c + 4);
    load_angles<Element>(rotary, rotary.sin, at + 4, s + 4);
  }
  unpack_chunk<Element>(own_chunk, own);
  unpack_chunk<Element>(other_chunk, other);
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (rotary.interleaved) {
      y[e] = e % 2 ? own[e] * c[e / 2] + own[e - 1] * s[e / 2] : own[e] * c[e / 2] - own[e + 1] * s[e / 2];
    } else {
      y[e] = own[e] * c[e] + (upper ? other[e] : -other[e]) * s[e];
    }
  }
  return make_uint4(pack<Element>(y[0], y[1]), pack<Element>(y[2], y[3]), pack<Element>(y[4], y[5]),
                    pack<Element>(y[6], y[7]));
}

}  // namespace jax_flash::decode
