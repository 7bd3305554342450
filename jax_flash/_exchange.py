"""Split sequences without a ring: each device gathers all keys and values, or exchanges its tokens of all heads for all
tokens of some heads (DeepSpeed Ulysses, https://arxiv.org/abs/2309.14509)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import _call, _derivative
from jax_flash._context import Split, take_chunks, with_sinks, zigzag_order


def attend_gathered(split: Split, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    k, v = (_in_order(split, _gather(split.axis_name, arrays[name]), 1) for name in "kv")
    results = _derivative.attend(*split.operands(arrays["q"], k, v, split.key_ranges(arrays)))
    return with_sinks(results, split, arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(axis_name, x):
    """The tokens of all devices. Its gradient is summed over them in float32."""
    return jax.lax.all_gather(x, axis_name, axis=1, tiled=True)


def _gather_forward(axis_name, x):
    return _gather(axis_name, x), jnp.zeros((), x.dtype)


def _gather_backward(axis_name, like, cotangent):
    total = jax.lax.psum_scatter(cotangent.astype(jnp.float32), axis_name, scatter_dimension=1, tiled=True)
    return (total.astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def attend_by_heads(split: Split, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    def to_heads(x):
        whole = jax.lax.all_to_all(x, split.axis_name, split_axis=2, concat_axis=1, tiled=True)
        return _in_order(split, whole, 1)

    def to_tokens(x, tokens, heads):
        x = take_chunks(x, tokens, zigzag_order(x, split.devices, tokens)) if split.queries.zigzag else x
        return jax.lax.all_to_all(x, split.axis_name, split_axis=tokens, concat_axis=heads, tiled=True)

    own = {name: to_heads(arrays[name]) for name in "qkv"}
    own |= {name: arrays[name] for name in ("q_lengths", "kv_lengths") if name in arrays}
    if "sinks" in arrays:
        heads = own["q"].shape[2]
        own["sinks"] = jax.lax.dynamic_slice_in_dim(arrays["sinks"], arrays["device"] * heads, heads)
    out, lse = _call.attend(split.spec, own)
    return to_tokens(out, 1, 2), to_tokens(lse, 2, 1)


def _in_order(split: Split, x, axis: int):
    """From the order of the devices to that of the text."""
    if not split.keys.zigzag:
        return x
    return take_chunks(x, axis, np.argsort(zigzag_order(x, split.devices, axis)))
