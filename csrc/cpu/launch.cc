// Picks the instruction set, and runs a call's tasks with it.
#include "cpu/launch.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/tasks.h"

namespace jax_flash::cpu {
namespace {

const Kernels& select_kernels() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return avx512bf16::kKernels;
  if (avx512) return avx512::kKernels;
  if (avx2) return avx2::kKernels;
#endif
  return portable::kKernels;
}

}  // namespace

const Kernels& selected_kernels() {
  static const Kernels& selected = select_kernels();
  return selected;
}

const char* instruction_set() { return selected_kernels().name; }

void forward(const ForwardParams& params, Executor& executor, const Kernels& kernels) {
  const Shape& shape = params.shape;
  if (shape.B * shape.K * shape.G * shape.T == 0) return;
  const ForwardPlan plan = plan_forward(params, kernels, executor.num_threads());
  const int64_t scratch = kernels.forward_scratch(params, plan.heads, plan.rows);
  parallel_for(executor, plan.workers, plan.tasks.size(), scratch,
               [&](int64_t task, void* memory) { kernels.forward(params, plan.tasks[task], memory); });
  const int64_t combiners = worthwhile_workers(Shape{1, 1, 1, 1, 1, shape.H}, 1, plan.combines.size());
  parallel_for(executor, combiners, plan.combines.size(), 0,
               [&](int64_t task, void*) { kernels.combine(params, plan.combines[task]); });
}

void backward(const BackwardParams& params, Executor& executor, const Kernels& kernels) {
  const Shape& shape = params.shape;
  const int64_t heads = shape.B * shape.K, rows = shape.T * shape.G;
  if (heads == 0) return;
  const int64_t workers = std::min(executor.num_threads(), worthwhile_workers(shape, rows, shape.S));

  // Some 800 rows a task: reading o and d_o is all they do as a rule.
  const int64_t row_blocks = (rows + kernels.backward_row_block(params) - 1) / kernels.backward_row_block(params);
  constexpr int64_t kBlocksPerTask = 8;
  const int64_t ranges = (row_blocks + kBlocksPerTask - 1) / kBlocksPerTask;
  parallel_for(executor, workers, heads * ranges, kernels.prepare_scratch(params), [&](int64_t task, void* memory) {
    const int64_t head = task / ranges, begin = task % ranges * kBlocksPerTask;
    const int64_t end = std::min(begin + kBlocksPerTask, row_blocks);
    kernels.prepare(params, {head / shape.K, head % shape.K, begin, end}, memory);
  });

  // Heads side by side, so that the key blocks of one, which wait for each other, are far apart.
  const int64_t key_block = kernels.backward_key_block(params), key_blocks = (shape.S + key_block - 1) / key_block;
  parallel_for(executor, workers, heads * key_blocks, kernels.backward_scratch(params),
               [&](int64_t task, void* memory) {
                 const int64_t head = task % heads;
                 kernels.backward(params, {head / shape.K, head % shape.K, task / heads}, memory);
               });
}

void forward(const ForwardParams& params, Executor& executor) { forward(params, executor, selected_kernels()); }
void backward(const BackwardParams& params, Executor& executor) { backward(params, executor, selected_kernels()); }

}  // namespace jax_flash::cpu
