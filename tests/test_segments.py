"""Segment ids under transformations, on meshes, and what is wrong with them; tests/cases.py has their values."""

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

B, T, N, K, H = 4, 24, 4, 2, 16
SORTED = np.repeat([[0, 2, 3], [1, 1, 5], [0, 7, 8], [4, 5, 6]], [5, 10, 9], axis=1).astype(np.int32)
ANY = np.random.default_rng(5).integers(-1, 3, (B, T)).astype(np.int32)


def arrays(ids=ANY, lead=(B,)):
    rng = np.random.default_rng(0)
    shapes = dict(q=(*lead, T, N, H), k=(*lead, T, K, H), v=(*lead, T, K, H))
    x = {name: jnp.asarray(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
    return x | {"ids": jnp.asarray(ids)}


def attend(attention, q, k, v, ids, **options):
    return attention(q, k, v, causal=True, q_segment_ids=ids, **options)


def loss(attention, *x):
    return jnp.sin(attend(attention, *x)).sum()


def value_and_gradients(attention):
    return lambda *x: (attend(attention, *x), jax.grad(functools.partial(loss, attention), (0, 1, 2))(*x))


def assert_close(ours, exact):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, 2e-5, 2e-5)


@pytest.fixture(autouse=True)
def float32_is_for_the_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.mark.parametrize("ids", [SORTED, ANY], ids=["sorted", "any"])
def test_one_array_for_queries_and_keys(ids):
    x = arrays(ids).values()
    assert_close(
        *(jax.jit(value_and_gradients(attention))(*x) for attention in (jax_flash.attention, reference.attention))
    )


def test_packed_sequences_are_segments():
    """What lies one behind the other gives the same, bit for bit, by ids and by cu_seqlens."""
    x = {name: a[0] for name, a in arrays(SORTED).items()}
    cu = np.array([0, 5, 15, 24], np.int32)
    by_cu = jax_flash.attention_varlen(x["q"], x["k"], x["v"], cu, cu, causal=True)
    np.testing.assert_array_equal(attend(jax_flash.attention, **x), by_cu)


def test_tokens_without_a_segment_are_never_read():
    x = arrays()
    none = x["ids"][..., None, None] < 0

    def run(bad):
        q, k, v = (jnp.where(none, bad, x[name]) for name in "qkv")
        out, pull = jax.vjp(lambda *qkv: attend(jax_flash.attention, *qkv, x["ids"]), q, k, v)
        return out, *pull(jnp.where(none, bad, jnp.ones_like(out)))

    for a, b in zip(run(jnp.nan), run(0.0), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mapped", ["all", "ids", "qkv"])
def test_vmap(mapped):
    x = arrays(np.random.default_rng(6).integers(0, 3, (3, B, T)).astype(np.int32), (3, B))
    axes = tuple(0 if mapped == "all" or (mapped == "ids") == (name == "ids") else None for name in x)
    x = [a if axis == 0 else a[0] for a, axis in zip(x.values(), axes, strict=True)]
    assert_close(
        *(
            jax.jit(jax.vmap(value_and_gradients(attention), in_axes=axes))(*x)
            for attention in (jax_flash.attention, reference.attention)
        )
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P(None, None, "data"), P("data", None, None)], ids=["heads", "batch"])
def test_no_communication_on_a_mesh(spec, kind):
    x = arrays()
    exact = value_and_gradients(reference.attention)(*x.values())
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x[name], NamedSharding(mesh, spec)) for name in "qkv"]
        placed.append(jax.device_put(x["ids"], NamedSharding(mesh, P(spec[0]))))
        run = jax.jit(value_and_gradients(jax_flash.attention)).lower(*placed).compile()
        assert not collectives(run)
        assert_close(run(*placed), exact)


@pytest.mark.parametrize(
    "ids, message",
    [
        (dict(kv_segment_ids=ANY), "kv_segment_ids need q_segment_ids"),
        (dict(q_segment_ids=ANY[0]), r"q_segment_ids must have shape \(B, T\) = \(4, 24\)"),
        (dict(q_segment_ids=ANY, kv_segment_ids=ANY[:, 1:]), r"kv_segment_ids must have shape \(B, S\) = \(4, 24\)"),
        (dict(q_segment_ids=ANY.astype(np.float32)), "q_segment_ids must be integers"),
        (dict(q_segment_ids=ANY.astype(np.int64) + 2**31), "q_segment_ids must fit in 32 bits"),
        (dict(q_segment_ids=ANY.tolist()), "q_segment_ids must be a JAX or NumPy array"),
    ],
    ids=["keys alone", "no batch", "length", "floats", "64 bits", "list"],
)
def test_mistakes_are_named(ids, message):
    x = arrays()
    with pytest.raises(ValueError, match=f"^attention: {message}"):
        jax_flash.attention(x["q"], x["k"], x["v"], **ids)


def test_ids_of_queries_alone_need_as_many_keys():
    x = arrays()
    with pytest.raises(ValueError, match="kv_segment_ids must be given where T and S differ"):
        jax_flash.attention(x["q"], x["k"][:, 1:], x["v"][:, 1:], q_segment_ids=x["ids"])
