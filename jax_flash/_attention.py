"""The public `attention`."""

from __future__ import annotations

import jax

from jax_flash import _call, _validate

_NAME = "attention"


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
    deterministic: bool = False,
    return_softmax_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    r"""Softmax attention in one fused kernel, with memory linear in the sequence length.

    .. math:: \mathrm{out}_i = \sum_j \mathrm{softmax}_j(\mathrm{score}_{ij}) \, v_j, \qquad
              \mathrm{score}_{ij} = \mathrm{softmax\_scale} \cdot q_i \cdot k_j

    over the keys j that query i sees. The names and meanings are FlashAttention's.

    ====================  ==================  =====================================
    array                 shape               dtype
    ====================  ==================  =====================================
    q, and the output     (B, T, N, H)        bfloat16, float16, float32 (CPU only)
    k, v                  (B, S, K, H)        as q
    mask                  (B, N, T, S)        bool; any axis may be 1 or left out
    q_lengths             (B,)                any integer
    kv_lengths            (B,)                any integer
    q_segment_ids         (B, T)              any integer
    kv_segment_ids        (B, S)              any integer
    sinks                 (N,)                any float
    log-sum-exp           (B, N, T)           float32
    ====================  ==================  =====================================

    All that have a B may come without it. Head n of q uses head n // (N // K) of k and v: K = N is multi-head
    attention, K = 1 multi-query, between them grouped-query.

    With q_lengths t and kv_lengths s (T and S where not given), query i < t may see key j < s. A query that sees no key
    has output 0, log-sum-exp -inf and gradients 0, whatever its cotangents are.

    Scores of NaN and infinity stay in their row: a query that sees a score of NaN or +inf has NaN for its output and
    log-sum-exp, as in a softmax that subtracts the maximum; a key whose score is -inf counts as not seen. (A value of v
    that is not finite is multiplied by 0 for a query that a mask, causal or a window hides it from, and so may make it
    NaN; one that kv_lengths hides is not. On GPUs probabilities have 16 bits, and values are summed in float32 before
    they are divided: v beyond 1e36 / S, or within 0.1 % of its dtype's largest number, may make an output infinite.)

    It works under jit, grad, vmap, scan, shard_map and export. Under jit on a mesh, each device computes its part of
    the batch and of the KV heads, without communication. (Where query heads are split over more devices than there are
    KV heads, q is gathered on automatic axes, unless you repeat the heads of k and v and split them too. On explicit
    axes, and in shard_map, there is no need to.) It has reverse-mode derivatives of first order. In `jax.checkpoint`
    policies the output is named "jax_flash_out" and the log-sum-exp "jax_flash_lse"; with both saved, the backward pass
    does not run the forward kernel again. `jax.export` needs
    `disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(name)]` for the names "jax_flash_forward" and
    "jax_flash_backward". `jax_debug_infs` reports a query that sees no key, whose log-sum-exp is -inf, in calls outside
    of jit, and where jit returns the log-sum-exp.

    Args:
      q: the queries.
      k: the keys.
      v: the values.
      mask: True where a query may see a key, in addition to what causal, window_size and the lengths say.
      softmax_scale: what the products q.k are multiplied by, default 1 / sqrt(H).
      causal: query i sees keys j <= i + s - t, that is, the last query sees all keys.
      window_size: (left, right): query i sees keys from i + s - t - left to i + s - t + right. None does not limit a
        side; one integer is for both. The cost is proportional to the window.
      softcap: scores become softcap * tanh(score / softcap); used by Gemma 2. Default: they do not.
      q_lengths: the number of valid queries in each sequence, clamped to [0, T]. Queries past it are ignored, and their
        outputs are 0.
      kv_lengths: the number of valid keys in each sequence, clamped to [0, S]. Keys past it are never read.
      q_segment_ids: of packed sequences, in any order: a query sees the keys of its own segment alone, in addition to
        what the rest says of positions in the arrays. Tokens with a negative id belong to no segment: such a query sees
        nothing, and such a key is never read. (Tokens are sorted by segment on the way, so that blocks of others are
        skipped. `attention_varlen` takes sequences that lie one behind the other as they are.)
      kv_segment_ids: those of the keys; default: q_segment_ids, if there are as many keys as queries.
      sinks: of each query head one score more, without a value, in the softmax of all its valid queries, which so give
        a part of their attention to nothing. Learnable, as in gpt-oss: it has a gradient. A query that sees no key has
        its head's sink for log-sum-exp. -inf is none.
      deterministic: gradients are equal bit for bit whenever the call is repeated, at some cost in speed on GPUs. The
        output always is.
      return_softmax_lse: also return the natural logarithm of the sum of the exponentials of the scores, which has a
        gradient.

    Returns:
      The output, like q; or (output, log-sum-exp) with return_softmax_lse.

    Raises:
      ValueError: the arguments contradict each other.
      NotImplementedError: they make sense but there is no kernel for them; the message says what to do.

    FlashAttention (https://arxiv.org/abs/2205.14135) and FlashAttention-2 (https://arxiv.org/abs/2307.08691) are the
    algorithm's papers.

    >>> import jax, jax.numpy as jnp, jax_flash
    >>> q = jax.random.normal(jax.random.key(0), (2, 5, 4, 64), jnp.bfloat16)
    >>> k = v = jax.random.normal(jax.random.key(1), (2, 9, 2, 64), jnp.bfloat16)
    >>> out, lse = jax.jit(
    ...     lambda q, k, v: jax_flash.attention(q, k, v, causal=True, return_softmax_lse=True)
    ... )(q, k, v)
    >>> out.shape, lse.shape
    ((2, 5, 4, 64), (2, 4, 5))
    """
    arrays = {"q": q, "k": k, "v": v, "mask": mask, "q_lengths": q_lengths, "kv_lengths": kv_lengths}
    arrays |= {"sinks": sinks}
    ids = {"q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids}
    arrays = {name: _validate.as_array(_NAME, name, x) for name, x in arrays.items() if x is not None or name in "qkv"}
    arrays |= {name: _validate.segment_ids(_NAME, name, x) for name, x in ids.items() if x is not None}
    q, k, v = (arrays[name] for name in "qkv")
    _validate.check_qkv(_NAME, q, k, v)
    if mask is not None:
        _validate.check_mask(_NAME, arrays["mask"], q, k)
    for name in ("q_lengths", "kv_lengths"):
        if name in arrays:
            _validate.check_lengths(_NAME, name, arrays[name], q)
    if sinks is not None:
        _validate.check_sinks(_NAME, arrays["sinks"], q)
    if q_segment_ids is not None or kv_segment_ids is not None:
        arrays = _validate.with_segment_ids(_NAME, arrays)
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
    out, lse = _call.attend(spec, arrays)
    return (out, lse) if with_lse else out
