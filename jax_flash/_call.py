"""From checked arrays of the API to a call: the operands that the table wants, and the public order of results."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jax_flash import _derivative, _primitive, _segments, _sharding, _validate
from jax_flash._operands import merge_heads, split_heads
from jax_flash._spec import Band, Spec


def attend(spec: Spec, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The output (B, T, N, H) and the log-sum-exp (B, N, T), all without B where q has none.

    arrays: q, k, v, and as far as the call has them mask, sinks, q_lengths, kv_lengths, q_segment_ids and
    kv_segment_ids, as `attention` takes them, and key_ranges (B, T, 2), the keys that each query sees: begin and end,
    which never fall.
    """
    return _attend(*positive_scale(spec, arrays))


def positive_scale(spec: Spec, arrays: dict[str, jax.Array]) -> tuple[Spec, dict[str, jax.Array]]:
    """jax.nn takes a scale of any sign; the kernels' largest score is that of the largest product."""
    if spec.softmax_scale > 0:
        return spec, arrays
    sign, scale = (-1, -spec.softmax_scale) if spec.softmax_scale < 0 else (0, 1.0)
    return dataclasses.replace(spec, softmax_scale=scale), arrays | {"q": arrays["q"] * sign}


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _attend(spec: Spec, arrays: dict[str, jax.Array]):
    """One compiled computation when called outside jit, and no call of its own inside."""
    q, k, v = (arrays[name] for name in "qkv")
    if q.ndim == 3:
        out, lse = _attend(spec, {name: x if name == "sinks" else x[None] for name, x in arrays.items()})
        return out[0], lse[0]
    if any(isinstance(size, int) and size == 0 for size in (*q.shape, k.shape[1])):  # no query, or no key for any
        return jnp.zeros_like(q), _lse_of_nothing(q, arrays)
    if "q_segment_ids" in arrays:
        return _attend_by_segment(spec, arrays)
    k, v = _sharding.split_like_queries(q, k, v)
    operands = {"q": q, "k": k, "v": v}
    if "mask" in arrays:
        operands["mask"] = _pack_mask(arrays["mask"], q, k)
    if "sinks" in arrays:
        operands["sinks"] = _spread_sinks(arrays["sinks"], q, k)
    for name in ("q_lengths", "kv_lengths"):
        if name in arrays:
            lengths = _validate.int32(arrays[name])
            operands[name] = _per_kv_head(lengths, k)
    if "key_ranges" in arrays:
        operands["key_ranges"] = _per_kv_head(arrays["key_ranges"], k)
    return _derivative.attend(spec, _sharding.vary_together(operands))


def _attend_by_segment(spec: Spec, arrays: dict[str, jax.Array]):
    """The same of the tokens sorted by segment."""
    ids = [_sharding.split_like(arrays["q"], arrays[name]) for name in ("q_segment_ids", "kv_segment_ids")]
    lengths = []
    for name, of_tokens in (("q_lengths", ids[0]), ("kv_lengths", ids[1])):
        size = of_tokens.shape[1]
        length = jnp.clip(_validate.int32(arrays[name]), 0, size) if name in arrays else size
        lengths.append(jnp.zeros_like(of_tokens[:, 0], jnp.int32) + length)
    tokens = jax.vmap(functools.partial(_segments.sort, spec.band))(*ids, *lengths)
    of_q = tokens.q_order, _segments.inverse(tokens.q_order)
    of_k = tokens.k_order, _segments.inverse(tokens.k_order)
    by_segment = {
        "q": _segments.permute(arrays["q"], 1, *of_q),
        "k": _segments.permute(arrays["k"], 1, *of_k),
        "v": _segments.permute(arrays["v"], 1, *of_k),
        "key_ranges": tokens.key_ranges,
        "q_lengths": tokens.q_length,
        "kv_lengths": tokens.kv_length,
    }
    if "sinks" in arrays:
        by_segment["sinks"] = arrays["sinks"]
    if "mask" in arrays:
        mask = arrays["mask"]
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        mask = _sharding.split_like(arrays["q"], jnp.broadcast_to(mask, (arrays["q"].shape[0], *mask.shape[1:])))
        rows = mask if mask.shape[2] == 1 else _segments.permute(mask, 2, *of_q)
        by_segment["mask"] = rows if mask.shape[3] == 1 else _segments.permute(rows, 3, *of_k)
    out, lse = _attend(dataclasses.replace(spec, band=Band()), by_segment)
    return _segments.permute(out, 1, *of_q[::-1]), _segments.permute(lse, 2, *of_q[::-1])


def _lse_of_nothing(q, arrays):
    """The log-sum-exp (B, N, T) of queries that see no key."""
    lse = jnp.full_like(q[..., 0].swapaxes(1, 2), -jnp.inf, dtype=jnp.float32)
    if "sinks" not in arrays:
        return lse
    i = jnp.arange(q.shape[1], dtype=jnp.int32)[None, None]
    valid = i < _validate.int32(arrays["q_lengths"])[:, None, None] if "q_lengths" in arrays else i >= 0
    return jnp.where(valid, arrays["sinks"].astype(jnp.float32)[None, :, None], lse)


def _spread_sinks(sinks, q, k):
    """(N,) to (B, K, G)."""
    K = k.shape[2]
    G = q.shape[2] // K if K else 1
    spread = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, K, G), (q.shape[0], K, G))
    return _sharding.split_like(q, spread, heads=True)


def _per_kv_head(x, k):
    """(B, ...) to (B, K, ...)."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], k.shape[2], *x.shape[1:]))


def _pack_mask(mask, q, k):
    """A boolean mask to bits, 32 keys a word, before it is spread over B and K: what T and G share stays shared."""
    (B, _, N, _), (S, K) = q.shape, k.shape[1:3]
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    b, n, t, _ = mask.shape
    words = (S + 31) // 32
    mask = jnp.broadcast_to(mask, (b, n, t, S))
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, words * 32 - S))).reshape(b, n, t, words, 32)
    bits = mask.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32).reshape(1, 1, 1, 1, 32)
    packed = jnp.sum(bits, axis=-1, dtype=jnp.uint32)
    packed = packed.reshape(b, *((K, N // K) if n == N and n > 1 else (1, 1)), t, words)
    return jnp.broadcast_to(packed, (B, K, *packed.shape[2:]))


# The API's names of what flash_attn_with_kvcache takes, and the table's.
_OF_CACHE = {
    "q": "q",
    "k_cache": "k_cache",
    "v_cache": "v_cache",
    "k": "k_new",
    "v": "v_new",
    "cache_seqlens": "lengths",
    "cache_batch_idx": "batch_index",
    "cache_leftpad": "leftpad",
    "block_table": "block_table",
    "rotary_cos": "cos",
    "rotary_sin": "sin",
    "sinks": "sinks",
}


def attend_to_cache(spec: Spec, arrays: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    """The output (B, T, N, H) and the log-sum-exp (B, N, T), and if there is something to append the updated caches."""
    return _attend_to_cache(*positive_scale(spec, arrays))


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _attend_to_cache(spec: Spec, arrays: dict[str, jax.Array]):
    operands = {_OF_CACHE[name]: x for name, x in arrays.items()}
    for name in ("lengths", "batch_index", "leftpad", "block_table"):
        if name in operands:
            # As it is where it is int32: the kernels look at every value themselves.
            operands[name] = _validate.int32(operands[name])
    if "k_new" in operands and operands["k_new"].shape[1] == 0:
        del operands["k_new"], operands["v_new"]
    per_kv_head = [name for name in ("k_cache", "v_cache", "k_new", "v_new") if name in operands]
    split = _sharding.split_like_queries(operands["q"], *(operands[name] for name in per_kv_head))
    operands |= zip(per_kv_head, split, strict=True)
    if "sinks" in operands:
        operands["sinks"] = _spread_sinks(operands["sinks"], operands["q"], operands["k_cache"])
    operands["q"] = split_heads("q", operands["q"], operands["k_cache"].shape[2])
    results = _primitive.bind("kvcache", spec, _sharding.vary_together(operands))
    caches = (_sharding.join(results[name], arrays[name]) for name in ("k_cache", "v_cache") if name in results)
    return merge_heads("o", results["o"]), merge_heads("lse", results["lse"]), *caches
