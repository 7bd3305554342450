"""Values at the edges: scores with much in common, NaN and infinity, values that add up to more than a float32 holds,
and cotangents of rows that see nothing."""

import functools
import platform as machine

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash
from jax_flash import _native, reference

SIXTEEN_BIT = ["bfloat16", "float16"]
DTYPES = ["float32", *SIXTEEN_BIT]


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def skip_without_kernel(dtype, platform):
    if dtype == "float32" and platform != "cpu":
        pytest.skip("float32 has a CPU kernel only")


# Scores with much in common.


def exact_attention(q, k, v, d_out, d_lse):
    """(out, dq, dk, dv) of causal attention with scale 1, and one KV head, in float64."""
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in (q, k, v, d_out, d_lse))
    T, S = q.shape[1], k.shape[1]
    score = np.einsum("btnh,bsh->bnts", q, k[:, :, 0])
    score[..., np.arange(S) > np.arange(T)[:, None] + S - T] = -np.inf
    p = np.exp(score - score.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("bnts,bsh->btnh", p, v[:, :, 0])
    dp = np.einsum("btnh,bsh->bnts", d_out, v[:, :, 0])
    ds = p * (dp - np.einsum("bnts,bnts->bnt", p, dp)[..., None] + d_lse[..., None])
    dq = np.einsum("bnts,bsh->btnh", ds, k[:, :, 0])
    dk, dv = np.einsum("bnts,btnh->bsh", ds, q), np.einsum("bnts,btnh->bsh", p, d_out)
    return out, dq, dk[:, :, None], dv[:, :, None]


@pytest.mark.parametrize("offset, bound", [(0, 1e-6), (30, 1e-6), (1e3, 1e-6), (1e4, 1e-6), (1e6, 1e-5)])
@pytest.mark.parametrize("T, N", [(5, 1), (70, 1), (130, 2)])
def test_scores_with_a_large_common_offset(T, N, offset, bound, platform):
    """What the offset leaves of a score in float32 is exact here, so nothing more is to be lost."""
    if platform != "cpu":
        pytest.skip("float32 has a CPU kernel only")
    if _native.build_info()["cpu_instruction_set"] == "portable" and machine.machine() in ("x86_64", "AMD64"):
        pytest.skip("without fused multiply-add, scores are rounded once more")
    rng = np.random.default_rng(0)
    q, k = (rng.integers(-2, 3, (1, n, heads, 64)).astype(np.float32) / 4 for n, heads in ((T, N), (200, 1)))
    q[..., 0] = 2.0 ** np.floor(np.log2(max(offset, 1)) / 2)
    k[..., 0] = np.round(offset / q[0, 0, 0, 0])
    v, d_out, d_lse = normal(rng, 1, 200, 1, 64), normal(rng, 1, T, N, 64), normal(rng, 1, N, T)
    attend = functools.partial(jax_flash.attention, causal=True, softmax_scale=1.0, return_softmax_lse=True)
    (out, _), pull = jax.vjp(attend, q, k, v)
    wants = exact_attention(q, k, v, d_out, d_lse)
    for name, got, want in zip(("out", "dq", "dk", "dv"), (out, *pull((d_out, d_lse))), wants, strict=True):
        # The first component is the offset's: in dq and dk it multiplies a sum that is zero but for rounding.
        error = np.abs(np.asarray(got) - want)[..., 1:].max() / np.abs(want[..., 1:]).max()
        assert error <= bound, f"{name}: {error:.2g}"


def test_every_row_of_a_block_has_its_own_offset(platform):
    """Rows whose LSE is small, large, and -inf, side by side."""
    if platform != "cpu":
        pytest.skip("float32 has a CPU kernel only")
    rng = np.random.default_rng(0)
    # Scores are exact in float32, in whatever order they are summed.
    q, k = (rng.integers(-4, 5, (1, n, heads, 16)).astype(np.float32) / 4 for n, heads in ((200, 2), (150, 1)))
    q *= rng.choice([0.125, 1, 128], (1, 200, 1, 1)).astype(np.float32)
    v = normal(rng, 1, 150, 1, 16)
    mask = (rng.random((1, 2, 200, 150)) < 0.5) & (rng.random((1, 2, 200, 1)) < 0.9)
    cotangents = normal(rng, 1, 200, 2, 16), normal(rng, 1, 2, 200)
    results = []
    for attention in (jax_flash.attention, reference.attention):
        outs, pull = jax.vjp(functools.partial(attention, mask=mask, return_softmax_lse=True), q, k, v)
        assert np.isneginf(outs[1]).any() and (np.asarray(outs[1]) > 100).any()
        results.append((outs[0], *pull(cotangents)))
    for name, a, b in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        np.testing.assert_allclose(a, b, 0, 1e-5 * float(jnp.abs(b).max()), err_msg=name)


# Rows that see nothing.


def unseen_by_mask(rng, T, S):
    rows = rng.random((1, 2, T, 1)) < 0.7
    return dict(mask=jnp.asarray(rows & (rng.random((1, 2, T, S)) < 0.8)))


UNSEEN = {
    "mask": (90, 130, unseen_by_mask),
    "shared mask": (90, 130, lambda rng, T, S: dict(mask=jnp.asarray(rng.random((1, 1, T, 1)) < 0.5))),
    "causal": (130, 70, lambda rng, T, S: dict(causal=True)),
    "window": (200, 40, lambda rng, T, S: dict(window_size=(3, 2))),
    "lengths": (100, 70, lambda rng, T, S: dict(causal=True, kv_lengths=jnp.array([20]), q_lengths=jnp.array([90]))),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [40, 64, 128, 256])
@pytest.mark.parametrize("kind", UNSEEN)
def test_unseen_rows_have_no_gradients_whatever_their_cotangents(kind, H, dtype, platform):
    skip_without_kernel(dtype, platform)
    T, S, extras = UNSEEN[kind]
    rng = np.random.default_rng(0)
    options = dict(extras(rng, T, S), return_softmax_lse=True)
    q, k, v = (jnp.asarray(normal(rng, 1, n, heads, H), dtype) for n, heads in ((T, 2), (S, 1), (S, 1)))
    d_out, d_lse = jnp.asarray(normal(rng, 1, T, 2, H), dtype), jnp.asarray(normal(rng, 1, 2, T))
    attends = {"attention": functools.partial(jax_flash.attention, **options, deterministic=True)}
    if H == 40:
        attends["reference"] = functools.partial(reference.attention, **options)
    for name, attend in attends.items():
        (out, lse), pull = jax.vjp(attend, q, k, v)
        unseen = jnp.isneginf(lse)  # (1, N, T)
        rows = unseen.swapaxes(1, 2)[..., None]
        assert unseen.any() and not unseen.all() and not jnp.any(jnp.where(rows, out, 0))
        clean = pull((jnp.where(rows, 0, d_out), jnp.where(unseen, 0, d_lse)))
        assert not jnp.any(jnp.where(rows, clean[0], 0))
        for poison in (jnp.nan, jnp.inf, -jnp.inf, float(jnp.finfo(dtype).max)):
            poisoned = pull((jnp.where(rows, jnp.asarray(poison, dtype), d_out), jnp.where(unseen, poison, d_lse)))
            for which, a, b in zip(("dq", "dk", "dv"), clean, poisoned, strict=True):
                np.testing.assert_array_equal(
                    np.asarray(a, np.float32), np.asarray(b, np.float32), err_msg=f"{name}: {which}, {poison}"
                )


def test_unseen_queries_may_be_nan(platform):
    """On the CPU not even the query itself is looked at."""
    if platform != "cpu":
        pytest.skip("the CPU kernels' own promise")
    rng = np.random.default_rng(0)
    q, k, v, d_out = (normal(rng, 1, 61, 2, 24) for _ in range(4))
    mask = unseen_by_mask(rng, 61, 61)["mask"]
    unseen = np.asarray(~mask.any(-1)).swapaxes(1, 2)[..., None]
    for dtype in DTYPES:
        gradients = []
        for value in (0, np.nan):
            inputs = (jnp.asarray(x, dtype) for x in (np.where(unseen, value, q), k, v))
            _, pull = jax.vjp(functools.partial(jax_flash.attention, mask=mask), *inputs)
            gradients.append(pull(jnp.asarray(d_out, dtype)))
        for a, b in zip(*gradients, strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


# NaN and infinity.


def same_as_reference(got, want, dtype):
    (out, lse), (want_out, want_lse) = got, want
    bound = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 2e-2}[dtype]
    for name, a, b, within in (("lse", lse, want_lse, 1e-4), ("out", out, want_out, bound)):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b), f"{name}: NaN")
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b), f"{name}: -inf")
        ordinary = np.isfinite(b)
        np.testing.assert_allclose(a[ordinary], b[ordinary], within, within, err_msg=name)


def special_inputs(T, S, H, dtype):
    """Queries and keys of which some hold NaN, +inf or -inf in a component that is positive elsewhere."""
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, 2, n, heads, H) for n, heads in ((T, 4), (S, 2), (S, 2)))
    q[..., 0], k[..., 0] = np.abs(q[..., 0]) + 0.1, np.abs(k[..., 0]) + 0.1
    for at, value in enumerate((np.nan, np.inf, -np.inf)):
        if T > 1:
            q[0, at * (T - 1) // 2, at, 0] = value
        # Some keys in a block of their own, some among the last, which causal rows see late.
        k[1, (7 * at + S // 2) % S, 1, 0] = value
    k[0, S - 1, 1, 0] = np.nan
    return [jnp.asarray(x, dtype) for x in (q, k, v)]


SPECIAL = [
    dict(),
    dict(causal=True),
    dict(window_size=(2, 1)),
    dict(softcap=3.0),
    dict(causal=True, softcap=3.0),
    dict(softmax_scale=0.5, kv_lengths=np.array([20, 40])),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", SPECIAL, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("T, S", [(1, 40), (2, 3000), (3, 50), (40, 70), (150, 290)])
def test_special_scores(T, S, options, dtype, platform):
    """A visible NaN or +inf makes the row NaN, output and LSE; -inf is as if hidden; no other row is touched."""
    skip_without_kernel(dtype, platform)
    inputs = special_inputs(T, S, 32, dtype)
    got = jax_flash.attention(*inputs, **options, return_softmax_lse=True)
    exact = [x.astype(jnp.float32) for x in inputs]
    want = reference.attention(*exact, **options, return_softmax_lse=True)
    assert jnp.isnan(want[1]).any() and jnp.isfinite(want[1]).any()
    same_as_reference(got, want, dtype)


@pytest.mark.parametrize("T", [1, 12, 100])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_of_special_scores_only(value, T, dtype):
    """Every key of every row: NaN, or nothing that is seen."""
    x = np.ones((1, 600, 1, 16), np.float32)
    k = x.copy()
    k[..., 3] = value
    out, lse = jax_flash.attention(*(jnp.asarray(y, dtype) for y in (x[:, :T], k, x)), return_softmax_lse=True)
    want = 0 if value == -np.inf else np.nan
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.full(out.shape, want))
    np.testing.assert_array_equal(np.asarray(lse), np.full(lse.shape, -np.inf if want == 0 else np.nan))


@pytest.mark.parametrize("payload", [0x7FC00001, 0xFFC12345, 0x7F800001])
def test_any_nan_is_a_nan(payload, platform):
    """The bits of a NaN do not matter: a probability is made by moving bits."""
    if platform != "cpu":
        pytest.skip("float32 has a CPU kernel only")
    x = np.ones((1, 20, 1, 16), np.float32)
    q = x.copy()
    q[0, 4, 0, 2] = np.array(payload, np.uint32).view(np.float32)
    out, lse = jax_flash.attention(q, x, x, return_softmax_lse=True)
    np.testing.assert_array_equal(np.isnan(out).all((0, 2, 3)), np.arange(20) == 4)
    np.testing.assert_array_equal(np.isnan(lse)[0, 0], np.arange(20) == 4)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("T", [1, 20])
def test_special_scores_of_a_cache(T, paged, dtype, platform):
    if platform != "cpu":
        pytest.skip("the GPU kernels have tests of their own")
    q, k, v = special_inputs(T, 3000, 32, dtype)
    want = reference.attention(q, k, v, causal=True, return_softmax_lse=True)
    table = {}
    if paged:
        k, v = (x.reshape(2 * 125, 24, 2, 32) for x in (k, v))
        table = dict(block_table=jnp.arange(250).reshape(2, 125))
    got = jax_flash.flash_attn_with_kvcache(q, k, v, causal=True, return_softmax_lse=True, **table)[:2]
    same_as_reference(got, want, dtype)


# Large and small values.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signs", ["one", "both"])
@pytest.mark.parametrize("T, S", [(1, 2), (3, 3000), (40, 3), (100, 700), (13, 5000)])
def test_values_near_the_largest(T, S, signs, dtype, platform):
    """An average of values is no larger than they are."""
    skip_without_kernel(dtype, platform)
    largest = float(jnp.finfo(dtype).max)
    if platform == "gpu":  # as attention's documentation says
        largest = min(0.998 * largest, 1e36 / S)
    rng = np.random.default_rng(0)
    q, k = normal(rng, 1, T, 2, 32) / 8, normal(rng, 1, S, 1, 32) / 8
    fraction = rng.choice([1, 0.999, 0.5], (1, S, 1, 32)).astype(np.float32)
    fraction[..., :4] = 1
    if signs == "both":
        fraction *= rng.choice([1, -1], (1, S, 1, 1))
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, (fraction * np.float64(largest)).astype(np.float32)))
    out, lse = jax_flash.attention(q, k, v, return_softmax_lse=True)
    scaled = [x.astype(jnp.float32) * s for x, s in ((q, 1), (k, 1), (v, 2.0**-20))]
    want, want_lse = reference.attention(*scaled, return_softmax_lse=True)
    out = np.asarray(out, np.float64)
    assert np.isfinite(out).all()
    bound = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(out / largest, np.asarray(want, np.float64) / largest * 2.0**20, bound, bound)
    np.testing.assert_allclose(lse, want_lse, 1e-4, 1e-4)


def test_small_values_are_not_lost(platform):
    if platform != "cpu":
        pytest.skip("float32 has a CPU kernel only")
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 1, 20, 1, 32), normal(rng, 1, 3, 1, 32), np.abs(normal(rng, 1, 3, 1, 32)) + 1
    small, want = jax_flash.attention(q, k, v * np.float32(1e-35)), jax_flash.attention(q, k, v)
    np.testing.assert_allclose(np.asarray(small) * np.float32(1e35), want, 1e-4)


@pytest.mark.parametrize("T", [1, 40])
def test_infinite_values(T, dtype, platform):
    """Only the component that is infinite is so in the output, of the rows that see it."""
    if platform != "cpu":
        pytest.skip("the GPU kernels have tests of their own")
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 1, T, 1, 32) / 8, normal(rng, 1, 70, 1, 32) / 8, normal(rng, 1, 70, 1, 32)
    v[0, 20, 0, 5], v[0, 31, 0, 6] = np.inf, -np.inf
    v[0, 40, 0, 7] = np.nan
    out = np.asarray(jax_flash.attention(*(jnp.asarray(x, dtype) for x in (q, k, v))), np.float32)
    want = np.asarray(reference.attention(*(jnp.asarray(x) for x in (q, k, v))), np.float32)
    np.testing.assert_allclose(out, want, 2e-2, 2e-2)
