"""The primitives of the three calls, forward, backward and kvcache, and all that JAX and XLA need to know of them.

A primitive takes the operands that a call has, in the order of the table and with the axes of vmap before those of the
table's memory order (q is (*vmapped, B, T, K, G, H)), and returns its results likewise. Updated caches lie in the
operands' buffers. Where only arrays with a G are mapped, the mapped axis of size M becomes one of theirs alone, behind
the other axes of vmap: `group_axes` counts these, and M may be 1 in an array that was not mapped.

The call that XLA sees is a second primitive. On one device it has these shapes; where XLA splits it over devices by
itself, it has the logical ones, batch and KV heads first, layouts that say how the bytes lie, and everything that
belongs to a sequence repeated for each KV head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import dispatch
from jax._src.core import Primitive  # jax.extend.core is public, but imports Pallas: 90 ms
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from jax_flash import _ffi, _kernels, _reference, _sharding
from jax_flash._operands import CALLS, TABLE, in_order, like, results
from jax_flash._spec import Spec


def bind(call: str, spec: Spec, operands: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The results of a call, by name."""
    operands = in_order(operands)
    outs = _PRIMITIVES[call].bind(*operands.values(), call=call, spec=spec, names=tuple(operands), group_axes=0)
    return dict(zip(results(call, operands), outs, strict=True))


# Abstract evaluation.


def _abstract_eval(*avals: ShapedArray, call: str, names: tuple[str, ...], group_axes: int, **_) -> list[ShapedArray]:
    by_name = dict(zip(names, (aval.update(weak_type=False) for aval in avals), strict=True))
    if call != "kvcache":
        for name, aval in by_name.items():
            _sharding.check_explicit(name, aval)
    return list(_result_avals(call, by_name, group_axes).values())


def _result_avals(call: str, operands: Mapping[str, ShapedArray], group_axes: int, logical: bool = False) -> dict:
    avals = {}
    q = operands["q"]
    if group_axes:
        lead = q.ndim - len("btkgh")
        shape = list(q.shape)
        for at in range(lead - group_axes, lead):
            shape[at] = _group_size(operands, lead - at)
        q = q.update(shape=tuple(shape))
    for result in results(call, operands):
        aval = q if (model := like(call, result)) == "q" else operands[model]
        own, axes = (TABLE[name].axes if logical else TABLE[name].memory for name in (result, model))
        if own != axes:  # the log-sum-exp
            lead = aval.ndim - len(axes)
            order = (*range(lead), *(lead + axes.index(letter) for letter in own))
            sharding = aval.sharding.update(spec=PartitionSpec(*(aval.sharding.spec[axis] for axis in order)))
            aval = aval.update(
                shape=tuple(aval.shape[axis] for axis in order), dtype=np.dtype(TABLE[result].type), sharding=sharding
            )
        avals[result] = aval
    return avals


def _group_size(operands: Mapping[str, ShapedArray | jax.Array], behind: int):
    """The size of the group axis that lies so far before an array's own axes: that of the arrays where it is not 1."""
    found = 1
    for name, x in operands.items():
        if TABLE[name].per_group:
            size = x.shape[x.ndim - len(TABLE[name].memory) - behind]
            found = found if isinstance(size, int) and size == 1 else size
    return found


# Batching.


def _batch(primitive: Primitive, axis_data, args: Sequence, dims: Sequence, *, call, spec, names, group_axes):
    bind = functools.partial(primitive.bind, call=call, spec=spec, names=names)
    rows = [TABLE[name] for name in names]
    mapped = [row for row, dim in zip(rows, dims, strict=True) if dim is not None]
    count = len(results(call, names))
    sharded = axis_data.spmd_name is not None or axis_data.explicit_mesh_axis is not None
    if call == "forward" and not sharded and all(row.per_group for row in mapped):
        keys = names.index("k")
        at = args[keys].ndim - len(TABLE["k"].memory)
        args = [
            x if not row.per_group else jnp.expand_dims(x, at) if dim is None else jnp.moveaxis(x, dim, at)
            for row, x, dim in zip(rows, args, dims, strict=True)
        ]
        return bind(*args, group_axes=group_axes + 1), [at] * count
    if not all(row.batched for row in mapped):
        # All other operands share the rotary tables among the sequences: one call for each.
        stacked = [batching.bdim_at_front(x, d, axis_data.size) for x, d in zip(args, dims, strict=True)]
        return jax.lax.map(lambda each: tuple(bind(*each, group_axes=0)), tuple(stacked)), [0] * count
    mesh_axis = axis_data.explicit_mesh_axis
    args = [
        batching.bdim_at_front(x, dim, axis_data.size, mesh_axis) if row.batched else x
        for row, x, dim in zip(rows, args, dims, strict=True)
    ]
    return bind(*args, group_axes=group_axes), [0] * count


# Differentiation.


def _refuse_gradient(primals, tangents, *, call: str, **_):
    if call == "kvcache":
        raise NotImplementedError(
            "flash_attn_with_kvcache has no derivatives: it is for inference. Use jax_flash.attention to train; where "
            "only other inputs are differentiated, pass q, k, v and the caches through jax.lax.stop_gradient first"
        )
    raise NotImplementedError(
        f"attention has reverse-mode derivatives of first order: there is no rule for the derivative of its {call} "
        "pass (jvp, jacfwd, linearize, hessian, grad of grad). Use jax_flash.reference.attention for these"
    )


def _reverse_mode_jvp(primals, tangents, *, tangent: bool):
    (x,), (dx,) = primals, tangents
    out = reverse_mode_p.bind(x, tangent=tangent)
    return out, dx if isinstance(dx, ad.Zero) else reverse_mode_p.bind(dx, tangent=True)


def _reverse_mode_batch(args, dims, *, tangent: bool):
    return reverse_mode_p.bind(_reverse_mode_value(*args, tangent=tangent), tangent=tangent), dims[0]


def _reverse_mode_value(x, *, tangent: bool):
    if tangent:  # reverse mode transposes it, and so never comes here
        raise NotImplementedError(
            "attention has reverse-mode derivatives of first order, and no forward mode (jvp, jacfwd, linearize, "
            "hessian). Use grad, vjp or jacrev, or jax_flash.reference.attention for these"
        )
    return x


# Lowering.


def _lower(platform: str, ctx: mlir.LoweringRuleContext, *operands, call, spec, names, group_axes):
    lower_to = functools.partial(mlir.lower_fun, multiple_results=True)
    params = dict(call=call, spec=spec, names=names, group_axes=group_axes)
    avals_in = cast("Sequence[ShapedArray]", ctx.avals_in)
    if any(size == 0 for aval in avals_in for size in aval.shape if isinstance(size, int)):
        # Nothing to compute: the results are constants, which XLA finds out for itself.
        return lower_to(_evaluate_reference)(ctx, *operands, **params)
    if platform == "cuda":
        _kernels.check_cuda(call, avals_in[0])
    # Rows of a cache that are looked up cannot be split with the sequences.
    split = _sharding.partitioned(ctx) and "batch_index" not in names and "block_table" not in names
    expand = _call_logical if split else _call_in_memory_order
    return lower_to(functools.partial(expand, platform))(ctx, *operands, **params)


def _call_in_memory_order(platform: str, *args, call, spec, names, group_axes):
    bind = functools.partial(_bind_call, platform, call, memory_order=True)
    return list(_with_folded_group(bind, spec, dict(zip(names, args, strict=True)), group_axes).values())


def _with_folded_group(call, spec: Spec, operands: Mapping[str, jax.Array], group_axes: int) -> dict[str, jax.Array]:
    """call(spec, operands), with group axes as more query heads for each KV head: k and v are not mapped, and are read
    once."""
    if not group_axes:
        return call(spec, operands)
    groups = (*(_group_size(operands, group_axes - i) for i in range(group_axes)), operands["q"].shape[-2])
    lead = operands["k"].ndim - len(TABLE["k"].memory)
    outs = call(spec, _fold_group(operands, groups))
    return {name: _unfold_group(name, x, lead, groups) for name, x in outs.items()}


def _fold_group(operands: Mapping[str, jax.Array], groups: tuple) -> dict[str, jax.Array]:
    group_axes = len(groups) - 1
    folded = {}
    for name, x in operands.items():
        row = TABLE[name]
        if row.per_group:
            lead = x.ndim - len(row.memory) - group_axes
            g = lead + row.memory.lower().index("g")  # where G comes to lie without the group axes
            x = jnp.moveaxis(x, range(lead, lead + group_axes), range(g, g + group_axes))
            own = x.shape[g : g + group_axes + 1]
            if not all(isinstance(size, int) and size == 1 for size in own):  # else one for all heads stays so
                x = jnp.broadcast_to(x, (*x.shape[:g], *groups, *x.shape[g + group_axes + 1 :]))
            x = x.reshape(*x.shape[:g], math.prod(x.shape[g : g + group_axes + 1]), *x.shape[g + group_axes + 1 :])
        folded[name] = x
    return folded


def _unfold_group(name: str, x, lead: int, groups: tuple):
    g = lead + TABLE[name].memory.index("g")
    x = x.reshape(*x.shape[:g], *groups, *x.shape[g + 1 :])
    added = len(groups) - 1
    return jnp.moveaxis(x, range(g, g + added), range(lead, lead + added))


def _call_logical(platform: str, *args, call, spec, names, group_axes):
    """One call that XLA may split over B and K: every operand begins with the batch axes."""
    operands = dict(zip(names, args, strict=True))
    if group_axes:  # the mapped axis may be split too, so that all operands have it
        sizes = [_group_size(operands, group_axes - i) for i in range(group_axes)]
        for name, x in operands.items():
            lead = x.ndim - len(TABLE[name].memory) - (group_axes if TABLE[name].per_group else 0)
            if not TABLE[name].per_group:
                x = jnp.expand_dims(x, range(lead, lead + group_axes))
            operands[name] = jnp.broadcast_to(x, (*x.shape[:lead], *sizes, *x.shape[lead + group_axes :]))
    B_axes = operands["q"].shape[:-4]
    K = operands["q"].shape[-3]
    if "cos" in operands:
        operands |= _tables_of_positions(operands)
    logical = {name: _to_logical(name, x, len(B_axes), K) for name, x in operands.items()}
    outs = _bind_call(platform, call, spec, logical, memory_order=False)
    return [_from_logical(name, x) for name, x in outs.items()]


def _to_logical(name: str, x, batch_axes: int, K: int):
    row = TABLE[name]
    if sorted(row.axes) == sorted(row.memory):
        lead = x.ndim - len(row.axes)
        return x.transpose(*range(lead), *(lead + row.memory.index(axis) for axis in row.axes))
    return jnp.broadcast_to(
        jnp.expand_dims(x, batch_axes), (*x.shape[:batch_axes], K, *x.shape[batch_axes:])
    )  # for each head


def _from_logical(name: str, x):
    row = TABLE[name]
    lead = x.ndim - len(row.axes)
    return x.transpose(*range(lead), *(lead + row.axes.index(axis) for axis in row.memory))


def _tables_of_positions(operands: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The rows of the rotary tables that each sequence's new tokens have: (*batch, T, rotary_dim / 2)."""
    lengths, T = operands["lengths"], operands["q"].shape[-4]
    steps = jnp.arange(T, dtype=jnp.int32).reshape(*[1] * lengths.ndim, T)
    position = jnp.minimum(jnp.expand_dims(jnp.maximum(lengths, 0), -1) + steps, operands["cos"].shape[0] - 1)
    # On explicit mesh axes a gather has to be told its sharding.
    split = jax.typeof(position).sharding.spec
    sharding = PartitionSpec(*split, None) if any(part is not None for part in split) else None
    return {name: operands[name].at[position].get(out_sharding=sharding) for name in ("cos", "sin")}


def _evaluate_reference(*args, call, spec, names, group_axes):
    def evaluate(spec, operands):
        return _reference.EVALUATE[call](spec, operands)

    outs = _with_folded_group(evaluate, spec, dict(zip(names, args, strict=True)), group_axes)
    return [outs[name] for name in results(call, names)]


# The call that XLA sees.


def _bind_call(platform: str, call: str, spec: Spec, operands: Mapping[str, jax.Array], memory_order: bool) -> dict:
    outs = call_p.bind(
        *operands.values(), call=call, spec=spec, names=tuple(operands), platform=platform, memory_order=memory_order
    )
    return dict(zip(results(call, operands), outs, strict=True))


def _abstract_eval_call(*avals: ShapedArray, call, names, memory_order, **_) -> list[ShapedArray]:
    operands = dict(zip(names, (aval.update(weak_type=False) for aval in avals), strict=True))
    return list(_result_avals(call, operands, 0, logical=not memory_order).values())


def _lower_call(ctx: mlir.LoweringRuleContext, *operands, call, spec, names, platform, memory_order):
    avals_in = dict(zip(names, cast("Sequence[ShapedArray]", ctx.avals_in), strict=True))
    avals_out = dict(zip(results(call, names), cast("Sequence[ShapedArray]", ctx.avals_out), strict=True))
    devices = 1 if memory_order else _sharding.num_devices(ctx)
    plan = _kernels.plan(call, platform, spec, avals_in, memory_order, devices)
    if plan.workspace is not None:
        avals_out["workspace"] = plan.workspace
    avals_out = in_order(avals_out)
    attributes = _ffi.attributes(spec, names, memory_order=memory_order, kvcache_kernel=plan.kvcache_kernel)
    aliases = {name: name for name in avals_out if name in names}
    if plan.o_may_be_q and memory_order:
        aliases["q"] = "o"
    options: dict[str, Any] = dict(
        operand_output_aliases={names.index(a): list(avals_out).index(b) for a, b in aliases.items()} or None
    )
    if not memory_order:
        options |= dict(
            operand_layouts=[_layout(name, aval.ndim) for name, aval in avals_in.items()],
            result_layouts=[_layout(name, aval.ndim) for name, aval in avals_out.items()],
            extra_attributes=_sharding.partitioning(avals_in, avals_out),
        )
    lower = jax.ffi.ffi_lowering(f"jax_flash_{call}", **options)
    outs = lower(ctx.replace(avals_out=list(avals_out.values())), *operands, **attributes)
    return [out for name, out in zip(avals_out, outs, strict=True) if name != "workspace"]


def _layout(name: str, ndim: int) -> tuple[int, ...]:
    """How an array in logical order lies in memory: its axes from minor to major."""
    row = TABLE[name]
    lead = ndim - len(row.axes)
    memory = row.memory if sorted(row.memory) == sorted(row.axes) else row.axes
    return (*range(lead), *(lead + row.axes.index(axis) for axis in memory))[::-1]


def _make_primitive(call: str) -> Primitive:
    primitive = Primitive(f"attention_{call}")
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(dispatch.apply_primitive, primitive))
    primitive.def_abstract_eval(_abstract_eval)
    batching.fancy_primitive_batchers[primitive] = functools.partial(_batch, primitive)
    ad.primitive_jvps[primitive] = _refuse_gradient
    mlir.register_lowering(primitive, mlir.lower_fun(_evaluate_reference, multiple_results=True))
    for platform in ("cpu", "cuda"):
        mlir.register_lowering(primitive, functools.partial(_lower, platform), platform=platform)
    return primitive


_PRIMITIVES = {call: _make_primitive(call) for call in CALLS}

# What attention's derivative rule differentiates passes through it. A custom_vjp refuses forward mode by itself, but
# does not say what there is instead.
reverse_mode_p = Primitive("attention_reverse_mode")
reverse_mode_p.def_impl(_reverse_mode_value)
reverse_mode_p.def_abstract_eval(lambda x, **_: x)
batching.primitive_batchers[reverse_mode_p] = _reverse_mode_batch
ad.primitive_jvps[reverse_mode_p] = _reverse_mode_jvp
ad.primitive_transposes[reverse_mode_p] = lambda cotangent, *_, **__: [cotangent]
mlir.register_lowering(reverse_mode_p, lambda _, x, **params: [_reverse_mode_value(x, **params)])

call_p = Primitive("attention_call")
call_p.multiple_results = True
call_p.def_abstract_eval(_abstract_eval_call)
mlir.register_lowering(call_p, _lower_call)
