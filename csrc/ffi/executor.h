// XLA's threads, as the CPU kernels see them.
#pragma once

#include <new>
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

// Calls work(executor) on XLA's threads. Memory that is out comes back as XLA's error for it; describe() says in which
// call.
template <class Work, class Describe>
ffi::Error run_on(ffi::ThreadPool& pool, Work work, Describe describe) {
  XlaExecutor executor(pool);
  try {
    work(executor);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      describe() +
                          ": the host has no memory for the kernel's intermediate results. Free some, or "
                          "split the batch or the heads over several calls");
  }
  return ffi::Error::Success();
}

}  // namespace jax_flash
