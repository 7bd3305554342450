// Programmatic dependent launch: a kernel starts while the one before it in the stream still runs. sm_90.
#pragma once

namespace jax_flash::ptx {

// griddepcontrol.wait: until the kernels before are complete and their writes visible
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// griddepcontrol.launch_dependents: the next kernel may start once every block of this one has said so
__device__ __forceinline__ void launch_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace jax_flash::ptx
