"""The primitive behind flash_attn_with_kvcache, and all that JAX and XLA need to know of it.

Logical shapes, as in _primitive.py; R is the number of cache rows, sequences or pages:

    q, o                 (*batch, B, K, G, T, H)     *batch: the axes of vmap
    k_cache, v_cache     (*batch, R, K, S, H)        R = B unless batch_index or block_table say which rows are whose
    k_new, v_new         (*batch, B, K, T_new, H)
    lse                  (*batch, B, K, G, T)        float32
    lengths, batch_index, leftpad   (*batch, B)      int32
    block_table          (*batch, B, pages)          int32
    cos, sin             (positions, rotary_dim / 2)

Where tokens are appended the caches are results too, and their buffers those of the operands. The call that XLA sees
is a second primitive: on one device its shapes are in memory order, so that the API's transposes cancel; over several
devices it has the logical shapes, with everything that belongs to a sequence repeated for each KV head, so that XLA can
split batch and heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import dispatch
from jax._src.core import Primitive  # jax.extend.core is public, but imports Pallas: 90 ms
from jax._src.sharding_impls import SPMDAxisContext
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from jax_flash import _ffi
from jax_flash._kvcache_reference import reference
from jax_flash._spec import KvcacheSpec

_TARGET = "jax_flash_kvcache"


class Operands(NamedTuple):
    """The arrays a call may have; None where it has none. The order is the FFI's."""

    q: jax.Array
    k_cache: jax.Array
    v_cache: jax.Array
    k_new: jax.Array | None = None
    v_new: jax.Array | None = None
    lengths: jax.Array | None = None
    batch_index: jax.Array | None = None
    leftpad: jax.Array | None = None
    block_table: jax.Array | None = None
    cos: jax.Array | None = None
    sin: jax.Array | None = None

    def names(self) -> tuple[str, ...]:
        return tuple(name for name, value in self._asdict().items() if value is not None)

    def arrays(self) -> list[jax.Array]:
        return [value for value in self if value is not None]


def attend(spec: KvcacheSpec, operands: Operands) -> list[jax.Array]:
    """o, lse, and k_cache and v_cache with the new tokens, if there are any."""
    return kvcache_p.bind(*operands.arrays(), spec=spec, names=operands.names())


def _named(names: Sequence[str], values: Sequence) -> Operands:
    return Operands(**dict(zip(names, values, strict=True)))


def _abstract_eval(*avals: ShapedArray, spec: KvcacheSpec, names: tuple[str, ...], **call) -> list[ShapedArray]:
    del spec
    operands = _named(names, avals)
    q = operands.q.update(weak_type=False)
    lead = q.ndim - 4  # ends with B
    rows = [*range(lead), *(lead + i for i in ((1, 2, 0) if call.get("time_major") else (0, 1, 2)))]  # B, K, G, T
    sharding = q.sharding.update(spec=PartitionSpec(*(q.sharding.spec[axis] for axis in rows)))
    lse = q.update(shape=tuple(q.shape[axis] for axis in rows), dtype=np.dtype(np.float32), sharding=sharding)
    caches = [operands.k_cache.update(weak_type=False), operands.v_cache.update(weak_type=False)]
    return [q, lse, *(caches if operands.k_new is not None else [])]


def _batch(axis_data, args: Sequence, dims: Sequence, *, spec: KvcacheSpec, names: tuple[str, ...]):
    mapped = dict(zip(names, dims, strict=True))
    results = 4 if "k_new" in names else 2
    if mapped.get("cos") is not None or mapped.get("sin") is not None:
        # Every other operand shares the tables among all sequences: one call for each.
        def one(*each):
            return tuple(kvcache_p.bind(*each, spec=spec, names=names))

        stacked = [batching.bdim_at_front(x, d, axis_data.size) for x, d in zip(args, dims, strict=True)]
        return jax.lax.map(lambda each: one(*each), tuple(stacked)), [0] * results
    mesh_axis = axis_data.explicit_mesh_axis
    moved = [
        x if name in ("cos", "sin") else batching.bdim_at_front(x, d, axis_data.size, mesh_axis)
        for name, x, d in zip(names, args, dims, strict=True)
    ]
    return kvcache_p.bind(*moved, spec=spec, names=names), [0] * results


def _refuse_gradient(primals, tangents, **params):
    raise NotImplementedError(
        "flash_attn_with_kvcache has no derivatives: it is for inference. Use jax_flash.attention to train, or stop "
        "the gradient with jax.lax.stop_gradient"
    )


# Lowering.


def _lower(platform: str, ctx: mlir.LoweringRuleContext, *operands, spec: KvcacheSpec, names: tuple[str, ...]):
    if any(size == 0 for aval in ctx.avals_in for size in aval.shape if isinstance(size, int)):
        return _lower_to_reference(ctx, *operands, spec=spec, names=names)
    if platform == "cuda":
        _ffi.check_cuda(ctx.avals_in[0])
    indexed = "batch_index" in names or "block_table" in names
    expand = _expand_logical if _ffi.partitioned(ctx) and not indexed else _expand_in_memory_order
    fun = functools.partial(expand, platform)
    return mlir.lower_fun(fun, multiple_results=True)(ctx, *operands, spec=spec, names=names)


def _expand_in_memory_order(platform: str, *values, spec: KvcacheSpec, names: tuple[str, ...]):
    """One call with time before heads."""
    x = _named(names, values)
    swap = functools.partial(_swap_heads_and_time)
    x = x._replace(
        q=jnp.moveaxis(x.q, -2, -4),
        **{name: swap(getattr(x, name)) for name in ("k_cache", "v_cache", "k_new", "v_new") if name in names},
    )
    o, lse, *caches = kvcache_call_p.bind(*x.arrays(), spec=spec, names=names, platform=platform, time_major=True)
    return [jnp.moveaxis(o, -4, -2), lse, *map(swap, caches)]


def _expand_logical(platform: str, *values, spec: KvcacheSpec, names: tuple[str, ...]):
    """One call that XLA may split over B and K: every operand begins with the batch axes."""
    x = _named(names, values)
    *batch, K, _, T, _ = x.q.shape

    def per_head(a):
        return jnp.broadcast_to(jnp.expand_dims(a, len(batch)), (*batch, K, *a.shape[len(batch) :]))

    replaced = {}
    if x.cos is not None:
        position = jnp.expand_dims(jnp.maximum(x.lengths, 0), -1) + jnp.arange(T, dtype=jnp.int32).reshape(
            *[1] * len(batch), T
        )
        position = jnp.minimum(position, x.cos.shape[0] - 1)
        # On explicit mesh axes a gather has to be told its sharding.
        split = jax.typeof(position).sharding.spec
        sharding = PartitionSpec(*split, None) if any(part is not None for part in split) else None
        replaced = {name: per_head(getattr(x, name).at[position].get(out_sharding=sharding)) for name in ("cos", "sin")}
    replaced |= {name: per_head(getattr(x, name)) for name in ("lengths", "leftpad") if name in names}
    x = x._replace(**replaced)
    return kvcache_call_p.bind(*x.arrays(), spec=spec, names=names, platform=platform, time_major=False)


def _swap_heads_and_time(x):
    return jnp.swapaxes(x, -2, -3)


def _lower_call(ctx: mlir.LoweringRuleContext, *operands, spec, names, platform, time_major):
    results = ("o", "lse", "workspace", *(("k_cache", "v_cache") if "k_new" in names else ()))
    workspace = _workspace(ctx, spec, names, platform, time_major)
    o, lse, *caches = ctx.avals_out
    avals_out = [o, lse, workspace, *caches]
    # As csrc/ffi/kvcache.h reads them.
    options = dict(
        present=sum(1 << i for i, name in enumerate(Operands._fields[3:]) if name in names),
        time_major=time_major,
        left=_ffi.side(spec.window_left),
        right=_ffi.side(spec.window_right),
        num_splits=spec.num_splits,
        rotary_interleaved=spec.rotary_interleaved,
    )
    attributes = dict(
        options=np.array([*options.values()], np.int64),
        score=np.array([spec.softmax_scale, spec.softcap or 0.0], np.float32),
    )
    aliases = {names.index(name): results.index(name) for name in ("k_cache", "v_cache") if "k_new" in names}
    if platform == "cuda" and time_major and _is_decode(_named(names, ctx.avals_in)):
        aliases[names.index("q")] = results.index("o")
    if time_major:
        call = jax.ffi.ffi_lowering(_TARGET, operand_output_aliases=aliases)
    else:
        call = jax.ffi.ffi_lowering(
            _TARGET,
            operand_layouts=_layouts(names, ctx.avals_in),
            result_layouts=_layouts(results, avals_out),
            operand_output_aliases=aliases,
            extra_attributes=_ffi.partitioning(names, ctx.avals_in, results, avals_out),
        )
    o, lse, _, *caches = call(ctx.replace(avals_out=avals_out), *operands, **attributes)
    return [o, lse, *caches]


def _is_decode(x: Operands) -> bool:
    """Whether the decode kernel takes this call, with q and o in memory order, and may write o where q lies.

    A loop that carries the query, as one over steps or layers does, would else copy o there in every iteration; where
    q is needed afterwards, or is a parameter that was not donated, XLA copies that small array before the call. The
    kernel reads all of a segment's rows of q before it writes the same rows of o, and reads no others there. Nor can
    another operand lie in that buffer: o is live while the call runs, and XLA shares a buffer only among values that
    are not live at once; it copies q where two operands are one value.
    """
    T, _, G, _ = x.q.shape[-4:]
    return T * G <= _PREFILL_ROWS


def _layouts(names, avals) -> list[tuple[int, ...]]:
    return [_ffi.memory_order(name, aval.ndim)[::-1] for name, aval in zip(names, avals, strict=True)]


# As csrc/cuda/kvcache/{decode,prefill} lay it out; the handler refuses a workspace that is too small.
_MAX_BLOCKS = 256
_PREFILL_ROWS = 256
_PREFILL_MOST_COPIED = 2**32


def _workspace(ctx, spec: KvcacheSpec, names, platform: str, time_major: bool) -> ShapedArray:
    x = _named(names, ctx.avals_in)
    *lead, a, b, c, H = x.q.shape
    T, K, G = (a, b, c) if time_major else (c, a, b)
    S = x.k_cache.shape[-3 if time_major else -2]
    capacity = S if x.block_table is None else S * x.block_table.shape[-1]
    heads = math.prod(lead) * K
    if platform == "cpu":
        each, shared = 0, 1
    else:
        each, shared = _prefill_workspace(x, T, G, H, capacity)
        if T * G <= _PREFILL_ROWS or (_copies_keys(x) and heads * 4 * capacity * H > _PREFILL_MOST_COPIED):
            each, shared = _decode_workspace(spec, T, G, H)
    if time_major:
        return ShapedArray((heads * each + shared,), np.dtype(np.uint8))
    # Split over devices, the parts for each KV head must add up to what one device needs.
    context = ctx.module_context.axis_context
    devices = context.mesh.size if isinstance(context, SPMDAxisContext) else context.num_devices
    share = -(-shared * devices // heads)
    return ShapedArray((*lead, K, each + share), np.dtype(np.uint8))


def _decode_workspace(spec: KvcacheSpec, T: int, G: int, H: int) -> tuple[int, int]:
    """Bytes for each KV head of each sequence, and for all of them together."""
    bucket, most = next((bucket, tiles) for bucket, tiles in ((64, 4), (128, 2), (256, 1)) if H <= bucket)
    rows = 8 * next(n for n in (1, 2, 4) if 8 * n >= T * G or n == most)
    slot = rows * (bucket + 2) * 4
    row_blocks = -(-T * G // rows)
    if spec.num_splits:
        return row_blocks * (8 + spec.num_splits * slot), 256
    return row_blocks * 8, 256 + 2 * _MAX_BLOCKS * slot


def _copies_keys(x: Operands) -> bool:
    return x.block_table is not None or x.batch_index is not None or x.leftpad is not None


def _prefill_workspace(x: Operands, T: int, G: int, H: int, capacity: int) -> tuple[int, int]:
    queries = G * T * H * 2 if x.cos is not None else 0
    return 4 + queries + (4 * capacity * H if _copies_keys(x) else 0), 4 * 256


def _reference(*values, spec: KvcacheSpec, names: tuple[str, ...]):
    x = _named(names, values)
    if x.q.ndim > 5:
        axes = Operands(*(None if a is None or name in ("cos", "sin") else 0 for name, a in x._asdict().items()))
        mapped = [axis for axis, value in zip(axes, x, strict=True) if value is not None]
        return jax.vmap(functools.partial(_reference, spec=spec, names=names), in_axes=mapped)(*values)
    return reference(spec, x)


_lower_to_reference = mlir.lower_fun(_reference, multiple_results=True)

kvcache_p = Primitive("attention_kvcache")
kvcache_p.multiple_results = True
kvcache_p.def_impl(functools.partial(dispatch.apply_primitive, kvcache_p))
kvcache_p.def_abstract_eval(_abstract_eval)
ad.primitive_jvps[kvcache_p] = _refuse_gradient
batching.fancy_primitive_batchers[kvcache_p] = _batch
mlir.register_lowering(kvcache_p, _lower_to_reference)
for _platform in ("cpu", "cuda"):
    mlir.register_lowering(kvcache_p, functools.partial(_lower, _platform), platform=_platform)

kvcache_call_p = Primitive("attention_kvcache_call")
kvcache_call_p.multiple_results = True
kvcache_call_p.def_abstract_eval(_abstract_eval)
mlir.register_lowering(kvcache_call_p, _lower_call)
