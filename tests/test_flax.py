"""`jax_flash.flax.attention_fn` against Flax's own attention, in both of Flax's layers."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import close

flax = pytest.importorskip("flax")

from flax import linen, nnx  # noqa: E402
from flax_oracle import by_definition  # noqa: E402

from jax_flash.flax import attention_fn  # noqa: E402

in_float32 = pytest.mark.skipif(
    jax.default_backend() == "gpu", reason="compares in float32, which has no CUDA kernel yet"
)

BATCH, LENGTH, FEATURES, HEADS = 2, 12, 32, 4


def inputs(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape or (BATCH, LENGTH, FEATURES))


def masks():
    """Name → mask, each as a user of Flax makes it. Every query sees at least one key."""
    tokens = jnp.ones((BATCH, LENGTH))
    valid = jnp.arange(LENGTH)[None] < jnp.array([[LENGTH], [7]])
    causal = linen.make_causal_mask(tokens)
    return {
        "none": None,
        "causal": causal,
        "causal-bool": causal.astype(bool),
        "padding": linen.make_attention_mask(jnp.ones_like(valid), valid, dtype=bool),
        "causal-padding": linen.combine_masks(causal, linen.make_attention_mask(jnp.ones_like(valid), valid)),
        "heads": jax.random.bernoulli(jax.random.key(1), 0.5, (BATCH, HEADS, LENGTH, LENGTH)).at[..., 0].set(True),
    }


def linen_layer(attention, **options):
    return linen.MultiHeadDotProductAttention(num_heads=HEADS, qkv_features=FEATURES, attention_fn=attention, **options)


def nnx_layer(attention, **options):
    """The same weights whatever the attention is."""
    options = {"decode": False, **options}
    return nnx.MultiHeadAttention(
        num_heads=HEADS, in_features=FEATURES, attention_fn=attention, rngs=nnx.Rngs(0), **options
    )


def assert_close(ours, theirs, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, theirs)


@in_float32
@pytest.mark.parametrize("mask", masks())
def test_linen_output_and_gradients(mask):
    mask, x = masks()[mask], inputs()
    variables = linen_layer(linen.dot_product_attention).init(jax.random.key(2), x)

    def value_and_grad(attention):
        loss = lambda v, x: jnp.sum(linen_layer(attention).apply(v, x, mask=mask) ** 2)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(variables, x)

    assert_close(value_and_grad(attention_fn), value_and_grad(linen.dot_product_attention), 1e-4)


@in_float32
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "is_causal"])
@pytest.mark.parametrize("mask", masks())
def test_nnx_output_and_gradients(mask, is_causal):
    mask, x = masks()[mask], inputs()
    if is_causal and mask is not None:
        mask = jnp.broadcast_to(mask, (BATCH, HEADS, LENGTH, LENGTH))  # what flax's own is_causal needs

    def value_and_grad(attention):
        layer = nnx_layer(attention)
        loss = nnx.value_and_grad(lambda m, x: jnp.sum(m(x, mask=mask, is_causal=is_causal) ** 2), argnums=(0, 1))
        value, (of_layer, of_x) = nnx.jit(loss)(layer, x)
        return value, nnx.to_pure_dict(of_layer), of_x

    assert_close(value_and_grad(attention_fn), value_and_grad(nnx.dot_product_attention), 1e-4)


@in_float32
@pytest.mark.parametrize("queries, keys", [(5, 9), (9, 5)])
def test_is_causal_is_aligned_to_the_top_left(queries, keys):
    q, k, v = (inputs(BATCH, n, HEADS, 8, seed=n) for n in (queries, keys, keys + 100))
    v = v[:, :keys]
    mask = jax.random.bernoulli(jax.random.key(3), 0.7, (BATCH, HEADS, queries, keys)).at[..., 0].set(True)
    for each in (None, mask):
        theirs = nnx.dot_product_attention(q, k, v, mask=each, is_causal=True)
        assert_close(attention_fn(q, k, v, mask=each, is_causal=True), theirs)


@in_float32
@pytest.mark.parametrize("window", [None, 3, (2, None), (4, 1), (None, 2)], ids=str)
@pytest.mark.parametrize("queries, keys", [(9, 9), (7, 12), (11, 9)])
def test_window_softcap_scale_and_lengths(queries, keys, window):
    ours = dict(window_size=window, softcap=3.0, softmax_scale=0.5)
    pair = window if isinstance(window, tuple) else (window, window)
    theirs = dict(window=pair, softcap=3.0, scale=0.5)
    mask = jax.random.bernoulli(jax.random.key(9), 0.8, (HEADS, queries, keys))
    for batch, mask, is_causal, which in (  # noqa: B020
        ((), None, True, "none"),
        ((3,), mask, False, "none"),
        ((3,), None, False, "queries"),
        ((3,), None, True, "keys"),
        ((2, 3), mask, True, "both"),
        ((3,), None, True, "the same"),
        ((2, 3), None, False, "the same"),
    ):
        q, k, v = (inputs(*batch, n, heads, 8, seed=heads) for n, heads in ((queries, HEADS), (keys, 2), (keys, 2)))
        short = jax.random.randint(jax.random.key(8), batch, 0, 6, "int32")
        q_lengths = None if which in ("none", "keys") else short
        kv_lengths = short if which == "the same" else short + 2 if which in ("keys", "both") else None
        out = attention_fn(q, k, v, None, mask, is_causal=is_causal, q_lengths=q_lengths, kv_lengths=kv_lengths, **ours)
        expected = by_definition(q, k, v, mask, is_causal, lengths=(q_lengths, kv_lengths), **theirs)
        np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5, err_msg=which)


@in_float32
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_partial_reaches_both_layers(kind):
    lengths = jnp.array([LENGTH, 7])
    attention = functools.partial(attention_fn, window_size=(4, 0), softcap=2.0, kv_lengths=lengths)
    oracle = functools.partial(by_definition, window=(4, 0), softcap=2.0, lengths=(None, lengths))

    def by_oracle(q, k, v, **_):
        return jnp.asarray(oracle(q, k, v))

    if kind == "nnx":
        assert_close(nnx_layer(attention)(inputs()), nnx_layer(by_oracle)(inputs()))
    else:
        variables = linen_layer(attention).init(jax.random.key(2), inputs())
        run = lambda f: linen_layer(f).apply(variables, inputs())  # noqa: E731
        assert_close(run(attention), run(by_oracle))


@in_float32
@pytest.mark.parametrize(
    "axes, mask_shape",
    [
        ((), (HEADS, 5, 7)),
        ((2,), (5, 7)),
        ((2, 3), None),
        ((2, 3), (HEADS, 5, 7)),
        ((2, 3), (2, 1, 1, 5, 7)),
        ((1, 2, 3), (1, 2, 3, 1, 5, 7)),
    ],
    ids=str,
)
def test_any_number_of_batch_axes(axes, mask_shape):
    q, k, v = (inputs(*axes, n, HEADS, 8, seed=i) for i, n in enumerate((5, 7, 7)))
    mask = mask_shape and jax.random.bernoulli(jax.random.key(4), 0.6, mask_shape).at[..., 0].set(True)
    assert_close(attention_fn(q, k, v, mask=mask), linen.dot_product_attention(q, k, v, mask=mask))


@in_float32
def test_mixed_dtypes_are_promoted_as_flax_does():
    q, k, v = (inputs(BATCH, 5, HEADS, 8, seed=i) for i in range(3))
    q = q.astype(jnp.bfloat16)
    assert_close(attention_fn(q, k, v), linen.dot_product_attention(q, k, v))
    assert attention_fn(q, k, v, dtype=jnp.bfloat16).dtype == jnp.bfloat16


@in_float32
def test_linen_decodes_step_by_step():
    x = inputs()
    causal = linen.make_causal_mask(jnp.ones((BATCH, LENGTH)))
    whole = linen_layer(linen.dot_product_attention)
    layer = linen_layer(attention_fn, decode=True)
    variables = layer.init(jax.random.key(2), x)
    cache, step = variables["cache"], jax.jit(functools.partial(layer.apply, mutable="cache"))
    outputs = []
    for i in range(LENGTH):
        out, changed = step({"params": variables["params"], "cache": cache}, x[:, i : i + 1])
        cache = changed["cache"]
        outputs.append(out)
    expected = whole.apply({"params": variables["params"]}, x, mask=causal)
    assert_close(jnp.concatenate(outputs, axis=1), expected)


@in_float32
def test_nnx_decodes_step_by_step():
    x = inputs()
    layer = nnx_layer(attention_fn, decode=True)
    layer.init_cache(x.shape)
    step = nnx.jit(lambda layer, x: layer(x))
    outputs = [step(layer, x[:, i : i + 1]) for i in range(LENGTH)]
    expected = nnx_layer(nnx.dot_product_attention)(x, mask=linen.make_causal_mask(jnp.ones((BATCH, LENGTH))))
    assert_close(jnp.concatenate(outputs, axis=1), expected)


@pytest.mark.parametrize("mask", masks())
def test_layers_in_half_precision(mask):
    """float16 has kernels everywhere: output and gradients beside Flax's own in float32."""
    mask, x, half = masks()[mask], inputs(), dict(dtype=jnp.float16)

    def in_linen(attention, **options):
        layer = linen_layer(attention, **options)
        variables = layer.init(jax.random.key(2), x)
        return jax.value_and_grad(lambda x: jnp.mean(layer.apply(variables, x, mask=mask) ** 2))(x)

    def in_nnx(attention, **options):
        layer = nnx_layer(attention, **options)
        return jax.value_and_grad(lambda x: jnp.mean(layer(x, mask=mask) ** 2))(x)

    for run, own in ((in_linen, linen.dot_product_attention), (in_nnx, nnx.dot_product_attention)):
        assert_equal_in_half(run(attention_fn, **half), run(own, **half), run(own))


def test_decode_in_half_precision():
    x, half = inputs(), dict(dtype=jnp.float16)

    def whole(**options):
        layer = nnx_layer(nnx.dot_product_attention, **options)
        return layer(x, mask=linen.make_causal_mask(jnp.ones((BATCH, LENGTH))))

    layer = nnx_layer(attention_fn, decode=True, **half)
    layer.init_cache(x.shape, dtype=jnp.float16)
    step = nnx.jit(lambda layer, x: layer(x))
    ours = jnp.concatenate([step(layer, x[:, i : i + 1]) for i in range(LENGTH)], axis=1)
    assert_equal_in_half(ours, whole(**half), whole())


def assert_equal_in_half(ours, rough, exact):
    """Each array is at most three times as far from the float32 result as Flax's own in half precision is."""
    for a, b, c in zip(*map(jax.tree.leaves, (ours, rough, exact)), strict=True):
        close("result", a, c, b, 3.0)


@in_float32
def test_linen_trains_as_with_its_own_attention():
    def losses(attention):
        class Model(linen.Module):
            @linen.compact
            def __call__(self, tokens):
                x = linen.Embed(16, FEATURES)(tokens)
                x = x + linen_layer(attention)(linen.LayerNorm()(x), mask=linen.make_causal_mask(tokens))
                return linen.Dense(16)(x)

        model, tokens = Model(), copy_task()
        parameters = model.init(jax.random.key(0), tokens)
        return train(lambda p: next_token_loss(model.apply(p, tokens), tokens), parameters)

    ours = losses(attention_fn)
    assert ours[-1] < 0.6 * ours[0]
    assert_close(ours, losses(linen.dot_product_attention), 1e-3)


@in_float32
def test_nnx_trains_as_with_its_own_attention():
    def losses(attention):
        class Model(nnx.Module):
            def __init__(self, rngs):
                self.embed = nnx.Embed(16, FEATURES, rngs=rngs)
                self.norm = nnx.LayerNorm(FEATURES, rngs=rngs)
                self.attend = nnx_layer(attention)
                self.out = nnx.Linear(FEATURES, 16, rngs=rngs)

            def __call__(self, tokens):
                x = self.embed(tokens)
                return self.out(x + self.attend(self.norm(x), is_causal=True))

        tokens = copy_task()
        graph, parameters = nnx.split(Model(nnx.Rngs(0)))
        return train(lambda p: next_token_loss(nnx.merge(graph, p)(tokens), tokens), parameters)

    ours = losses(attention_fn)
    assert ours[-1] < 0.6 * ours[0]
    assert_close(ours, losses(nnx.dot_product_attention), 1e-3)


def copy_task():
    """Sequences whose second half repeats the first."""
    half = jax.random.randint(jax.random.key(7), (8, 8), 0, 16)
    return jnp.concatenate([half, half], axis=1)


def next_token_loss(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def train(loss, parameters, steps=30):
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(parameters, state):
        value, gradients = jax.value_and_grad(loss)(parameters)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, value

    state, values = optimizer.init(parameters), []
    for _ in range(steps):
        parameters, state, value = step(parameters, state)
        values.append(float(value))
    return values


@in_float32
@pytest.mark.skipif(not hasattr(nnx, "RoPE"), reason="this Flax has no nnx.RoPE")
def test_rope():
    rope = nnx.RoPE()
    q, k, v = (inputs(BATCH, 5, HEADS, 8, seed=i) for i in range(3))
    ours, theirs = (functools.partial(f, rope=rope) for f in (attention_fn, nnx.dot_product_attention_with_rope))
    assert_close(ours(q, k, v), theirs(q, k, v))
    # Positions may differ from sequence to sequence, and only their differences matter.
    positions = jnp.arange(5)[None] + jnp.array([[0], [11]])
    assert_close(ours(q, k, v, input_positions=positions), theirs(q, k, v))
    assert_close(ours(q, k, v, input_positions=jnp.arange(5) + 3), theirs(q, k, v))
    gaps = jnp.array([0, 1, 2, 9, 10])
    assert np.abs(ours(q, k, v, input_positions=gaps) - theirs(q, k, v)).max() > 1e-3
    layer = nnx_layer(functools.partial(attention_fn, rope=rope))
    assert_close(layer(inputs()[:, :5], input_positions=positions), layer(inputs()[:, :5]))
    with pytest.raises(ValueError, match="same length"):
        ours(q, k[:, :3], v[:, :3])
    with pytest.raises(ValueError, match="rope="):
        attention_fn(q, k, v, input_positions=positions)


@in_float32
def test_a_query_that_sees_nothing_gets_zero():
    q = inputs(BATCH, 5, HEADS, 8)
    out = attention_fn(q, q, q, mask=jnp.zeros((1, 1, 5, 5), bool).at[:, :, 1:].set(True))
    assert not out[:, 0].any() and np.isfinite(out).all()


def test_every_argument_of_linen_is_named():
    """linen drops what it does not find in the signature: nothing that its own attention takes may be missing."""
    theirs = set(inspect.signature(linen.dot_product_attention).parameters)
    # linen's layers never pass these two.
    assert theirs - {"promote_dtype", "einsum_dot_general"} <= set(inspect.signature(attention_fn).parameters)


def refusals():
    x = inputs(BATCH, 5, HEADS, 8)
    return {
        "dropout": (NotImplementedError, "dropout_rate=0.1", lambda: attention_fn(x, x, x, dropout_rate=0.1)),
        "bias": (NotImplementedError, "bias", lambda: attention_fn(x, x, x, jnp.zeros((5, 5)))),
        "einsum": (NotImplementedError, "einsum", lambda: attention_fn(x, x, x, qk_attn_weights_einsum=jnp.einsum)),
        "ranks": (ValueError, r"\(5, 4, 8\)", lambda: attention_fn(x, x[0], x)),
        "batches": (ValueError, "batch", lambda: attention_fn(x, x[:1], x[:1])),
        "lengths": (ValueError, "kv_lengths.*batch", lambda: attention_fn(x, x, x, kv_lengths=jnp.ones((3,), int))),
        "window": (ValueError, "attention_fn: window_size", lambda: attention_fn(x, x, x, window_size=-2)),
        "mask-rank": (ValueError, "mask", lambda: attention_fn(x, x, x, mask=jnp.ones((1, 1, 1, 5, 5)))),
        "linen-dropout": (
            NotImplementedError,
            "dropout_rate=0.5",
            lambda: linen_layer(attention_fn, dropout_rate=0.5, deterministic=False).init(
                {"params": jax.random.key(0), "dropout": jax.random.key(1)}, inputs()
            ),
        ),
        "nnx-dropout": (
            NotImplementedError,
            "dropout_rate=0.5",
            lambda: nnx_layer(attention_fn, dropout_rate=0.5, deterministic=False)(inputs()),
        ),
        "linen-sow": (
            NotImplementedError,
            "sow_weights",
            lambda: linen_layer(attention_fn).init(jax.random.key(0), inputs(), sow_weights=True),
        ),
        "nnx-sow": (NotImplementedError, "sow_weights", lambda: nnx_layer(attention_fn)(inputs(), sow_weights=True)),
    }


@pytest.mark.parametrize("case", refusals())
def test_what_cannot_be_honoured_is_refused(case):
    error, message, call = refusals()[case]
    with pytest.raises(error, match=message):
        call()


@in_float32
def test_dropout_is_fine_where_it_is_switched_off():
    layer = nnx_layer(attention_fn, dropout_rate=0.5, deterministic=True)
    assert_close(layer(inputs()), nnx_layer(nnx.dot_product_attention)(inputs()))
