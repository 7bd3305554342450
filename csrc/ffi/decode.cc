#include "ffi/decode.h"

#include <initializer_list>
#include <optional>

#include "backward_workspace.h"
#include "band.h"
#include "ffi/reader.h"

namespace jax_flash {
namespace {

// The two orders in which a call states its dimensions; the bytes are the same. Leading axes are vmapped batch axes.
//   logical:    q (..., B, K, G, T, H), k (..., B, K, S, H)   with device layouts that store T before the heads
//   time_major: q (..., B, T, K, G, H), k (..., B, S, K, H)
struct Layout {
  bool time_major = false;
  DimsView lead;  // everything up to and including B
  Shape shape{};

  Dims with_lead(std::initializer_list<int64_t> tail) const { return Dims(lead, tail); }
  Dims query() const {
    const auto& s = shape;
    return time_major ? with_lead({s.T, s.K, s.G, s.H}) : with_lead({s.K, s.G, s.T, s.H});
  }
  Dims key() const {
    const auto& s = shape;
    return time_major ? with_lead({s.S, s.K, s.H}) : with_lead({s.K, s.S, s.H});
  }
  Dims row_statistic() const { return with_lead({shape.K, shape.G, shape.T}); }
  Dims per_kv_head() const { return with_lead({shape.K}); }
};

Layout read_layout(Reader& reader, ffi::AnyBuffer q, ffi::AnyBuffer k) {
  Layout layout;
  layout.time_major = reader.attr<bool>("time_major");
  const DimsView qd = q.dimensions(), kd = k.dimensions();
  if (qd.size() < 5 || qd.size() > Dims::kMostAxes || kd.size() + 1 != qd.size()) {
    reader.fail("q and k must have ranks 5 and 4 (more for mapped axes); got " + to_string(qd) + ", " + to_string(kd));
    return layout;
  }
  const size_t lead = qd.size() - 4;
  layout.lead = DimsView(qd.begin(), lead);
  Shape& s = layout.shape;
  s.B = 1;
  for (int64_t d : layout.lead) s.B *= d;
  s.T = qd[lead + (layout.time_major ? 0 : 2)];
  s.K = qd[lead + (layout.time_major ? 1 : 0)];
  s.G = qd[lead + (layout.time_major ? 2 : 1)];
  s.S = kd[lead + (layout.time_major ? 0 : 1)];
  s.H = qd[lead + 3];
  if (s.T > kMaxLength || s.S > kMaxLength) reader.fail("sequences longer than 2^29 are not supported");
  if (s.H < 1 || s.H > 256) reader.fail("the head dim must lie in [1, 256]; got " + std::to_string(s.H));
  return layout;
}

MaskParams read_mask(Reader& reader, const Layout& layout) {
  MaskParams mask;
  if (const auto bits = reader.optional("has_mask")) {
    const DimsView got = bits->dimensions();
    if (got.size() != layout.lead.size() + 4) {
      reader.fail("mask must have rank " + std::to_string(layout.lead.size() + 4) + "; got " + to_string(got));
      return mask;
    }
    mask.G = got[got.size() - 3] == 1 ? 1 : layout.shape.G;
    mask.T = got[got.size() - 2] == 1 ? 1 : layout.shape.T;
    reader.expect("mask", *bits, ffi::DataType::U32,
                  layout.with_lead({layout.shape.K, mask.G, mask.T, (layout.shape.S + 31) / 32}));
    mask.words = static_cast<const uint32_t*>(bits->untyped_data());
  }
  return mask;
}

BandParams read_band(Reader& reader, const Layout& layout) {
  BandParams band;
  band.left = reader.attr<int64_t>("left");
  band.right = reader.attr<int64_t>("right");
  band.top_left = reader.attr<bool>("top_left");
  const auto lengths = [&](const char* flag, const char* name) -> const int32_t* {
    const auto buffer = reader.optional(flag);
    if (!buffer) return nullptr;
    reader.expect(name, *buffer, ffi::DataType::S32, layout.per_kv_head());
    return static_cast<const int32_t*>(buffer->untyped_data());
  };
  band.q_lengths = lengths("has_q_lengths", "q_lengths");
  band.kv_lengths = lengths("has_kv_lengths", "kv_lengths");
  return band;
}

}  // namespace

ffi::ErrorOr<ForwardParams> decode_forward(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                                           ffi::RemainingArgs rest, ffi::AnyBuffer o, ffi::AnyBuffer lse,
                                           ffi::Dictionary attrs) {
  Reader reader("jax_flash_forward", rest, attrs);
  const Layout layout = read_layout(reader, q, k);
  if (!reader.ok()) return ffi::Unexpected(reader.error());
  ForwardParams p{};
  p.dtype = read_dtype(reader, q);
  p.shape = layout.shape;
  p.score = read_score(reader);
  p.mask = read_mask(reader, layout);
  p.band = read_band(reader, layout);
  const ffi::DataType type = q.element_type();
  reader.expect("k", k, type, layout.key());
  reader.expect("v", v, type, layout.key());
  reader.expect("o", o, type, layout.query());
  reader.expect("lse", lse, ffi::DataType::F32, layout.row_statistic());
  reader.finish();
  if (!reader.ok()) return ffi::Unexpected(reader.error());
  p.q = q.untyped_data();
  p.k = k.untyped_data();
  p.v = v.untyped_data();
  p.o = o.untyped_data();
  p.lse = static_cast<float*>(lse.untyped_data());
  return p;
}

ffi::ErrorOr<BackwardParams> decode_backward(const BackwardBuffers& b, ffi::RemainingArgs rest, ffi::Dictionary attrs) {
  Reader reader("jax_flash_backward", rest, attrs);
  const Layout layout = read_layout(reader, b.q, b.k);
  if (!reader.ok()) return ffi::Unexpected(reader.error());
  BackwardParams p{};
  p.dtype = read_dtype(reader, b.q);
  p.shape = layout.shape;
  p.deterministic = reader.attr<bool>("deterministic");
  p.score = read_score(reader);
  if (const auto d_lse = reader.optional("has_dlse")) {
    reader.expect("dlse", *d_lse, ffi::DataType::F32, layout.row_statistic());
    p.d_lse = static_cast<const float*>(d_lse->untyped_data());
  }
  p.mask = read_mask(reader, layout);
  p.band = read_band(reader, layout);
  const ffi::DataType type = b.q.element_type();
  for (const auto& [name, buffer] : {std::pair{"o", b.o}, {"do", b.d_o}, {"dq", b.dq}}) {
    reader.expect(name, buffer, type, layout.query());
  }
  for (const auto& [name, buffer] : {std::pair{"k", b.k}, {"v", b.v}, {"dk", b.dk}, {"dv", b.dv}}) {
    reader.expect(name, buffer, type, layout.key());
  }
  reader.expect("lse", b.lse, ffi::DataType::F32, layout.row_statistic());
  p.workspace_bytes = static_cast<int64_t>(b.workspace.size_bytes());
  if (p.workspace_bytes < backward_workspace_bytes(p.shape)) {
    reader.fail("the workspace must hold " + std::to_string(backward_workspace_bytes(p.shape)) + " bytes; got " +
                std::to_string(p.workspace_bytes));
  }
  reader.finish();
  if (!reader.ok()) return ffi::Unexpected(reader.error());
  p.q = b.q.untyped_data();
  p.k = b.k.untyped_data();
  p.v = b.v.untyped_data();
  p.o = b.o.untyped_data();
  p.lse = static_cast<const float*>(b.lse.untyped_data());
  p.d_o = b.d_o.untyped_data();
  p.dq = b.dq.untyped_data();
  p.dk = b.dk.untyped_data();
  p.dv = b.dv.untyped_data();
  p.workspace = b.workspace.untyped_data();
  return p;
}

std::string describe(DType dtype, const Shape& s) {
  const char* names[] = {"float32", "float16", "bfloat16"};
  std::string text = names[static_cast<int>(dtype)];
  for (const auto& [name, size] :
       {std::pair{" B=", s.B}, {" K=", s.K}, {" G=", s.G}, {" T=", s.T}, {" S=", s.S}, {" H=", s.H}}) {
    text += name + std::to_string(size);
  }
  return text;
}

}  // namespace jax_flash
