#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#include "cpu/tasks.h"

namespace jax_flash::cpu {
namespace {

inline constexpr std::align_val_t kScratchAlignment{64};

struct FreeScratch {
  void operator()(void* scratch) const { ::operator delete(scratch, kScratchAlignment); }
};

using Scratch = std::unique_ptr<void, FreeScratch>;

// Outlives the call where a helper starts late; by then no task is left and work is not touched.
struct Loop {
  int64_t count;
  int64_t scratch_bytes;
  const std::function<void(int64_t, void*)>* work;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // what the first task to fail threw; written before failed is set, read when all are done
  std::mutex mutex;
  std::condition_variable all_done;

  void run(void* scratch) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      if (!failed.load(std::memory_order_relaxed)) run_task(task, scratch);
      if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
        std::lock_guard<std::mutex> lock(mutex);
        all_done.notify_one();
      }
    }
  }

  // On a thread other than the caller's. One that has no memory takes no task: the others do them.
  void help() {
    if (next.load(std::memory_order_relaxed) >= count) return;
    Scratch scratch;
    if (scratch_bytes > 0) {
      scratch.reset(::operator new(scratch_bytes, kScratchAlignment, std::nothrow));
      if (!scratch) return;
    }
    run(scratch.get());
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    all_done.wait(lock, [this] { return done.load(std::memory_order_acquire) == count; });
  }

 private:
  void run_task(int64_t task, void* scratch) {
    try {
      (*work)(task, scratch);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
      failed.store(true, std::memory_order_relaxed);
    }
  }
};

}  // namespace

void parallel_for(Executor& executor, int64_t max_workers, int64_t count, int64_t scratch_bytes,
                  const std::function<void(int64_t, void*)>& work) {
  if (count <= 0) return;
  // What the caller needs comes first: where it is not to be had, nothing has begun.
  const auto loop = std::make_shared<Loop>();
  const Scratch scratch(scratch_bytes > 0 ? ::operator new(scratch_bytes, kScratchAlignment) : nullptr);
  loop->count = count;
  loop->scratch_bytes = scratch_bytes;
  loop->work = &work;
  const int64_t workers = std::min({executor.num_threads(), max_workers, count});
  try {
    for (int64_t i = 1; i < workers; ++i) executor.schedule([loop] { loop->help(); });
  } catch (...) {  // With fewer helpers, then: those that were scheduled still use this call's plan.
  }
  loop->run(scratch.get());
  loop->wait();
  if (loop->error) std::rethrow_exception(loop->error);
}

void wait_for_semaphore(const int32_t* semaphore, int32_t value) {
  // A neighbour on another core is a tile away at most; beyond that its thread is not running, and ours makes room.
  for (int spins = 0; __atomic_load_n(semaphore, __ATOMIC_ACQUIRE) < value; ++spins) {
    if (spins >= 64) std::this_thread::yield();
  }
}

}  // namespace jax_flash::cpu
