// The Python module jax_flash._native: what there is to register with XLA, and what was built.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "cpu/launch.h"
#include "ffi/handlers.h"
#if defined(JAX_FLASH_CUDA)
#include "cuda/kernels.h"
#endif

namespace nb = nanobind;

namespace jax_flash {
namespace {

nb::capsule capsule(XLA_FFI_Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

// {platform: {target: handler}}, as jax.ffi.register_ffi_target takes them.
nb::dict registrations() {
  nb::dict cpu, all;
  cpu["jax_flash_forward"] = capsule(jax_flash_cpu_forward);
  cpu["jax_flash_backward"] = capsule(jax_flash_cpu_backward);
  cpu["jax_flash_kvcache"] = capsule(jax_flash_cpu_kvcache);
  all["cpu"] = cpu;
#if defined(JAX_FLASH_CUDA)
  nb::dict cuda;
  cuda["jax_flash_forward"] = capsule(jax_flash_cuda_forward);
  cuda["jax_flash_backward"] = capsule(jax_flash_cuda_backward);
  cuda["jax_flash_kvcache"] = capsule(jax_flash_cuda_kvcache);
  all["CUDA"] = cuda;
#endif
  return all;
}

nb::dict build_info() {
  nb::dict info;
  info["version"] = JAX_FLASH_VERSION;
  info["cpu_instruction_set"] = cpu::instruction_set();
  info["cuda_architectures"] = JAX_FLASH_CUDA_ARCHITECTURES;  // "" without CUDA kernels
  return info;
}

DType dtype_from(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  throw nb::value_error(("unsupported dtype " + name).c_str());
}

// The name of the CUDA kernel that a call would get, or "" where none takes it.
std::string kernel_name([[maybe_unused]] const std::string& direction, [[maybe_unused]] int compute_capability,
                        [[maybe_unused]] int shared_memory, const std::string& dtype, int64_t B, int64_t K, int64_t G,
                        int64_t T, int64_t S, int64_t H, bool has_mask, float softcap, int64_t left, int64_t right,
                        bool deterministic) {
  ForwardParams forward{};
  forward.dtype = dtype_from(dtype);
  forward.shape = Shape{B, K, G, T, S, H};
  forward.band.left = left;
  forward.band.right = right;
  static const uint32_t some_mask = 0;
  if (has_mask) forward.mask.words = &some_mask;
  forward.score.softcap = softcap;
  BackwardParams backward{};
  backward.dtype = forward.dtype;
  backward.shape = forward.shape;
  backward.band = forward.band;
  backward.mask = forward.mask;
  backward.score = forward.score;
  backward.deterministic = deterministic;
#if defined(JAX_FLASH_CUDA)
  Device device;
  device.compute_capability = compute_capability;
  device.shared_memory = shared_memory;
  if (direction == "forward") {
    const ForwardKernel* kernel = find_forward_kernel(forward, device);
    return kernel ? kernel->name : "";
  }
  const BackwardKernel* kernel = find_backward_kernel(backward, device);
  return kernel ? kernel->name : "";
#else
  return "";
#endif
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "jax_flash's compiled kernels: FFI handlers and build information.";
  m.def("registrations", &registrations);
  m.def("build_info", &build_info);
  m.attr("UNBOUNDED") = kUnbounded;
  m.def("kernel_name", &kernel_name, nb::arg("direction"), nb::arg("compute_capability"), nb::arg("shared_memory"),
        nb::arg("dtype"), nb::arg("B"), nb::arg("K"), nb::arg("G"), nb::arg("T"), nb::arg("S"), nb::arg("H"),
        nb::arg("has_mask"), nb::arg("softcap"), nb::arg("left"), nb::arg("right"), nb::arg("deterministic"));
}

}  // namespace jax_flash
