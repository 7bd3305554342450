// The Python module jax_flash._native: what there is to register with XLA, the tables that describe calls and kernels,
// and what was built. jax_flash/_native.pyi has the signatures.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "backward_workspace.h"
#include "cpu/launch.h"
#include "ffi/handlers.h"
#include "kernel_table.h"
#include "kvcache_plan.h"
#include "operands.h"
#include "options.h"

namespace nb = nanobind;

namespace jax_flash {
namespace {

constexpr const char* kDTypeNames[] = {"float32", "float16", "bfloat16"};
constexpr Call kCalls[] = {Call::kForward, Call::kBackward, Call::kKvcache};

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

template <size_t count>
nb::tuple names(const char* const (&values)[count]) {
  nb::list list;
  for (const char* value : values) list.append(value);
  return nb::tuple(list);
}

// The operand table: for each row, what it is to each call.
nb::list operands() {
  constexpr const char* kRoleNames[] = {"", "required", "optional", "updated", "result"};
  nb::list rows;
  for (const Operand& operand : kOperands) {
    nb::dict row, roles;
    row["name"] = operand.name;
    row["axes"] = operand.axes;
    row["memory"] = operand.memory;
    row["type"] = kElementTypeNames[static_cast<int>(operand.type)];
    row["gradient"] = operand.gradient;
    for (Call call : kCalls)
      roles[kCallNames[static_cast<int>(call)]] = kRoleNames[static_cast<int>(operand.use(call).role)];
    row["roles"] = roles;
    rows.append(row);
  }
  return rows;
}

nb::list feature_names(Features features) {
  nb::list list;
  for (int i = 0; i < kFeatureCount; ++i) {
    if (features >> i & 1) list.append(kFeatureNames[i]);
  }
  return list;
}

// The kernel table, whether built or not.
nb::list kernels() {
  nb::list rows;
  for (const Kernel& kernel : kKernels) {
    nb::dict row;
    nb::list dtypes;
    for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      if (kernel.dtypes & dtype_bit(dtype)) dtypes.append(kDTypeNames[static_cast<int>(dtype)]);
    }
    row["name"] = kernel.name;
    row["call"] = kCallNames[static_cast<int>(kernel.call)];
    row["first_capability"] = kernel.first_capability;
    row["last_capability"] = kernel.last_capability;
    row["dtypes"] = dtypes;
    row["head_dim_multiple"] = kernel.head_dim_multiple;
    row["most_head_dim"] = kernel.most_head_dim;
    row["supports"] = feature_names(kernel.supports);
    rows.append(row);
  }
  return rows;
}

DType dtype_from(const std::string& name) {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    if (name == kDTypeNames[static_cast<int>(dtype)]) return dtype;
  }
  throw nb::value_error(("unsupported dtype " + name).c_str());
}

// The params of a call with these operands, as far as needs.h looks at them.
template <class Params>
Params sketch(Call call, const std::string& dtype, int64_t S, int64_t H, const std::vector<std::string>& operands,
              const std::vector<int64_t>& options, const std::vector<float>& score) {
  if (options.size() != kOptionCount || score.size() != kScoreCount)
    throw nb::value_error("options or score: wrong size");
  alignas(16) static char somewhere[16];
  Params p{};
  p.dtype = dtype_from(dtype);
  p.shape = Shape{1, 1, 1, 1, S, H};
  p.band.left = options[kLeft];
  p.band.right = options[kRight];
  p.band.top_left = options[kTopLeft] != 0;
  p.score = {score[kSoftmaxScale], score[kSoftcap]};
  for (const Operand& operand : kOperands) {
    for (const std::string& name : operands) {
      if (name == operand.name && operand.use(call).pointer >= 0) {
        *reinterpret_cast<void**>(reinterpret_cast<char*>(&p) + operand.use(call).pointer) = somewhere;
      }
    }
  }
  return p;
}

// The name of the kernel that a forward or backward call gets on a device of that compute capability, or "" where none
// takes it. 0: the CPU.
std::string kernel_name(const std::string& call, int capability, const std::string& dtype, int64_t S, int64_t H,
                        const std::vector<std::string>& operands, const std::vector<int64_t>& options,
                        const std::vector<float>& score) {
  const Kernel* kernel = nullptr;
  if (call == "forward") {
    kernel = find_kernel(sketch<ForwardParams>(Call::kForward, dtype, S, H, operands, options, score), capability);
  } else if (call == "backward") {
    auto params = sketch<BackwardParams>(Call::kBackward, dtype, S, H, operands, options, score);
    params.deterministic = options[kDeterministic] != 0;
    kernel = find_kernel(params, capability);
  } else {
    throw nb::value_error("call must be forward or backward");
  }
  return kernel ? kernel->name : "";
}

// (kernel, whether o may take q's buffer, bytes per KV head, per position, per call): see kvcache_plan.h.
nb::tuple kvcache_plan(int64_t T, int64_t G, int64_t H, bool rotary, bool pages, bool batch_index, bool leftpad,
                       int64_t num_splits, int64_t positions) {
  const bool copies_keys = prefill::copies_keys(pages, batch_index, leftpad);
  const KvcachePlan plan = plan_kvcache(T, G, H, rotary, copies_keys, num_splits, positions);
  return nb::make_tuple(static_cast<int64_t>(plan.kernel), plan.o_may_be_q, plan.per_head, plan.per_position,
                        plan.per_call);
}

// (bytes per KV head, per query head and begun `rows` queries, where query heads share a KV head per begun `rows` keys;
// rows)
nb::tuple backward_workspace(int64_t H) {
  const BackwardWorkspaceSize size = backward_workspace_size(H);
  return nb::make_tuple(size.per_kv_head, size.per_rows, size.per_keys, BackwardWorkspaceSize::kRows);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "jax_flash's compiled kernels: FFI handlers, the tables of operands and kernels, and build information.";
  m.attr("UNBOUNDED") = kUnbounded;
  m.attr("FORWARD_WORKSPACE") = kForwardWorkspaceBytes;
  m.attr("OPTIONS") = names(kOptionNames);
  m.attr("SCORE") = names(kScoreNames);
  m.attr("FEATURES") = names(kFeatureNames);
  m.def("registrations", &registrations);
  m.def("build_info", &build_info);
  m.def("operands", &operands);
  m.def("kernels", &kernels);
  m.def("kernel_name", &kernel_name, nb::arg("call"), nb::arg("capability"), nb::arg("dtype"), nb::arg("S"),
        nb::arg("H"), nb::arg("operands"), nb::arg("options"), nb::arg("score"));
  m.def("plan_kvcache", &kvcache_plan, nb::arg("T"), nb::arg("G"), nb::arg("H"), nb::arg("rotary"), nb::arg("pages"),
        nb::arg("batch_index"), nb::arg("leftpad"), nb::arg("num_splits"), nb::arg("positions"));
  m.def("backward_workspace", &backward_workspace, nb::arg("H"));
}

}  // namespace jax_flash
