"""Sinks under transformations, on meshes, and at the edges; tests/cases.py has their values."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_sharding import collectives, make_mesh

import jax_flash
from jax_flash import reference

B, T, S, N, K, H = 2, 9, 14, 4, 2, 16


def arrays(dtype=jnp.float32, **shapes):
    rng = np.random.default_rng(0)
    shapes = dict(q=(B, T, N, H), k=(B, S, K, H), v=(B, S, K, H), sinks=(N,)) | shapes
    return {name: jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for name, shape in shapes.items()}


def attend(attention, q, k, v, sinks, **options):
    return attention(q, k, v, sinks=sinks, return_softmax_lse=True, **options)


def loss(attention, q, k, v, sinks, **options):
    out, lse = attend(attention, q, k, v, sinks, **options)
    return (out * jnp.cos(out)).sum() + jnp.where(jnp.isfinite(lse), jnp.sin(lse), 0.0).sum()


def gradients(attention, x, **options):
    return jax.jit(jax.grad(functools.partial(loss, attention, **options), (0, 1, 2, 3)))(*x.values())


def assert_close(ours, exact):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, 2e-5, 2e-5)


@pytest.fixture(autouse=True)
def float32_is_for_the_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def test_the_gradient_has_the_sinks_dtype():
    x = arrays()
    exact = gradients(reference.attention, x)
    x["sinks"] = x["sinks"].astype(jnp.bfloat16)
    ours = gradients(jax_flash.attention, x)
    assert ours[3].dtype == jnp.bfloat16
    np.testing.assert_allclose(ours[3].astype(jnp.float32), exact[3], 0.02, 0.02)


@pytest.mark.parametrize("mapped", ["all", "sinks", "q"])
def test_vmap(mapped):
    x = arrays() | arrays(q=(3, B, T, N, H), k=(3, B, S, K, H), v=(3, B, S, K, H), sinks=(3, N))
    axes = tuple(0 if mapped in ("all", name) else None for name in x)
    x = {name: a if axis == 0 else a[0] for (name, a), axis in zip(x.items(), axes, strict=True)}
    results = [
        jax.vmap(jax.grad(functools.partial(loss, attention), (0, 1, 2, 3)), in_axes=axes)(*x.values())
        for attention in (jax_flash.attention, reference.attention)
    ]
    assert_close(*results)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P(None, None, "model"), P("data", None, "model")], ids=["heads", "batch and heads"])
def test_heads_and_batch_on_a_mesh(spec, kind):
    x = arrays(q=(4, T, 8, H), k=(4, S, 4, H), v=(4, S, 4, H), sinks=(8,))
    exact = attend(reference.attention, **x), gradients(reference.attention, x)
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(a, NamedSharding(mesh, spec)) for name, a in x.items() if name != "sinks"}
        placed["sinks"] = jax.device_put(x["sinks"], NamedSharding(mesh, P()))
        run = jax.jit(functools.partial(attend, jax_flash.attention))
        assert not collectives(run.lower(*placed.values()).compile())
        assert_close((run(*placed.values()), gradients(jax_flash.attention, placed)), exact)


def test_queries_past_their_length_have_no_say():
    x = arrays()
    lengths = jnp.array([5, 0])
    outs, pull = jax.vjp(lambda *a: attend(jax_flash.attention, *a, q_lengths=lengths), *x.values())
    assert np.isneginf(outs[1][0, :, 5:]).all() and np.isneginf(outs[1][1]).all()
    past = jnp.arange(T)[None] >= lengths[:, None]

    def cotangents(of_past):
        ones = jnp.ones_like(outs[0]), jnp.ones_like(outs[1])
        return jnp.where(past[..., None, None], of_past, ones[0]), jnp.where(past[:, None], of_past, ones[1])

    clean, poisoned = pull(cotangents(0.0)), pull(cotangents(jnp.nan))
    for a, b in zip(poisoned, clean, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("keys", [0, S], ids=["no keys", "no valid keys"])
def test_a_query_without_keys_sees_its_sink_alone(keys):
    x = arrays(k=(B, keys, K, H), v=(B, keys, K, H))
    options = dict(kv_lengths=jnp.zeros(B, jnp.int32)) if keys else {}
    out, lse = attend(jax_flash.attention, **x, **options)
    np.testing.assert_array_equal(out, jnp.zeros_like(out))
    np.testing.assert_allclose(lse, jnp.broadcast_to(x["sinks"][:, None], lse.shape), rtol=1e-6)
    np.testing.assert_allclose(gradients(jax_flash.attention, x, **options)[3], B * T * jnp.cos(x["sinks"]), rtol=1e-5)


def test_minus_infinity_is_none():
    x = arrays()
    with_none = jax_flash.attention(x["q"], x["k"], x["v"], return_softmax_lse=True)
    for a, b in zip(attend(jax_flash.attention, **x | {"sinks": jnp.full(N, -jnp.inf)}), with_none, strict=True):
        np.testing.assert_array_equal(a, b)


def test_packed_sequences():
    x = arrays(q=(T, N, H), k=(T, K, H), v=(T, K, H))
    cu = np.array([0, 4, 4, T], np.int32)
    ours, lse = jax_flash.attention_varlen(**x, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True, return_softmax_lse=True)
    for begin, end in ((0, 4), (4, T)):
        part = {name: a if name == "sinks" else a[None, begin:end] for name, a in x.items()}
        exact = attend(reference.attention, **part, causal=True)
        assert_close((ours[begin:end], lse[:, begin:end]), (exact[0][0], exact[1][0]))


@pytest.mark.parametrize(
    "sinks, message",
    [
        (np.zeros(K, np.float32), r"sinks must have shape \(N,\) = \(4,\)"),
        (np.zeros((B, N), np.float32), r"sinks must have shape \(N,\)"),
        (np.zeros(N, np.int32), "sinks must be floating-point numbers"),
        ([0.0] * N, "sinks must be a JAX or NumPy array"),
    ],
    ids=["K", "batch", "integers", "list"],
)
def test_mistakes_are_named(sinks, message):
    x = arrays()
    with pytest.raises(ValueError, match=f"^attention: {message}"):
        jax_flash.attention(x["q"], x["k"], x["v"], sinks=sinks)
    with pytest.raises(ValueError, match=f"^flash_attn_with_kvcache: {message}"):
        jax_flash.flash_attn_with_kvcache(x["q"], x["k"], x["v"], sinks=sinks)


@pytest.mark.parametrize("cotangent", [np.nan, np.inf])
@pytest.mark.parametrize("attention", [jax_flash.attention, reference.attention], ids=["kernel", "reference"])
def test_cotangents_of_unseen_rows_do_not_matter(attention, cotangent):
    """Their output is 0 whatever q, k, v and the sinks are; the log-sum-exp is the sink, and so has its gradient."""
    x = arrays(k=(B, T - 3, K, H), v=(B, T - 3, K, H))
    attend_causal = functools.partial(attend, attention, causal=True)
    (out, lse), pull = jax.vjp(attend_causal, *x.values())
    assert not np.asarray(out[:, :3]).any() and np.asarray(out[:, 3:]).any()
    got, want = (pull((jnp.ones_like(out).at[:, :3].set(value), jnp.ones_like(lse))) for value in (cotangent, 0.0))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("sizes", [(0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 0, 4), (2, 3, 5, 0)])
def test_empty_arrays(sizes):
    b, t, s, n = sizes
    x = arrays(q=(b, t, n, H), k=(b, s, min(n, K), H), v=(b, s, min(n, K), H), sinks=(n,))
    lengths = jnp.array([t, 1][:b], jnp.int32)
    out, lse = attend(jax_flash.attention, *x.values(), q_lengths=lengths)
    assert out.shape == (b, t, n, H) and not np.asarray(out).any()
    exact = attend(reference.attention, *x.values(), q_lengths=lengths)[1]
    np.testing.assert_array_equal(lse, exact)
    grads = gradients(jax_flash.attention, x, q_lengths=lengths)
    assert [gradient.shape for gradient in grads] == [each.shape for each in x.values()]


def test_a_cache_without_heads():
    q, cache = jnp.zeros((2, 1, 0, 16)), jnp.zeros((2, 8, 0, 16))
    out, lse, *_ = jax_flash.flash_attn_with_kvcache(q, cache, cache, sinks=jnp.zeros(0), return_softmax_lse=True)
    assert out.shape == q.shape and lse.shape == (2, 0, 1)
