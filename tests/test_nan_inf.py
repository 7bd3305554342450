"""Scores and cotangents that are no finite numbers.

Within a row: a NaN or +inf score makes output and log-sum-exp NaN, as float32 softmax does; a score of -inf has weight
0, and a row of nothing else is 0 and -inf, as one that sees no key. No row changes another.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import close_lse

import jax_flash
from jax_flash import _reference, flash_attn_with_kvcache, reference
from jax_flash._spec import Spec

# Every kernel: buckets of head dims, and (odd H, or a mask) those of GPUs before Hopper.
HEAD_DIMS = (64, 96, 128, 192, 256, 59)
T, S, HEADS = 200, 700, 32  # enough keys that whole blocks of them are seen, however a kernel walks


def normal(rng, *shape, dtype):
    return jnp.asarray(rng.standard_normal(shape, np.float32).astype(dtype))


def qkv(dtype, H, *, T=T, S=S, N=4, K=4, B=1, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(normal(rng, B, *rest, H, dtype=dtype) for rest in ((T, N), (S, K), (S, K)))


def attend(q, k, v, **options):
    out, lse = jax.jit(functools.partial(jax_flash.attention, return_softmax_lse=True, **options))(q, k, v)
    return np.asarray(out, np.float32), np.asarray(lse)


def all_nan_where(rows, out, lse):
    """rows: (B, T, N) of bool; elsewhere nothing is NaN."""
    np.testing.assert_array_equal(np.isnan(out).all(-1), rows)
    np.testing.assert_array_equal(np.isnan(out).any(-1), rows)
    np.testing.assert_array_equal(np.isnan(lse).swapaxes(1, 2), rows)


def with_extra_score(q, k, extra):
    """q and k whose scores have `extra` (S,) added, 0 or not finite, through the last element of the head."""
    return q.at[..., -1].set(1), k.at[..., -1].set(jnp.asarray(extra, k.dtype)[:, None])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("H", HEAD_DIMS)
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_key_spoils_the_rows_that_see_it(H, causal, value, dtype):
    """In every head another key, so that each place within a block has its turn."""
    q, k, v = qkv(dtype, H, N=HEADS, K=HEADS)
    q = q.at[..., -1].set(1)
    for start in (0, 290, S - HEADS):
        key = start + np.arange(HEADS)
        spoilt = k.at[:, key, np.arange(HEADS), -1].set(value)
        out, lse = attend(q, spoilt, v, causal=causal)
        sees = np.arange(T)[:, None] + S - T >= key if causal else np.ones((T, HEADS), bool)
        all_nan_where(sees[None], out, lse)
        clean, clean_lse = attend(q, k, v, causal=causal)
        # Which of two ways a warp takes to the same result may depend on the neighbours.
        np.testing.assert_allclose(out[0][~sees], clean[0][~sees], rtol=0, atol=2e-3)
        np.testing.assert_allclose(lse[0].T[~sees], clean_lse[0].T[~sees], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("H", HEAD_DIMS)
@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(softcap=5.0), dict(window_size=(90, 20))], ids=str)
def test_a_query_spoils_itself_alone(H, options, dtype):
    q, k, v = qkv(dtype, H, S=T)
    rows = np.zeros((1, T, 4), bool)
    rows[0, [0, 77, T - 1], [0, 1, 3]] = True
    out, lse = attend(jnp.where(rows[..., None], jnp.nan, q), k, v, **options)
    all_nan_where(rows, out, lse)
    clean, clean_lse = attend(q, k, v, **options)
    np.testing.assert_allclose(out[~rows], clean[~rows], rtol=0, atol=2e-3)
    np.testing.assert_allclose(lse.swapaxes(1, 2)[~rows], clean_lse.swapaxes(1, 2)[~rows], rtol=1e-5, atol=1e-4)


HIDDEN = {
    "first": slice(0, 430),
    "last": slice(270, S),
    "middle": slice(100, 600),
    "every second": slice(0, S, 2),
    "all": slice(0, S),
    "all but one": slice(1, S),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("H", HEAD_DIMS)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_minus_infinity_is_a_mask(hidden, H, causal, dtype):
    """Also where a row has seen nothing else yet, whichever way a kernel walks."""
    q, k, v = qkv(dtype, H)
    extra = np.zeros(S, np.float32)
    extra[HIDDEN[hidden]] = -np.inf
    out, lse = attend(*with_extra_score(q, k, extra), v, causal=causal)
    clean_q, clean_k = with_extra_score(q, k, np.zeros(S))
    mask = jnp.broadcast_to(jnp.asarray(extra == 0), (1, 4, T, S))
    arrays = (x.astype(jnp.float32) for x in (clean_q, clean_k, v))
    want, want_lse = reference.attention(*arrays, mask, causal=causal, return_softmax_lse=True)
    np.testing.assert_allclose(out, want, rtol=0, atol=5e-3 if dtype == "float16" else 1e-5)
    close_lse(lse, want_lse)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("H", [64, 128, 59])
def test_softcap(H, value, dtype):
    """It makes finite what is infinite."""
    q, k, v = qkv(dtype, H)
    extra = np.zeros(S, np.float32)
    extra[[3, 300, S - 1]] = value
    out, lse = attend(*with_extra_score(q, k, extra), v, softcap=5.0)
    if np.isnan(value):
        assert np.isnan(out).all() and np.isnan(lse).all()
        return
    arrays = (x.astype(jnp.float32) for x in (*with_extra_score(q, k, extra), v))
    want, want_lse = reference.attention(*arrays, softcap=5.0, return_softmax_lse=True)
    np.testing.assert_allclose(out, want, rtol=0, atol=5e-3 if dtype == "float16" else 1e-5)
    close_lse(lse, want_lse)


# One token and several, keys cut into parts, and many rows (which the GPU leaves to its forward kernels).
@pytest.mark.parametrize("tokens, splits", [(1, None), (3, None), (1, 5), (90, None)])
@pytest.mark.parametrize("H", [64, 128, 256, 59])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_cache(value, H, tokens, splits, dtype):
    q, k, v = qkv(dtype, H, T=tokens, N=8, K=2, B=3)
    extra = np.zeros(S, np.float32)
    extra[:200] = extra[500] = value if value < 0 else 0
    if not value < 0:
        extra[333] = value
    lengths = jnp.array([S, 400, 300])  # the last one sees no NaN
    run = jax.jit(functools.partial(flash_attn_with_kvcache, causal=True, num_splits=splits, return_softmax_lse=True))
    call = functools.partial(run, cache_seqlens=lengths)
    out, lse = (np.asarray(x, np.float32) for x in call(*with_extra_score(q, k, extra), v)[:2])
    if value < 0:
        clean_q, clean_k = with_extra_score(q, k, np.zeros(S))
        mask = jnp.broadcast_to(jnp.asarray(extra == 0), (3, 8, tokens, S))
        arrays = (x.astype(jnp.float32) for x in (clean_q, clean_k, v))
        want, want_lse = reference.attention(*arrays, mask, causal=True, kv_lengths=lengths, return_softmax_lse=True)
        np.testing.assert_allclose(out, want, rtol=0, atol=5e-3 if dtype == "float16" else 1e-5)
        close_lse(jnp.asarray(lse), want_lse)
        return
    assert np.isnan(out[0]).all() and np.isnan(lse[0]).all()
    sees = np.broadcast_to((np.arange(tokens) + 400 - tokens >= 333)[:, None], (tokens, 8))
    all_nan_where(sees[None], out[1:2], lse[1:2])
    assert np.isfinite(out[2]).all() and np.isfinite(lse[2]).all()


@pytest.mark.parametrize("hidden", [slice(3, 5), slice(0, S)])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_cache_on_platforms_without_kernels(value, hidden):
    q, k, v = qkv("float32", 16, T=2, N=4, K=2, B=2)
    extra = np.zeros(S, np.float32)
    extra[hidden] = value
    q, k = with_extra_score(q, k, extra)
    operands = {"q": q.reshape(2, 2, 2, 2, 16), "k_cache": k, "v_cache": v}
    with jax.default_matmul_precision("highest"):
        results = _reference.EVALUATE["kvcache"](Spec(softmax_scale=0.25), operands)
    want, want_lse = reference.attention(q, k, v, return_softmax_lse=True)
    np.testing.assert_allclose(results["o"].reshape(want.shape), want, 1e-5, 1e-6)
    np.testing.assert_allclose(results["lse"].reshape(2, 4, 2), want_lse, 1e-5)


@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(softcap=5.0)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("H", HEAD_DIMS)
def test_gradients_of_rows_that_see_nan(H, masked, options, dtype):
    q, k, v = qkv(dtype, H)
    key = 613
    mask = jnp.ones((1, 1, T, S), bool) if masked else None
    attend = functools.partial(jax_flash.attention, mask=mask, **options)
    d_out = qkv(dtype, H, seed=1)[0]
    dq, dk, dv = jax.jit(lambda *a: jax.vjp(attend, *a)[1](d_out))(q, k.at[0, key].set(jnp.nan), v)
    sees = np.arange(T) + S - T >= key if options.get("causal") else np.ones(T, bool)
    assert np.isnan(np.asarray(dq, np.float32)[0, sees]).all()
    assert all(np.isnan(np.asarray(x, np.float32)[0, : key + 1]).all() for x in (dk, dv))


# How a row may come to see nothing, with T = 90 and S = 75: a mask, and bands that end before it.
UNSEEN = {
    "mask": (dict(), lambda i: (i % 7 == 3) | (i > 80)),
    "mask, causal": (dict(causal=True), lambda i: (i % 7 == 3) | (i < 15)),
    "causal": (dict(causal=True), lambda i: i < 15),
    "window": (dict(window_size=(10, 5)), lambda i: i < 10),
    "lengths, causal": (dict(causal=True, q_lengths=jnp.array([80]), kv_lengths=jnp.array([30])), lambda i: i < 50),
}


@pytest.mark.parametrize("value", ["nan", "inf", "max"])
@pytest.mark.parametrize("case", UNSEEN)
@pytest.mark.parametrize("H", HEAD_DIMS)
def test_cotangents_of_unseen_rows_do_not_matter(H, case, value, dtype):
    options, is_unseen = UNSEEN[case]
    unseen = np.asarray(is_unseen(np.arange(90)))
    q, k, v = qkv(dtype, H, T=90, S=75, N=4, K=2)
    d_out, d_lse = qkv(dtype, H, T=90, N=4, seed=1)[0], jnp.ones((1, 4, 90))
    if "mask" in case:
        options = options | dict(mask=jnp.broadcast_to(jnp.asarray(~unseen)[:, None], (1, 1, 90, 75)))
    attend = functools.partial(jax_flash.attention, **options, deterministic=True, return_softmax_lse=True)
    spoil = float(jnp.finfo(dtype).max) if value == "max" else float(value)

    @jax.jit
    def gradients(value):
        rows = jnp.asarray(unseen)
        d_spoilt = jnp.where(rows[:, None, None], value, d_out).astype(dtype)
        return jax.vjp(attend, q, k, v)[1]((d_spoilt, jnp.where(rows, value, d_lse)))

    clean, spoilt = gradients(0.0), gradients(spoil)
    assert not np.asarray(spoilt[0], np.float32)[0, unseen].any()
    for name, x, y in zip(("dq", "dk", "dv"), clean, spoilt, strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32), name)
