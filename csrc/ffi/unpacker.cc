#include "ffi/unpacker.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace jax_flash {
namespace {

constexpr size_t kMostAxes = 64;  // numpy has no more

std::optional<DType> to_dtype(ffi::DataType type) {
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

bool has_vmapped_axes(const char* axes) { return axes[0] == 'b' || axes[0] == 'r'; }

}  // namespace

std::string to_string(DimsView dims) {
  std::string text = "(";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + ")";
}

Unpacker::Unpacker(Call call, const Buffers& buffers, void* params)
    : call_(call), params_(params), attributes_(buffers.attributes) {
  std::fill(std::begin(sizes_), std::end(sizes_), -1);
  sizes_['2'] = 2;
  read_attributes();
  if (ok()) read_arrays(buffers);
}

void Unpacker::fail(const std::string& what) {
  if (error_.empty()) error_ = std::string("jax_flash_") + kCallNames[static_cast<int>(call_)] + ": " + what;
}

void Unpacker::read_attributes() {
  const auto options = attributes_.get<ffi::Span<const int64_t>>("options");
  const auto score = attributes_.get<ffi::Span<const float>>("score");
  if (!options.has_value() || options.value().size() != kOptionCount) {
    return fail("the attribute options must be " + std::to_string(kOptionCount) + " int64");
  }
  if (!score.has_value() || score.value().size() != kScoreCount) {
    return fail("the attribute score must be " + std::to_string(kScoreCount) + " float32");
  }
  options_ = options.value();
  score_ = score.value();
  if (!std::isfinite(score_[kSoftmaxScale])) fail("softmax_scale must be finite");
  if (!std::isfinite(score_[kSoftcap]) || score_[kSoftcap] < 0) fail("softcap must be finite and not negative");
}

void Unpacker::read_arrays(const Buffers& buffers) {
  const auto present = static_cast<uint64_t>(option(kPresent));
  if (present >> kOperandCount != 0) return fail("unknown operands are announced");
  size_t operand = 0, result = 0;
  for (size_t i = 0; i < kOperandCount; ++i) {
    const Operand& row = kOperands[i];
    const Role role = row.use(call_).role;
    const bool here = present >> i & 1, takes = role != Role::kNone && role != Role::kResult;
    if (here && !takes) return fail(std::string(row.name) + " is not an operand of this call");
    if (!here && (role == Role::kRequired || role == Role::kUpdated))
      return fail(row.name + std::string(" is missing"));
    if (!here) continue;
    const auto buffer = buffers.operands.get<ffi::AnyBuffer>(operand++);
    if (!buffer.has_value()) return fail("the operand " + std::string(row.name) + " is announced, but missing");
    read(i, false, buffer.value());
    if (!ok()) return;
  }
  const bool updates = has(operand_row("k_new"));
  for (size_t i = 0; i < kOperandCount; ++i) {
    const Role role = kOperands[i].use(call_).role;
    if (role != Role::kResult && !(role == Role::kUpdated && updates)) continue;
    auto buffer = buffers.results.get<ffi::AnyBuffer>(result++);
    if (!buffer.has_value()) return fail("the result " + std::string(kOperands[i].name) + " is missing");
    read(i, true, *buffer.value());
    if (!ok()) return;
  }
  if (operand != buffers.operands.size()) return fail("more operands than the options announce");
  if (result != buffers.results.size()) return fail("more results than such a call has");
}

void Unpacker::read(size_t at, bool result, ffi::AnyBuffer buffer) {
  const Operand& row = kOperands[at];
  const auto* begin = static_cast<const char*>(buffer.untyped_data());
  arrays_[count_++] = {at, result, begin, begin + buffer.size_bytes(), buffer.element_type()};
  read_type(row, buffer.element_type());
  if (ok()) read_axes(row, buffer.dimensions());
  void* data = buffer.untyped_data();
  std::memcpy(static_cast<char*>(params_) + row.use(call_).pointer, &data, sizeof(data));
}

void Unpacker::read_type(const Operand& row, ffi::DataType type) {
  if (count_ == 1) {  // q, whose type the others have
    const std::optional<DType> dtype = to_dtype(type);
    if (!dtype) return fail("q must be float32, float16 or bfloat16");
    dtype_ = *dtype;
    type_ = type;
  }
  bool right = false;
  switch (row.type) {
    case ElementType::kInput:
      right = type == type_;
      break;
    case ElementType::kInputOrFloat32:
      right = type == type_ || type == ffi::DataType::F32;
      break;
    case ElementType::kFloat32:
      right = type == ffi::DataType::F32;
      break;
    case ElementType::kInt32:
      right = type == ffi::DataType::S32;
      break;
    case ElementType::kUint32:
      right = type == ffi::DataType::U32;
      break;
    case ElementType::kUint8:
      right = type == ffi::DataType::U8;
      break;
  }
  if (!right) {
    fail(std::string(row.name) + " has the wrong dtype; it must be " + kElementTypeNames[static_cast<int>(row.type)] +
         (row.type == ElementType::kInput ? ", that of q" : ""));
  }
}

void Unpacker::read_axes(const Operand& row, DimsView dims) {
  const char* axes = option(kMemoryOrder) ? row.memory : row.axes;
  const size_t own = std::strlen(axes);
  if (count_ == 1) {
    if (dims.size() < own || dims.size() > kMostAxes) {
      return fail("q must have " + std::to_string(own) + " axes, and those of vmap before them; got " +
                  to_string(dims));
    }
    vmapped_axes_ = DimsView(dims.begin(), dims.size() - own);
    for (int64_t d : vmapped_axes_) {
      if (__builtin_mul_overflow(vmapped_, d, &vmapped_)) return fail("the axes of vmap are too large");
    }
  }
  const size_t lead = has_vmapped_axes(axes) ? vmapped_axes_.size() : 0;
  bool same = dims.size() == lead + own;
  for (size_t i = 0; same && i < lead; ++i) same = dims[i] == vmapped_axes_[i];
  char* capital = nullptr;
  if (row.use(call_).capitals >= 0) capital = static_cast<char*>(params_) + row.use(call_).capitals;
  for (size_t i = 0; same && i < own; ++i) {
    int64_t size = 0;
    same = read_axis(axes[i], dims[lead + i], &size);
    if (capital && axes[i] >= 'A' && axes[i] <= 'Z') {
      std::memcpy(capital, &size, sizeof(size));
      capital += sizeof(size);
    }
  }
  if (same) return;
  std::string known;
  for (const char* axis = axes; *axis; ++axis) {
    const char letter = static_cast<char>(*axis >= 'A' && *axis <= 'Z' ? *axis - 'A' + 'a' : *axis);
    if (sizes_[static_cast<int>(letter)] >= 0) {
      known += (known.empty() ? " with " : ", ") + std::string(1, letter) + "=" +
               std::to_string(sizes_[static_cast<int>(letter)]);
    }
  }
  fail(std::string(row.name) + " must have the axes " + (lead ? to_string(vmapped_axes_) + " + " : "") + axes + known +
       "; got " + to_string(dims));
}

bool Unpacker::read_axis(char letter, int64_t size, int64_t* capital) {
  if (letter == 'w') return size == (this->size('s') + 31) / 32;
  if (letter == 'x') return true;
  if (letter >= 'A' && letter <= 'Z') {
    *capital = size;
    return size == 1 || size == this->size(static_cast<char>(letter - 'A' + 'a'));
  }
  int64_t& known = sizes_[static_cast<int>(letter)];
  if (known < 0) known = size;
  return known == size;
}

const Unpacker::Array* Unpacker::find(size_t row, bool result) const {
  for (size_t i = 0; i < count_; ++i) {
    if (arrays_[i].result == result && arrays_[i].row == row) return &arrays_[i];
  }
  return nullptr;
}

DType Unpacker::dtype_of(size_t row) const { return to_dtype(find(row)->type).value_or(DType::kFloat32); }

int64_t Unpacker::bytes_of(size_t row) const {
  const Array* array = find(row);
  if (!array) array = find(row, true);
  return array ? array->end - array->begin : 0;
}

void Unpacker::limit(const char* letters, int64_t least, int64_t most) {
  for (; *letters; ++letters) {
    if (size(*letters) >= least && size(*letters) <= most) continue;
    fail(std::string("the axis ") + *letters + " must lie in [" + std::to_string(least) + ", " + std::to_string(most) +
         "]; got " + std::to_string(size(*letters)));
  }
}

void Unpacker::limit_product(const char* letters, int64_t most) {
  int64_t product = 1;
  bool fits = true;
  for (const char* letter = letters; *letter; ++letter) {
    fits &= !__builtin_mul_overflow(product, *letter == 'V' ? vmapped_ : size(*letter), &product);
  }
  if (fits && product <= most) return;
  fail(std::string("the product of the axes ") + letters + " may be at most " + std::to_string(most) +
       " (V: all axes of vmap)");
}

const void* Unpacker::held_before(size_t row) const {
  const Array *operand = find(row), *result = find(row, true);
  return result && result->begin != operand->begin ? operand->begin : nullptr;
}

void Unpacker::check_aliases(bool o_may_be_q) {
  for (size_t i = 0; i < count_; ++i) {
    const Array& result = arrays_[i];
    if (!result.result || result.begin == result.end) continue;
    for (size_t j = 0; j < count_; ++j) {
      const Array& other = arrays_[j];
      if (i == j || other.end <= result.begin || result.end <= other.begin || other.begin == other.end) continue;
      const bool same_place = !other.result && other.begin == result.begin && other.end == result.end;
      if (same_place && other.row == result.row) continue;
      if (same_place && o_may_be_q && result.row == operand_row("o") && other.row == operand_row("q")) continue;
      return fail(std::string("the result ") + kOperands[result.row].name + " may not share memory with " +
                  kOperands[other.row].name + " in this call");
    }
  }
}

}  // namespace jax_flash
