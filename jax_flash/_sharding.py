"""Meshes of devices: what XLA may split by itself, what a mesh with explicit axes may have split, and shard_map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax._src.custom_partitioning_sharding_rule import sdy_sharding_rule_to_mlir, str_to_sdy_sharding_rule
from jax._src.sharding_impls import ShardingContext, SPMDAxisContext
from jax.core import ShapedArray
from jax.interpreters import mlir
from jax.sharding import PartitionSpec

from jax_flash._operands import TABLE


def partitioned(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether XLA will split this call over several devices by itself."""
    context = ctx.module_context.axis_context
    if isinstance(context, SPMDAxisContext):
        return context.mesh.size > 1 and context.manual_axes != frozenset(context.mesh.axis_names)
    return isinstance(context, ShardingContext) and context.num_devices > 1


def num_devices(ctx: mlir.LoweringRuleContext) -> int:
    context = ctx.module_context.axis_context
    return context.mesh.size if isinstance(context, SPMDAxisContext) else context.num_devices


def partitioning(operands: Mapping[str, ShapedArray], results: Mapping[str, ShapedArray]) -> dict | None:
    """Tells XLA that the batch axes and the KV heads of a call in logical order may be split, and nothing else.

    None for symbolic shapes, which it cannot split.
    """
    if not all(isinstance(size, int) for aval in (*operands.values(), *results.values()) for size in aval.shape):
        return None
    num_batch_dims = operands["q"].ndim - len("gth")  # of every array: they begin with bk or rk
    batch = [f"batch{axis}" for axis in range(num_batch_dims)]

    def whole(name):
        # A capital's axis is not that of the letter. Digits cannot begin a name.
        return [{"2": "two"}.get(axis, axis if axis.islower() else axis.lower() + "1") for axis in TABLE[name].axes[2:]]

    terms_in, terms_out = ([" ".join([*batch, *whole(name)]) for name in arrays] for arrays in (operands, results))
    factors = dict.fromkeys(axis for name in (*operands, *results) for axis in whole(name))
    rule = str_to_sdy_sharding_rule(
        f"{', '.join(terms_in)} -> {', '.join(terms_out)}", need_replication_factors=tuple(factors)
    )

    def types(arrays) -> list[mlir.ir.Type]:
        return [mlir.ir.RankedTensorType.get(a.shape, mlir.dtype_to_ir_type(a.dtype)) for a in arrays.values()]

    return {
        "mhlo.frontend_attributes": mlir.ir_attribute({"num_batch_dims": str(num_batch_dims)}),
        "sdy.sharding_rule": sdy_sharding_rule_to_mlir(rule, types(operands), types(results)),
    }


def check_explicit(name: str, aval: ShapedArray) -> None:
    """On a mesh with explicit axes, what is not batch or heads must be whole on each device."""
    axes, spec = TABLE[name].memory, aval.sharding.spec
    own = spec[aval.ndim - len(axes) : aval.ndim]
    if any(part is not None and axis not in "brk" for axis, part in zip(axes, own, strict=False)):
        raise NotImplementedError(
            f"attention: on explicit mesh axes only the batch and the heads may be sharded; got {name} of shape "
            f"{aval.shape} sharded {spec}. Reshard it with jax.sharding.reshard"
        )


def split_like_queries(q, *keys) -> tuple[jax.Array, ...]:
    """On explicit mesh axes: where the heads of q (B, T, N, H) are split over more devices than there are KV heads,
    repeats the heads of keys (B, S, K, H), so that each device holds the one KV head that its query heads use."""
    sharding = jax.typeof(q).sharding
    axes = sharding.spec[2] if len(sharding.spec) > 2 else None
    if axes is None:
        return keys
    shards = math.prod(sharding.mesh.shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))
    K = keys[0].shape[2]
    if K % shards == 0:
        return keys
    if shards % K != 0:
        raise NotImplementedError(
            f"on explicit mesh axes, heads split over {shards} devices need a number of KV heads that divides it or is "
            f"divided by it; got K={K}. Reshard the queries, keys and values with jax.sharding.reshard"
        )

    def repeat(x):
        B, S, _, H = x.shape
        x = jnp.broadcast_to(x[:, :, :, None], (B, S, K, shards // K, H)).reshape(B, S, shards, H)
        return jax.sharding.reshard(
            x, sharding.update(spec=PartitionSpec(jax.typeof(x).sharding.spec[0], None, axes, None))
        )

    return tuple(map(repeat, keys))


def split_like(q, x, heads: bool = False) -> jax.Array:
    """On explicit mesh axes: x (B, ...), or with heads (B, K, ...), split over the devices as q (B, T, N, H) is."""
    sharding = jax.typeof(q).sharding
    own = (sharding.spec[0], sharding.spec[2]) if heads else (sharding.spec[0],)
    spec = PartitionSpec(*own, *[None] * (x.ndim - len(own)))
    return x if spec == jax.typeof(x).sharding.spec else jax.sharding.reshard(x, sharding.update(spec=spec))


def join(repeated, keys) -> jax.Array:
    """The other way round: one of the heads that split_like_queries repeated of keys, sharded as keys is."""
    B, S, heads, H = repeated.shape
    K = keys.shape[2]
    if heads == K:
        return repeated
    sharding = jax.typeof(repeated).sharding
    whole = jax.sharding.reshard(repeated, sharding.update(spec=PartitionSpec(sharding.spec[0], None, None, None)))
    return jax.sharding.reshard(whole.reshape(B, S, K, heads // K, H)[:, :, :, 0], jax.typeof(keys).sharding)


def vary_together(arrays):
    """Inside shard_map: every array varies over the mesh axes that any of them varies over.

    It happens outside the derivative rule, so that the transposes of these casts sum the gradients of what was shared.
    """
    leaves, treedef = jax.tree.flatten(arrays)
    varying: Sequence[frozenset] = [jax.typeof(x).manual_axis_type.varying for x in leaves]
    everywhere = frozenset().union(*varying)
    leaves = [
        jax.lax.pcast(x, tuple(sorted(everywhere - axes, key=str)), to="varying") if everywhere - axes else x
        for x, axes in zip(leaves, varying, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)
