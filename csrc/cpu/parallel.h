// A loop over tasks on somebody else's threads.
#pragma once

#include <cstdint>
#include <functional>

#include "cpu/launch.h"

namespace jax_flash::cpu {

// Calls work(task, scratch) for every task in [0, count), started in ascending order, on at most max_workers threads,
// one of which is the caller's. Each worker has scratch_bytes of its own. Returns when all are done; depends on no
// thread but those that have begun a task, so it may be nested and the executor may be busy.
//
// Throws std::bad_alloc, before any task has begun, where there is no memory for the caller; a helper without memory
// only does not help. Throws what the first task to fail threw, when all that had begun are done and without starting
// others: tasks that wait for each other must not throw.
void parallel_for(Executor& executor, int64_t max_workers, int64_t count, int64_t scratch_bytes,
                  const std::function<void(int64_t task, void* scratch)>& work);

}  // namespace jax_flash::cpu
