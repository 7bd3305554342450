// What a call needs of a kernel, beyond its dtype and head dim. A new member of params.h gets its place here, or the
// structured bindings below do not compile; kernel_table.h says which kernel supports what.
#pragma once

#include <cstdint>

#include "params.h"

namespace jax_flash {

using Features = uint32_t;

enum Feature : Features {
  kNeedsBand = 1 << 0,      // causal, windows
  kNeedsDiagonal = 1 << 1,  // a diagonal for each sequence
  kNeedsLengths = 1 << 2,   // valid queries and keys for each sequence
  kNeedsRanges = 1 << 3,    // tables of key ranges
  kNeedsMask = 1 << 4,      // one bit a key
  kNeedsSoftcap = 1 << 5,
  kNeedsSinks = 1 << 6,  // a score more in each head's softmax
  kNeedsLseGradient = 1 << 7,
  kNeedsDeterministic = 1 << 8,
  kNeedsManyOrdered = 1 << 9,  // deterministic, with more keys than 16 bits count blocks of 128 of
  kNeedsUnaligned = 1 << 10,   // an array that does not begin at a multiple of 16 bytes
  kNeedsAppend = 1 << 11,      // new tokens are written to the cache
  kNeedsRotary = 1 << 12,
  kNeedsPages = 1 << 13,
  kNeedsBatchIndex = 1 << 14,
  kNeedsLeftpad = 1 << 15,
  kNeedsSplits = 1 << 16,  // num_splits is given
};

inline constexpr const char* kFeatureNames[] = {
    "band",         "diagonal",      "lengths",           "ranges",    "mask",   "softcap", "sinks",
    "LSE gradient", "deterministic", "ordered > 8M keys", "unaligned", "append", "rotary",  "pages",
    "batch index",  "left padding",  "num_splits"};
inline constexpr int kFeatureCount = sizeof(kFeatureNames) / sizeof(char*);
inline constexpr Features kAllFeatures = (Features{1} << kFeatureCount) - 1;

inline constexpr int64_t kMostOrderedKeys = 128 * 65534;

constexpr Features when(bool needed, Feature feature) { return needed ? Features{feature} : Features{0}; }

template <class... Pointers>
Features needs_of_pointers(Pointers... pointers) {
  return when(((reinterpret_cast<uintptr_t>(pointers) % 16 != 0) || ...), kNeedsUnaligned);
}

inline Features needs(const BandParams& params) {
  const auto& [left, right, top_left, diagonal, q_lengths, kv_lengths, key_ranges, query_ranges] = params;
  (void)top_left;  // a choice of the diagonal, which every kernel takes from make_band()
  return when(left != kUnbounded || right != kUnbounded, kNeedsBand) | when(diagonal, kNeedsDiagonal) |
         when(q_lengths || kv_lengths, kNeedsLengths) | when(key_ranges || query_ranges, kNeedsRanges);
}

inline Features needs(const MaskParams& params) {
  const auto& [words, G, T] = params;
  (void)G, (void)T;
  return when(words, kNeedsMask);
}

inline Features needs(const ScoreParams& params) {
  const auto& [softmax_scale, softcap] = params;
  (void)softmax_scale;
  return when(softcap != 0.0f, kNeedsSoftcap);
}

inline Features needs(const ForwardParams& params) {
  const auto& [dtype, shape, band, mask, score, sinks, q, k, v, o, lse, workspace] = params;
  (void)dtype, (void)shape, (void)workspace;
  return needs(band) | needs(mask) | needs(score) | when(sinks, kNeedsSinks) | needs_of_pointers(q, k, v, o, lse);
}

inline Features needs(const BackwardParams& params) {
  const auto& [dtype, shape, band, mask, score, sinks, deterministic, q, k, v, o, lse, d_o, d_lse, dq, dk, dv,
               workspace, workspace_bytes] = params;
  (void)dtype, (void)workspace_bytes;
  return needs(band) | needs(mask) | needs(score) | when(sinks, kNeedsSinks) | when(d_lse, kNeedsLseGradient) |
         when(deterministic, kNeedsDeterministic) |
         when(deterministic && shape.S > kMostOrderedKeys, kNeedsManyOrdered) |
         needs_of_pointers(q, k, v, o, lse, d_o, d_lse, dq, dk, dv, workspace);
}

inline Features needs(const RotaryParams& params) {
  const auto& [dim, rows, interleaved, per_query, per_sequence, dtype, cos, sin] = params;
  (void)rows, (void)interleaved, (void)per_query, (void)per_sequence, (void)dtype;
  return when(dim != 0, kNeedsRotary) | needs_of_pointers(cos, sin);
}

inline Features needs(const KvcacheParams& params) {
  const auto& [dtype, B, K, G, T, T_new, H, groups, rows, S, pages, sequence_stride, left, right, score, rotary, sinks,
               num_splits, q, k_new, v_new, k_cache, v_cache, lengths, batch_index, leftpad, block_table, o, lse,
               workspace, workspace_bytes] = params;
  (void)dtype, (void)B, (void)K, (void)G, (void)T, (void)H, (void)groups, (void)rows, (void)S, (void)sequence_stride;
  (void)block_table, (void)workspace_bytes;
  return when(left != kUnbounded || right != kUnbounded, kNeedsBand) | when(lengths, kNeedsLengths) | needs(score) |
         needs(rotary) | when(T_new != 0, kNeedsAppend) | when(pages != 0, kNeedsPages) |
         when(batch_index, kNeedsBatchIndex) | when(leftpad, kNeedsLeftpad) | when(num_splits != 0, kNeedsSplits) |
         when(sinks, kNeedsSinks) | needs_of_pointers(q, k_new, v_new, k_cache, v_cache, o, lse, workspace);
}

}  // namespace jax_flash
