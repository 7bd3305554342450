"""The two primitives, attention_forward and attention_backward, and all that JAX and XLA need to know of them.

In a primitive's logical shapes the batch axes come first, so that XLA's partitioner can split them with no Python
callback:

    q, o, do, dq     (*batch, K, G, T, H)    *batch: the axes of vmap, then B
    k, v, dk, dv     (*batch, K, S, H)
    lse, dlse        (*batch, K, G, T)       float32
    mask             (*batch, K, G or 1, T or 1, ceil(S / 32))   uint32
    q_lengths, ...   (*batch, K)             int32
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import dispatch
from jax._src.core import Primitive  # jax.extend.core is public, but imports Pallas: 90 ms
from jax._src.lib.mlir.dialects import hlo
from jax.core import ShapedArray
from jax.interpreters import batching, mlir
from jax.sharding import PartitionSpec

from jax_flash import _ffi, reference
from jax_flash._spec import Extras, Spec

_WORKSPACE_BUCKETS = (64, 96, 128, 192, 256)


def forward(spec: Spec, q, k, v, extras: Extras) -> tuple[jax.Array, jax.Array]:
    """The output, like q, and the LSE."""
    present = extras.present()
    return tuple(forward_p.bind(q, k, v, *present.values(), spec=spec, extras=tuple(present)))


def backward(spec: Spec, q, k, v, o, lse, do, dlse, extras: Extras) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v. dlse may be None, for zero."""
    present = extras.present() if dlse is None else {"dlse": dlse, **extras.present()}
    return tuple(backward_p.bind(q, k, v, o, lse, do, *present.values(), spec=spec, extras=tuple(present)))


_REQUIRED = {"forward": ("q", "k", "v"), "backward": ("q", "k", "v", "o", "lse", "do")}
_RESULTS = {"forward": ("o", "lse"), "backward": ("dq", "dk", "dv")}


# Abstract evaluation.


def _abstract_eval(direction: str, *avals: ShapedArray, spec: Spec, extras: tuple[str, ...]) -> list[ShapedArray]:
    del spec
    names = _REQUIRED[direction] + extras
    by_name = dict(zip(names, avals, strict=True))
    q, k, v = (by_name[name].update(weak_type=False) for name in "qkv")
    for name, aval in by_name.items():
        _check_sharding(name, aval)
    if direction == "backward":
        return [q, k, v]
    row_sharding = q.sharding.update(spec=PartitionSpec(*q.sharding.spec[: q.ndim - 1]))
    return [q, q.update(shape=q.shape[:-1], dtype=np.dtype(np.float32), sharding=row_sharding)]


def _check_sharding(name: str, aval: ShapedArray) -> None:
    """On a mesh with explicit axes, what is not batch or heads must be whole on each device."""
    spec, axes = aval.sharding.spec, _ffi.AXES[name]
    if any(part is not None for part in spec[aval.ndim - len(axes) : aval.ndim]):
        raise NotImplementedError(
            f"attention: on explicit mesh axes only the batch and the heads may be sharded; got {name} of shape "
            f"(*batch, K, {', '.join(axes.upper())}) = {aval.shape} sharded {spec}. "
            "Reshard it with jax.sharding.reshard"
        )


# Batching.


def _batch(primitive: Primitive, direction: str, axis_data, args: Sequence, dims: Sequence, *, spec, extras):
    names = _REQUIRED[direction] + extras
    mapped = {name for name, dim in zip(names, dims, strict=True) if dim is not None}
    sharded = axis_data.spmd_name is not None or axis_data.explicit_mesh_axis is not None
    if direction == "forward" and all("g" in _ffi.AXES[name] or name == "mask" for name in mapped) and not sharded:
        return _batch_into_group(axis_data.size, names, args, dims, spec=spec, extras=extras)
    mesh_axis = axis_data.explicit_mesh_axis
    args = [batching.bdim_at_front(x, d, axis_data.size, mesh_axis) for x, d in zip(args, dims, strict=True)]
    return primitive.bind(*args, spec=spec, extras=extras), [0] * len(_RESULTS[direction])


def _batch_into_group(size: int, names: Sequence[str], args: Sequence, dims: Sequence, *, spec, extras):
    """The mapped axis becomes more query heads per KV head: k and v are not mapped, and are read once."""
    group = args[0].ndim - (4 if dims[0] is not None else 3)  # the position of G in q, and of M in the mask

    def fold(name, x, dim):
        if name not in ("q", "mask"):
            return x
        if dim is None and x.shape[group] == 1 and name == "mask":
            return x
        x = jnp.expand_dims(x, group) if dim is None else jnp.moveaxis(x, dim, group)
        if name == "mask":  # a mask that the group shares is now one for each G
            x = jnp.broadcast_to(x, (*x.shape[: group + 1], G, *x.shape[group + 2 :]))
        x = jnp.broadcast_to(x, (*x.shape[:group], size, *x.shape[group + 1 :]))
        return x.reshape(*x.shape[:group], size * G, *x.shape[group + 2 :])

    G = np.delete(args[0].shape, [] if dims[0] is None else [dims[0]])[group].item()
    folded = [fold(*each) for each in zip(names, args, dims, strict=True)]
    outs = forward_p.bind(*folded, spec=spec, extras=extras)
    return [x.reshape(*x.shape[:group], size, G, *x.shape[group + 1 :]) for x in outs], [group] * len(outs)


# Lowering.


def _lower(
    direction: str, platform: str, ctx: mlir.LoweringRuleContext, *operands, spec: Spec, extras: tuple[str, ...]
):
    if any(size == 0 for aval in ctx.avals_in for size in aval.shape if isinstance(size, int)):
        # Nothing to compute: the results are constants, which XLA finds out for itself.
        return _lower_to_reference(direction)(ctx, *operands, spec=spec, extras=extras)
    names, results, avals_out = _REQUIRED[direction] + extras, _RESULTS[direction], list(ctx.avals_out)
    if platform == "cuda":
        _ffi.check_cuda(ctx.avals_in[0])
    if direction == "backward":
        results = (*results, "workspace")
        avals_out.append(_workspace(ctx.avals_in[0]))
    time_major = platform == "cpu" and not _ffi.partitioned(ctx)
    attributes = _attributes(spec, extras, time_major)
    if direction == "backward":
        attributes.update(deterministic=spec.deterministic, has_dlse="dlse" in extras)
    orders_in = [_ffi.memory_order(name, aval.ndim) for name, aval in zip(names, ctx.avals_in, strict=True)]
    orders_out = [_ffi.memory_order(name, aval.ndim) for name, aval in zip(results, avals_out, strict=True)]
    if time_major:
        operands = [_transpose(x, order) for x, order in zip(operands, orders_in, strict=True)]
        call_in = [_transposed(aval, order) for aval, order in zip(ctx.avals_in, orders_in, strict=True)]
        call_out = [_transposed(aval, order) for aval, order in zip(avals_out, orders_out, strict=True)]
        call = jax.ffi.ffi_lowering(f"jax_flash_{direction}")
        outs = call(ctx.replace(avals_in=call_in, avals_out=call_out), *operands, **attributes)
        outs = [_transpose(x, np.argsort(order)) for x, order in zip(outs, orders_out, strict=True)]
    else:
        call = jax.ffi.ffi_lowering(
            f"jax_flash_{direction}",
            operand_layouts=[order[::-1] for order in orders_in],
            result_layouts=[order[::-1] for order in orders_out],
            extra_attributes=_ffi.partitioning(names, ctx.avals_in, results, avals_out),
        )
        outs = call(ctx.replace(avals_out=avals_out), *operands, **attributes)
    return outs[: len(ctx.avals_out)]


def _lower_to_reference(direction: str):
    def fun(*args, spec, extras):
        named = dict(zip(_REQUIRED[direction] + extras, args, strict=True))
        arrays = Extras(**{name: named[name] for name in Extras._fields if name in named})
        if direction == "forward":
            return reference.forward(spec, *args[:3], arrays)
        return reference.backward(spec, *args[:3], named["do"], named.get("dlse"), arrays)

    return mlir.lower_fun(fun, multiple_results=True)


def _attributes(spec: Spec, extras: tuple[str, ...], time_major: bool) -> dict:
    return dict(
        softmax_scale=np.float32(spec.softmax_scale),
        softcap=np.float32(spec.softcap or 0.0),
        left=_ffi.side(spec.window_left),
        right=_ffi.side(spec.window_right),
        top_left=False,
        has_mask="mask" in extras,
        has_q_lengths="q_lengths" in extras,
        has_kv_lengths="kv_lengths" in extras,
        time_major=time_major,
    )


def _workspace(q: ShapedArray) -> ShapedArray:
    """What the backward kernel may scribble on: a float32 dq, two statistics a row and a counter per 64 rows."""
    *batch, G, T, H = q.shape
    head_dim = next(bucket for bucket in _WORKSPACE_BUCKETS if H <= bucket)
    rows = (T + 127) // 128 * 128
    return ShapedArray((*batch, 256 + G * (rows * (head_dim + 2) * 4 + rows // 16)), np.dtype(np.uint8))


def _transpose(x, order: Sequence[int]):
    order = tuple(int(axis) for axis in order)
    return x if order == tuple(range(len(order))) else hlo.transpose(x, mlir.dense_int_array(order))


def _transposed(aval: ShapedArray, order: Sequence[int]) -> ShapedArray:
    return ShapedArray(tuple(aval.shape[axis] for axis in order), aval.dtype)


def _make_primitive(direction: str) -> Primitive:
    primitive = Primitive(f"attention_{direction}")
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(dispatch.apply_primitive, primitive))
    primitive.def_abstract_eval(functools.partial(_abstract_eval, direction))
    batching.fancy_primitive_batchers[primitive] = functools.partial(_batch, primitive, direction)
    mlir.register_lowering(primitive, _lower_to_reference(direction))
    for platform in ("cpu", "cuda"):
        mlir.register_lowering(primitive, functools.partial(_lower, direction, platform), platform=platform)
    return primitive


forward_p = _make_primitive("forward")
backward_p = _make_primitive("backward")
