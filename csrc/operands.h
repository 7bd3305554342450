// The one table of the arrays that calls have: their axes, how they lie in memory, their types, and which member of a
// call's params points to them. The FFI handlers unpack calls by it (ffi/unpack.h), and Python, as _native.operands(),
// evaluates, batches, shards and lowers them by it.
//
// An axis is a letter:
//     b sequences   k KV heads   g query heads per KV head   t queries   s keys, or positions in a row of the cache
//     h head dim    u new tokens   r rows of the cache   n pages per sequence
//     p positions of the rotary tables   d half the rotary dim   w words of 32 keys   x bytes   2 begin and end
// A capital is an axis that may also be 1, for all. Arrays whose axes begin with b or r have the axes of vmap before
// them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "params.h"

namespace jax_flash {

enum class Call { kForward, kBackward, kKvcache };

inline constexpr const char* kCallNames[] = {"forward", "backward", "kvcache"};

// What an array is to a call.
enum class Role : int8_t {
  kNone,      // not a part of it
  kRequired,  // an operand
  kOptional,  // an operand that may be left out
  kUpdated,   // an operand, and where there is a k_new also a result, in the same buffer unless XLA had to copy
  kResult,
};

enum class ElementType : int8_t { kInput, kInputOrFloat32, kFloat32, kInt32, kUint32, kUint8 };

inline constexpr const char* kElementTypeNames[] = {"input", "input or float32", "float32", "int32", "uint32", "uint8"};

struct Use {
  Role role = Role::kNone;
  int16_t pointer = -1;   // the params' member for the data: an offset in bytes
  int16_t capitals = -1;  // of the sizes, int64 each, of the axes that are capitals
};

struct Operand {
  const char* name;
  const char* axes;    // in logical order, batch and heads first: the axes that XLA may split
  const char* memory;  // in the order of memory; what a sequence's heads share has no k there
  ElementType type;
  const char* gradient;  // its name, or ""; a result of backward where a row below has it
  Use forward, backward, kvcache;

  constexpr const Use& use(Call call) const {
    return call == Call::kForward ? forward : call == Call::kBackward ? backward : kvcache;
  }
};

#define JAX_FLASH_USE(role, Params, member) {Role::role, offsetof(Params, member), -1}
#define JAX_FLASH_MASK_USE(Params, member) {Role::kOptional, offsetof(Params, member.words), offsetof(Params, member.G)}

// In the order in which calls pass them; operands and results apart.
inline constexpr Operand kOperands[] = {
    {"q", "bkgth", "btkgh", ElementType::kInput, "dq", JAX_FLASH_USE(kRequired, ForwardParams, q),
     JAX_FLASH_USE(kRequired, BackwardParams, q), JAX_FLASH_USE(kRequired, KvcacheParams, q)},
    {"k",
     "bksh",
     "bskh",
     ElementType::kInput,
     "dk",
     JAX_FLASH_USE(kRequired, ForwardParams, k),
     JAX_FLASH_USE(kRequired, BackwardParams, k),
     {}},
    {"v",
     "bksh",
     "bskh",
     ElementType::kInput,
     "dv",
     JAX_FLASH_USE(kRequired, ForwardParams, v),
     JAX_FLASH_USE(kRequired, BackwardParams, v),
     {}},
    {"k_cache", "rksh", "rskh", ElementType::kInput, "", {}, {}, JAX_FLASH_USE(kUpdated, KvcacheParams, k_cache)},
    {"v_cache", "rksh", "rskh", ElementType::kInput, "", {}, {}, JAX_FLASH_USE(kUpdated, KvcacheParams, v_cache)},
    {"k_new", "bkuh", "bukh", ElementType::kInput, "", {}, {}, JAX_FLASH_USE(kOptional, KvcacheParams, k_new)},
    {"v_new", "bkuh", "bukh", ElementType::kInput, "", {}, {}, JAX_FLASH_USE(kOptional, KvcacheParams, v_new)},
    {"o", "bkgth", "btkgh", ElementType::kInput, "", JAX_FLASH_USE(kResult, ForwardParams, o),
     JAX_FLASH_USE(kRequired, BackwardParams, o), JAX_FLASH_USE(kResult, KvcacheParams, o)},
    {"lse", "bkgt", "bkgt", ElementType::kFloat32, "", JAX_FLASH_USE(kResult, ForwardParams, lse),
     JAX_FLASH_USE(kRequired, BackwardParams, lse), JAX_FLASH_USE(kResult, KvcacheParams, lse)},
    {"do", "bkgth", "btkgh", ElementType::kInput, "", {}, JAX_FLASH_USE(kRequired, BackwardParams, d_o), {}},
    {"dlse", "bkgt", "bkgt", ElementType::kFloat32, "", {}, JAX_FLASH_USE(kOptional, BackwardParams, d_lse), {}},
    {"mask",
     "bkGTw",
     "bkGTw",
     ElementType::kUint32,
     "",
     JAX_FLASH_MASK_USE(ForwardParams, mask),
     JAX_FLASH_MASK_USE(BackwardParams, mask),
     {}},
    {"diagonal",
     "bk",
     "bk",
     ElementType::kInt32,
     "",
     JAX_FLASH_USE(kOptional, ForwardParams, band.diagonal),
     JAX_FLASH_USE(kOptional, BackwardParams, band.diagonal),
     {}},
    {"q_lengths",
     "bk",
     "bk",
     ElementType::kInt32,
     "",
     JAX_FLASH_USE(kOptional, ForwardParams, band.q_lengths),
     JAX_FLASH_USE(kOptional, BackwardParams, band.q_lengths),
     {}},
    {"kv_lengths",
     "bk",
     "bk",
     ElementType::kInt32,
     "",
     JAX_FLASH_USE(kOptional, ForwardParams, band.kv_lengths),
     JAX_FLASH_USE(kOptional, BackwardParams, band.kv_lengths),
     {}},
    {"key_ranges",
     "bkt2",
     "bkt2",
     ElementType::kInt32,
     "",
     JAX_FLASH_USE(kOptional, ForwardParams, band.key_ranges),
     JAX_FLASH_USE(kOptional, BackwardParams, band.key_ranges),
     {}},
    {"query_ranges",
     "bks2",
     "bks2",
     ElementType::kInt32,
     "",
     {},
     JAX_FLASH_USE(kOptional, BackwardParams, band.query_ranges),
     {}},
    {"sinks", "bkg", "bkg", ElementType::kFloat32, "dsinks", JAX_FLASH_USE(kOptional, ForwardParams, sinks),
     JAX_FLASH_USE(kOptional, BackwardParams, sinks), JAX_FLASH_USE(kOptional, KvcacheParams, sinks)},
    {"lengths", "bk", "b", ElementType::kInt32, "", {}, {}, JAX_FLASH_USE(kOptional, KvcacheParams, lengths)},
    {"batch_index", "bk", "b", ElementType::kInt32, "", {}, {}, JAX_FLASH_USE(kOptional, KvcacheParams, batch_index)},
    {"leftpad", "bk", "b", ElementType::kInt32, "", {}, {}, JAX_FLASH_USE(kOptional, KvcacheParams, leftpad)},
    {"block_table", "bn", "bn", ElementType::kInt32, "", {}, {}, JAX_FLASH_USE(kOptional, KvcacheParams, block_table)},
    {"cos",
     "bkpd",
     "pd",
     ElementType::kInputOrFloat32,
     "",
     {},
     {},
     JAX_FLASH_USE(kOptional, KvcacheParams, rotary.cos)},
    {"sin",
     "bkpd",
     "pd",
     ElementType::kInputOrFloat32,
     "",
     {},
     {},
     JAX_FLASH_USE(kOptional, KvcacheParams, rotary.sin)},
    {"dq", "bkgth", "btkgh", ElementType::kInput, "", {}, JAX_FLASH_USE(kResult, BackwardParams, dq), {}},
    {"dk", "bksh", "bskh", ElementType::kInput, "", {}, JAX_FLASH_USE(kResult, BackwardParams, dk), {}},
    {"dv", "bksh", "bskh", ElementType::kInput, "", {}, JAX_FLASH_USE(kResult, BackwardParams, dv), {}},
    {"workspace", "bkx", "x", ElementType::kUint8, "", JAX_FLASH_USE(kResult, ForwardParams, workspace),
     JAX_FLASH_USE(kResult, BackwardParams, workspace), JAX_FLASH_USE(kResult, KvcacheParams, workspace)},
};

#undef JAX_FLASH_USE
#undef JAX_FLASH_MASK_USE

inline constexpr size_t kOperandCount = sizeof(kOperands) / sizeof(Operand);
static_assert(kOperandCount < 64, "a bit of the option `present` for each");

// The row of this name: a constant expression, or it does not compile where there is none.
constexpr size_t operand_row(const char* name) {
  for (size_t row = 0;; ++row) {
    size_t i = 0;
    while (name[i] && kOperands[row].name[i] == name[i]) ++i;
    if (name[i] == kOperands[row].name[i]) return row;
  }
}

}  // namespace jax_flash
