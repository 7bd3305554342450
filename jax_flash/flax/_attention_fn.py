"""The function that Flax's attention layers call instead of their own attention."""

from __future__ import annotations

import functools
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import _call, _validate
from jax_flash._spec import Spec

_NAME = "attention_fn"


# linen passes only the keyword arguments that it finds in the signature, so each one that it may pass is named here:
# one that were missing would be lost without a word. nnx passes all it has.
def attention_fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    broadcast_dropout: bool = True,
    deterministic: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    force_fp32_for_softmax: bool = False,
    qk_attn_weights_einsum=None,
    attn_weights_value_einsum=None,
    module=None,
    is_causal: bool = False,
    input_positions: jax.Array | None = None,
    rope=None,
    window_size: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    softmax_scale: float | None = None,
    q_lengths: jax.Array | None = None,
    kv_lengths: jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attention for `flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention`.

    Computes `softmax(query keyᵀ / sqrt(H)) value` like the function that both layers use by default, at the same
    arguments, with the kernels of `jax_flash.attention`. One difference: a query whose mask hides every key gets 0,
    where Flax returns the mean of all values. What Flax's layers do not pass, from `rope` on, is given by
    `functools.partial(attention_fn, window_size=..., ...)`.

    =====================  =====================================================================
    query                  (batch..., T, N, H)
    key, value             (batch..., S, K, H), N a multiple of K
    mask                   broadcasts to (batch..., N, T, S); True or nonzero: the query sees the key
    q_lengths, kv_lengths  (batch...), integers
    q_, kv_segment_ids     (batch..., T), (batch..., S), integers
    sinks                  (N,)
    returns                (batch..., T, N, H)
    =====================  =====================================================================

    Args:
      query: the queries.
      key: the keys.
      value: the values.
      bias: must be None.
      mask: boolean, or any dtype that Flax's mask helpers make, which is then compared with zero.
      dropout_rng: not needed, since there is no dropout.
      dropout_rate: must be 0, unless `deterministic`.
      broadcast_dropout: not needed.
      deterministic: True switches dropout off. (`jax_flash.attention` means something else by this name.)
      dtype: what query, key and value are cast to; None: their common type.
      precision: accepted in every form: sums and the softmax are always float32.
      force_fp32_for_softmax: accepted: the softmax is always float32.
      qk_attn_weights_einsum: must be None; the kernel has matrix products of its own.
      attn_weights_value_einsum: must be None.
      module: must be None. Flax sets it to save the attention weights, which this function never has in memory.
      is_causal: query i sees keys j <= i, aligned to the top left as in Flax when T and S differ. Prefer this to a
        causal mask: the kernel then skips what it hides.
      input_positions: the tokens' positions, for `rope`.
      rope: a `flax.nnx.RoPE`, applied to query and key: `functools.partial(attention_fn, rope=rope)` does what
        `flax.nnx.dot_product_attention_with_rope` does.
      window_size: (left, right): query i sees keys from i - left to i + right, aligned to the top left like is_causal.
        None does not limit a side; one integer is for both.
      softcap: scores become softcap * tanh(score / softcap).
      softmax_scale: what the products are multiplied by, default 1 / sqrt(H).
      q_lengths: the number of valid queries in each sequence; the output of the others is 0.
      kv_lengths: the number of valid keys in each sequence; the others are not seen.
      q_segment_ids: of packed sequences: a query sees the keys of its segment alone, as in `jax_flash.attention`.
      kv_segment_ids: those of the keys; default: q_segment_ids.
      sinks: of each query head one score more, without a value, in its softmax.

    Returns:
      The attention's output, in the common dtype of query, key and value.

    Raises:
      NotImplementedError: for an argument that this function cannot honour; the message names the way out.
      ValueError: for shapes or dtypes that do not fit together.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> from jax_flash.flax import attention_fn
      >>> layer = nnx.MultiHeadAttention(
      ...     num_heads=2, in_features=16, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 5, 16)), is_causal=True).shape
      (1, 5, 16)
    """
    del dropout_rng, broadcast_dropout, precision, force_fp32_for_softmax
    _refuse("bias", bias, "use a mask where it only hides keys, or flax's own dot_product_attention")
    _refuse("module", module, "attention weights are never in memory; for sow_weights use flax's own attention")
    _refuse("qk_attn_weights_einsum", qk_attn_weights_einsum, "use flax's own attention with it")
    _refuse("attn_weights_value_einsum", attn_weights_value_einsum, "use flax's own attention with it")
    _check_dropout(dropout_rate)
    if dropout_rate > 0 and not _validate.static_bool(_NAME, "deterministic", deterministic):
        raise NotImplementedError(
            f"attention_fn: dropout on the attention weights is not supported; got dropout_rate={dropout_rate}. "
            "Set dropout_rate=0 in the attention layer (dropout elsewhere is unaffected) or deterministic=True"
        )
    query, key, value = (
        _validate.as_array(_NAME, name, x) for name, x in (("query", query), ("key", key), ("value", value))
    )
    mask, q_lengths, kv_lengths, sinks = (
        x if x is None else _validate.as_array(_NAME, name, x)
        for name, x in (("mask", mask), ("q_lengths", q_lengths), ("kv_lengths", kv_lengths), ("sinks", sinks))
    )
    q_segment_ids, kv_segment_ids = (
        x if x is None else _validate.segment_ids(_NAME, name, x)
        for name, x in (("q_segment_ids", q_segment_ids), ("kv_segment_ids", kv_segment_ids))
    )
    _check_ranks(query, key, value, mask)
    _check_lengths(query, q_lengths=q_lengths, kv_lengths=kv_lengths)
    if rope is not None:
        query, key = _rotate_both(rope, query, key, input_positions)
    elif input_positions is not None:
        raise ValueError("attention_fn: input_positions needs functools.partial(attention_fn, rope=...)")
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    arrays = {"q": query, "k": key, "v": value}
    if mask is not None:
        mask = mask if mask.dtype == jnp.bool_ else mask != 0
        arrays["mask"] = mask.reshape((1,) * (query.ndim - mask.ndim) + mask.shape)
    rest = {"q_lengths": q_lengths, "kv_lengths": kv_lengths, "sinks": sinks}
    rest |= {"q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids}
    arrays |= {name: x for name, x in rest.items() if x is not None}
    spec = _validate.make_spec(
        _NAME,
        query.shape[-1],
        softmax_scale=softmax_scale,
        causal=is_causal,
        window_size=window_size,
        softcap=softcap,
        top_left=True,
        names={"causal": "is_causal"},
    )
    return _attend(spec, arrays)


def _check_dropout(rate):
    _validate.static(_NAME, "dropout_rate", rate)
    number = isinstance(rate, numbers.Real) or (isinstance(rate, (np.ndarray, jax.Array)) and rate.ndim == 0)
    if isinstance(rate, bool) or not (number and 0 <= float(rate) <= 1):  # nor NaN
        raise ValueError(f"{_NAME}: dropout_rate must be a number in [0, 1]; got {rate!r}")


def _refuse(name, value, way_out):
    if value is not None:
        raise NotImplementedError(f"attention_fn: {name} is not supported; {way_out}")


def _rotate_both(rope, query, key, positions):
    if query.shape[-3] != key.shape[-3]:
        raise ValueError(
            "attention_fn: rope needs query and key at the same positions, so of the same length (no decode cache, "
            f"whose keys must be rotated before they are stored); got query {query.shape}, key {key.shape}"
        )
    return _rotate(rope, query, positions), _rotate(rope, key, positions)


def _rotate(rope, x, positions):
    """rope on x (batch..., T, heads, H), one head at a time; positions (T,), or (batch..., T), or None: 0, 1, 2, ..."""
    if positions is None or positions.ndim == 1:
        return jax.vmap(lambda head: rope(head, positions), in_axes=-2, out_axes=-2)(x)
    positions = jnp.broadcast_to(positions, x.shape[:-2])
    return jax.vmap(functools.partial(_rotate, rope))(x, positions)


def _check_ranks(query, key, value, mask):
    got = f"got query {query.shape}, key {key.shape}, value {value.shape}"
    if query.ndim < 3 or not query.ndim == key.ndim == value.ndim:
        raise ValueError(f"attention_fn: query, key and value must all be (batch..., length, heads, H); {got}")
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        raise ValueError(f"attention_fn: query, key and value must share their batch axes; {got}")
    if mask is not None and mask.ndim > query.ndim:
        raise ValueError(f"attention_fn: mask {mask.shape} must broadcast to (batch..., N, T, S); {got}")


def _check_lengths(query, **lengths):
    for name, array in lengths.items():
        if array is not None and array.shape != query.shape[:-3]:
            raise ValueError(
                f"attention_fn: {name} must have the batch axes {query.shape[:-3]} of query {query.shape}; "
                f"got {array.shape}"
            )


def _attend(spec: Spec, arrays: dict[str, jax.Array]) -> jax.Array:
    """Batch axes beyond the first are vmapped rather than folded into one, so that each keeps its sharding."""
    if arrays["q"].ndim > 4:
        axes: dict[str, int | None] = {name: None if name == "sinks" else 0 for name in arrays}
        if "mask" in arrays and arrays["mask"].shape[0] == 1:
            arrays, axes["mask"] = arrays | {"mask": arrays["mask"][0]}, None
        return jax.vmap(functools.partial(_attend, spec), in_axes=(axes,))(arrays)
    q, k, v = (arrays[name] for name in "qkv")
    _validate.check_qkv(_NAME, q, k, v, ("query", "key", "value"))
    if "mask" in arrays:
        _validate.check_mask(_NAME, arrays["mask"], q, k)
    for name in ("q_lengths", "kv_lengths"):
        if name in arrays:
            _validate.check_lengths(_NAME, name, arrays[name], q)
    if "sinks" in arrays:
        _validate.check_sinks(_NAME, arrays["sinks"], q)
    if "q_segment_ids" in arrays or "kv_segment_ids" in arrays:
        arrays = _validate.with_segment_ids(_NAME, arrays)
    return _call.attend(spec, arrays)[0]
