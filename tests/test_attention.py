"""Outputs, log-sum-exp and gradients against the reference; padding that holds NaN; repeats; empty arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, F32, FEW, Case
from compare import check, close, run_reference

import jax_flash
from jax_flash import reference


def skip_without_kernel(case, platform):
    if case.dtype == F32 and platform != "cpu":
        pytest.skip("float32 has a CPU kernel only")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_matches_reference(case, platform):
    skip_without_kernel(case, platform)
    attend = functools.partial(jax_flash.attention, **case.options(), return_softmax_lse=True)
    check(case, attend, *case.arrays())


@pytest.mark.parametrize("case", FEW, ids=lambda c: c.id)
@pytest.mark.parametrize("which", ["out", "lse"])
def test_gradient_of_one_result(case, which, platform):
    skip_without_kernel(case, platform)
    qkv, extras = case.arrays()
    d_out, d_lse = case.cotangents()

    def one(q, k, v):
        outs = jax_flash.attention(q, k, v, **extras, **case.options(), return_softmax_lse=True)
        return outs[0 if which == "out" else 1]

    grads = jax.vjp(one, *qkv.values())[1](d_out if which == "out" else d_lse)
    cotangents = (d_out, 0 * d_lse) if which == "out" else (0 * d_out, d_lse)
    options = tuple(case.options().items())
    exact = run_reference(options, "float32", qkv, extras, cotangents)[1]
    rough = run_reference(options, case.dtype, qkv, extras, cotangents)[1]
    for name, *each in zip(("dq", "dk", "dv"), grads, exact, rough, strict=True):
        close(name, *each, 3.0)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_large_scores(scale, dtype):
    """Scores far beyond the range of exp do not overflow."""
    case = Case(dtype=dtype, T=70, S=90, causal=True)
    qkv, _ = case.arrays()
    qkv = {name: x * (5 * scale if name == "q" else 3 * scale) for name, x in qkv.items()}
    out, lse = jax_flash.attention(**qkv, causal=True, return_softmax_lse=True)
    options = tuple(case.options().items())
    (exact, exact_lse), _ = run_reference(options, "float32", qkv, {}, case.cotangents())
    assert np.isfinite(np.asarray(out, np.float32)).all()
    np.testing.assert_allclose(lse, exact_lse, 1e-4, 1e-4)
    # A probability is off by the error of a score, and scores reach the thousands.
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=0.05 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_never_read(causal, dtype):
    """Past the lengths there is NaN, in the inputs and in the cotangents, and none of it shows."""
    case = Case(dtype=dtype, T=150, S=300, H=64, causal=causal, q_lengths=(97, 0), kv_lengths=(130, 300))
    qkv, extras = case.arrays()
    d_out, d_lse = case.cotangents()
    lengths = {"q": extras["q_lengths"], "k": extras["kv_lengths"], "v": extras["kv_lengths"]}

    def fill(x, length, value):
        rows = jnp.arange(x.shape[1]).reshape(1, -1, 1, 1)
        return jnp.where(rows < length.reshape(-1, 1, 1, 1), x, value)

    def run(value, deterministic=True):
        filled = [fill(x, lengths[name], value) for name, x in qkv.items()]
        options = dict(causal=causal, deterministic=deterministic, return_softmax_lse=True)
        outs, pull = jax.vjp(functools.partial(jax_flash.attention, **extras, **options), *filled)
        d_lse_filled = fill(d_lse.swapaxes(1, 2)[..., None], lengths["q"], value)[..., 0].swapaxes(1, 2)
        return *outs, *pull((fill(d_out, lengths["q"], value), d_lse_filled))

    for clean, poisoned in zip(run(0), run(jnp.nan), strict=True):
        np.testing.assert_array_equal(np.asarray(clean, np.float32), np.asarray(poisoned, np.float32))
    out, lse, dq, dk, dv = (np.asarray(x, np.float32) for x in run(jnp.nan, deterministic=False))
    assert all(np.isfinite(x).all() for x in (out, dq, dk, dv))
    assert (
        not out[0, 97:].any() and not out[1].any() and np.isneginf(lse[0, :, 97:]).all() and np.isneginf(lse[1]).all()
    )
    assert not dq[0, 97:].any() and not dq[1].any() and not dk[0, 130:].any() and not dv[0, 130:].any()


def test_fully_masked_rows(dtype):
    case = Case(dtype=dtype, T=40, S=30, causal=True)  # the first ten queries see nothing
    qkv, _ = case.arrays()
    outs, pull = jax.vjp(lambda *a: jax_flash.attention(*a, causal=True, return_softmax_lse=True), *qkv.values())
    dq, dk, dv = pull(case.cotangents())
    assert not np.asarray(outs[0])[:, :10].any() and np.isneginf(outs[1][:, :, :10]).all()
    assert not np.asarray(dq)[:, :10].any()
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (dq, dk, dv))


# The last has enough blocks that their order varies.
@pytest.mark.parametrize("case", [*FEW, Case(T=900, S=1000, N=8, K=2, causal=True)], ids=lambda c: c.id)
def test_deterministic_gradients_are_bit_equal(case, platform):
    skip_without_kernel(case, platform)
    qkv, extras = case.arrays()
    attend = functools.partial(jax_flash.attention, **extras, **case.options(), deterministic=True)
    run = jax.jit(lambda *a: jax.vjp(attend, *a)[1](case.cotangents()[0]))
    first = run(*qkv.values())
    for _ in range(10):
        for x, y in zip(first, run(*qkv.values()), strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("sizes", [dict(B=0), dict(T=0), dict(S=0), dict(N=0, K=0), dict(B=0, S=0)], ids=str)
def test_empty(sizes, dtype):
    case = Case(dtype=dtype, **{**dict(B=2, T=3, S=5, N=4, K=2, H=8), **sizes})
    qkv, _ = case.arrays()
    outs, pull = jax.vjp(lambda *a: jax_flash.attention(*a, return_softmax_lse=True), *qkv.values())
    assert outs[0].shape == qkv["q"].shape and outs[1].shape == (case.B, case.N, case.T)
    assert not np.asarray(outs[0]).any() and np.isneginf(outs[1]).all()
    for x, g in zip(qkv.values(), pull(case.cotangents()), strict=True):
        assert g.shape == x.shape and not np.asarray(g).any()
    text = jax.jit(jax_flash.attention).lower(*qkv.values()).as_text()
    assert "jax_flash_forward" not in text


EMPTY = {
    "causal": lambda B, T, S, N: dict(causal=True),
    "window": lambda B, T, S, N: dict(window_size=(2, 1)),
    "mask": lambda B, T, S, N: dict(mask=jnp.ones((B, N, T, S), bool)),
    "broadcast-mask": lambda B, T, S, N: dict(mask=jnp.ones((B, 1, T, S), bool)),
    "lengths": lambda B, T, S, N: dict(q_lengths=jnp.ones(B, int), kv_lengths=jnp.ones(B, int)),
}


@pytest.mark.parametrize("option", EMPTY)
@pytest.mark.parametrize("B, T, S, N", [(0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 0, 4), (2, 3, 5, 0)])
def test_empty_with_every_option(B, T, S, N, option, dtype):
    """Of all functions of q, k and v, and of the reference: no NaN, no error, and gradients of the right shapes."""
    q, k = jnp.ones((B, T, N, 8), dtype), jnp.ones((B, S, min(N, 2), 8), dtype)
    options = EMPTY[option](B, T, S, N)
    as_jax_nn = dict(
        causal="is_causal",
        window_size="local_window_size",
        q_lengths="query_seq_lengths",
        kv_lengths="key_value_seq_lengths",
    )
    calls = {
        jax_flash.attention: options,
        reference.attention: options,
        jax_flash.dot_product_attention: {as_jax_nn.get(name, name): x for name, x in options.items()},
    }
    for function, arguments in calls.items():
        out, pull = jax.vjp(functools.partial(function, **arguments), q, k, k)
        assert out.shape == q.shape and not np.asarray(out).any()
        for x, gradient in zip((q, k, k), pull(out + 1), strict=True):
            assert gradient.shape == x.shape and not np.asarray(gradient).any()


def test_without_batch_axis(dtype):
    case = Case(dtype=dtype, B=1, T=20, S=30, H=32, mask=(1, 4, 20, 30), q_lengths=(15,), kv_lengths=(25,))
    qkv, extras = case.arrays()
    with_batch = jax_flash.attention(**qkv, **extras, return_softmax_lse=True)
    without = jax_flash.attention(
        **{n: x[0] for n, x in qkv.items()}, **{n: x[0] for n, x in extras.items()}, return_softmax_lse=True
    )
    for a, b in zip(with_batch, without, strict=True):
        np.testing.assert_array_equal(np.asarray(a[0]), np.asarray(b))


@pytest.mark.parametrize("lengths_dtype", [np.int8, np.uint8, np.int16, np.uint32])
def test_lengths_of_any_integer_dtype(lengths_dtype, dtype):
    case = Case(dtype=dtype, T=20, S=30, H=32)
    qkv, _ = case.arrays()
    # 200 is beyond S; as uint8 it must not become a negative length.
    lengths = np.array([7, 200 if lengths_dtype in (np.uint8, np.uint32) else 100], lengths_dtype)
    out = jax_flash.attention(**qkv, kv_lengths=lengths)
    np.testing.assert_array_equal(
        np.asarray(out), np.asarray(jax_flash.attention(**qkv, kv_lengths=jnp.array([7, 30])))
    )


def test_numpy_arrays_and_eager_calls(dtype):
    qkv, _ = Case(dtype=dtype, T=20, S=30, H=32).arrays()
    eager = jax_flash.attention(*(np.asarray(x) for x in qkv.values()), causal=True)
    jitted = jax.jit(functools.partial(jax_flash.attention, causal=True))(*qkv.values())
    np.testing.assert_array_equal(np.asarray(eager), np.asarray(jitted))


def test_memory_is_linear(dtype):
    """The compiled program holds nothing of the size of the scores."""
    T = 4096
    x = jax.ShapeDtypeStruct((1, T, 1, 64), dtype)
    grad = jax.grad(lambda q, k, v: jax_flash.attention(q, k, v, causal=True).astype(jnp.float32).sum(), (0, 1, 2))
    analysis = jax.jit(grad).lower(x, x, x).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 16 * T * 64 * 4


@pytest.mark.parametrize("causal", [False, True])
def test_more_tiles_than_16_bits_count(causal, dtype):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((70_001, n, 1, 8)), dtype) for n in (1, 3, 3))
    out = jax_flash.attention(q, k, v, causal=causal)
    exact = reference.attention(*(x.astype(jnp.float32) for x in (q, k, v)), causal=causal)
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, rtol=0, atol=2e-3 if dtype == "float16" else 1e-5)
