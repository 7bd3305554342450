// How every kernel but decode's is launched.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace jax_flash {

// Whether the product of sizes, none of them negative, is a number that kernels can count to: they index blocks, tiles
// and heads with 32 bits, and take a few more than there are.
constexpr bool countable(std::initializer_list<int64_t> sizes) {
  constexpr int64_t kMost = INT32_MAX - 65536;
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (size == 0) return true;
  }
  for (const int64_t size : sizes) {
    if (size > kMost / product) return false;
    product *= size;
  }
  return true;
}
static_assert(countable({1 << 15, 1 << 15}) && countable({int64_t{1} << 62, 1 << 30, 0}));
static_assert(!countable({1 << 16, 1 << 15}) && !countable({int64_t{1} << 62, int64_t{1} << 62}));

struct LaunchOptions {
  dim3 blocks, threads;
  size_t shared_bytes = 0;  // of dynamic shared memory
  bool overlap = false;     // the kernel may start before the one before it ends, and waits for it itself
};

// Enqueues a kernel. What it returns is about this launch: after <<<>>> one has to ask for the last error, which may be
// anybody's.
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const LaunchOptions& options, cudaStream_t stream,
                          const Arguments&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = options.blocks;
  config.blockDim = options.threads;
  config.dynamicSmemBytes = options.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = options.overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace jax_flash
