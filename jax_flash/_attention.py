"""The public `attention`: checks, the packing of masks, and the derivative rule."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from jax_flash import _primitive, _validate
from jax_flash._spec import Extras, Spec


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
    log-sum-exp           (B, N, T)           float32
    ====================  ==================  =====================================

    All of them may come without B. Head n of q uses head n // (N // K) of k and v: K = N is multi-head attention, K = 1
    multi-query, between them grouped-query.

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
    "jax_flash_backward".

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
    out, lse = call(
        "attention",
        q,
        k,
        v,
        mask,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        q_lengths=q_lengths,
        kv_lengths=kv_lengths,
        deterministic=deterministic,
    )
    return (out, lse) if return_softmax_lse else out


def call(
    function: str,
    q,
    k,
    v,
    mask=None,
    *,
    softmax_scale=None,
    causal=False,
    window_size=None,
    softcap=None,
    q_lengths=None,
    kv_lengths=None,
    deterministic=False,
) -> tuple[jax.Array, jax.Array]:
    """`attention` on behalf of the public function that messages name; returns the output and the log-sum-exp."""
    q, k, v = (_validate.as_array(function, *each) for each in zip("qkv", (q, k, v), strict=True))
    _validate.check_qkv(function, q, k, v)
    spec = _validate.make_spec(function, q.shape[-1], softmax_scale, causal, window_size, softcap, deterministic)
    if mask is not None:
        mask = _validate.as_array(function, "mask", mask)
        _validate.check_mask(function, mask, q, k)
    if q_lengths is not None:
        q_lengths = _validate.as_array(function, "q_lengths", q_lengths)
        _validate.check_lengths(function, "q_lengths", q_lengths, q)
    if kv_lengths is not None:
        kv_lengths = _validate.as_array(function, "kv_lengths", kv_lengths)
        _validate.check_lengths(function, "kv_lengths", kv_lengths, q)
    return _attention(spec, q, k, v, mask, q_lengths, kv_lengths)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _attention(spec: Spec, q, k, v, mask, q_lengths, kv_lengths):
    """One compiled computation when called outside jit, and no call of its own inside."""
    if q.ndim == 3:
        out, lse = _attention(spec, *(None if x is None else x[None] for x in (q, k, v, mask, q_lengths, kv_lengths)))
        return out[0], lse[0]
    k, v = _split_like_queries(q, k, v)
    extras = Extras(
        mask=None if mask is None else _pack_mask(mask, q, k),
        q_lengths=_lengths_per_head(q_lengths, q.shape[1], k),
        kv_lengths=_lengths_per_head(kv_lengths, k.shape[1], k),
    )
    q, k, v, extras = _vary_together((q, k, v, extras))
    return _attend(spec, q, k, v, extras)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: Spec, q, k, v, extras: Extras):
    """(B, T, N, H) in and out; the primitives' order of axes exists inside only."""
    out, lse = _primitive.forward(spec, _grouped(q, k), _heads_first(k), _heads_first(v), extras)
    return _ungrouped(out), lse.reshape(lse.shape[0], q.shape[2], q.shape[1])


def _attend_forward(spec: Spec, q, k, v, extras: Extras):
    q, k, v = q.value, k.value, v.value
    extras = jax.tree.map(lambda x: x.value, extras, is_leaf=lambda x: hasattr(x, "perturbed"))
    out, lse = _attend(spec, q, k, v, extras)
    # Named here, where they are both results and residuals, so that saving them spares the kernel a second run.
    out, lse = checkpoint_name(out, "jax_flash_out"), checkpoint_name(lse, "jax_flash_lse")
    return (out, lse), (q, k, v, out, lse, extras)


def _attend_backward(spec: Spec, residuals, cotangents):
    q, k, v, out, lse, extras = residuals
    d_out, d_lse = cotangents
    d_out = jnp.zeros_like(out) if isinstance(d_out, SymbolicZero) else d_out
    per_group = _grouped(lse.swapaxes(1, 2)[..., None], k)[..., 0].shape
    d_lse = None if isinstance(d_lse, SymbolicZero) else d_lse.reshape(per_group)
    dq, dk, dv = _primitive.backward(
        spec,
        _grouped(q, k),
        _heads_first(k),
        _heads_first(v),
        _grouped(out, k),
        lse.reshape(per_group),
        _grouped(d_out, k),
        d_lse,
        extras,
    )
    return _ungrouped(dq), _heads_first(dk), _heads_first(dv), None


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _grouped(x, k):
    """(B, T, N, H) to (B, K, G, T, H)."""
    (B, T, N, H), K = x.shape, k.shape[2]
    return x.reshape(B, T, K, N // K if K else 1, H).transpose(0, 2, 3, 1, 4)


def _ungrouped(x):
    """(B, K, G, T, H) to (B, T, N, H)."""
    B, K, G, T, H = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _heads_first(x):
    """(B, S, K, H) to (B, K, S, H), and back."""
    return x.swapaxes(1, 2)


def _lengths_per_head(lengths, limit, k):
    """(B,) integers to (B, K) int32."""
    if lengths is None:
        return None
    # Clamped in its own dtype, so that no value changes sign on the way to int32.
    lengths = jnp.clip(lengths, 0, limit).astype(jnp.int32)
    return jnp.broadcast_to(lengths[:, None], (lengths.shape[0], k.shape[2]))


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


def _split_like_queries(q, k, v):
    """On explicit mesh axes: where q's heads are split over more devices than there are KV heads, repeats the latter.

    Each device then holds the one KV head that its query heads use, and nothing is gathered.
    """
    sharding = jax.typeof(q).sharding
    axes = sharding.spec[2] if len(sharding.spec) > 2 else None
    if axes is None:
        return k, v
    shards = math.prod(sharding.mesh.shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))
    B, S, K, H = k.shape
    if K % shards == 0:
        return k, v
    if shards % K != 0:
        raise NotImplementedError(
            f"attention: heads split over {shards} devices need a number of KV heads that divides it or is divided by "
            f"it; got K={K}. Reshard q, k and v with jax.sharding.reshard"
        )

    def repeat(x):
        x = jnp.broadcast_to(x[:, :, :, None], (B, S, K, shards // K, H)).reshape(B, S, shards, H)
        return jax.sharding.reshard(
            x, sharding.update(spec=PartitionSpec(jax.typeof(x).sharding.spec[0], None, axes, None))
        )

    return repeat(k), repeat(v)


def _vary_together(arrays):
    """Inside shard_map: every array varies over the mesh axes that any of them varies over.

    It happens outside the derivative rule, so that the transposes of these casts sum the gradients of what was shared.
    """
    leaves, treedef = jax.tree.flatten(arrays)
    varying = [jax.typeof(x).manual_axis_type.varying for x in leaves]
    everywhere = frozenset().union(*varying)
    leaves = [
        jax.lax.pcast(x, tuple(sorted(everywhere - axes, key=str)), to="varying") if everywhere - axes else x
        for x, axes in zip(leaves, varying, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)
