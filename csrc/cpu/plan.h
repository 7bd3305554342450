// How a forward call is divided into tasks.
#pragma once

#include <memory>
#include <vector>

#include "cpu/tasks.h"

namespace jax_flash::cpu {

struct ForwardPlan {
  std::vector<ForwardTask> tasks;     // the longest first, as far as that is known
  std::vector<CombineTask> combines;  // after all tasks
  std::unique_ptr<float[]> partials;  // what they pass on
  int64_t heads, rows;                // of the largest task
  int64_t workers;                    // as many as the work is worth
};

ForwardPlan plan_forward(const ForwardParams& params, const Kernels& kernels, int64_t threads);

// How many tasks keep this many threads busy to the end: four a thread even out their lengths.
inline int64_t target_tasks(int64_t threads) { return threads > 1 ? 4 * threads : 1; }

// How many of the rows a task takes that keeps their queries and outputs in its cache, so that `heads` times as many
// rows become so many `tasks` if that is worth it.
int64_t rows_of_task(int64_t rows, int64_t heads, int64_t H, int64_t tasks);

// How many workers a pass over B * K heads, rows and keys is worth.
int64_t worthwhile_workers(const Shape& shape, int64_t rows, int64_t keys);

}  // namespace jax_flash::cpu
