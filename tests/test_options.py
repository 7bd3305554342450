"""Options that are static, in every function: what is not one is refused, with the way out; what JAX and FlashAttention
take, is taken."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash import attention, dot_product_attention, flash_attn_with_kvcache

Q, K = jnp.ones((1, 2, 2, 8)), jnp.ones((1, 3, 2, 8))


def attention_fn(*args, **options):
    pytest.importorskip("flax")
    from jax_flash.flax import attention_fn

    return attention_fn(*args, **options)


FUNCTIONS = {
    "attention": attention,
    "dot_product_attention": dot_product_attention,
    "attention_fn": attention_fn,
    "flash_attn_with_kvcache": flash_attn_with_kvcache,
}
CAUSAL = {"attention": "causal", "flash_attn_with_kvcache": "causal"}
SCALE = {"dot_product_attention": "scale"}
WINDOW = {"dot_product_attention": "local_window_size"}
BOOLEANS = [
    *((function, CAUSAL.get(function, "is_causal")) for function in FUNCTIONS),
    ("attention", "deterministic"),
    ("attention", "return_softmax_lse"),
    ("dot_product_attention", "return_residual"),
    ("flash_attn_with_kvcache", "rotary_interleaved"),
    ("flash_attn_with_kvcache", "return_softmax_lse"),
]
NUMBERS = [
    *((function, WINDOW.get(function, "window_size")) for function in FUNCTIONS),
    *((function, "softcap") for function in FUNCTIONS if function != "dot_product_attention"),
    ("flash_attn_with_kvcache", "num_splits"),
    ("attention_fn", "dropout_rate"),
]


@pytest.mark.parametrize("function, option", BOOLEANS + NUMBERS, ids=str)
def test_a_traced_option_is_refused(function, option):
    call = functools.partial(FUNCTIONS[function], Q, K, K)
    message = (
        rf"^{function}: {option} must be known when the call is compiled; got a traced value, .*: "
        rf"bind it with functools.partial\({function}, {option}=...\) before jit, or list it in jit's static_argnames"
    )
    with pytest.raises(NotImplementedError, match=message):
        jax.jit(lambda x: call(**{option: x}))((function, option) in BOOLEANS)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_traced_scale_and_a_traced_side_of_a_window(function):
    call = functools.partial(FUNCTIONS[function], Q, K, K)
    scale, window = SCALE.get(function, "softmax_scale"), WINDOW.get(function, "window_size")
    with pytest.raises(NotImplementedError, match=rf"{function}: {scale} .* multiply q.* by it, and give {scale}=1\.0"):
        jax.jit(lambda x: call(**{scale: x}))(2.0)
    with pytest.raises(NotImplementedError, match=f"{function}: {window} must be known"):
        jax.jit(lambda x: call(**{window: (x, 0)}))(2)


def test_both_ways_out_for_a_traced_option_work(dtype):
    q, k = Q.astype(dtype), K.astype(dtype)
    want = attention(q, k, k, causal=True)
    np.testing.assert_array_equal(jax.jit(functools.partial(attention, causal=True))(q, k, k), want)
    np.testing.assert_array_equal(jax.jit(attention, static_argnames="causal")(q, k, k, causal=True), want)


@pytest.mark.parametrize("value", ["False", None, 1, [True]], ids=repr)
@pytest.mark.parametrize("function, option", BOOLEANS, ids=str)
def test_only_booleans_are_booleans(function, option, value):
    with pytest.raises(ValueError, match=f"^{function}: {option} must be True or False; got "):
        FUNCTIONS[function](Q, K, K, **{option: value})


@pytest.mark.parametrize("value", ["2", True, 1.5, [1, 2, 3], (1, "2"), -2], ids=repr)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_windows_are_integers(function, value):
    window = WINDOW.get(function, "window_size")
    with pytest.raises(ValueError, match=rf"^{function}: {window} must be \(left, right\) or one int for both"):
        FUNCTIONS[function](Q, K, K, **{window: value})


@pytest.mark.parametrize("value", [1e-39, -1.0, 1e39, 10**400, float("nan"), float("inf"), "1", True], ids=str)
@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f != "dot_product_attention"])
def test_softcaps_that_float32_does_not_hold(function, value):
    with pytest.raises(ValueError, match=f"^{function}: softcap must be "):
        FUNCTIONS[function](Q, K, K, softcap=value)


@pytest.mark.parametrize("value", [1e39, -1e39, 10**400, float("nan"), float("-inf"), "1", True, np.ones(1)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_scales_that_float32_does_not_hold(function, value):
    scale = SCALE.get(function, "softmax_scale")
    with pytest.raises(ValueError, match=f"^{function}: {scale} must be "):
        FUNCTIONS[function](Q, K, K, **{scale: value})


@pytest.mark.parametrize(
    "scale", [0, -0.5, jnp.float32(-0.5), jnp.bfloat16(0.25), jnp.array(2), np.float16(0.5)], ids=repr
)
def test_scales_of_any_sign_and_type(scale, dtype):
    """As jax.nn takes them; with the gradients."""
    rng = np.random.default_rng(0)
    q, k, v, d_out = (jnp.asarray(rng.standard_normal((1, 5, 1, 8)), dtype) for _ in range(4))

    def run(attend, *args):
        out, pull = jax.vjp(
            functools.partial(attend, scale=float(scale) if attend is not dot_product_attention else scale), *args
        )
        return out, *pull(d_out.astype(out.dtype))

    exact = run(jax.nn.dot_product_attention, *(x.astype(jnp.float32) for x in (q, k, v)))
    bound = 1e-5 if dtype == "float32" else 1e-2
    for a, b in zip(run(dot_product_attention, q, k, v), exact, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, bound, bound)
    others = (
        attention(q, k, v, softmax_scale=scale),
        attention_fn(q, k, v, softmax_scale=scale),
        flash_attn_with_kvcache(q, k, v, softmax_scale=scale)[0],
    )
    for out in others:
        np.testing.assert_allclose(np.asarray(out, np.float32), exact[0], bound, bound)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_negative_scale_of_large_scores(function, dtype):
    """The largest score is then that of the smallest product."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, n, 1, 8)), dtype) for n in (5, 40, 40))
    call, scale = FUNCTIONS[function], SCALE.get(function, "softmax_scale")
    got, want = call(q, k, v, **{scale: -200.0}), call(-q, k, v, **{scale: 200.0})
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert np.isfinite(np.asarray(jax.tree.leaves(got)[0], np.float32)).all()


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f != "dot_product_attention"])
def test_flash_attention_s_words_for_none(function, dtype):
    qkv = (x.astype(dtype) for x in (Q, K * jnp.arange(3.0).reshape(1, 3, 1, 1), K))
    call = functools.partial(FUNCTIONS[function], *qkv)
    for none in (dict(window_size=(-1, -1)), dict(window_size=-1), dict(softcap=0.0), dict(softcap=0)):
        jax.tree.map(np.testing.assert_array_equal, call(**none), call())


@pytest.mark.parametrize("rate", [-0.5, 1.5, float("nan"), "0.5", None, True, [0.5]], ids=str)
def test_dropout_rates_that_are_none(rate):
    with pytest.raises(ValueError, match=r"^attention_fn: dropout_rate must be a number in \[0, 1\]; got "):
        attention_fn(Q, K, K, dropout_rate=rate)


def test_a_string_does_not_switch_dropout_off():
    with pytest.raises(ValueError, match="attention_fn: deterministic must be True or False; got 'False'"):
        attention_fn(Q, K, K, dropout_rate=0.1, deterministic="False")
    with pytest.raises(NotImplementedError, match="attention_fn: deterministic must be known"):
        jax.jit(lambda x: attention_fn(Q, K, K, dropout_rate=0.1, deterministic=x))(True)


@pytest.mark.parametrize("value", [None, [[1.0]], "q", 1.0], ids=repr)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_array(function, value):
    names = list(inspect.signature(FUNCTIONS[function]).parameters)[:3]
    names = names if len(names) == 3 else ["query", "key", "value"]
    for at, name in enumerate(names):
        args = [Q, K, K]
        args[at] = value
        with pytest.raises(
            ValueError, match=f"^{function}: {name} must be a JAX or NumPy array; got {type(value).__name__}"
        ):
            FUNCTIONS[function](*args)
