"""flash_attn_with_kvcache in plain jnp: the oracle of its tests, and the lowering for platforms without a kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_flash._spec import KvcacheSpec


def reference(spec: KvcacheSpec, x) -> list[jax.Array]:
    """`x`: the operands in _kvcache_primitive's logical shapes, without axes of vmap. Computed in float32."""
    B, K, _, T, H = x.q.shape
    k_cache, v_cache = (jnp.swapaxes(c, 1, 2) for c in (x.k_cache, x.v_cache))  # (R, S, K, H)
    R, S = k_cache.shape[:2]
    capacity = S if x.block_table is None else S * x.block_table.shape[1]
    length = jnp.full((B,), capacity, jnp.int32) if x.lengths is None else jnp.clip(x.lengths, 0, capacity)
    T_new = appended = 0 if x.k_new is None else x.k_new.shape[2]

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

    local = spec.window_left is not None or spec.window_right is not None
    t = jnp.arange(T, dtype=jnp.int32)
    q = x.q.astype(jnp.float32)
    if x.cos is not None:
        at = length[:, None] + (t if local else jnp.zeros_like(t))[None]
        q = _rotate(spec, q, x.cos, x.sin, at[:, None, None]).astype(x.q.dtype).astype(jnp.float32)

    flat_k, flat_v = (c.reshape(R * S, K, H) for c in (k_cache, v_cache))
    if appended and capacity:
        new_at = length[:, None] + t[None, :appended]
        k_new = x.k_new
        if x.cos is not None:
            k_new = _rotate(spec, k_new.astype(jnp.float32), x.cos, x.sin, new_at[:, None]).astype(k_new.dtype)
        fits = new_at < capacity
        target = jnp.take_along_axis(place, jnp.minimum(new_at, capacity - 1), axis=1)
        target = jnp.where(fits & (target >= 0), target, R * S)  # dropped
        flat_k = flat_k.at[target].set(jnp.swapaxes(k_new, 1, 2), mode="drop")
        flat_v = flat_v.at[target].set(jnp.swapaxes(x.v_new, 1, 2), mode="drop")

    start = jnp.zeros((B,), jnp.int32) if x.leftpad is None else jnp.maximum(x.leftpad, 0)
    held = (j[None] < end[:, None]) & (j[None] >= start[:, None])
    sees = jnp.broadcast_to(held[:, None], (B, T, capacity))
    offset = j[None, None] - t[None, :, None] - (end - T)[:, None, None]
    if spec.window_left is not None:
        sees &= offset >= -spec.window_left
    if spec.window_right is not None:
        sees &= offset <= spec.window_right

    keys, values = (
        jnp.where((held & exists)[:, :, None, None], flat[jnp.maximum(place, 0)], 0).astype(jnp.float32)
        for flat in (flat_k, flat_v)
    )
    score = jnp.einsum("bkgth,bskh->bkgts", q, keys) * spec.softmax_scale
    if spec.softcap:
        score = spec.softcap * jnp.tanh(score / spec.softcap)
    score = jnp.where(sees[:, None, None], score, -jnp.inf)
    top = jnp.max(score, axis=-1, keepdims=True, initial=-jnp.inf)
    weight = jnp.exp(score - jnp.where(jnp.isneginf(top), 0, top))
    total = jnp.sum(weight, axis=-1, keepdims=True)
    seen = total != 0  # true for NaN, which is to stay
    o = jnp.einsum("bkgts,bskh->bkgth", weight / jnp.where(seen, total, 1), values)
    lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1)), -jnp.inf)[..., 0]
    out = [o.astype(x.q.dtype), lse]
    if appended:
        out += [jnp.swapaxes(f.reshape(R, S, K, H), 1, 2) for f in (flat_k, flat_v)]
    return out


def _rotate(spec: KvcacheSpec, x, cos, sin, position):
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
