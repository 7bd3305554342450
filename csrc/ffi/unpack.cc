#include "ffi/unpack.h"

#include <initializer_list>
#include <utility>

#include "backward_workspace.h"
#include "band.h"
#include "ffi/unpacker.h"

namespace jax_flash {
namespace {

constexpr int64_t kMostSplits = 4096;  // as kvcache.py has it
constexpr int64_t kMostHeadDim = 256;

constexpr size_t kKNew = operand_row("k_new"), kVNew = operand_row("v_new"), kCos = operand_row("cos"),
                 kSin = operand_row("sin"), kBatchIndex = operand_row("batch_index"),
                 kBlockTable = operand_row("block_table"), kKeyRanges = operand_row("key_ranges"),
                 kQueryRanges = operand_row("query_ranges"), kWorkspace = operand_row("workspace"),
                 kKCache = operand_row("k_cache"), kVCache = operand_row("v_cache");

// What forward and backward calls have in common.
template <class Params>
void unpack_common(Unpacker& call, Params& p) {
  call.limit("ts", 0, kMaxLength);
  call.limit("h", 1, kMostHeadDim);
  call.limit_product("Vbkgt", int64_t{1} << 40);
  call.limit_product("Vbks", int64_t{1} << 40);
  if (!call.ok()) return;
  p.dtype = call.dtype();
  p.shape = Shape{
      call.vmapped() * call.size('b'), call.size('k'), call.size('g'), call.size('t'), call.size('s'), call.size('h')};
  p.score = call.score();
  p.band.left = call.option(kLeft);
  p.band.right = call.option(kRight);
  p.band.top_left = call.option(kTopLeft) != 0;
}

void check_workspace(Unpacker& call, int64_t needed) {
  const int64_t bytes = call.bytes_of(kWorkspace);
  if (bytes < needed) {
    call.fail("the workspace must hold " + std::to_string(needed) + " bytes; got " + std::to_string(bytes));
  }
}

using NamedSizes = std::initializer_list<std::pair<const char*, int64_t>>;

std::string describe(Call call, DType dtype, NamedSizes named_sizes) {
  const char* names[] = {"float32", "float16", "bfloat16"};
  std::string text =
      std::string("jax_flash ") + kCallNames[static_cast<int>(call)] + " (" + names[static_cast<int>(dtype)];
  for (const auto& [name, size] : named_sizes) text += std::string(" ") + name + "=" + std::to_string(size);
  return text + ")";
}

}  // namespace

ffi::ErrorOr<ForwardParams> unpack_forward(const Buffers& buffers) {
  ForwardParams p{};
  Unpacker call(Call::kForward, buffers, &p);
  if (call.ok()) unpack_common(call, p);
  if (call.ok()) call.check_aliases(false);
  if (call.ok()) check_workspace(call, kForwardWorkspaceBytes);
  if (!call.ok()) return ffi::Unexpected(call.error());
  return p;
}

ffi::ErrorOr<BackwardParams> unpack_backward(const Buffers& buffers) {
  BackwardParams p{};
  Unpacker call(Call::kBackward, buffers, &p);
  if (call.ok()) unpack_common(call, p);
  if (call.ok()) call.check_aliases(false);
  if (!call.ok()) return ffi::Unexpected(call.error());
  if (call.has(kKeyRanges) != call.has(kQueryRanges)) {
    call.fail("key_ranges and query_ranges come together");
    return ffi::Unexpected(call.error());
  }
  p.deterministic = call.option(kDeterministic) != 0;
  p.workspace_bytes = call.bytes_of(kWorkspace);
  check_workspace(call, backward_workspace_bytes(p.shape));
  if (!call.ok()) return ffi::Unexpected(call.error());
  return p;
}

namespace {

void unpack_rotary(Unpacker& call, KvcacheParams& p) {
  const int64_t half = call.size('d');
  if (half < 8 || half % 8 != 0 || half > p.H / 2) {
    return call.fail("the rotary dim must be a multiple of 16 and at most the head dim; got " +
                     std::to_string(2 * half));
  }
  if (call.dtype_of(kCos) != call.dtype_of(kSin)) return call.fail("cos and sin must have one dtype");
  RotaryParams& r = p.rotary;
  r.dim = static_cast<int32_t>(2 * half);
  r.rows = static_cast<int32_t>(call.size('p'));
  r.interleaved = call.option(kRotaryInterleaved) != 0;
  r.per_query = p.left != kUnbounded || p.right != kUnbounded;
  r.per_sequence = call.option(kMemoryOrder) == 0;
  r.dtype = call.dtype_of(kCos);
}

void unpack_sizes(Unpacker& call, KvcacheParams& p) {
  call.limit("h", 1, kMostHeadDim);
  call.limit("kg", 1, kMaxLength);
  call.limit("s", 0, kMaxLength);
  call.limit_product("Vb", INT32_MAX);
  call.limit_product("tg", kMaxLength);
  call.limit_product("Vr", INT32_MAX);  // a cache holds at most 2^31 - 1 positions
  call.limit_product("Vrs", INT32_MAX);
  if (call.has(kKNew)) call.limit("u", 0, call.size('t'));
  if (call.has(kBlockTable)) {
    call.limit("ns", 1, kMaxLength);
    call.limit_product("ns", kMaxLength);
  }
  if (call.has(kCos)) call.limit("p", 1, INT32_MAX);
  if (!call.has(kBlockTable) && !call.has(kBatchIndex) && call.size('r') != call.size('b')) {
    call.fail("the cache must have a row for each sequence; got " + std::to_string(call.size('r')) + " rows for " +
              std::to_string(call.size('b')));
  }
  if (!call.ok()) return;
  const auto size = [&](char letter) { return static_cast<int32_t>(call.size(letter)); };
  p.groups = static_cast<int32_t>(call.vmapped());
  p.B = static_cast<int32_t>(call.vmapped() * call.size('b'));
  p.K = size('k');
  p.G = size('g');
  p.T = size('t');
  p.T_new = size('u');
  p.H = size('h');
  p.rows = size('r');
  p.S = size('s');
  p.pages = size('n');
  p.sequence_stride = call.option(kMemoryOrder) ? 1 : p.K;
}

}  // namespace

ffi::ErrorOr<KvcacheCall> unpack_kvcache(const Buffers& buffers) {
  KvcacheCall result{};
  KvcacheParams& p = result.params;
  Unpacker call(Call::kKvcache, buffers, &p);
  if (!call.ok()) return ffi::Unexpected(call.error());
  if (call.has(kKNew) != call.has(kVNew) || call.has(kCos) != call.has(kSin)) {
    call.fail("k_new and v_new, and cos and sin, come together");
  }
  if (call.has(kBatchIndex) && call.has(kBlockTable)) call.fail("batch_index and block_table exclude each other");
  const int64_t splits = call.option(kNumSplits), kernel = call.option(kKvcacheKernel);
  if (splits < 0 || splits > kMostSplits) call.fail("num_splits must lie in [0, " + std::to_string(kMostSplits) + "]");
  if (kernel < 0 || kernel > static_cast<int64_t>(KvcacheKernel::kPrefill))
    call.fail("there is no such kvcache_kernel");
  if (call.ok()) unpack_sizes(call, p);
  if (!call.ok()) return ffi::Unexpected(call.error());
  p.dtype = call.dtype();
  p.left = call.option(kLeft);
  p.right = call.option(kRight);
  p.score = call.score();
  p.num_splits = static_cast<int32_t>(splits);
  if (call.has(kCos)) unpack_rotary(call, p);
  result.kernel = static_cast<KvcacheKernel>(kernel);
  call.check_aliases(result.kernel == KvcacheKernel::kDecode);
  if (!call.ok()) return ffi::Unexpected(call.error());
  p.workspace_bytes = call.bytes_of(kWorkspace);
  result.k_from = call.held_before(kKCache);
  result.v_from = call.held_before(kVCache);
  result.cache_bytes = static_cast<size_t>(call.bytes_of(kKCache));
  return result;
}

std::string describe(const ForwardParams& p) {
  const Shape& s = p.shape;
  return describe(Call::kForward, p.dtype, {{"B", s.B}, {"K", s.K}, {"G", s.G}, {"T", s.T}, {"S", s.S}, {"H", s.H}});
}

std::string describe(const BackwardParams& p) {
  const Shape& s = p.shape;
  return describe(Call::kBackward, p.dtype, {{"B", s.B}, {"K", s.K}, {"G", s.G}, {"T", s.T}, {"S", s.S}, {"H", s.H}});
}

std::string describe(const KvcacheParams& p) {
  return describe(Call::kKvcache, p.dtype,
                  {{"B", p.B},
                   {"K", p.K},
                   {"G", p.G},
                   {"T", p.T},
                   {"T_new", p.T_new},
                   {"H", p.H},
                   {"cache rows", p.rows},
                   {"S", p.S},
                   {"pages", p.pages}});
}

}  // namespace jax_flash
