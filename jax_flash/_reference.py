"""What the primitives mean, in plain jax.numpy: the lowering for platforms without a kernel, and for empty arrays.

Operands are dicts in the memory order of the operand table. Everything is computed in float32.
"""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp

from jax_flash._operands import TABLE, in_order
from jax_flash._spec import Spec
from jax_flash.reference import softmax_attention

_MAX_DIAGONAL = 2**29


def _forward(spec: Spec, operands: dict[str, jax.Array]) -> dict[str, jax.Array]:
    x = types.SimpleNamespace(**dict.fromkeys(TABLE) | operands)
    (T, S), dtype = (x.q.shape[-4], x.k.shape[-3]), x.q.dtype
    visible = _visible(spec, x, T, S)
    # What lies past a length may hold anything, so it is cut out rather than multiplied by a probability of zero.
    valid_q = _rows_below(x.q_lengths, T, x.k.ndim - 2)[..., None, :, None]
    valid_k = _rows_below(x.kv_lengths, S, x.k.ndim - 2)[..., None]
    q = jnp.where(valid_q, jnp.moveaxis(x.q, -4, -2).astype(jnp.float32), 0.0)  # (..., K, G, T, H)
    k, v = (jnp.where(valid_k, a.swapaxes(-3, -2).astype(jnp.float32), 0.0) for a in (x.k, x.v))  # (..., K, S, H)
    out, lse = softmax_attention(q, k, v, visible, spec.softmax_scale, spec.softcap, x.sinks)
    out = jnp.where(valid_q, out, 0.0).astype(dtype)
    if x.sinks is not None:
        lse = jnp.where(valid_q[..., 0], lse, -jnp.inf)
    return {"o": jnp.moveaxis(out, -2, -4), "lse": lse}


def _visible(spec: Spec, x, T: int, S: int):
    """Which keys each query sees, (..., K or 1, G or 1, T, S)."""
    lead = x.k.ndim - 2  # B, K and the axes of vmap
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (*[1] * lead, T, S), lead + axis) for axis in (0, 1))

    def per_head(values):  # (..., K) against (..., K, T, S)
        return values[..., None, None]

    t = T if x.q_lengths is None else per_head(jnp.clip(x.q_lengths, 0, T))
    s = S if x.kv_lengths is None else per_head(jnp.clip(x.kv_lengths, 0, S))
    visible = (i < t) & (j < s)
    d = 0 if spec.band.top_left else s - t
    if x.diagonal is not None:
        d = per_head(jnp.clip(x.diagonal, -_MAX_DIAGONAL, _MAX_DIAGONAL))
    if spec.band.left is not None:
        visible &= j >= i + d - spec.band.left
    if spec.band.right is not None:
        visible &= j <= i + d + spec.band.right
    if x.key_ranges is not None:
        visible = visible & (j >= x.key_ranges[..., :1]) & (j < x.key_ranges[..., 1:])
    visible = visible[..., None, :, :]
    if x.mask is not None:
        bits = x.mask[..., None] >> jnp.arange(32, dtype=jnp.uint32).reshape((1,) * x.mask.ndim + (32,)) & 1
        bits = bits.reshape(*x.mask.shape[:-1], -1)[..., :S].astype(bool)
        visible = visible & bits
    return visible


def _rows_below(lengths, size, lead: int):
    """(..., K, size): True in the rows that are valid."""
    rows = jax.lax.broadcasted_iota(jnp.int32, (*[1] * lead, size), lead)
    return rows < size if lengths is None else rows < lengths[..., None]


def _backward(spec: Spec, operands: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The gradients of `_forward`, without its residuals."""
    differentiable = {name: x for name, x in operands.items() if TABLE[name].gradient}
    rest = {name: x for name, x in operands.items() if name not in differentiable}
    outs, pull = jax.vjp(lambda some: _forward(spec, some | rest), differentiable)
    (gradients,) = pull({"o": operands["do"], "lse": operands.get("dlse", jnp.zeros_like(outs["lse"]))})
    return in_order({TABLE[name].gradient: gradient for name, gradient in gradients.items()})


def _one_kvcache(spec: Spec, operands: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Appending to a cache and attending to it, without axes of vmap."""
    x = types.SimpleNamespace(**dict.fromkeys(TABLE) | operands)
    B, T, K, _, H = x.q.shape
    k_cache, v_cache = x.k_cache, x.v_cache
    R, S = k_cache.shape[:2]
    capacity = S if x.block_table is None else S * x.block_table.shape[1]
    length = jnp.full((B,), capacity, jnp.int32) if x.lengths is None else jnp.clip(x.lengths, 0, capacity)
    T_new = appended = x.k_new.shape[1] if "k_new" in operands else 0

    # Where each position lies among all positions of the cache, -1 where it has no place.
    j = jnp.arange(capacity, dtype=jnp.int32)
    if x.block_table is None:
        row = jnp.arange(B, dtype=jnp.int32) if x.batch_index is None else x.batch_index
        exists = jnp.broadcast_to(((row >= 0) & (row < R))[:, None], (B, capacity))
        length = jnp.where(exists[:, 0] if capacity else True, length, 0)
        place = row[:, None] * S + j[None]
    else:
        page = x.block_table[:, j // S]
        exists = (page >= 0) & (page < R)
        place = page * S + (j % S)[None]
    place = jnp.where(exists, place, -1)
    if x.block_table is None and capacity:
        T_new = jnp.where(exists[:, 0], T_new, 0)
    end = jnp.minimum(length + T_new, capacity)

    local = spec.band.left is not None or spec.band.right is not None
    t = jnp.arange(T, dtype=jnp.int32)
    q = jnp.moveaxis(x.q, 1, 3).astype(jnp.float32)  # (B, K, G, T, H)
    if x.cos is not None:
        at = length[:, None] + (t if local else jnp.zeros_like(t))[None]
        q = _rotate(spec, q, x.cos, x.sin, at[:, None, None]).astype(x.q.dtype).astype(jnp.float32)

    flat_k, flat_v = (c.reshape(R * S, K, H) for c in (k_cache, v_cache))
    if appended and capacity:
        new_at = length[:, None] + t[None, :appended]
        k_new = jnp.swapaxes(x.k_new, 1, 2)
        if x.cos is not None:
            k_new = _rotate(spec, k_new.astype(jnp.float32), x.cos, x.sin, new_at[:, None]).astype(k_new.dtype)
        fits = new_at < capacity
        target = jnp.take_along_axis(place, jnp.minimum(new_at, capacity - 1), axis=1)
        target = jnp.where(fits & (target >= 0), target, R * S)  # dropped
        flat_k = flat_k.at[target].set(jnp.swapaxes(k_new, 1, 2), mode="drop")
        flat_v = flat_v.at[target].set(x.v_new, mode="drop")

    start = jnp.zeros((B,), jnp.int32) if x.leftpad is None else jnp.maximum(x.leftpad, 0)
    held = (j[None] < end[:, None]) & (j[None] >= start[:, None])
    sees = jnp.broadcast_to(held[:, None], (B, T, capacity))
    offset = j[None, None] - t[None, :, None] - (end - T)[:, None, None]
    if spec.band.left is not None:
        sees &= offset >= -spec.band.left
    if spec.band.right is not None:
        sees &= offset <= spec.band.right

    def held_of(flat):
        rows = flat[jnp.maximum(place, 0)] if R * S else jnp.zeros((B, capacity, K, H), flat.dtype)
        return jnp.where((held & exists)[:, :, None, None], rows, 0).astype(jnp.float32)

    keys, values = held_of(flat_k), held_of(flat_v)
    o, lse = softmax_attention(
        q, keys.swapaxes(1, 2), values.swapaxes(1, 2), sees[:, None, None], spec.softmax_scale, spec.softcap, x.sinks
    )
    out = {"o": jnp.moveaxis(o, 3, 1).astype(x.q.dtype), "lse": lse}
    if appended:
        out |= {"k_cache": flat_k.reshape(R, S, K, H), "v_cache": flat_v.reshape(R, S, K, H)}
    return out


def _rotate(spec: Spec, x, cos, sin, position):
    """x (..., H) float32 at the positions (...); a position past the tables has their last row."""
    position = jnp.minimum(position, cos.shape[0] - 1)
    c, s = cos[position].astype(jnp.float32), sin[position].astype(jnp.float32)
    half = cos.shape[1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if spec.rotary_interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = jnp.stack([a * c - b * s, b * c + a * s], axis=-1).reshape(turned.shape)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = jnp.concatenate([a * c - b * s, b * c + a * s], axis=-1)
    return jnp.concatenate([turned, rest], axis=-1)


def _kvcache(spec: Spec, operands: dict[str, jax.Array]) -> dict[str, jax.Array]:
    if operands["q"].ndim == len(TABLE["q"].memory):
        return _one_kvcache(spec, operands)
    axes = ({name: 0 if TABLE[name].batched else None for name in operands},)
    return jax.vmap(lambda some: _kvcache(spec, some), in_axes=axes)(operands)


EVALUATE = {"forward": _forward, "backward": _backward, "kvcache": _kvcache}
