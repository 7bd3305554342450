"""jax_flash.flax's MultiHeadAttention for nnx and linen: training, against Flax's own layers and the definition."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import close
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

flax = pytest.importorskip("flax")

from flax import linen, nnx  # noqa: E402
from flax_oracle import layer_by_definition, make, of_linen, of_nnx  # noqa: E402

from jax_flash.flax import AxisNames  # noqa: E402
from jax_flash.flax.linen import MultiHeadAttention as LinenAttention  # noqa: E402
from jax_flash.flax.nnx import MultiHeadAttention as NnxAttention  # noqa: E402
from jax_flash.rotary import Linear, Llama3, Rotary  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")
in_float32 = pytest.mark.skipif(
    jax.default_backend() == "gpu", reason="compares in float32, which has no CUDA kernel yet"
)
BOTH = pytest.mark.parametrize("kind", ["nnx", "linen"])

B, T, FEATURES, HEADS, H = 2, 12, 32, 4, 16


def inputs(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape or (B, T, FEATURES)), dtype)


def assert_close(ours, theirs, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, theirs)


def value_and_grads(apply, params, xs, **options):
    """The output, and the gradients of its squares' sum by parameters and inputs."""

    def loss(params, xs):
        out = apply(params, *xs, **options)
        return jnp.sum(out.astype(jnp.float32) ** 2), out

    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, xs)
    return out, grads


def calls():
    """Name → (arguments of the layer, those that nnx's own has but linen's lacks, its inputs, those of the call)."""
    valid = jnp.arange(T)[None] < jnp.array([[T], [7]])
    padding = linen.make_attention_mask(jnp.ones_like(valid), valid)
    causal = linen.make_causal_mask(jnp.ones((B, T)))
    random = jax.random.bernoulli(jax.random.key(1), 0.5, (B, HEADS, T, 9)).at[..., 0].set(True)
    x, other, features = inputs(), inputs(B, 9, FEATURES, seed=1), inputs(B, 9, 24, seed=2)
    return {
        "masks-features": (
            dict(qkv_features=24, out_features=20),
            {},
            (x,),
            dict(mask=linen.combine_masks(causal, padding)),
        ),
        "cross": (dict(use_bias=False), {}, (x, other, other + 1), dict(mask=random)),
        "cross-features": ({}, dict(in_kv_features=24), (x, features), dict(mask=random)),
        "grouped-causal": ({}, dict(num_kv_heads=2), (x,), dict(is_causal=True)),
        "batch-axes": ({}, {}, (inputs(2, 3, T, FEATURES),), dict(mask=causal[:1])),
    }


@in_float32
@pytest.mark.parametrize(
    "kind, case",
    [
        *(("nnx", case) for case in ("masks-features", "cross-features", "grouped-causal")),
        ("linen", "masks-features"),
        ("linen", "cross"),
        ("linen", "batch-axes"),
    ],
)
def test_equals_flax_s_own(kind, case):
    """The same parameters give the same output and gradients."""
    options, of_nnx_alone, xs, call = calls()[case]
    if kind == "nnx":
        options = options | of_nnx_alone
        params, apply_own = of_nnx(
            lambda: nnx.MultiHeadAttention(HEADS, FEATURES, **options, decode=False, rngs=nnx.Rngs(0))
        )
        same, apply = of_nnx(lambda: NnxAttention(HEADS, FEATURES, **options, rngs=nnx.Rngs(0)))
    else:
        params, apply_own = of_linen(linen.MultiHeadDotProductAttention(HEADS, **options), *xs)
        same, apply = of_linen(LinenAttention(HEADS, **options), *xs)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, same)
    own = value_and_grads(apply_own, params, xs, **call)
    assert_close(value_and_grads(apply, params, xs, **call), own, 2e-4)


@BOTH
def test_initializes_as_flax_s_own(kind):
    """The same seed gives the same parameters."""
    if kind == "nnx":
        own = nnx.state(nnx.MultiHeadAttention(HEADS, FEATURES, num_kv_heads=2, decode=False, rngs=nnx.Rngs(3)))
        ours = nnx.state(NnxAttention(HEADS, FEATURES, num_kv_heads=2, rngs=nnx.Rngs(3)))
    else:
        layers = linen.MultiHeadDotProductAttention(HEADS), LinenAttention(HEADS)
        own, ours = (jax.jit(layer.init)(jax.random.key(3), inputs()) for layer in layers)
    jax.tree.map(np.testing.assert_array_equal, ours, own)


FEATURE_SETS = {
    "rotary-halves-llama3-window": (
        dict(
            rotary=Rotary(base=500.0, interleaved=False, scaling=Llama3(original_max_position_embeddings=64)),
            window_size=(3, 0),
        ),
        dict(window=(3, 0)),
    ),
    "rotary-part-linear-softcap-scale": (
        dict(rotary=Rotary(rotary_dim=8, scaling=Linear(4.0)), softcap=2.0, softmax_scale=0.5),
        dict(softcap=2.0, scale=0.5),
    ),
    "qk-norm-window-both-sides": (
        dict(use_qk_norm=True, norm_epsilon=0.1, window_size=2),
        dict(epsilon=0.1, window=(2, 2), is_causal=False),
    ),
    "biases-of-qwen": (dict(use_out_bias=False), {}),
    "all": (
        dict(
            rotary=Rotary(base=100.0),
            window_size=(5, 0),
            softcap=3.0,
            softmax_scale=0.3,
            use_qk_norm=True,
            use_sinks=True,
            use_bias=False,
            use_out_bias=True,
        ),
        dict(window=(5, 0), softcap=3.0, scale=0.3),
    ),
}
# Every feature set also has grouped heads whose size is its own.
GROUPED = dict(num_heads=HEADS, num_kv_heads=2, head_dim=H)


@in_float32
@pytest.mark.parametrize("case", FEATURE_SETS)
def test_equals_the_definition(case):
    options, definition = FEATURE_SETS[case]
    definition = dict(is_causal=True, rotary=options.get("rotary")) | definition
    x = inputs()
    params, apply = make("nnx", x, **GROUPED, **options)
    assert params["query"]["kernel"].shape == (FEATURES, HEADS, H)
    assert params["key"]["kernel"].shape == (FEATURES, 2, H)
    run = jax.jit(functools.partial(apply, is_causal=definition["is_causal"]))
    assert_close(run(params, x), layer_by_definition(params, x, **definition))
    if "rotary" in options:
        for positions in (jnp.arange(T) * 3, jax.random.randint(jax.random.key(4), (B, T), 0, 90, "int32")):
            out = run(params, x, input_positions=positions)
            assert_close(out, layer_by_definition(params, x, positions=positions, **definition), 2e-4)


@in_float32
@pytest.mark.parametrize("case", ["all", "biases-of-qwen"])
def test_linen_and_nnx_are_one(case):
    params, of_nnx = make("nnx", inputs(), **GROUPED, **FEATURE_SETS[case][0])
    same, of_linen = make("linen", inputs(), **GROUPED, **FEATURE_SETS[case][0])
    assert jax.tree.structure(params) == jax.tree.structure(same)
    ours, theirs = (value_and_grads(f, params, (inputs(),), is_causal=True) for f in (of_nnx, of_linen))
    assert_close(ours, theirs)


@in_float32
@pytest.mark.parametrize("kind, is_causal", [("nnx", True), ("linen", False)])
def test_padding_by_lengths(kind, is_causal):
    """One of the lengths says both; padding changes nothing, and what comes out of it is the last bias."""
    lengths, options = jnp.array([7, T]), dict(rotary=Rotary(), **GROUPED)
    x, tail = inputs(), inputs(B, T, FEATURES, seed=5)
    params, apply = make(kind, x, **options)
    valid = (jnp.arange(T)[None] < lengths[:, None])[..., None]
    other = jnp.where(valid, x, 100 * tail)

    @jax.jit
    def run(x, **padding):
        loss = lambda p, x: jnp.sum(jnp.where(valid, apply(p, x, is_causal=is_causal, **padding), 0) ** 2)  # noqa: E731
        grads = jax.grad(loss, argnums=(0, 1))(params, x)
        return apply(params, x, is_causal=is_causal, **padding), grads

    out, grads = run(x, kv_lengths=lengths)
    assert_close(run(other, q_lengths=lengths), (out, grads))
    assert_close(run(other, q_lengths=lengths, kv_lengths=lengths), (out, grads))
    assert_close(out[0, 7:], jnp.broadcast_to(params["out"]["bias"], (T - 7, FEATURES)))
    # The same by a mask, where padding is not hidden from padding.
    by_mask, mask_grads = run(x, mask=linen.make_attention_mask(jnp.ones((B, T), bool), valid[..., 0], dtype=bool))
    assert_close(jnp.where(valid, out, 0), jnp.where(valid, by_mask, 0))
    assert_close(grads, mask_grads, 2e-4)


@in_float32
@BOTH
def test_packed_segments(kind):
    """A token sees its own segment alone."""
    x, ids = inputs(), jnp.asarray(np.random.default_rng(0).integers(0, 3, (B, T)), jnp.int32)
    params, apply = make(kind, x, **GROUPED)
    same = (ids[:, :, None] == ids[:, None])[:, None]
    run = jax.jit(functools.partial(apply, is_causal=True))
    assert_close(run(params, x, q_segment_ids=ids), run(params, x, mask=same))


@in_float32
def test_padding_in_cross_attention():
    x, memory = inputs(), inputs(B, 9, FEATURES, seed=1)
    params, apply = make("nnx", x, memory, num_heads=HEADS)
    apply = jax.jit(apply)
    q_lengths, kv_lengths = jnp.array([T, 3]), jnp.array([4, 0])
    out = apply(params, x, memory, q_lengths=q_lengths, kv_lengths=kv_lengths)
    assert_close(out[0], apply(params, x[:1], memory[:1, :4])[0])
    assert_close(out[1], jnp.broadcast_to(params["out"]["bias"], (T, FEATURES)))
    only = apply(params, x, memory, kv_lengths=jnp.array([9, 4]))
    assert_close(only[1], apply(params, x[1:], memory[1:, :4])[0])


@pytest.mark.parametrize("kind, half", [("nnx", "bfloat16"), ("linen", "float16")])
def test_half_precision(kind, half):
    """Against Flax's own layer in the same types, both beside float32."""
    x = inputs()
    if kind == "nnx":
        build = lambda layer, dtype: of_nnx(lambda: layer(HEADS, FEATURES, dtype=dtype, rngs=nnx.Rngs(0)))  # noqa: E731
        own = functools.partial(nnx.MultiHeadAttention, decode=False)
        ours = NnxAttention
    else:
        build = lambda layer, dtype: of_linen(layer(HEADS, dtype=dtype), x)  # noqa: E731
        own, ours = linen.MultiHeadDotProductAttention, LinenAttention
    results = []
    for layer, dtype in ((ours, half), (own, half), (own, None)):
        params, apply = build(layer, dtype)
        out, grads = value_and_grads(apply, params, (x,))
        assert out.dtype == (dtype or "float32")
        results.append(jax.tree.leaves((out, grads)))
    for a, b, c in zip(*results, strict=True):
        close("result", a, c, b, 3.0)


@BOTH
def test_dtypes_of_parameters(kind):
    x = inputs(dtype="bfloat16")
    params, apply = make(kind, x, **GROUPED, use_qk_norm=True, param_dtype="bfloat16", rotary=Rotary())
    assert {p.dtype.name for p in jax.tree.leaves(params)} == {"bfloat16"}
    assert jax.eval_shape(functools.partial(apply, is_causal=True), params, x).dtype == jnp.bfloat16


@BOTH
def test_names_for_remat(kind, dtype):
    """With all that attention needs saved, the backward pass neither projects nor attends again."""
    x = inputs(dtype=dtype)
    params, apply = make(kind, x, **GROUPED, rotary=Rotary(), dtype=dtype)

    def count(jaxpr, primitive):
        nested = sum(count(inner, primitive) for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params))
        return nested + sum(eqn.primitive.name == primitive for eqn in jaxpr.eqns)

    def products(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        loss = jax.checkpoint(lambda p: jnp.sum(apply(p, x, is_causal=True)), policy=policy)
        jaxpr = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
        return count(jaxpr, "dot_general"), count(jaxpr, "attention_forward")

    attention = ("jax_flash_out", "jax_flash_lse")
    nothing, projected = products(), products("query_proj", "key_proj", "value_proj")
    everything = products("query_proj", "key_proj", "value_proj", *attention)
    assert nothing[1] == projected[1] == 2 and everything[1] == 1
    assert nothing[0] - everything[0] == 3 == nothing[0] - projected[0]
    assert "name=out_proj" in str(jax.make_jaxpr(lambda p: apply(p, x))(params))


@in_float32
def test_transforms_of_linen():
    x = inputs()
    params, apply = make("linen", x, **GROUPED, rotary=Rotary())
    rematted = of_linen(linen.remat(LinenAttention)(**GROUPED, rotary=Rotary()), x)[1]
    assert_close(value_and_grads(rematted, params, (x,)), value_and_grads(apply, params, (x,)))


@in_float32
def test_transforms_of_nnx():
    """Layers made by vmap and run by scan, each rematerialised, equal a loop over them."""
    x = inputs()

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def create(rngs):
        return NnxAttention(in_features=FEATURES, **GROUPED, rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return x + nnx.remat(lambda layer, x: layer(x, is_causal=True))(layer, x)

    layers, expected = create(nnx.Rngs(0)), x
    graph, state = nnx.split(layers)
    one = jax.jit(lambda state, x: x + nnx.merge(graph, state)(x, is_causal=True))
    for i in range(3):
        expected = one(jax.tree.map(lambda p, i=i: p[i], state), expected)
    assert_close(nnx.jit(run)(layers, x), expected)


RULES = (("batch", "data"), ("heads", "model"), ("kv_heads", "model"), ("embed", None), ("head_dim", None))


def mesh(kind):
    return jax.sharding.Mesh(np.array(jax.devices("cpu")).reshape(4, 2), ("data", "model"), axis_types=(kind,) * 2)


@in_float32
@BOTH
def test_axis_names_shard(kind):
    x = inputs(4, T, FEATURES)
    options = dict(**GROUPED, rotary=Rotary(), use_qk_norm=True, axis_names=AxisNames())
    params, apply = make(kind, x, **options | dict(axis_names=None))
    expected = apply(params, x, is_causal=True)
    with jax.set_mesh(mesh(AxisType.Auto)), linen.logical_axis_rules(RULES):
        if kind == "nnx":
            layer = NnxAttention(in_features=FEATURES, **options, rngs=nnx.Rngs(0))
            state = nnx.state(layer, nnx.Param)
            shardings = nnx.to_pure_dict(jax.tree.map(lambda p: p.sharding.spec, state))
            run = of_nnx(lambda: layer)[1]
        else:
            layer = LinenAttention(**options)
            boxed = jax.jit(layer.init)(jax.random.key(0), x)["params"]
            shardings = linen.logical_to_mesh(linen.get_partition_spec(boxed), RULES)
            run = lambda params, x, **o: layer.apply({"params": params}, x, **o)  # noqa: E731
        assert shardings["query"]["kernel"] == shardings["key"]["kernel"] == P(None, "model", None)
        assert shardings["value"]["bias"] == P("model", None) and shardings["out"]["bias"] == P(None)
        assert shardings["out"]["kernel"] == P("model", None, None) and shardings["query_norm"]["scale"] == P(None)
        placed = jax.tree.map(lambda p, s: jax.device_put(p, NamedSharding(mesh(AxisType.Auto), s)), params, shardings)
        x = jax.device_put(x, NamedSharding(mesh(AxisType.Auto), P("data")))
        compiled = jax.jit(functools.partial(run, is_causal=True)).lower(placed, x).compile()
    assert_close(compiled(placed, x), expected)
    assert "all-gather" not in compiled.as_text()  # the sum over heads is the only communication


@in_float32
def test_explicit_axes():
    """On a mesh of explicit axes, the layer's output is where it is asked to be."""
    x = inputs(4, T, FEATURES)
    params, apply = make("nnx", x, **GROUPED, rotary=Rotary())
    with jax.set_mesh(mesh(AxisType.Explicit)):
        specs = {name: P(None, "model", None) for name in ("query", "key", "value")} | {"out": P("model", None, None)}
        placed = {
            name: {
                "kernel": jax.device_put(p["kernel"], specs[name]),
                "bias": jax.device_put(p["bias"], P(*(specs[name][1:] if name != "out" else ()))),
            }
            for name, p in params.items()
        }
        out = jax.jit(functools.partial(apply, is_causal=True, out_sharding=P("data", None, None)))(
            placed, jax.device_put(x, P("data"))
        )
        assert jax.typeof(out).sharding.spec == P("data", None, None)
    assert_close(out, apply(params, x, is_causal=True))


def mistakes():
    x = inputs()

    def nnx_layer(**options):
        return NnxAttention(**dict(num_heads=HEADS, in_features=FEATURES) | options, rngs=nnx.Rngs(0))

    return {
        "kv-heads": ("multiple of num_kv_heads; got 4 and 3", lambda: nnx_layer(num_kv_heads=3)),
        "no-heads": ("multiple of num_kv_heads; got 4 and 0", lambda: nnx_layer(num_kv_heads=0)),
        "features": ("num_heads must divide qkv_features.*got 5 and 32", lambda: nnx_layer(num_heads=5)),
        "both": ("= 64; got 32", lambda: nnx_layer(head_dim=16, qkv_features=32)),
        "linen": ("num_heads must divide", lambda: LinenAttention(5).init(jax.random.key(0), x)),
        "head-dim": ("head_dim must be at least 1; got 0", lambda: nnx_layer(head_dim=0)),
        "in-features": (r"inputs_q must have 32 features.*got \(2, 12, 31\)", lambda: nnx_layer()(x[..., 1:])),
        "kv-features": (
            "inputs_q as keys must have 24 features",
            lambda: nnx_layer(in_kv_features=24)(x),
        ),
        "axes": (r"\(batch..., length, features\).*inputs_q \(32,\)", lambda: nnx_layer()(x[0, 0])),
        "batches": ("same batch axes", lambda: nnx_layer()(x, x[0])),
        "no-rotary": ("the layer needs rotary", lambda: nnx_layer()(x, input_positions=jnp.arange(T))),
        "a-number": ("must be a jax_flash.rotary.Rotary; got 10000.0", lambda: nnx_layer(rotary=1e4)(x)),
        "positions": ("a row for each token", lambda: nnx_layer(rotary=Rotary())(x, input_positions=jnp.arange(9))),
        "values-alone": ("inputs_v needs inputs_k", lambda: nnx_layer()(x, None, x)),
        "rotary": ("of the same length", lambda: nnx_layer(rotary=Rotary())(x, x[:, :3])),
        "rotary-dim": ("rotary_dim must be even", lambda: nnx_layer(head_dim=7, rotary=Rotary())(x)),
        "window": ("window_size", lambda: nnx_layer(window_size=-2)(x)),
        "lengths": ("kv_lengths must have the batch axes", lambda: nnx_layer()(x, x, kv_lengths=jnp.ones(3, int))),
        "mask": ("mask", lambda: nnx_layer()(x, mask=jnp.ones((B, HEADS, T, T + 1), bool))),
    }


@pytest.mark.parametrize("case", mistakes())
def test_mistakes_are_named(case):
    message, call = mistakes()[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("layer", [functools.partial(NnxAttention, in_features=FEATURES, rngs=None), LinenAttention])
def test_what_there_is_not(layer):
    """Dropout on the attention weights is no argument that could be forgotten in silence."""
    with pytest.raises(TypeError, match="dropout_rate"):
        layer(num_heads=HEADS, dropout_rate=0.1)
    with pytest.raises(TypeError, match="positional"):
        LinenAttention(HEADS, jnp.bfloat16)  # linen's own has dtype there
