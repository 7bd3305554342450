#include "cpu/plan.h"

#include <algorithm>

namespace jax_flash::cpu {
namespace {

// Rows of a task: at most what keeps q and o, in float32, in half of a second-level cache; at least what makes packing
// a block of keys (the work of about three rows) small beside using it. Multiples of every kernel's strip.
constexpr int64_t kRowUnit = 12;
constexpr int64_t kMinRows = 4 * kRowUnit;
constexpr int64_t kRowBytes = 384 * 1024;

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t align_up(int64_t a, int64_t unit) { return div_up(a, unit) * unit; }

// The keys that some query of sequence b sees lie in [begin, end).
struct KeyRange {
  int64_t begin, end;
};

KeyRange visible_keys(const ForwardParams& params, int64_t b) {
  KeyRange range{params.shape.S, 0};
  for (int64_t kh = 0; kh < params.shape.K; ++kh) {
    const Band band = make_band(params.shape, params.band, b, kh);
    if (band.T == 0) continue;
    range.begin = std::min<int64_t>(range.begin, band.key_begin(0));
    range.end = std::max<int64_t>(range.end, band.key_end(band.T - 1));
  }
  range.begin = std::min(range.begin, range.end) / kKeyUnit * kKeyUnit;
  return range;
}

// Rows and heads of sequence b, their keys divided into pieces.
struct Part {
  int64_t b, kh_begin, kh_end, row_begin, row_end;
  KeyRange keys;
  int64_t piece, pieces;

  int64_t heads() const { return kh_end - kh_begin; }
  int64_t rows() const { return row_end - row_begin; }
};

void add_tasks(const ForwardParams& params, const Part& part, float* partials, ForwardPlan& plan) {
  const int64_t stride = partial_stride(params.shape.H), share = part.heads() * part.rows() * stride;
  for (int64_t s = 0; s < part.pieces; ++s) {
    const int64_t begin = part.keys.begin + s * part.piece;
    plan.tasks.push_back({part.b, part.kh_begin, part.kh_end, part.row_begin, part.row_end, begin,
                          std::min(begin + part.piece, align_up(part.keys.end, kKeyUnit)),
                          part.pieces > 1 ? partials + s * share : nullptr});
  }
  if (part.pieces == 1) return;
  for (int64_t row = 0; row < part.heads() * part.rows(); ++row) {
    plan.combines.push_back({part.b, part.kh_begin + row / part.rows(), part.row_begin + row % part.rows(),
                             partials + row * stride, part.pieces, share});
  }
}

}  // namespace

int64_t worthwhile_workers(const Shape& shape, int64_t rows, int64_t keys) {
  // Waking a thread costs about 10 us: as much as 500k products of an element of q and one of k, or reading 50k of k.
  const double elements = static_cast<double>(shape.B * shape.K) * keys * shape.H;
  return 1 + static_cast<int64_t>(std::min(elements * rows / 500e3 + elements / 50e3, 4096.0));
}

int64_t rows_of_task(int64_t rows, int64_t heads, int64_t H, int64_t tasks) {
  const int64_t most = std::max(kMinRows, kRowBytes / (8 * H) / kRowUnit * kRowUnit);
  const int64_t task_rows = std::clamp(align_up(div_up(heads * rows, tasks), kRowUnit), kMinRows, most);
  return align_up(div_up(rows, div_up(rows, task_rows)), kRowUnit);
}

ForwardPlan plan_forward(const ForwardParams& params, const Kernels& kernels, int64_t threads) {
  const Shape& shape = params.shape;
  const int64_t rows = shape.T * shape.G;
  const bool few = rows <= kernels.few_rows;
  std::vector<KeyRange> keys;
  int64_t all_keys = 0;
  for (int64_t b = 0; b < shape.B; ++b) {
    keys.push_back(visible_keys(params, b));
    all_keys += keys.back().end - keys.back().begin;
  }

  ForwardPlan plan;
  plan.workers = threads = std::min(threads, worthwhile_workers(shape, rows, (all_keys + shape.B - 1) / shape.B));
  const int64_t target = target_tasks(threads);
  int64_t task_rows = rows, task_heads = 1;
  if (few) {
    // Pieces of keys first: a task that takes all heads reads memory in order.
    const int64_t units = div_up(all_keys, kKeyUnit);
    task_heads =
        units >= threads ? shape.K : div_up(shape.K, std::min(shape.K, div_up(threads, std::max<int64_t>(units, 1))));
  } else {
    task_rows = rows_of_task(rows, shape.B * shape.K, shape.H, target);
  }
  const int64_t blocks = div_up(rows, task_rows), groups = div_up(shape.K, task_heads);
  const int64_t whole = std::max<int64_t>(1, shape.B * groups * blocks);
  // Keys are divided only where rows and heads do not keep the threads busy: the shares have to be combined.
  const int64_t piece =
      whole >= target ? shape.S + 1 : std::max<int64_t>(1, div_up(all_keys * groups * blocks, target));

  std::vector<Part> parts;
  int64_t floats = 0;
  for (int64_t b = 0; b < shape.B; ++b) {
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t block = blocks - 1; block >= 0; --block) {
        Part part{b,
                  group * task_heads,
                  std::min(shape.K, (group + 1) * task_heads),
                  block * task_rows,
                  std::min(rows, (block + 1) * task_rows),
                  keys[b],
                  align_up(piece, kKeyUnit),
                  1};
        part.pieces = std::max<int64_t>(1, div_up(part.keys.end - part.keys.begin, part.piece));
        if (part.pieces > 1) floats += part.pieces * part.heads() * part.rows() * partial_stride(shape.H);
        parts.push_back(part);
      }
    }
  }

  plan.heads = task_heads;
  plan.rows = std::min(rows, task_rows);
  if (floats > 0) plan.partials.reset(new float[floats]);
  float* partials = plan.partials.get();
  for (const Part& part : parts) {
    add_tasks(params, part, partials, plan);
    if (part.pieces > 1) partials += part.pieces * part.heads() * part.rows() * partial_stride(shape.H);
  }
  return plan;
}

}  // namespace jax_flash::cpu
