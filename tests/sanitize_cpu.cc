// Random calls of the CPU kernels for the sanitizers to watch, on every instruction set that runs here: arrays of
// exactly their size, each an allocation of its own, uninitialised workspaces, lengths and page numbers that name what
// is not there. .ci/sanitize builds and runs it.
//
// usage: sanitize_cpu [calls] [seed]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "backward_workspace.h"
#include "cache_sequence.h"
#include "cpu/tasks.h"

namespace jax_flash {
namespace {

// Every task on a new thread, some of which outlive the call.
class Threads final : public cpu::Executor {
 public:
  explicit Threads(int64_t count) : count_(count) {}
  ~Threads() override {
    for (std::thread& thread : threads_) thread.join();
  }
  int64_t num_threads() const override { return count_; }
  void schedule(std::function<void()> task) override { threads_.emplace_back(std::move(task)); }

 private:
  int64_t count_;
  std::vector<std::thread> threads_;
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// As much memory as asked for, aligned as XLA's is.
using Array = std::unique_ptr<void, Free>;

Array allocate(int64_t bytes, size_t alignment = 64) {
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, static_cast<size_t>(bytes)) != 0) std::abort();
  return Array(memory);
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  bool chance(double p) { return std::uniform_real_distribution<>()(engine_) < p; }
  int64_t any_of(std::initializer_list<int64_t> values) {
    return values.begin()[integer(0, static_cast<int64_t>(values.size()) - 1)];
  }

  // Normal values of the dtype.
  Array normal(DType dtype, int64_t count) {
    Array array = allocate(count * size(dtype));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) {
      const float value = normal(engine_);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (dtype == DType::kFloat32) {
        static_cast<float*>(array.get())[i] = value;
      } else if (dtype == DType::kBFloat16) {
        static_cast<uint16_t*>(array.get())[i] = static_cast<uint16_t>(bits >> 16);
      } else {  // Truncated, and what is too small for a normal float16 is 0.
        const int32_t exponent = static_cast<int32_t>(bits >> 23 & 0xff) - 112;
        const uint32_t half = exponent > 0 ? static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 0x3ff) : 0;
        static_cast<uint16_t*>(array.get())[i] = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
      }
    }
    return array;
  }

  Array integers(int64_t count, int64_t low, int64_t high) {
    Array array = allocate(count * 4);
    for (int64_t i = 0; i < count; ++i)
      static_cast<int32_t*>(array.get())[i] = static_cast<int32_t>(integer(low, high));
    return array;
  }

  static int64_t size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

 private:
  std::mt19937_64 engine_;
};

// The arrays of a call, and which of them are its results.
struct Arrays {
  std::vector<Array> all;
  struct Result {
    const char* name;
    const void* data;
    DType dtype;
    int64_t count;
  };
  std::vector<Result> results;

  void* keep(Array array) {
    all.push_back(std::move(array));
    return all.back().get();
  }
  void* result(const char* name, DType dtype, int64_t count) {
    void* data = keep(allocate(count * Random::size(dtype)));
    results.push_back({name, data, dtype, count});
    return data;
  }
};

std::vector<std::vector<float>> values(const Arrays& arrays) {
  std::vector<std::vector<float>> all;
  for (const Arrays::Result& result : arrays.results) {
    std::vector<float> values(result.count);
    for (int64_t i = 0; i < result.count; ++i) {
      if (result.dtype == DType::kFloat32) {
        values[i] = static_cast<const float*>(result.data)[i];
        continue;
      }
      const uint32_t bits = static_cast<const uint16_t*>(result.data)[i];
      if (result.dtype == DType::kBFloat16) {
        const uint32_t wide = bits << 16;
        std::memcpy(&values[i], &wide, 4);
      } else {
        const uint32_t exponent = bits >> 10 & 31;
        const float mantissa = static_cast<float>(bits & 0x3ff);
        const float magnitude =
            exponent ? std::ldexp(1024 + mantissa, static_cast<int>(exponent) - 25) : std::ldexp(mantissa, -24);
        values[i] = bits >> 15 ? -magnitude : magnitude;
      }
    }
    all.push_back(std::move(values));
  }
  return all;
}

// Results of one instruction set, and of one number of threads, as those of another.
void expect_close(const Arrays& arrays, const std::vector<std::vector<float>>& got,
                  const std::vector<std::vector<float>>& want, DType dtype, const std::string& call) {
  const float bound = dtype == DType::kFloat32 ? 1e-4f : dtype == DType::kFloat16 ? 1e-2f : 6e-2f;
  for (size_t which = 0; which < got.size(); ++which) {
    float largest = 1;
    for (float x : want[which]) largest = std::isfinite(x) ? std::max(largest, std::fabs(x)) : largest;
    for (size_t i = 0; i < got[which].size(); ++i) {
      const float a = got[which][i], b = want[which][i];
      if (a == b || std::fabs(a - b) <= bound * largest) continue;
      std::fprintf(stderr, "%s: %s[%zu] is %g, not %g\n", call.c_str(), arrays.results[which].name, i, a, b);
      std::exit(1);
    }
  }
}

std::vector<const cpu::Kernels*> kernels() {
  std::vector<const cpu::Kernels*> all{&cpu::portable::kKernels};
#if defined(__x86_64__)
  const std::string best = cpu::selected_kernels().name;
  if (best != "portable") all.push_back(&cpu::avx2::kKernels);
  if (best.rfind("avx512", 0) == 0) all.push_back(&cpu::avx512::kKernels);
  if (best == "avx512bf16") all.push_back(&cpu::avx512bf16::kKernels);
#endif
  return all;
}

using Run = std::function<void(cpu::Executor&, const cpu::Kernels&)>;

void run_all(const Arrays& arrays, DType dtype, const std::string& call, Random& random, const Run& run) {
  std::vector<std::vector<float>> first;
  for (const cpu::Kernels* set : kernels()) {
    {
      Threads threads(set->name == std::string("portable") ? 1 : random.integer(1, 4));
      run(threads, *set);
    }
    if (first.empty()) {
      first = values(arrays);
    } else {
      expect_close(arrays, values(arrays), first, dtype, call + " " + set->name);
    }
  }
  Threads threads(4);  // TSan is to see threads on machines that have the portable kernels only
  run(threads, cpu::portable::kKernels);
  expect_close(arrays, values(arrays), first, dtype, call + " portable, 4 threads");
}

DType some_dtype(Random& random) { return static_cast<DType>(random.integer(0, 2)); }

int64_t some_head_dim(Random& random) {
  return random.chance(0.5) ? random.integer(1, 256) : random.any_of({1, 8, 40, 64, 128, 256});
}

int64_t some_length(Random& random) {
  return random.chance(0.4) ? random.any_of({1, 2, 16, 63, 64, 65, 127, 129}) : random.integer(1, 260);
}

ScoreParams some_score(Random& random, int64_t H) {
  const float scale = 1 / std::sqrt(static_cast<float>(H));
  return {random.chance(0.1) ? -scale : scale, random.chance(0.3) ? 3.0f : 0.0f};
}

int64_t some_side(Random& random) { return random.chance(0.6) ? kUnbounded : random.integer(-20, 100); }

// [heads, T, 2], a range of keys for each query, both ends of which never fall, and [heads, S, 2], the same seen from
// the keys.
void add_ranges(Random& random, const Shape& s, Arrays& arrays, BandParams& band) {
  const int64_t heads = s.B * s.K;
  auto* keys = static_cast<int32_t*>(arrays.keep(allocate(heads * s.T * 8)));
  auto* queries = static_cast<int32_t*>(arrays.keep(allocate(heads * s.S * 8)));
  band.key_ranges = keys;
  band.query_ranges = queries;
  for (int64_t head = 0; head < heads; ++head, keys += 2 * s.T, queries += 2 * s.S) {
    for (int side = 0; side < 2; ++side) {
      std::vector<int32_t> ends;
      for (int64_t i = 0; i < s.T; ++i) ends.push_back(static_cast<int32_t>(random.integer(0, s.S)));
      std::sort(ends.begin(), ends.end());
      for (int64_t i = 0; i < s.T; ++i) keys[2 * i + side] = ends[i];
    }
    for (int64_t j = 0; j < s.S; ++j) {
      int32_t begin = 0, end = 0;
      while (begin < s.T && keys[2 * begin + 1] <= j) ++begin;
      while (end < s.T && keys[2 * end] <= j) ++end;
      queries[2 * j] = begin;
      queries[2 * j + 1] = end;
    }
  }
}

std::string describe(const char* kind, DType dtype, const Shape& s) {
  std::string text = std::string(kind) + " dtype " + std::to_string(static_cast<int>(dtype)) + ", B K G T S H";
  for (int64_t size : {s.B, s.K, s.G, s.T, s.S, s.H}) text += " " + std::to_string(size);
  return text;
}

void attention(Random& random) {
  const Shape s{random.integer(1, 2), random.integer(1, 3), random.integer(1, 4),
                some_length(random),  some_length(random),  some_head_dim(random)};
  const DType dtype = some_dtype(random);
  const int64_t queries = s.B * s.T * s.N() * s.H, keys = s.B * s.S * s.K * s.H, rows = s.B * s.N() * s.T;
  Arrays inputs, forward_results;
  ForwardParams f{};
  f.dtype = dtype;
  f.shape = s;
  f.score = some_score(random, s.H);
  f.band.left = some_side(random);
  f.band.right = random.chance(0.3) ? 0 : some_side(random);
  f.band.top_left = random.chance(0.3);
  const auto lengths = [&](int64_t most) {
    return static_cast<const int32_t*>(inputs.keep(random.integers(s.B * s.K, -3, most + 3)));
  };
  if (random.chance(0.3)) f.band.q_lengths = lengths(s.T);
  if (random.chance(0.3)) f.band.kv_lengths = lengths(s.S);
  if (random.chance(0.2)) f.band.diagonal = lengths(s.T);
  if (random.chance(0.2)) add_ranges(random, s, inputs, f.band);
  if (random.chance(0.4)) {
    f.mask.G = random.chance(0.5) ? 1 : s.G;
    f.mask.T = random.chance(0.3) ? 1 : s.T;
    const int64_t words = s.B * s.K * f.mask.G * f.mask.T * ((s.S + 31) / 32);
    const bool sparse = random.chance(0.3);
    f.mask.words =
        static_cast<const uint32_t*>(inputs.keep(random.integers(words, INT32_MIN, sparse ? INT32_MIN : INT32_MAX)));
  }
  f.q = inputs.keep(random.normal(dtype, queries));
  f.k = inputs.keep(random.normal(dtype, keys));
  f.v = inputs.keep(random.normal(dtype, keys));
  f.o = forward_results.result("o", dtype, queries);
  f.lse = static_cast<float*>(forward_results.result("lse", DType::kFloat32, rows));
  run_all(forward_results, dtype, describe("forward", dtype, s), random,
          [&](cpu::Executor& executor, const cpu::Kernels& set) { cpu::forward(f, executor, set); });

  Arrays gradients;
  BackwardParams b{};
  b.dtype = dtype;
  b.shape = s;
  b.band = f.band;
  b.mask = f.mask;
  b.score = f.score;
  b.q = f.q;
  b.k = f.k;
  b.v = f.v;
  b.o = f.o;
  b.lse = f.lse;
  b.d_o = inputs.keep(random.normal(dtype, queries));
  if (random.chance(0.5)) b.d_lse = static_cast<const float*>(inputs.keep(random.normal(DType::kFloat32, rows)));
  b.dq = gradients.result("dq", dtype, queries);
  b.dk = gradients.result("dk", dtype, keys);
  b.dv = gradients.result("dv", dtype, keys);
  b.workspace_bytes = backward_workspace_bytes(s);
  run_all(gradients, dtype, describe("backward", dtype, s), random,
          [&](cpu::Executor& executor, const cpu::Kernels& set) {
            const Array workspace = allocate(b.workspace_bytes, 256);  // a new one, so that nothing is left in it
            b.workspace = workspace.get();
            cpu::backward(b, executor, set);
          });
}

void cache(Random& random) {
  KvcacheParams p{};
  Arrays inputs, results;
  p.dtype = some_dtype(random);
  p.groups = static_cast<int32_t>(random.integer(1, 2));
  p.B = static_cast<int32_t>(p.groups * random.integer(1, 2));
  p.K = static_cast<int32_t>(random.integer(1, 3));
  p.G = static_cast<int32_t>(random.integer(1, 4));
  p.T = static_cast<int32_t>(random.chance(0.5) ? 1 : random.integer(1, 80));
  p.H = static_cast<int32_t>(some_head_dim(random));
  const bool paged = random.chance(0.5);
  p.pages = paged ? static_cast<int32_t>(random.integer(1, 9)) : 0;
  p.S = static_cast<int32_t>(paged ? random.integer(1, 70) : some_length(random));
  const int32_t each = p.B / p.groups;
  p.rows = paged ? each * p.pages : each;
  p.sequence_stride = random.chance(0.5) ? 1 : p.K;
  p.score = some_score(random, p.H);
  p.left = some_side(random);
  p.right = random.chance(0.4) ? 0 : some_side(random);
  const int64_t capacity = cache_capacity(p), entries = static_cast<int64_t>(p.B) * p.sequence_stride;
  const auto integers = [&](int64_t low, int64_t high) {
    return static_cast<const int32_t*>(inputs.keep(random.integers(entries, low, high)));
  };
  if (random.chance(0.8)) p.lengths = integers(-3, capacity + 3);
  if (random.chance(0.3)) p.leftpad = integers(-3, capacity + 3);
  if (paged) {
    // Every page once, so that no two sequences write to one; then some that there are not.
    int32_t* table = static_cast<int32_t*>(inputs.keep(allocate(int64_t{p.B} * p.pages * 4)));
    for (int32_t i = 0; i < p.B * p.pages; ++i) table[i] = random.chance(0.1) ? p.rows + 5 : i % p.rows;
    p.block_table = table;
  } else if (random.chance(0.4)) {
    int32_t* index = static_cast<int32_t*>(inputs.keep(allocate(entries * 4)));
    for (int64_t i = 0; i < entries; ++i) {
      const int32_t b = static_cast<int32_t>(i / p.sequence_stride) % each;
      index[i] = random.chance(0.1) ? -1 : each - 1 - b;
    }
    p.batch_index = index;
  }
  const int64_t heads = int64_t{p.B} * p.T * p.K * p.G;
  const int64_t cached = int64_t{p.groups} * p.rows * p.S * p.K * p.H;
  if (random.chance(0.7)) {
    p.T_new = static_cast<int32_t>(random.integer(1, p.T));
    p.k_new = inputs.keep(random.normal(p.dtype, int64_t{p.B} * p.T_new * p.K * p.H));
    p.v_new = inputs.keep(random.normal(p.dtype, int64_t{p.B} * p.T_new * p.K * p.H));
  }
  if (p.H >= 16 && random.chance(0.5)) {
    RotaryParams& r = p.rotary;
    r.dim = static_cast<int32_t>(16 * random.integer(1, p.H / 16));
    r.rows = static_cast<int32_t>(random.integer(1, 300));
    r.interleaved = random.chance(0.5);
    r.per_query = p.left != kUnbounded || p.right != kUnbounded;
    r.per_sequence = random.chance(0.3);
    r.dtype = random.chance(0.5) ? p.dtype : DType::kFloat32;
    const int64_t count = int64_t{r.rows} * (r.dim / 2) * (r.per_sequence ? p.B * p.K : 1);
    r.cos = inputs.keep(random.normal(r.dtype, count));
    r.sin = inputs.keep(random.normal(r.dtype, count));
  }
  p.q = inputs.keep(random.normal(p.dtype, heads * p.H));
  p.k_cache = inputs.keep(random.normal(p.dtype, cached));
  p.v_cache = inputs.keep(random.normal(p.dtype, cached));
  p.o = results.result("o", p.dtype, heads * p.H);
  p.lse = static_cast<float*>(results.result("lse", DType::kFloat32, heads));
  const Shape shape{p.B, p.K, p.G, p.T, p.S, p.H};
  run_all(results, p.dtype, describe(paged ? "paged cache" : "cache", p.dtype, shape), random,
          [&](cpu::Executor& executor, const cpu::Kernels& set) { cpu::kvcache(p, executor, set); });
}

}  // namespace
}  // namespace jax_flash

int main(int argc, char** argv) {
  const int64_t calls = argc > 1 ? std::atoll(argv[1]) : 60;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  jax_flash::Random random(seed);
  for (int64_t i = 0; i < calls; ++i) {
    if (i % 2) {
      jax_flash::cache(random);
    } else {
      jax_flash::attention(random);
    }
  }
  std::printf("%lld calls on", static_cast<long long>(calls));
  for (const auto* set : jax_flash::kernels()) std::printf(" %s", set->name);
  std::printf("\n");
}
