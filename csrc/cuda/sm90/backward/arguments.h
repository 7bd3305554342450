// What a backward launch hands its kernels.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "band.h"
#include "cuda/sm90/backward/workspace.h"

namespace jax_flash::sm90 {

struct BackwardArguments {
  CUtensorMap q, d_o;      // loads of 64 columns by M rows of [B, T, N, H]
  CUtensorMap k, v;        // loads of 64 columns by N rows of [B, S, K, H]
  CUtensorMap dq, dk, dv;  // stores of 64 columns by 64 rows
  BackwardWorkspace workspace;
  Shape shape;
  BandParams band;
  float softmax_scale;
  float log2_scale;  // exponent of 2 = log2_scale * (product, or with a softcap tanh(tanh_scale * product))
  float tanh_scale;
  float softcap;       // 0: off
  int32_t key_blocks;  // of kSumKeys, of one KV head
  int32_t parts;       // of a group of query heads, each taken apart: 1 or G
  int32_t part_heads;  // query heads of a part: G or 1
  int32_t tickets;     // key blocks, of all parts of all groups
  int32_t last_parts;  // parts that are taken together at the end: see BackwardWork
  bool deterministic;
  const void* gO;      // [B, T, K, G, H]
  const void* gDo;     // [B, T, K, G, H]
  const float* gLse;   // [B, K, G, T], natural log
  const float* gDlse;  // [B, K, G, T] or null
};

}  // namespace jax_flash::sm90
