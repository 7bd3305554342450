"""The public `attention_varlen`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_flash import _call, _ranges, _validate
from jax_flash._spec import Band

_NAME = "attention_varlen"


def attention_varlen(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cu_seqlens_q: jax.Array,
    cu_seqlens_k: jax.Array,
    *,
    seqused_q: jax.Array | None = None,
    seqused_k: jax.Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    deterministic: bool = False,
    return_softmax_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`attention` to packed sequences of different lengths, each to itself: B of them, one behind the other.

    Sequence b has the queries cu_seqlens_q[b] to cu_seqlens_q[b + 1] and the keys cu_seqlens_k[b] to
    cu_seqlens_k[b + 1], and its output is that of `attention` to these alone. The cost is by tokens that see each
    other, not by B times the longest sequence, and lengths may change from call to call without compiling anew. The
    names and meanings are those of FlashAttention's flash_attn_varlen_func.

    ==========================  ===================  =====================================
    array                       shape                dtype
    ==========================  ===================  =====================================
    q, and the output           (total_q, N, H)      bfloat16, float16, float32 (CPU only)
    k, v                        (total_k, K, H)      as q
    cu_seqlens_q, cu_seqlens_k  (B + 1,)             any integer
    seqused_q, seqused_k        (B,)                 any integer
    sinks                       (N,)                 any float
    log-sum-exp                 (N, total_q)         float32
    ==========================  ===================  =====================================

    Sequences may be empty. Tokens from cu_seqlens[B] on, and those of a sequence that it does not use, belong to none:
    they are never read as keys, and their outputs are 0, their log-sum-exps -inf and their gradients 0. Values of
    cu_seqlens beyond the arrays are clamped, and one that is less than the one before is taken as that.

    As for masks, a query's probability of a key of another sequence is 0 and not left out: a value of v that is not
    finite may so make outputs of a neighbouring sequence NaN.

    Args:
      q: the queries of all sequences.
      k: the keys.
      v: the values.
      cu_seqlens_q: where each sequence's queries begin, and where the last one's end.
      cu_seqlens_k: the same for its keys.
      seqused_q: how many queries of each sequence count, from its first. Default: all.
      seqused_k: how many keys of each sequence count, from its first. Default: all.
      softmax_scale: what the products q.k are multiplied by, default 1 / sqrt(H).
      causal: with t and s queries and keys in a sequence, its query i sees its keys j <= i + s - t.
      window_size: (left, right): query i sees keys from i + s - t - left to i + s - t + right. None does not limit a
        side; one integer is for both.
      softcap: scores become softcap * tanh(score / softcap).
      sinks: of each query head one score more, without a value, in the softmax of all its queries. It has a gradient.
      deterministic: gradients are equal bit for bit whenever the call is repeated.
      return_softmax_lse: also return the log-sum-exp of the scores, which has a gradient.

    Returns:
      The output, like q; or (output, log-sum-exp) with return_softmax_lse.

    Raises:
      ValueError: the arguments contradict each other.
      NotImplementedError: they make sense but there is no kernel for them; the message says what to do.

    >>> import jax, jax.numpy as jnp, jax_flash
    >>> q = k = v = jax.random.normal(jax.random.key(0), (10, 4, 64), jnp.bfloat16)
    >>> cu_seqlens = jnp.array([0, 3, 3, 8])  # of 3, 0 and 5 tokens, and 2 that belong to none
    >>> jax_flash.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True).shape
    (10, 4, 64)
    """
    arrays = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    optional = {"seqused_q": seqused_q, "seqused_k": seqused_k, "sinks": sinks}
    arrays |= {name: x for name, x in optional.items() if x is not None}
    arrays = {name: _validate.as_array(_NAME, name, x) for name, x in arrays.items()}
    q, k, v = (arrays[name] for name in "qkv")
    _validate.check_packed(_NAME, arrays)
    if sinks is not None:
        _validate.check_sinks(_NAME, arrays["sinks"], q)
    spec = _validate.make_spec(
        _NAME,
        q.shape[-1],
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        deterministic=_validate.static_bool(_NAME, "deterministic", deterministic),
    )
    with_lse = _validate.static_bool(_NAME, "return_softmax_lse", return_softmax_lse)
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
    integers = {name: _validate.int32(arrays[name]) for name in names if name in arrays}
    packed = _ranges.of_packed(spec.band, q.shape[0], k.shape[0], **integers)
    if seqused_q is not None:
        q = jnp.where(packed.valid_q[:, None, None], q, 0)
    if seqused_k is not None:
        k, v = (jnp.where(packed.valid_k[:, None, None], x, 0) for x in (k, v))
    one = {"q": q, "k": k, "v": v, "key_ranges": packed.key_ranges}
    one |= {"q_lengths": packed.q_length, "kv_lengths": packed.kv_length}
    one = {name: x[None] for name, x in one.items()} | {name: arrays[name] for name in ("sinks",) if name in arrays}
    out, lse = _call.attend(dataclasses.replace(spec, band=Band()), one)
    return (out[0], lse[0]) if with_lse else out[0]
