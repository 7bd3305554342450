"""Causal, windows and lengths from the top left, as jax.nn and Flax have them, are bands: no (T, S) array is made, and
both lengths may be symbolic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash

B, N, K, H = 2, 4, 2, 16
SIZES = [(48, 80), (80, 48), (48, 48)]


def dot_product_attention(q, k, v, q_lengths, kv_lengths, **options):
    return jax_flash.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        local_window_size=(20, 3),
        query_seq_lengths=q_lengths,
        key_value_seq_lengths=kv_lengths,
        **options,
    )


def attention_fn(q, k, v, q_lengths, kv_lengths, **options):
    pytest.importorskip("flax")
    from jax_flash.flax import attention_fn

    return attention_fn(
        q, k, v, is_causal=True, window_size=(20, 3), q_lengths=q_lengths, kv_lengths=kv_lengths, **options
    )


FUNCTIONS = pytest.mark.parametrize("function", [dot_product_attention, attention_fn], ids=lambda f: f.__name__)


def arguments(T, S, dtype):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
    return q, k, v, jnp.array([T, T - 7], jnp.int32), jnp.array([S - 5, S], jnp.int32)


def equations(jaxpr):
    """Of a jaxpr and of all jaxprs in it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(getattr(inner, "jaxpr", inner))


def arrays_over_scores(function, T, S, dtype):
    """The shapes (..., T, S), or (..., T, words of 32 keys), in the program of the output and its gradients."""

    def loss(q, k, v, *lengths):
        return function(q, k, v, *lengths).astype(jnp.float32).sum()

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1, 2)))(*arguments(T, S, dtype)).jaxpr
    all_equations = list(equations(jaxpr))
    assert {"attention_forward", "attention_backward"} <= {equation.primitive.name for equation in all_equations}
    shapes = {x.aval.shape for equation in all_equations for x in (*equation.invars, *equation.outvars)}
    return [shape for shape in shapes if shape[-2:] in ((T, S), (S, T), (T, -(-S // 32)))]


@FUNCTIONS
@pytest.mark.parametrize("T,S", SIZES)
def test_no_array_over_queries_and_keys(function, T, S, dtype):
    assert not arrays_over_scores(function, T, S, dtype)
    mask = jnp.ones((1, 1, T, S), bool)
    assert arrays_over_scores(functools.partial(function, mask=mask), T, S, dtype), "the search finds nothing"


@FUNCTIONS
def test_symbolic_lengths_export(function, dtype):
    b, t, s = jax.export.symbolic_shape("b, t, s")
    shapes = (b, t, N, H), (b, s, K, H), (b, s, K, H), (b,), (b,)
    dtypes = dtype, dtype, dtype, jnp.int32, jnp.int32
    exported = jax.export.export(
        jax.jit(function), disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("jax_flash_forward")]
    )(*(jax.ShapeDtypeStruct(*each) for each in zip(shapes, dtypes, strict=True)))
    for T, S in SIZES:
        args = arguments(T, S, dtype)
        np.testing.assert_array_equal(exported.call(*args), function(*args))
