// XLA's threads, as the CPU kernels see them.
#pragma once

#include <utility>

#include "cpu/launch.h"
#include "ffi/xla_ffi.h"

namespace jax_flash {

class XlaExecutor final : public cpu::Executor {
 public:
  explicit XlaExecutor(ffi::ThreadPool& pool) : pool_(pool) {}
  int64_t num_threads() const override { return pool_.num_threads(); }
  void schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  ffi::ThreadPool& pool_;
};

}  // namespace jax_flash
