// How a CUDA call over a KV cache is done. It is planned once, where the call is lowered (Python has plan_kvcache as
// _native.plan_kvcache()); the handler does as the call's attribute says, and refuses what does not fit its buffers.
#pragma once

#include <cstdint>

#include "cuda/kvcache/decode/config.h"
#include "cuda/kvcache/prefill/workspace.h"

namespace jax_flash {

enum class KvcacheKernel : int64_t { kDecode, kPrefill };

struct KvcachePlan {
  KvcacheKernel kernel;
  // Decode reads all of a segment's rows of q before it writes the same rows of o, and reads no others there.
  bool o_may_be_q;
  // Bytes of workspace: for each KV head of each sequence, for each position that it can hold, and for the call.
  int64_t per_head, per_position, per_call;
};

// Fewer rows T * G than this are decode's, which divides the keys among the blocks.
inline constexpr int64_t kPrefillRows = 257;
// Prefill copies a cache that does not lie in order, up to this.
inline constexpr int64_t kMostCopiedBytes = int64_t{1} << 32;

// `positions`: of all KV heads of all sequences; INT64_MAX where that is not known.
inline KvcachePlan plan_kvcache(int64_t T, int64_t G, int64_t H, bool rotary, bool copies_keys, int64_t num_splits,
                                int64_t positions) {
  const int64_t copied = copies_keys ? 2 * prefill::key_bytes_per_position(H) : 0;
  if (T * G >= kPrefillRows && (copied == 0 || positions <= kMostCopiedBytes / copied)) {
    return {KvcacheKernel::kPrefill, false, 4 + prefill::query_bytes_per_head(T, G, H, rotary), copied,
            4 * prefill::kAlignment + kForwardWorkspaceBytes};
  }
  const int64_t rows = 8 * decode::row_tiles(T * G, static_cast<int32_t>(H));
  const int64_t row_blocks = (T * G + rows - 1) / rows;
  const int64_t slot = decode::slot_bytes(rows, static_cast<int32_t>(H));
  const int64_t counters = decode::kCounterBytes * row_blocks;
  if (num_splits > 0) {
    return {KvcacheKernel::kDecode, true, counters + row_blocks * num_splits * slot, 0, decode::kCounterAlignment};
  }
  return {KvcacheKernel::kDecode, true, counters, 0, decode::kCounterAlignment + 2 * decode::kMaxBlocks * slot};
}

}  // namespace jax_flash
