"""The public `flash_attn_with_kvcache`."""

from __future__ import annotations

import numbers

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import _call, _validate

_NAME = "flash_attn_with_kvcache"


def flash_attn_with_kvcache(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    k: jax.Array | None = None,
    v: jax.Array | None = None,
    *,
    rotary_cos: jax.Array | None = None,
    rotary_sin: jax.Array | None = None,
    cache_seqlens: jax.Array | int | None = None,
    cache_batch_idx: jax.Array | None = None,
    cache_leftpad: jax.Array | None = None,
    block_table: jax.Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    rotary_interleaved: bool = True,
    num_splits: int | None = None,
    return_softmax_lse: bool = False,
) -> tuple[jax.Array, ...]:
    r"""Appends new keys and values to a cache, in place, and attends to all that it then holds, in one kernel.

    .. math:: \mathrm{out}_i = \sum_j \mathrm{softmax}_j(\mathrm{softmax\_scale} \cdot q_i \cdot k_j) \, v_j

    over the positions j that query i sees. The names and meanings are FlashAttention's.

    ====================  ============================  =====================================
    array                 shape                         dtype
    ====================  ============================  =====================================
    q, and the output     (B, T, N, H)                  bfloat16, float16, float32 (CPU only)
    k_cache, v_cache      (B_cache, S, K, H)            as q
    ... or, paged         (num_pages, page_size, K, H)  as q; page_size a multiple of 8
    k, v                  (B, T_new, K, H)              as q; T_new <= T
    rotary_cos, _sin      (positions, rotary_dim / 2)   as q, or float32
    cache_seqlens         (B,), or one integer          any integer
    cache_batch_idx       (B,)                          any integer
    cache_leftpad         (B,)                          any integer
    block_table           (B, max_pages)                any integer
    sinks                 (N,)                          any float
    log-sum-exp           (B, N, T)                     float32
    ====================  ============================  =====================================

    Sequence b holds cache_seqlens[b] positions before the call. k and v are written behind them; then query i sees
    the positions j < s = min(cache_seqlens[b] + T_new, capacity), with causal and window_size aligned to the bottom
    right: the last query and the last position are the same token. q may hold one token, a few, or a whole prompt.

    The caches are updated in place where their buffers may be: donate them to jit (`donate_argnums`), or carry them
    through `lax.while_loop` or `lax.scan`. Elsewhere, and where XLA splits the call over devices by itself, they are
    copied first, and the caller's arrays stay as they were. Keep one array per layer: slicing a stacked cache copies.
    On a GPU the output of a few query tokens likewise takes the buffer of q; a q that is needed afterwards is copied.

    Values that are only known on the device are never trusted with memory. cache_seqlens is clamped to [0, capacity];
    new tokens past the capacity (S, or max_pages * page_size) are neither written nor seen; a sequence whose
    cache_batch_idx names no row of the cache has an empty one; entries of block_table outside [0, num_pages) are
    pages of zeros, and what would be written to them is dropped; cache_leftpad is clamped to [0, s]; positions past
    the rotary tables take their last row. A query that sees nothing has output 0 and log-sum-exp -inf; scores of
    NaN or infinity do what they do in `attention`. Two sequences may share pages that neither of them writes to.

    It works under jit, vmap, scan, while_loop and shard_map, and under jit on a mesh of devices runs on its own part
    of the batch and of the KV heads (contiguous caches without cache_batch_idx; use jax.shard_map for the others).
    `jax.export` needs `disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("jax_flash_kvcache")]`. It has no
    derivatives.

    Args:
      q: the queries.
      k_cache: the keys so far, a row per sequence or per page.
      v_cache: the values so far.
      k: the keys of the new tokens, or None to append nothing.
      v: their values.
      rotary_cos: if given, the first rotary_dim elements of k and q are rotated: new token t has position
        cache_seqlens[b] + t, and so has query t if causal or window_size is given; else all queries have position
        cache_seqlens[b]. rotary_dim is a multiple of 16. Needs k.
      rotary_sin: the sines for rotary_cos.
      cache_seqlens: the number of positions each sequence holds. None: all (then k must be None too).
      cache_batch_idx: the row of the cache for each sequence; default: row b for sequence b. Rows written to must
        differ.
      cache_leftpad: the first position that may be seen; default 0.
      block_table: the caches are pages, and this names the pages of each sequence in order.
      softmax_scale: what the products q.k are multiplied by, default 1 / sqrt(H).
      causal: query i sees positions j <= i + s - T.
      window_size: (left, right): query i sees positions from i + s - T - left to i + s - T + right. None, or -1, does
        not limit a side; one integer is for both.
      softcap: scores become softcap * tanh(score / softcap). Default, or 0: they do not.
      sinks: of each query head one score more, without a value, in the softmax of all its queries.
      rotary_interleaved: rotate the pairs (0, 1), (2, 3), ...; else (0, rotary_dim / 2), (1, rotary_dim / 2 + 1), ...
      num_splits: how many parts the keys of a sequence are divided into on a GPU; None or 0 lets the device balance
        the work from the actual lengths. Results do not depend on it but for rounding. The CPU divides as its threads
        need.
      return_softmax_lse: also return the natural logarithm of the sum of the exponentials of the scores.

    Returns:
      (output, k_cache, v_cache), or (output, log-sum-exp, k_cache, v_cache) with return_softmax_lse.

    Raises:
      ValueError: the arguments contradict each other.
      NotImplementedError: they make sense but there is no kernel for them, or a derivative was asked for.

    FlashAttention (https://github.com/Dao-AILab/flash-attention) has the function of this name for PyTorch.

    >>> import functools, jax, jax.numpy as jnp, jax_flash
    >>> k_cache, v_cache = jax_flash.cache.contiguous(batch=1, length=32, num_heads=2, head_dim=64)
    >>> q, k, v = (jax.random.normal(jax.random.key(i), (1, 1, n, 64), jnp.bfloat16) for i, n in enumerate((4, 2, 2)))
    >>> attend = functools.partial(jax_flash.flash_attn_with_kvcache, causal=True)
    >>> step = jax.jit(attend, donate_argnames=("k_cache", "v_cache"))
    >>> out, k_cache, v_cache = step(q, k_cache, v_cache, k, v, cache_seqlens=jnp.array([0]))
    >>> out.shape
    (1, 1, 4, 64)
    """
    arrays = {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k": k,
        "v": v,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "block_table": block_table,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "sinks": sinks,
    }
    required = ("q", "k_cache", "v_cache")
    arrays = {n: _validate.as_array(_NAME, n, x) for n, x in arrays.items() if x is not None or n in required}
    if cache_seqlens is not None:
        arrays["cache_seqlens"] = _lengths(cache_seqlens, arrays["q"])
    _check(arrays)
    spec = _validate.make_spec(
        _NAME,
        arrays["q"].shape[-1],
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        rotary_interleaved=_validate.static_bool(_NAME, "rotary_interleaved", rotary_interleaved),
        num_splits=_splits(num_splits),
    )
    with_lse = _validate.static_bool(_NAME, "return_softmax_lse", return_softmax_lse)
    out, lse, *updated = _call.attend_to_cache(spec, arrays)
    k_cache, v_cache = updated or (arrays["k_cache"], arrays["v_cache"])
    return (out, lse, k_cache, v_cache) if with_lse else (out, k_cache, v_cache)


def _lengths(cache_seqlens, q) -> jax.Array:
    if isinstance(cache_seqlens, numbers.Integral) and not isinstance(cache_seqlens, bool):
        cache_seqlens = np.array(max(min(int(cache_seqlens), 2**62), -(2**62)))
    if not (isinstance(cache_seqlens, (jax.Array, np.ndarray)) or hasattr(cache_seqlens, "__jax_array__")):
        raise ValueError(
            f"{_NAME}: cache_seqlens must be an array (B,), or one integer for all sequences; got {cache_seqlens!r}"
        )
    cache_seqlens = _validate.as_array(_NAME, "cache_seqlens", cache_seqlens)
    if cache_seqlens.ndim == 0 and q.ndim == 4:
        cache_seqlens = jnp.broadcast_to(cache_seqlens, q.shape[:1])
    return cache_seqlens


def _splits(num_splits) -> int:
    _validate.static(_NAME, "num_splits", num_splits)
    num_splits = 0 if num_splits is None else num_splits
    integer = isinstance(num_splits, numbers.Integral) and not isinstance(num_splits, bool)
    if not (integer and 0 <= int(num_splits) <= 4096):
        raise ValueError(f"{_NAME}: num_splits must be an integer from 0 to 4096, or None; got {num_splits!r}")
    return int(num_splits)


def _check(a: dict[str, jax.Array]) -> None:
    """What shapes and dtypes tell."""

    def fail(wanted: str, *names: str, kind: type[Exception] = ValueError):
        got = ", ".join(f"{name} {_validate.show(a[name])}" for name in names if name in a)
        raise kind(f"{_NAME}: {wanted}; got {got}")

    q, k_cache, v_cache = a["q"], a["k_cache"], a["v_cache"]
    main = ("q", "k_cache", "v_cache")
    if any(a[name].ndim != 4 for name in main):
        fail("q must be (B, T, N, H), k_cache and v_cache (B, S, K, H) or (num_pages, page_size, K, H)", *main)
    if k_cache.shape != v_cache.shape:
        fail("k_cache and v_cache must have one shape", *main)
    if k_cache.dtype == v_cache.dtype != q.dtype and k_cache.dtype.itemsize == 1:
        fail(
            "quantised caches have no kernel yet: keep them in the dtype of q, or convert them before the call with "
            "x.astype(q.dtype) * scale",
            *main,
            kind=NotImplementedError,
        )
    T, H = q.shape[1], q.shape[3]
    rows, S, K, _ = k_cache.shape
    # All that holds for attention() holds here, but for the caches' own batch size.
    like_keys = jax.ShapeDtypeStruct((q.shape[0], S, K, k_cache.shape[3]), k_cache.dtype)
    _validate.check_qkv(_NAME, q, like_keys, jax.ShapeDtypeStruct(like_keys.shape, v_cache.dtype), main)
    if ("k" in a) != ("v" in a):
        fail("k and v go together: give both or neither", "q", "k", "v")
    if "k" in a:
        k, v = a["k"], a["v"]
        if k.shape != v.shape or k.ndim != 4 or (k.shape[0], *k.shape[2:]) != (q.shape[0], K, H):
            fail(f"k and v must be (B, T_new, K, H) = ({q.shape[0]}, T_new, {K}, {H})", *main, "k", "v")
        if not k.dtype == v.dtype == q.dtype:
            fail("k and v must have the dtype of q", *main, "k", "v")
        if k.shape[1] > T:
            fail(f"k and v may hold at most as many tokens as q, T = {T}", *main, "k", "v")
        if "cache_seqlens" not in a:
            fail("k and v need cache_seqlens, which says where they go", *main, "k", "v")
    if "sinks" in a:
        _validate.check_sinks(_NAME, a["sinks"], q)
    for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad"):
        if name in a:
            _validate.check_lengths(_NAME, name, a[name], q)
    if "block_table" in a:
        if "cache_batch_idx" in a:
            fail(
                "block_table and cache_batch_idx exclude each other: the rows of a block table are those of q",
                "q",
                "block_table",
                "cache_batch_idx",
            )
        table = a["block_table"]
        if table.ndim != 2 or table.shape[0] != q.shape[0] or not jnp.issubdtype(table.dtype, jnp.integer):
            fail(f"block_table must be integers (B, max_pages) = ({q.shape[0]}, max_pages)", "q", "block_table")
        if isinstance(S, int) and S % 8 != 0:
            fail(f"the page size must be a multiple of 8, not {S}", *main, "block_table")
        if isinstance(S * table.shape[1], int) and S * table.shape[1] > _validate.MAX_LENGTH:
            fail(
                f"a sequence holds at most {_validate.MAX_LENGTH} positions",
                *main,
                "block_table",
                kind=NotImplementedError,
            )
    elif "cache_batch_idx" not in a and rows != q.shape[0]:
        fail("the caches must have a row for each sequence of q, or cache_batch_idx or block_table", *main)
    if isinstance(rows * S, int) and rows * S >= 2**31:
        fail("a cache holds at most 2^31 - 1 positions", *main, kind=NotImplementedError)
    _check_rotary(a, fail)


def _check_rotary(a: dict[str, jax.Array], fail) -> None:
    if ("rotary_cos" in a) != ("rotary_sin" in a):
        fail("rotary_cos and rotary_sin go together: give both or neither", "q", "rotary_cos", "rotary_sin")
    if "rotary_cos" not in a:
        return
    cos, sin, H = a["rotary_cos"], a["rotary_sin"], a["q"].shape[-1]
    shown = ("q", "rotary_cos", "rotary_sin")
    if "k" not in a:
        fail("rotary_cos and rotary_sin need k and v: they rotate what is appended, and q as if it was", *shown)
    if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[0] < 1:
        fail("rotary_cos and rotary_sin must both be (positions, rotary_dim / 2)", *shown)
    if cos.shape[1] % 8 != 0 or cos.shape[1] == 0:
        fail(f"rotary_dim must be a multiple of 16, not {2 * cos.shape[1]}", *shown)
    if 2 * cos.shape[1] > H:
        fail(f"rotary_dim may be at most the head dim H = {H}, not {2 * cos.shape[1]}", *shown)
    if cos.dtype != sin.dtype or cos.dtype not in (jnp.float32, a["q"].dtype):
        fail("rotary_cos and rotary_sin must both be float32, or both have the dtype of q", *shown)
    if cos.shape[0] < a["k"].shape[1]:
        fail("rotary_cos and rotary_sin must have a position for each new token at least", *shown, "k")
