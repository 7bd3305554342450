"""What is common to all calls through XLA's foreign function interface: the compiled library, layouts, partitioning.

The kernels want time before heads in memory, which is how the API's arrays lie there. On GPUs a call keeps its logical
shapes, batch and heads first, and says by layouts how they lie, so that the API's transposes cost nothing. XLA's CPU
compiler would copy around such a call, so on one CPU device the shapes themselves are in memory order.
"""

from __future__ import annotations

import jax
import numpy as np
from jax._src.custom_partitioning_sharding_rule import sdy_sharding_rule_to_mlir, str_to_sdy_sharding_rule
from jax._src.sharding_impls import ShardingContext, SPMDAxisContext
from jax.core import ShapedArray
from jax.interpreters import mlir

try:
    from jax_flash import _native
except ImportError as error:
    raise ImportError(
        "jax_flash: its compiled library jax_flash._native is missing or does not load "
        f"({error}). Build it with `pip install .` in the source tree, which needs a C++17 compiler. If it is "
        "installed already, Python found the source tree first: start Python elsewhere, or as `python -P`"
    ) from error

# The axes of every operand and result after its batch axes (which end with K), in logical order. The mask's own letters
# are m, u and w; the rotary tables' are p and r.
AXES = {
    **dict.fromkeys(("q", "o", "do", "dq"), "gth"),
    **dict.fromkeys(("k", "v", "dk", "dv", "k_new", "v_new", "k_cache", "v_cache"), "sh"),
    **dict.fromkeys(("lse", "dlse"), "gt"),
    **dict.fromkeys(("q_lengths", "kv_lengths", "lengths", "leftpad"), ""),
    **dict.fromkeys(("cos", "sin"), "pr"),
    "mask": "muw",
    "workspace": "x",
}
# The same in memory, where K counts: time before heads.
_TIME_MAJOR = {"gth": "tkgh", "sh": "skh"}


def check_cuda(q: ShapedArray) -> None:
    """Refuses a call that is lowered for CUDA and has no kernel there."""
    if not _native.build_info()["cuda_architectures"]:
        raise NotImplementedError(
            "attention: this jax_flash was built without its CUDA kernels. Install nvcc and reinstall with "
            "`pip install . -C cmake.define.JAX_FLASH_CUDA=ON`, or run on the CPU with jax.default_device"
        )
    if q.dtype == np.float32:
        raise NotImplementedError(
            f"attention: float32 has no CUDA kernel; got q float32{q.shape}. Cast q, k and v to bfloat16 or float16, "
            "or run on the CPU with jax.default_device(jax.devices('cpu')[0])"
        )


def side(value: int | None) -> int:
    """A side of a band as the kernels take it."""
    return _native.UNBOUNDED if value is None else value


def memory_order(name: str, ndim: int) -> tuple[int, ...]:
    """The permutation of logical axes, major to minor, in which an array lies in memory."""
    axes = AXES[name]
    last = ndim - len(axes)
    letters = dict(zip("k" + axes, range(last - 1, ndim), strict=True))
    return (*range(last - 1), *(letters[letter] for letter in _TIME_MAJOR.get(axes, "k" + axes)))


def partitioned(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether XLA will split this call over several devices by itself."""
    context = ctx.module_context.axis_context
    if isinstance(context, SPMDAxisContext):
        return context.mesh.size > 1 and context.manual_axes != frozenset(context.mesh.axis_names)
    return isinstance(context, ShardingContext) and context.num_devices > 1


def partitioning(names, avals_in, results, avals_out) -> dict | None:
    """Tells XLA that the batch axes may be split, and nothing else; None for symbolic shapes, which it cannot split."""
    if not all(isinstance(size, int) for aval in (*avals_in, *avals_out) for size in aval.shape):
        return None
    num_batch_dims = avals_in[0].ndim - len(AXES["q"])
    batch = [f"b{axis}" for axis in range(num_batch_dims)]
    whole = dict.fromkeys("".join(AXES[name] for name in (*names, *results)))
    terms = [" ".join([*batch, *AXES[name]]) for name in (*names, *results)]
    rule = str_to_sdy_sharding_rule(
        f"{', '.join(terms[: len(names)])} -> {', '.join(terms[len(names) :])}", need_replication_factors=tuple(whole)
    )
    types_in, types_out = (
        [mlir.ir.RankedTensorType.get(a.shape, mlir.dtype_to_ir_type(a.dtype)) for a in avals]
        for avals in (avals_in, avals_out)
    )
    return {
        "mhlo.frontend_attributes": mlir.ir_attribute({"num_batch_dims": str(num_batch_dims)}),
        "sdy.sharding_rule": sdy_sharding_rule_to_mlir(rule, types_in, types_out),
    }


def _register_targets() -> None:
    for platform, targets in _native.registrations().items():
        for name, handler in targets.items():
            jax.ffi.register_ffi_target(name, handler, platform=platform)
            jax.ffi.register_ffi_target_as_batch_partitionable(name)


_register_targets()
