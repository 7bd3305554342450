"""Packed sequences against the reference with a mask."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import close, close_lse

import jax_flash
from jax_flash import reference

OPTIONS = {
    "plain": dict(),
    "causal": dict(causal=True),
    "window": dict(window_size=(20, 7)),
    "left window": dict(window_size=(33, None), causal=True),
    "softcap": dict(softcap=3.0, softmax_scale=0.2, window_size=(None, 5)),
}
# The lengths of the sequences' queries and keys, and how many tokens belong to none.
PACKINGS = {
    "self": ((30, 1, 0, 129, 64, 7), None, 9),
    "cross": ((0, 40, 3, 0, 100, 64), (9, 0, 130, 5, 33, 64), 17),
    "one": ((77,), None, 0),
    "nothing": ((0, 0), (4, 0), 5),
}


def normal(seed, shape, dtype):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def packed(dtype, lengths_q, lengths_k, tail, N=4, K=2, H=32):
    cu_q, cu_k = (np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in (lengths_q, lengths_k or lengths_q))
    q = normal(0, (cu_q[-1] + tail, N, H), dtype)
    k, v = (normal(seed, (cu_k[-1] + tail, K, H), dtype) for seed in (1, 2))
    return (q, k, v), (cu_q, cu_k)


def expected(q, k, v, cu_q, cu_k, used_q=None, used_k=None, causal=False, window_size=(None, None), **options):
    """The reference over all tokens, with a mask of who sees whom."""
    visible = np.zeros((len(q), len(k)), bool)
    left, right = (10**6 if side is None else side for side in window_size)
    right = min(right, 0) if causal else right
    for b in range(len(cu_q) - 1):
        T, S = (
            max(0, cu[b + 1] - cu[b] if used is None else min(cu[b + 1] - cu[b], used[b]))
            for cu, used in ((cu_q, used_q), (cu_k, used_k))
        )
        ahead = np.arange(S) - np.arange(T)[:, None] - (S - T)  # of the bottom-right diagonal
        visible[cu_q[b] : cu_q[b] + T, cu_k[b] : cu_k[b] + S] = (-left <= ahead) & (ahead <= right)
    batch = (x[None] for x in (q, k, v))
    out, lse = reference.attention(*batch, visible[None, None], **options, return_softmax_lse=True)
    return out[0], lse[0]


def check(qkv, cu, used=(None, None), **options):
    dtype = qkv[0].dtype
    cotangents = normal(3, qkv[0].shape, dtype), normal(4, qkv[0].shape[1::-1], jnp.float32)

    def ours(q, k, v):
        named = dict(zip(("seqused_q", "seqused_k"), map(as_jax, used), strict=True))
        return jax_flash.attention_varlen(q, k, v, *map(as_jax, cu), **named, **options, return_softmax_lse=True)

    theirs = functools.partial(expected, cu_q=cu[0], cu_k=cu[1], used_q=used[0], used_k=used[1], **options)
    results = []
    for attend, cast in ((ours, dtype), (theirs, jnp.float32), (theirs, dtype)):
        some = [x.astype(cast) for x in qkv]
        outs, pull = jax.jit(functools.partial(jax.vjp, attend))(*some)
        results.append((*outs, *pull((cotangents[0].astype(cast), cotangents[1]))))
    for name, mine, exact, rough in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        if name == "lse":
            close_lse(mine, exact)
        else:
            close(name, mine, exact, rough, 3.0)


def near(ours, exact):
    """Values are standard normal."""
    assert ours.dtype == exact.dtype
    bound = 1e-5 if ours.dtype == jnp.float32 else 4e-3
    np.testing.assert_allclose(ours.astype(jnp.float32), exact.astype(jnp.float32), rtol=0, atol=bound)


def as_jax(x):
    return None if x is None else jnp.asarray(x, jnp.int32)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("options", OPTIONS)
def test_sequence_by_sequence(packing, options, dtype):
    qkv, cu = packed(dtype, *PACKINGS[packing])
    check(qkv, cu, **OPTIONS[options])


@pytest.mark.parametrize("options", ["plain", "causal"])
def test_used_tokens(options, dtype):
    """What a sequence does not use is never read, nor what belongs to none."""
    (q, k, v), cu = packed(dtype, (30, 10, 0, 129), (20, 0, 3, 70), 9)
    used = np.array([30, 4, 7, 100], np.int32), np.array([0, 0, 2, 999], np.int32)
    check((q, k, v), cu, used, **OPTIONS[options])
    valid = [np.zeros(len(x), bool) for x in (q, k)]
    for side in (0, 1):
        for b in range(4):
            valid[side][cu[side][b] : min(cu[side][b + 1], cu[side][b] + used[side][b])] = True

    def attend(q, k, v):
        options_ = dict(seqused_q=used[0], seqused_k=used[1], **OPTIONS[options])
        return jax_flash.attention_varlen(q, k, v, *cu, **options_)

    def run(value):
        arrays = {"q": (q, valid[0]), "k": (k, valid[1]), "v": (v, valid[1])}
        poisoned = (jnp.where(ok[:, None, None], x, value) for x, ok in arrays.values())
        out, pull = jax.vjp(attend, *poisoned)
        return out, *pull(jnp.where(valid[0][:, None, None], jnp.ones_like(out), value))

    for clean, poisoned in zip(run(0.0), run(jnp.nan), strict=True):
        np.testing.assert_array_equal(np.asarray(poisoned, np.float32), np.asarray(clean, np.float32))


def test_lengths_that_change_compile_once(dtype):
    traces = []

    @jax.jit
    def attend(q, k, v, cu):
        traces.append(1)
        return jax_flash.attention_varlen(q, k, v, cu, cu, causal=True)

    for lengths in ((3, 20, 7), (0, 0, 30), (10, 10, 10)):
        qkv, cu = packed(dtype, lengths, None, 0)
        near(attend(*qkv, cu[0]), expected(*qkv, *cu, causal=True)[0])
    assert len(traces) == 1


@pytest.mark.parametrize(
    "cu", [[5, 0, 50, 30], [-9, 10, 10, 2**31 - 1], [40, 40, 40, 40], [0], np.array([0, 2**40, 3, 3])], ids=str
)
def test_any_values_of_cu_seqlens_stay_inside(cu, dtype):
    """Clamped to the arrays, and none before the one before."""
    q, k, v = (normal(seed, (33, 2, 16), dtype) for seed in range(3))
    cu = np.asarray(cu)
    clean = np.maximum.accumulate(np.clip(cu, 0, 33)).astype(np.int32)
    out, pull = jax.vjp(lambda *x: jax_flash.attention_varlen(*x, cu, cu, causal=True, deterministic=True), q, k, v)
    near(out, expected(q, k, v, clean, clean, causal=True)[0])
    assert all(np.isfinite(x).all() for x in pull(out))


def test_vmap_is_one_call_after_the_other(dtype):
    (q, k, v), (cu, _) = packed(dtype, (9, 0, 21), None, 2)
    other = np.array([0, 20, 25, 32], np.int32)
    stack = [jnp.stack([x, 2 * x]) for x in (q, k, v)]
    attend = functools.partial(jax_flash.attention_varlen, causal=True)
    ours = jax.jit(jax.vmap(lambda q, k, v, cu: attend(q, k, v, cu, cu)))(*stack, np.stack([cu, other]))
    for at, starts in enumerate((cu, other)):
        near(ours[at], attend(*(x[at] for x in stack), starts, starts))


def test_nothing_over_queries_and_keys():
    """Linear memory: no array over queries and keys in the program, forward and backward."""
    cu = jnp.array([0, 100, 3000, 4000], jnp.int32)
    q = jnp.zeros((4001, 2, 16), jnp.float32)

    def loss(q):
        return jax_flash.attention_varlen(q, q, q, cu, cu, causal=True).sum()

    most = max(
        aval.size
        for equation in jax.make_jaxpr(jax.grad(loss))(q).jaxpr.eqns
        for aval in (x.aval for x in equation.outvars)
    )
    assert most <= 2 * q.size


def test_symbolic_totals_export(dtype):
    from jax import export

    (total,) = export.symbolic_shape("total")
    q = jax.ShapeDtypeStruct((total, 2, 16), dtype)
    cu = jax.ShapeDtypeStruct((4,), jnp.int32)
    names = ("jax_flash_forward",)
    exported = export.export(
        jax.jit(lambda q, cu: jax_flash.attention_varlen(q, q, q, cu, cu, causal=True)),
        disabled_checks=[export.DisabledSafetyCheck.custom_call(name) for name in names],
    )(q, cu)
    q, cu = normal(0, (50, 2, 16), dtype), jnp.array([0, 20, 20, 47], jnp.int32)
    near(exported.call(q, cu), jax_flash.attention_varlen(q, q, q, cu, cu, causal=True))


Q, K = np.zeros((9, 4, 16), np.float32), np.zeros((12, 2, 16), np.float32)
CU = np.array([0, 4, 9], np.int32)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=Q[None]), "without a batch axis"),
        (dict(cu_seqlens_q=[0, 4, 9]), "must be a JAX or NumPy array"),
        (dict(cu_seqlens_q=CU.astype(np.float32)), "cu_seqlens_q must be integers"),
        (dict(cu_seqlens_k=CU[:2]), r"must both have shape \(B \+ 1,\)"),
        (dict(cu_seqlens_q=CU[:0], cu_seqlens_k=CU[:0]), r"must both have shape \(B \+ 1,\)"),
        (dict(seqused_k=CU), r"seqused_k must have shape \(B,\) = \(2,\)"),
        (dict(k=K[..., :8], v=K[..., :8]), "must share head dim H"),
    ],
    ids=str,
)
def test_mistakes_are_named(change, message):
    arguments = dict(q=Q, k=K, v=K, cu_seqlens_q=CU, cu_seqlens_k=CU) | change
    with pytest.raises(ValueError, match=message):
        jax_flash.attention_varlen(**arguments)
