// Reads the attributes and buffers of an XLA call and checks them.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>

#include "ffi/xla_ffi.h"
#include "params.h"

namespace jax_flash {

// The dimensions of a buffer that XLA passes; they outlive the call.
using DimsView = ffi::Span<const int64_t>;

// Dimensions made here, without allocating: a decode step is short, and this code is a part of it.
class Dims {
 public:
  static constexpr size_t kMostAxes = 64;  // numpy has no more

  Dims(DimsView lead, std::initializer_list<int64_t> tail) : size_(lead.size() + tail.size()) {
    std::copy(tail.begin(), tail.end(), std::copy(lead.begin(), lead.end(), dims_));
  }
  Dims(std::initializer_list<int64_t> dims) : Dims(DimsView(), dims) {}

  operator DimsView() const { return DimsView(dims_, size_); }

 private:
  int64_t dims_[kMostAxes];
  size_t size_;
};

inline std::string to_string(DimsView dims) {
  std::string text = "(";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + ")";
}

// Reads attributes and optional operands in order, and keeps the first thing that is wrong.
class Reader {
 public:
  Reader(const char* target, ffi::RemainingArgs rest, ffi::Dictionary attrs)
      : target_(target), rest_(rest), attrs_(attrs) {}

  template <class T>
  T attr(const char* name) {
    const ffi::ErrorOr<T> value = attrs_.get<T>(name);
    if (value.has_value()) return value.value();
    fail(std::string("attribute ") + name + ": " + value.error().message());
    return T{};
  }

  // An attribute that is an array of `size` elements.
  template <class T>
  std::optional<ffi::Span<const T>> array(const char* name, size_t size) {
    const ffi::ErrorOr<ffi::Span<const T>> values = attrs_.get<ffi::Span<const T>>(name);
    if (values.has_value() && values.value().size() == size) return values.value();
    fail(std::string("attribute ") + name + " must be an array of " + std::to_string(size) + " elements");
    return std::nullopt;
  }

  // The next optional operand, if it is there.
  std::optional<ffi::AnyBuffer> optional(bool present, const char* name) {
    if (!present) return std::nullopt;
    const ffi::ErrorOr<ffi::AnyBuffer> buffer = rest_.get<ffi::AnyBuffer>(next_++);
    if (buffer.has_value()) return buffer.value();
    fail(std::string("the operand ") + name + " is announced, but missing");
    return std::nullopt;
  }

  // The same, where the attribute `flag` says whether it is.
  std::optional<ffi::AnyBuffer> optional(const char* flag) { return optional(attr<bool>(flag), flag); }

  void expect(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType dtype, const Dims& dims) {
    if (buffer.element_type() != dtype) return fail(std::string(name) + " has the wrong dtype");
    const DimsView got = buffer.dimensions(), want = dims;
    bool same = got.size() == want.size();
    for (size_t i = 0; same && i < got.size(); ++i) same = got[i] == want[i];  // quicker than memcmp on so few
    if (!same) fail(std::string(name) + " must have shape " + to_string(want) + "; got " + to_string(got));
  }

  void fail(const std::string& what) {
    if (error_.empty()) error_ = std::string(target_) + ": " + what;
  }

  void finish() {
    if (next_ != rest_.size()) fail("more operands than the attributes announce");
  }

  bool ok() const { return error_.empty(); }
  ffi::Error error() const { return ffi::Error(ffi::ErrorCode::kInvalidArgument, error_); }

 private:
  const char* target_;
  ffi::RemainingArgs rest_;
  ffi::Dictionary attrs_;
  size_t next_ = 0;
  std::string error_;
};

inline std::optional<DType> to_dtype(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32:
      return DType::kFloat32;
    case ffi::DataType::F16:
      return DType::kFloat16;
    case ffi::DataType::BF16:
      return DType::kBFloat16;
    default:
      return std::nullopt;
  }
}

inline DType read_dtype(Reader& reader, ffi::AnyBuffer q) {
  const std::optional<DType> dtype = to_dtype(q.element_type());
  if (!dtype) reader.fail("q, k and v must be float32, float16 or bfloat16");
  return dtype.value_or(DType::kFloat32);
}

inline void check_score(Reader& reader, const ScoreParams& score) {
  if (!std::isfinite(score.softmax_scale)) reader.fail("softmax_scale must be finite");
  if (!std::isfinite(score.softcap) || score.softcap < 0) reader.fail("softcap must be finite and not negative");
}

inline ScoreParams read_score(Reader& reader) {
  ScoreParams score;
  score.softmax_scale = reader.attr<float>("softmax_scale");
  score.softcap = reader.attr<float>("softcap");
  check_score(reader, score);
  return score;
}

}  // namespace jax_flash
