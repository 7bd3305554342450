// Reads a call by the operand table: binds the axes' letters to sizes, checks every buffer against them, and puts the
// pointers where the params want them. Keeps the first thing that is wrong.
#pragma once

#include <optional>
#include <string>

#include "ffi/unpack.h"
#include "operands.h"
#include "options.h"

namespace jax_flash {

// The dimensions of a buffer that XLA passes; they outlive the call.
using DimsView = ffi::Span<const int64_t>;

std::string to_string(DimsView dims);

class Unpacker {
 public:
  // `params` are those of the call; their members have no values yet.
  Unpacker(Call call, const Buffers& buffers, void* params);

  // False where something is wrong, and nothing else may be asked but error().
  bool ok() const { return error_.empty(); }
  ffi::Error error() const { return ffi::Error(ffi::ErrorCode::kInvalidArgument, error_); }
  void fail(const std::string& what);

  int64_t option(Option which) const { return options_[which]; }
  ScoreParams score() const { return {score_[kSoftmaxScale], score_[kSoftcap]}; }
  DType dtype() const { return dtype_; }
  // Rows of the operand table: operand_row().
  bool has(size_t row) const { return option(kPresent) >> row & 1; }
  DType dtype_of(size_t row) const;
  int64_t bytes_of(size_t row) const;

  // The size of an axis; 0 where no array has it. `vmapped`: the product of the axes of vmap.
  int64_t size(char letter) const {
    return sizes_[static_cast<int>(letter)] < 0 ? 0 : sizes_[static_cast<int>(letter)];
  }
  int64_t vmapped() const { return vmapped_; }
  // Fails unless all are within [least, most].
  void limit(const char* letters, int64_t least, int64_t most);
  // Fails unless the product is at most so much; 'V' is vmapped().
  void limit_product(const char* letters, int64_t most);

  // What an updated operand held before the call, where its result is another buffer; else null.
  const void* held_before(size_t row) const;
  // Results lie apart from all else, but for updated operands in their own buffers. `o_may_be_q`: and o in that of q.
  void check_aliases(bool o_may_be_q);

 private:
  struct Array {
    size_t row;
    bool result;
    const char *begin, *end;
    ffi::DataType type;
  };

  void read_attributes();
  void read_arrays(const Buffers& buffers);
  void read(size_t row, bool result, ffi::AnyBuffer buffer);
  void read_type(const Operand& row, ffi::DataType type);
  void read_axes(const Operand& row, DimsView dims);
  bool read_axis(char letter, int64_t size, int64_t* capital);
  const Array* find(size_t row, bool result = false) const;

  const Call call_;
  void* const params_;
  ffi::Dictionary attributes_;
  ffi::Span<const int64_t> options_;
  ffi::Span<const float> score_;
  DType dtype_ = DType::kFloat32;
  ffi::DataType type_ = ffi::DataType::F32;
  DimsView vmapped_axes_;
  int64_t vmapped_ = 1;
  int64_t sizes_[128];
  Array arrays_[2 * kOperandCount];  // in their order
  size_t count_ = 0;
  std::string error_;
};

}  // namespace jax_flash
