"""`jax.nn.dot_product_attention`'s signature and meanings with our kernels, so that one import line swaps them."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jax_flash import _call, _sharding, _validate
from jax_flash._spec import Band, Spec

_NAME = "dot_product_attention"


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    r"""Softmax attention with the signature and the meanings of `jax.nn.dot_product_attention`.

    .. math:: \mathrm{out}_i = \sum_j \mathrm{softmax}_j(\mathrm{scale} \cdot q_i \cdot k_j) \, v_j

    It differs from `jax_flash.attention` in three things: causal masks and windows are aligned to the top left (query i
    sees keys j <= i whatever T and S are), a query that sees no key gets the mean of all values, and the residual is
    the log-sum-exp as (B, T, N) in the inputs' dtype, without a gradient.

    ======================  ==================  =====================================
    array                   shape               dtype
    ======================  ==================  =====================================
    query, and the output   (B, T, N, H)        bfloat16, float16, float32 (CPU only)
    key, value              (B, S, K, H)        as query
    mask                    (B, N, T, S)        bool; any axis may be 1
    query_seq_lengths       (B,)                int32
    key_value_seq_lengths   (B,)                int32
    residual                (B, T, N)           as query
    ======================  ==================  =====================================

    The arrays may come without B, but then without lengths too.

    Args:
      query: the queries.
      key: the keys.
      value: the values.
      bias: must be None: there is no kernel that adds a bias yet.
      mask: True where a query may see a key.
      scale: what the products are multiplied by, default 1 / sqrt(H).
      is_causal: query i sees keys j <= i.
      query_seq_lengths: the number of valid queries in each sequence; the outputs of the others are 0.
      key_value_seq_lengths: the number of valid keys in each sequence.
      local_window_size: (left, right), or one integer for both: query i sees keys from i - left to i + right.
      implementation: must be None: there is one.
      return_residual: also return the log-sum-exp of the scores.

    Returns:
      The output, like query; or (output, residual) with return_residual.

    Raises:
      ValueError: the arguments contradict each other.
      NotImplementedError: they make sense but there is no kernel for them; the message says what to do.

    The signature is that of https://docs.jax.dev/en/latest/_autosummary/jax.nn.dot_product_attention.html.

    >>> import jax, jax.numpy as jnp
    >>> from jax_flash import dot_product_attention
    >>> x = jax.random.normal(jax.random.key(0), (2, 5, 4, 64), jnp.bfloat16)
    >>> dot_product_attention(x, x, x, is_causal=True).shape
    (2, 5, 4, 64)
    """
    if bias is not None:
        raise NotImplementedError(
            f"{_NAME}: bias has no kernel yet; a boolean bias can be given as mask, else use jax.nn's"
        )
    if implementation is not None:
        raise NotImplementedError(f"{_NAME}: jax_flash has one implementation; leave it None (got {implementation!r})")
    q, k, v = (_validate.as_array(_NAME, n, x) for n, x in (("query", query), ("key", key), ("value", value)))
    _validate.check_qkv(_NAME, q, k, v, ("query", "key", "value"))
    if mask is not None:
        mask = _validate.as_array(_NAME, "mask", mask)
        if mask.ndim == 4 and q.ndim == 3 and mask.shape[0] == 1:
            mask = mask[0]
        _validate.check_mask(_NAME, mask, q, k)
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "mask": mask,
        "q_lengths": _lengths("query_seq_lengths", query_seq_lengths, q),
        "kv_lengths": _lengths("key_value_seq_lengths", key_value_seq_lengths, q),
    }
    arrays = {name: x for name, x in arrays.items() if x is not None}
    spec = _validate.make_spec(
        _NAME,
        q.shape[-1],
        softmax_scale=scale,
        causal=is_causal,
        window_size=local_window_size,
        least_window=0,
        top_left=True,
        names={"softmax_scale": "scale", "causal": "is_causal", "window_size": "local_window_size"},
    )
    with_residual = _validate.static_bool(_NAME, "return_residual", return_residual)
    out, lse = _call.attend(spec, arrays)
    out = _mean_where_unseen(spec, arrays, out, lse)
    if not with_residual:
        return out
    # What the log-sum-exp of S equal, very negative scores comes to there; beyond its length, a query has none.
    lse = jax.lax.stop_gradient(lse.swapaxes(-1, -2))
    hidden = -0.7 * float(jnp.finfo(jnp.float32).max) + jnp.log(jnp.maximum(jnp.float32(k.shape[-3]), 1))
    return out, jnp.where(jnp.isneginf(lse), hidden, lse).astype(q.dtype)


def _mean_where_unseen(spec: Spec, arrays: dict[str, jax.Array], out, lse):
    """jax.nn gives a valid query that sees no key the mean of all values."""
    q, v = arrays["q"], arrays["v"]
    S = v.shape[-3]
    everything_seen = spec.band == Band() and not {"mask", "kv_lengths"} & arrays.keys()
    if everything_seen or any(isinstance(size, int) and size == 0 for size in (*q.shape, S)):
        return out
    unseen = jnp.isneginf(lse.swapaxes(-1, -2))  # (B, T, N)
    if "q_lengths" in arrays:
        valid = jnp.arange(q.shape[-3])[None, :] < _validate.int32(arrays["q_lengths"])[:, None]
        unseen &= valid[:, :, None]
    if q.ndim == 4:
        (v,) = _sharding.split_like_queries(q, v)
    K = v.shape[-2]
    out = out.reshape(*out.shape[:-2], K, out.shape[-2] // K, out.shape[-1])
    # Cast where it is as large as the output, so that its gradient, a sum over the queries, is summed in float32.
    mean = jnp.expand_dims(jnp.mean(v, axis=-3, dtype=jnp.float32), (-4, -2))
    mean = jnp.broadcast_to(mean, out.shape).astype(out.dtype)
    return jnp.where(unseen.reshape(*out.shape[:-1], 1), mean, out).reshape(q.shape)


def _lengths(name: str, lengths, q):
    if lengths is None:
        return None
    lengths = _validate.as_array(_NAME, name, lengths)
    if q.ndim == 3:
        raise ValueError(f"{_NAME}: {name} needs a batch axis; got query {_validate.show(q)}")
    _validate.check_lengths(_NAME, name, lengths, q)
    return lengths
