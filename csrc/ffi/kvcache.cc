#include "ffi/kvcache.h"

#include "ffi/reader.h"

namespace jax_flash {
namespace {

// The dimensions of a call, in the order in which its arrays lie in memory (time_major) or in the logical one, where
// the heads come first so that XLA can split them and layouts say how the bytes lie. Leading axes are those of vmap.
struct Layout {
  bool time_major;
  DimsView vmapped;
  int64_t groups = 1;                         // product of the vmapped axes
  int64_t B = 0, K = 0, G = 0, T = 0, H = 0;  // B: of one group
  int64_t rows = 0, S = 0;

  Dims dims(std::initializer_list<int64_t> tail) const { return Dims(vmapped, tail); }
  Dims query() const { return time_major ? dims({B, T, K, G, H}) : dims({B, K, G, T, H}); }
  Dims key(int64_t rows_, int64_t length) const {
    return time_major ? dims({rows_, length, K, H}) : dims({rows_, K, length, H});
  }
  // Split over devices, everything that belongs to a sequence is there for each of its heads.
  Dims per_sequence() const { return time_major ? dims({B}) : dims({B, K}); }
};

// The optional operands' bits.
enum Operand : int { kKNew, kVNew, kLengths, kBatchIndex, kLeftpad, kBlockTable, kCos, kSin, kOperands };

constexpr int64_t kMostSplits = 4096;  // as kvcache.py has it

// False where the product does not fit int64, as that of an array without elements may not.
bool product(DimsView dims, int64_t* result) {
  *result = 1;
  for (int64_t d : dims) {
    if (__builtin_mul_overflow(*result, d, result)) return false;
  }
  return true;
}

bool fits(std::initializer_list<int64_t> dims, int64_t most) {
  int64_t count;
  return product(DimsView(dims.begin(), dims.size()), &count) && count <= most;
}

Layout read_layout(Reader& reader, bool time_major, ffi::AnyBuffer q, ffi::AnyBuffer cache) {
  Layout l;
  l.time_major = time_major;
  const DimsView qd = q.dimensions(), cd = cache.dimensions();
  if (qd.size() < 5 || qd.size() > Dims::kMostAxes || cd.size() + 1 != qd.size()) {
    reader.fail("q and k_cache must have ranks 5 and 4 (more for mapped axes); got " + to_string(qd) + ", " +
                to_string(cd));
    return l;
  }
  const size_t at = qd.size() - 5;
  l.vmapped = DimsView(qd.begin(), at);
  if (!product(l.vmapped, &l.groups)) reader.fail("the mapped axes are too large; got q " + to_string(qd));
  l.B = qd[at];
  l.T = qd[at + (l.time_major ? 1 : 3)];
  l.K = qd[at + (l.time_major ? 2 : 1)];
  l.G = qd[at + (l.time_major ? 3 : 2)];
  l.H = qd[at + 4];
  l.rows = cd[at];
  l.S = cd[at + (l.time_major ? 1 : 2)];
  if (l.H < 1 || l.H > 256) reader.fail("the head dim must lie in [1, 256]; got " + std::to_string(l.H));
  if (l.K < 1 || l.G < 1) reader.fail("there must be a head; got q " + to_string(qd));
  if (l.S > kMaxLength) reader.fail("a row of the cache holds at most 2^29 positions; got " + std::to_string(l.S));
  if (!fits({l.groups, l.rows}, INT32_MAX) || !fits({l.groups, l.rows, l.S}, INT32_MAX)) {
    reader.fail("a cache holds at most 2^31 - 1 positions; got k_cache " + to_string(cd));
  }
  if (!fits({l.groups, l.B}, INT32_MAX) || !fits({l.T, l.G}, kMaxLength) || l.K > kMaxLength) {
    reader.fail("at most 2^31 - 1 sequences, and 2^29 queries times heads of a KV head; got q " + to_string(qd));
  }
  return l;
}

}  // namespace

ffi::ErrorOr<KvcacheCall> decode_kvcache(const KvcacheBuffers& b, ffi::RemainingArgs rest, ffi::RemainingRets caches,
                                         ffi::Dictionary attrs) {
  Reader reader("jax_flash_kvcache", rest, attrs);
  const auto options = reader.array<int64_t>("options", kKvcacheOptions);
  const auto score = reader.array<float>("score", 2);
  if (!reader.ok()) return ffi::Unexpected(reader.error());
  const auto option = [&](KvcacheOption which) { return (*options)[which]; };
  const Layout l = read_layout(reader, option(kTimeMajor), b.q, b.k_cache);
  if (!reader.ok()) return ffi::Unexpected(reader.error());
  const auto has = [&](Operand operand) { return (option(kPresent) >> operand & 1) != 0; };
  if (option(kPresent) >> kOperands != 0) reader.fail("unknown operands are announced");
  if (has(kBatchIndex) && has(kBlockTable)) reader.fail("batch_index and block_table exclude each other");
  if (option(kNumSplits) < 0 || option(kNumSplits) > kMostSplits) {
    reader.fail("num_splits must lie in [0, " + std::to_string(kMostSplits) + "]; got " +
                std::to_string(option(kNumSplits)));
  }
  if (has(kKNew) != has(kVNew) || has(kCos) != has(kSin)) {
    reader.fail("k_new and v_new, and cos and sin, come together");
    return ffi::Unexpected(reader.error());
  }
  const auto optional = [&](Operand operand, const char* name) { return reader.optional(has(operand), name); };
  const ffi::DataType type = b.q.element_type();
  KvcacheParams p{};
  p.dtype = read_dtype(reader, b.q);
  p.groups = static_cast<int32_t>(l.groups);
  p.B = static_cast<int32_t>(l.groups * l.B);
  p.K = static_cast<int32_t>(l.K);
  p.G = static_cast<int32_t>(l.G);
  p.T = static_cast<int32_t>(l.T);
  p.H = static_cast<int32_t>(l.H);
  p.rows = static_cast<int32_t>(l.rows);
  p.S = static_cast<int32_t>(l.S);
  p.sequence_stride = static_cast<int32_t>(l.time_major ? 1 : l.K);
  p.left = option(kLeft);
  p.right = option(kRight);
  p.score = ScoreParams{(*score)[0], (*score)[1]};
  check_score(reader, p.score);
  p.num_splits = static_cast<int32_t>(option(kNumSplits));

  if (const auto k_new = optional(kKNew, "k_new")) {
    const DimsView got = k_new->dimensions();
    const int64_t T_new = got.size() == l.vmapped.size() + 4 ? got[l.vmapped.size() + (l.time_major ? 1 : 2)] : -1;
    reader.expect("k_new", *k_new, type, l.key(l.B, T_new));
    if (T_new > l.T) reader.fail("more new tokens than queries");
    p.T_new = static_cast<int32_t>(T_new);
    p.k_new = k_new->untyped_data();
    if (const auto v_new = optional(kVNew, "v_new")) {
      reader.expect("v_new", *v_new, type, l.key(l.B, T_new));
      p.v_new = v_new->untyped_data();
    }
  }
  const auto integers = [&](Operand operand, const char* name) -> const int32_t* {
    const auto buffer = optional(operand, name);
    if (!buffer) return nullptr;
    reader.expect(name, *buffer, ffi::DataType::S32, l.per_sequence());
    return static_cast<const int32_t*>(buffer->untyped_data());
  };
  p.lengths = integers(kLengths, "lengths");
  p.batch_index = integers(kBatchIndex, "batch_index");
  p.leftpad = integers(kLeftpad, "leftpad");
  if (const auto table = optional(kBlockTable, "block_table")) {
    const DimsView got = table->dimensions();
    const int64_t pages = got.size() == 0 ? 0 : got.back();
    if (pages < 1 || l.S < 1 || !fits({pages, l.S}, kMaxLength)) {
      reader.fail("the pages of a sequence must hold 1 to 2^29 positions; got block_table " + to_string(got) +
                  " and pages of " + std::to_string(l.S));
      return ffi::Unexpected(reader.error());
    }
    p.pages = static_cast<int32_t>(pages);
    reader.expect("block_table", *table, ffi::DataType::S32, l.dims({l.B, p.pages}));
    p.block_table = static_cast<const int32_t*>(table->untyped_data());
  }
  if (!p.pages && !p.batch_index && l.rows != l.B) reader.fail("the cache must have a row for each sequence");
  if (const auto cos = optional(kCos, "cos")) {
    const DimsView got = cos->dimensions();
    RotaryParams& r = p.rotary;
    r.interleaved = option(kRotaryInterleaved);
    r.per_query = p.left != kUnbounded || p.right != kUnbounded;
    r.per_sequence = !l.time_major;
    const std::optional<DType> table_dtype = to_dtype(cos->element_type());
    if (!table_dtype || (*table_dtype != DType::kFloat32 && *table_dtype != p.dtype)) {
      reader.fail("the rotary tables must be float32 or as q");
    }
    r.dtype = table_dtype.value_or(DType::kFloat32);
    if (got.size() < 2 || got.back() < 8 || got.back() > l.H / 2 || got.back() % 8 != 0 || got[got.size() - 2] < 1 ||
        got[got.size() - 2] > INT32_MAX) {
      reader.fail("the rotary tables have the wrong shape " + to_string(got));
      return ffi::Unexpected(reader.error());
    }
    r.dim = static_cast<int32_t>(2 * got.back());
    r.rows = static_cast<int32_t>(got[got.size() - 2]);
    const Dims want = r.per_sequence ? l.dims({l.B, l.K, r.rows, got.back()}) : Dims{r.rows, got.back()};
    reader.expect("cos", *cos, cos->element_type(), want);
    r.cos = cos->untyped_data();
    if (const auto sin = optional(kSin, "sin")) {
      reader.expect("sin", *sin, cos->element_type(), want);
      r.sin = sin->untyped_data();
    }
  }
  reader.expect("k_cache", b.k_cache, type, l.key(l.rows, l.S));
  reader.expect("v_cache", b.v_cache, type, l.key(l.rows, l.S));
  reader.expect("o", b.o, type, l.query());
  reader.expect("lse", b.lse, ffi::DataType::F32, l.dims({l.B, l.K, l.G, l.T}));
  p.k_cache = b.k_cache.untyped_data();
  p.v_cache = b.v_cache.untyped_data();
  KvcacheCall call{};
  if (caches.size() != (has(kKNew) ? 2 : 0)) {
    reader.fail("the caches are results where there is a k_new, and only there");
    return ffi::Unexpected(reader.error());
  }
  if (has(kKNew)) {
    auto k_out = caches.get<ffi::AnyBuffer>(0), v_out = caches.get<ffi::AnyBuffer>(1);
    if (!k_out.has_value() || !v_out.has_value()) {
      reader.fail("the updated caches must be results");
      return ffi::Unexpected(reader.error());
    }
    ffi::AnyBuffer k_result = *k_out.value(), v_result = *v_out.value();
    reader.expect("the result k_cache", k_result, type, l.key(l.rows, l.S));
    reader.expect("the result v_cache", v_result, type, l.key(l.rows, l.S));
    p.k_cache = k_result.untyped_data();
    p.v_cache = v_result.untyped_data();
    if (p.k_cache != b.k_cache.untyped_data()) call.k_from = b.k_cache.untyped_data();
    if (p.v_cache != b.v_cache.untyped_data()) call.v_from = b.v_cache.untyped_data();
    // Each result takes its own operand's buffer or a new one.
    const bool crossed = p.k_cache == b.v_cache.untyped_data() || p.v_cache == b.k_cache.untyped_data();
    if (b.k_cache.size_bytes() > 0 && (crossed || p.k_cache == p.v_cache)) {
      reader.fail("k_cache and v_cache may be aliased only to the results of the same names");
    }
    call.cache_bytes = b.k_cache.size_bytes();
  }
  reader.finish();
  if (!reader.ok()) return ffi::Unexpected(reader.error());
  p.q = b.q.untyped_data();
  p.o = b.o.untyped_data();
  p.lse = static_cast<float*>(b.lse.untyped_data());
  p.workspace = b.workspace.untyped_data();
  p.workspace_bytes = static_cast<int64_t>(b.workspace.size_bytes());
  call.params = p;
  return call;
}

std::string describe(const KvcacheParams& p) {
  const char* names[] = {"float32", "float16", "bfloat16"};
  std::string text = names[static_cast<int>(p.dtype)];
  for (const auto& [name, size] : {std::pair{" B=", p.B},
                                   {" K=", p.K},
                                   {" G=", p.G},
                                   {" T=", p.T},
                                   {" T_new=", p.T_new},
                                   {" H=", p.H},
                                   {" cache rows=", p.rows},
                                   {" S=", p.S},
                                   {" pages=", p.pages}}) {
    text += name + std::to_string(size);
  }
  return text;
}

}  // namespace jax_flash
