"""Attention written down plainly: the definition that every kernel is tested against.

It computes the whole (T, S) matrix of scores, so its memory is quadratic. It is also what runs on platforms that have
no kernel.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    q_lengths: jax.Array | None = None,
    kv_lengths: jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    sinks: jax.Array | None = None,
    return_softmax_lse: bool = False,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
):
    """`jax_flash.attention` for q of shape (B, T, N, H), in plain jax.numpy.

    Args:
      compute_dtype: the dtype of the two matrix products and of the probabilities. The softmax itself is float32.

    The other arguments, and what is returned, are those of `jax_flash.attention`; nothing is checked.
    """
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    G = N // K if K else 1
    left, right = window_size if isinstance(window_size, tuple) else (window_size, window_size)
    if causal:
        right = 0 if right is None else min(right, 0)
    q_lengths, kv_lengths = _column(q_lengths, T), _column(kv_lengths, S)
    visible = visible_keys(T, S, left, right, q_lengths, kv_lengths)
    if q_segment_ids is not None:
        of_q, of_k = q_segment_ids, q_segment_ids if kv_segment_ids is None else kv_segment_ids
        same = (of_q[:, :, None] == of_k[:, None]) & (of_q[:, :, None] >= 0)
        visible = visible & same[:, None, None]
    if mask is not None:
        mask = jnp.broadcast_to(mask, (B, N, T, S)).reshape(B, K, G, T, S)
        visible = jnp.broadcast_to(visible, mask.shape) & mask
    out, lse = softmax_attention(
        q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).astype(compute_dtype),
        k.transpose(0, 2, 1, 3).astype(compute_dtype),
        v.transpose(0, 2, 1, 3).astype(compute_dtype),
        visible,
        H**-0.5 if softmax_scale is None else softmax_scale,
        softcap,
        None if sinks is None else sinks.reshape(K, G),
    )
    # No sink for the queries past the length, or without a segment.
    for valid in (
        None if q_lengths is None else jnp.arange(T)[None] < q_lengths,
        None if q_segment_ids is None else jnp.asarray(q_segment_ids) >= 0,
    ):
        lse = lse if valid is None else jnp.where(valid[:, None, None], lse, -jnp.inf)
    out = out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q.dtype)
    return (out, lse.reshape(B, N, T)) if return_softmax_lse else out


def _column(lengths, most: int):
    """(B,) integers of any dtype to (B, 1) int32 in [0, most]."""
    if lengths is None:
        return None
    if isinstance(lengths, np.ndarray):  # JAX would cut it to 32 bits
        lengths = np.array([min(max(int(length), 0), most) for length in lengths], np.int32)
    lengths = jnp.asarray(lengths)
    low = jnp.where(lengths > 0, lengths, 0)  # compared in their own dtype, and cut to 32 bits afterwards
    return jnp.where(low > min(most, jnp.iinfo(low.dtype).max), most, low.astype(jnp.int32))[:, None]


def visible_keys(T, S, left, right, q_lengths=None, kv_lengths=None) -> jax.Array:
    """Which keys each query sees, (*lengths.shape, 1, T, S): window, causal, lengths; aligned to the bottom right."""
    shape = next((x.shape for x in (q_lengths, kv_lengths) if x is not None), (1, 1))
    shape = (*shape, 1, T, S)
    i = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)
    j = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    t = T if q_lengths is None else q_lengths[..., None, None, None]
    s = S if kv_lengths is None else kv_lengths[..., None, None, None]
    visible = (i < t) & (j < s)
    if left is not None:
        visible &= j >= i + (s - t) - left
    if right is not None:
        visible &= j <= i + (s - t) + right
    return visible


def softmax_attention(q, k, v, visible, softmax_scale, softcap, sinks=None):
    """Logical order: q (*batch, K, G, T, H), k and v (*batch, K, S, H), sinks (..., K, G); returns out like q and the
    LSE (..., G, T).

    A query that sees a score of NaN or +inf has NaN for its output and LSE, as in a float32 softmax that subtracts the
    maximum. A key whose score is -inf has probability 0, and a query all of whose scores are -inf, since no key is
    visible or by their values, has output 0 and LSE -inf, and gradients 0 whatever its cotangents are. A sink is one
    score more, which has no value; it is the LSE of such a query.
    """
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    score = product("...kgth,...ksh->...kgts", q, k).astype(jnp.float32) * softmax_scale
    if softcap is not None:
        score = softcap * jnp.tanh(score / softcap)
    score = jnp.where(jnp.broadcast_to(visible, score.shape), score, -jnp.inf)
    highest = jax.lax.stop_gradient(jnp.max(score, axis=-1, keepdims=True, initial=-jnp.inf))
    if sinks is not None:
        sinks = sinks.reshape((1,) * (score.ndim - sinks.ndim - 2) + (*sinks.shape, 1, 1)).astype(jnp.float32)
        highest = jnp.maximum(highest, jax.lax.stop_gradient(sinks))
    highest = jnp.where(highest == -jnp.inf, 0.0, highest)  # not +inf and NaN: subtracted, they make the row NaN
    p = jnp.exp(score - highest)
    total = jnp.sum(p, axis=-1, keepdims=True)
    sees_any = total != 0
    if sinks is not None:
        total = total + jnp.exp(sinks - highest)
    total = jnp.where(any_score := total != 0, total, 1.0)
    out = product("...kgts,...ksh->...kgth", (p / total).astype(v.dtype), v)
    out = jnp.where(sees_any, out, 0.0)  # it is 0 already, but for its gradient and for 0 * NaN
    lse = jnp.where(any_score, highest + jnp.log(total), -jnp.inf)
    return out, lse[..., 0]
