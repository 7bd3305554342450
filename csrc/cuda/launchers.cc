#include "cuda/launchers.h"

#include <cstring>

#include "cuda/sm80/launch.h"
#include "cuda/sm90/launch.h"

namespace jax_flash {
namespace {

constexpr Launcher<ForwardParams> kForwardLaunchers[] = {{"sm90", sm90::forward}, {"sm80", sm80::forward}};
constexpr Launcher<BackwardParams> kBackwardLaunchers[] = {{"sm90", sm90::backward}, {"sm80", sm80::backward}};

template <class Params, size_t count>
const Launcher<Params>* find(const Launcher<Params> (&launchers)[count], const Params& params, const Device& device) {
  const Kernel* kernel = find_kernel(params, device.compute_capability);
  for (const Launcher<Params>& launcher : launchers) {
    if (kernel && std::strcmp(launcher.name, kernel->name) == 0) return &launcher;
  }
  return nullptr;
}

}  // namespace

const Launcher<ForwardParams>* find_launcher(const ForwardParams& params, const Device& device) {
  return find(kForwardLaunchers, params, device);
}

const Launcher<BackwardParams>* find_launcher(const BackwardParams& params, const Device& device) {
  return find(kBackwardLaunchers, params, device);
}

}  // namespace jax_flash
