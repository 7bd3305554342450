// What one call is, in plain structs: pointers, shapes, switches. This is all a kernel sees of the world.
//
// Letters as in jax.nn: B batch, T query length, S key length, N = K * G query heads, K KV heads, G query heads per
// KV head, H head dim. Every array is dense in the order written beside it, last axis contiguous. A new member has to
// be given its place in needs.h, or that does not compile.
#pragma once

#include <cstdint>

namespace jax_flash {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };

struct Shape {
  int64_t B, K, G, T, S, H;
  int64_t N() const { return K * G; }
};

// A side of a band that does not limit anything.
inline constexpr int64_t kUnbounded = INT64_MAX;

// Which keys a query sees, as far as they are a contiguous range; band.h turns it into ranges and blocks. With t <= T
// and s <= S valid queries and keys, and d the diagonal's place, query i < t sees key j < s iff
//     i + d - left <= j <= i + d + right.
struct BandParams {
  int64_t left = kUnbounded;  // of any sign; causal is right = 0
  int64_t right = kUnbounded;
  bool top_left = false;                  // d = 0; else d = s - t, FlashAttention's bottom right
  const int32_t* diagonal = nullptr;      // [B, K], d itself; null: as top_left says
  const int32_t* q_lengths = nullptr;     // [B, K], valid queries per sequence; null: all T
  const int32_t* kv_lengths = nullptr;    // [B, K], valid keys per sequence; null: all S
  const int32_t* key_ranges = nullptr;    // [B, K, T, 2], keys that a query sees: begin, end; both never fall with i
  const int32_t* query_ranges = nullptr;  // [B, K, S, 2], the same seen from the keys, for backward: first query with
                                          // end > j, behind the last with begin <= j
};

// Which keys a query sees, one by one.
struct MaskParams {
  // [B, K, G', T', ceil(S / 32)], bit j % 32 of word j / 32 is 1 where key j may be seen; null: everywhere. G' is 1 or
  // G and T' is 1 or T: a size of 1 is shared by all.
  const uint32_t* words = nullptr;
  int64_t G = 1;
  int64_t T = 1;
};

// score = softmax_scale * q.k, then softcap * tanh(score / softcap) where softcap > 0, then what hides keys.
struct ScoreParams {
  float softmax_scale = 1.0f;
  float softcap = 0.0f;  // 0: off
};

// What a forward call needs of workspace: a counter.
inline constexpr int64_t kForwardWorkspaceBytes = 8;

struct ForwardParams {
  DType dtype;
  Shape shape;
  BandParams band;
  MaskParams mask;
  ScoreParams score;
  const float* sinks = nullptr;  // [B, K, G], one score more, without a value, in each valid row's softmax; null: none
  const void* q;                 // [B, T, K, G, H]
  const void* k;                 // [B, S, K, H]
  const void* v;                 // [B, S, K, H]
  void* o;                       // [B, T, K, G, H]; 0 for a row that sees no key
  float* lse;                    // [B, K, G, T], natural log; -inf for a row that sees no key and has no sink
  void* workspace;               // uninitialised; kForwardWorkspaceBytes of it, 8-byte aligned
};

struct BackwardParams {
  DType dtype;
  Shape shape;
  BandParams band;
  MaskParams mask;
  ScoreParams score;
  const float* sinks = nullptr;  // [B, K, G]; the LSE has them already
  bool deterministic;            // bit-equal results over repeats
  const void* q;                 // [B, T, K, G, H]
  const void* k;                 // [B, S, K, H]
  const void* v;                 // [B, S, K, H]
  const void* o;                 // [B, T, K, G, H]
  const float* lse;              // [B, K, G, T], natural log
  const void* d_o;               // [B, T, K, G, H]
  const float* d_lse;            // [B, K, G, T]; null: the LSE has no gradient
  void* dq;                      // [B, T, K, G, H]
  void* dk;                      // [B, S, K, H]
  void* dv;                      // [B, S, K, H]
  void* workspace;               // uninitialised; workspace_bytes of it, 256-byte aligned
  int64_t workspace_bytes;
};

// Rotary embedding of q and of the new keys: the first `dim` elements of a head are turned by the angle of their
// position.
struct RotaryParams {
  int32_t dim = 0;                // a multiple of 16, at most H; 0: none
  int32_t rows = 0;               // positions in the tables; later positions take the last row
  bool interleaved = false;       // pairs (0, 1), (2, 3), ...; else (i, i + dim / 2)
  bool per_query = false;         // query i has position length + i; else all have position length
  bool per_sequence = false;      // tables are [B, K, rows, dim / 2] and row 0 is position length; else [rows, dim / 2]
  DType dtype = DType::kFloat32;  // of the tables: float32 or that of q
  const void* cos = nullptr;
  const void* sin = nullptr;
};

// Attention over a KV cache. A contiguous cache is [rows, S, K, H], a row per sequence; a paged one is the same array
// with a row per page, and block_table names the pages of each sequence in order. cache_sequence.h says what a sequence
// holds.
struct KvcacheParams {
  DType dtype;
  int32_t B, K, G, T, T_new, H;  // T_new new keys per sequence, at most T; 0: nothing is appended
  int32_t groups;                // the cache is [groups, rows, S, K, H]; sequence b belongs to group b / (B / groups)
  int32_t rows, S;               // sequences or pages per group, positions in each; groups * rows * S < 2^31
  int32_t pages;                 // entries of block_table per sequence; 0: the cache is contiguous
  int32_t sequence_stride;       // between the entries of lengths, batch_index and leftpad for b and b + 1: 1 or K
  int64_t left = kUnbounded, right = kUnbounded;  // sides of the band as in BandParams, bottom right
  ScoreParams score;
  RotaryParams rotary;
  const float* sinks = nullptr;  // [B, K, G], as in ForwardParams
  int32_t num_splits;            // of the keys; 0: balanced over the device
  const void* q;                 // [B, T, K, G, H]
  const void* k_new;             // [B, T_new, K, H]
  const void* v_new;             // [B, T_new, K, H]
  void* k_cache;                 // [groups, rows, S, K, H]; written at the appended positions only
  void* v_cache;
  const int32_t* lengths;      // positions filled before the call; null: all
  const int32_t* batch_index;  // cache row of each sequence; null: sequence b of a group has row b
  const int32_t* leftpad;      // first position that may be seen; null: 0
  const int32_t* block_table;  // [B, pages]
  void* o;                     // [B, T, K, G, H]; 0 for a row that sees no key
  float* lse;                  // [B, K, G, T], natural log; -inf for a row that sees no key and has no sink
  void* workspace;             // uninitialised, workspace_bytes of it, 256-byte aligned
  int64_t workspace_bytes;
};

}  // namespace jax_flash
