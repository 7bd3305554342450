"""jax_flash.flax's MultiHeadAttention with a KV cache, against the layer without one, and Flax's own with its cache."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

flax = pytest.importorskip("flax")

from flax import linen, nnx  # noqa: E402
from flax_oracle import Decoder, make, nnx_with, of_linen, of_nnx  # noqa: E402

from jax_flash.cache import PageTable  # noqa: E402
from jax_flash.flax import AxisNames  # noqa: E402
from jax_flash.flax.linen import MultiHeadAttention as LinenAttention  # noqa: E402
from jax_flash.flax.nnx import MultiHeadAttention as NnxAttention  # noqa: E402
from jax_flash.rotary import Linear, Rotary  # noqa: E402

in_float32 = pytest.mark.skipif(
    jax.default_backend() == "gpu", reason="compares in float32, which has no CUDA kernel yet"
)
BOTH = pytest.mark.parametrize("kind", ["nnx", "linen"])

B, T, FEATURES, HEADS, H, CAPACITY, PAGE = 3, 20, 32, 4, 16, 32, 8
GROUPED = dict(num_heads=HEADS, num_kv_heads=2, head_dim=H)
FEATURE_SETS = {
    "rotary-halves-part": dict(rotary=Rotary(rotary_dim=6, interleaved=False, scaling=Linear(2.0))),
    "window": dict(window_size=(5, 0)),
    "all": dict(
        rotary=Rotary(),
        window_size=7,
        softcap=3.0,
        softmax_scale=0.3,
        use_qk_norm=True,
        use_sinks=True,
        use_out_bias=False,
    ),
}


def inputs(seed=0, shape=(B, T, FEATURES), dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_close(ours, theirs, tolerance=5e-5):
    np.testing.assert_allclose(
        np.asarray(ours, np.float32), np.asarray(theirs, np.float32), rtol=tolerance, atol=tolerance
    )


class Session:
    """A Decoder, and where it is paged, its page table."""

    def __init__(self, kind, params, paged, pages=None, **options):
        self.table = paged or None
        if paged:
            pages = pages or B * CAPACITY // PAGE
            self.table = PageTable.create(B, CAPACITY // PAGE, pages, PAGE)
        self.decoder = Decoder(kind, params, (B, CAPACITY, FEATURES), self.table, **options)

    def __call__(self, x, **options):
        if self.table is None:
            return self.decoder(x, **options)
        new = options.get("q_lengths", jnp.full(B, x.shape[1]))
        self.table, fits = self.table.reserve(new)
        out = self.decoder(x, page_table=self.table, **options)
        self.table = self.table.advance(jnp.where(fits, new, 0))
        return out


PAGED = pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])


@in_float32
@pytest.mark.parametrize(
    "kind, paged, case",
    [
        ("nnx", False, "all"),
        ("nnx", False, "rotary-halves-part"),
        ("nnx", True, "all"),
        ("nnx", True, "window"),
        ("linen", False, "all"),
        ("linen", True, "all"),
    ],
)
def test_chunks_and_steps_equal_the_whole(kind, paged, case):
    x, options = inputs(), GROUPED | FEATURE_SETS[case]
    params, apply = make(kind, x, **options)
    expected = jax.jit(functools.partial(apply, is_causal=True))(params, x)
    session, outs = Session(kind, params, paged, **options), []
    for start, end in ((0, 7), (7, 14), *((i, i + 1) for i in range(14, T))):
        outs.append(session(x[:, start:end]))
    assert_close(jnp.concatenate(outs, axis=1), expected)
    if not paged:
        assert session.decoder.arrays["cache_index"].tolist() == [T] * B


@in_float32
@pytest.mark.parametrize("kind, paged", [("nnx", True), ("linen", False)])
def test_chunks_of_different_lengths(kind, paged):
    """Prompts of 5, 13 and 0 tokens in padded chunks of 8, then steps in which only some sequences go on."""
    x, options = inputs(), dict(**GROUPED, rotary=Rotary())
    params, apply = make(kind, x, **options)
    whole = apply(params, x, is_causal=True)
    bias = params["out"]["bias"]
    session, done = Session(kind, params, paged, **options), np.zeros(B, int)
    for length, counts in ((8, (5, 8, 0)), (8, (0, 5, 0)), (1, (1, 0, 1)), (1, (1, 1, 0)), (8, (4, 1, 3))):
        tokens = [np.pad(x[b, done[b] : done[b] + n], ((0, length - n), (0, 0))) for b, n in enumerate(counts)]
        padded = np.stack(tokens) + 100.0 * (np.arange(length)[None, :, None] >= np.array(counts)[:, None, None])
        out = session(jnp.asarray(padded, jnp.float32), q_lengths=jnp.array(counts))
        for b, n in enumerate(counts):
            assert_close(out[b, :n], whole[b, done[b] : done[b] + n])
            assert_close(out[b, n:], jnp.broadcast_to(bias, (length - n, FEATURES)))
        done += counts


@in_float32
@BOTH
def test_steps_equal_flax_s_own(kind):
    """Token by token, with the parameters of Flax's own layer, beside its own cache."""
    x = inputs()
    if kind == "nnx":
        create = lambda: nnx.MultiHeadAttention(HEADS, FEATURES, num_kv_heads=2, decode=True, rngs=nnx.Rngs(0))  # noqa: E731
        params = of_nnx(create)[0]
        own = nnx_with(create, params)
        own.init_cache((B, CAPACITY, FEATURES))
        step = nnx.jit(lambda layer, x: layer(x))
        ours = Decoder(kind, params, (B, CAPACITY, FEATURES), num_heads=HEADS, num_kv_heads=2)
        theirs = functools.partial(step, own)
    else:
        own = linen.MultiHeadDotProductAttention(HEADS, decode=True)
        params = of_linen(own, inputs())[0]
        cache = jax.jit(own.init)(jax.random.key(0), jnp.zeros((B, CAPACITY, FEATURES)))["cache"]
        step = jax.jit(lambda cache, x: own.apply({"params": params, "cache": cache}, x, mutable=["cache"]))
        ours = Decoder(kind, params, (B, CAPACITY, FEATURES), num_heads=HEADS)

        def theirs(x):
            nonlocal cache
            out, changed = step(cache, x)
            cache = changed["cache"]
            return out

    for i in range(T):
        assert_close(ours(x[:, i : i + 1]), theirs(x[:, i : i + 1]))


@in_float32
def test_positions_may_be_given():
    """Only distances matter to the rotary embedding, until there is a gap."""
    x, options = inputs(), dict(**GROUPED, rotary=Rotary())
    params, apply = make("nnx", x, **options)
    apply = jax.jit(functools.partial(apply, is_causal=True))
    for positions in (jnp.arange(T) + 100, jnp.arange(T) + 7 * (jnp.arange(T) > 9)):
        expected = apply(params, x, input_positions=positions)
        session = Session("nnx", params, False, **options)
        for start, end in ((0, 10), (10, 20)):
            each = jnp.broadcast_to(positions[start:end], (B, end - start))
            assert_close(session(x[:, start:end], input_positions=each), expected[:, start:end], 2e-4)
    assert np.abs(expected - apply(params, x)).max() > 1e-3


@PAGED
def test_what_has_no_place_is_not_a_number(paged, dtype):
    x = inputs(dtype=dtype)
    params, _ = make("nnx", x, **GROUPED, dtype=dtype)
    session = Session("nnx", params, paged, dtype=dtype, **GROUPED)
    session(x, q_lengths=jnp.array([10, T, T]))
    out = session(x[:, :12], q_lengths=jnp.array([12, 12, 0]))
    assert np.isfinite(out.astype(jnp.float32)).all()  # exactly full, or nothing new
    for length in (1, 8):
        out = np.asarray(session(x[:, :length], q_lengths=jnp.array([1, 1, 1])).astype(jnp.float32))
        assert np.isfinite(out[[0, 2], 0]).all() and np.isnan(out[1, 0]).all()
    out = session(x[:, :8], q_lengths=jnp.array([8, 0, 8]))
    assert np.isfinite(out[jnp.array([0, 1])].astype(jnp.float32)).all()  # 32 tokens; a full one that adds nothing
    out = session(x[:, :1], q_lengths=jnp.array([0, 0, 1])).astype(jnp.float32)
    assert np.isfinite(out).all()


def test_what_has_no_page_is_not_a_number(dtype):
    """A pool of 4 pages for three sequences: the last gets none, until another ends."""
    x = inputs(dtype=dtype)
    params, _ = make("linen", x, **GROUPED, dtype=dtype)
    session = Session("linen", params, True, pages=4, dtype=dtype, **GROUPED)
    finite = lambda out: np.isfinite(np.asarray(out, np.float32)).all(axis=(1, 2)).tolist()  # noqa: E731
    assert finite(session(x[:, :9])) == [True, True, False]
    assert session.table.lengths.tolist() == [9, 9, 0]
    assert finite(session(x[:, :9], q_lengths=jnp.array([7, 1, 0]))) == [True, True, True]  # padding needs no page
    session.table = session.table.release(jnp.array([True, False, False]))
    assert finite(session(x[:, :9], q_lengths=jnp.array([0, 0, 9]))) == [True, True, True]


@in_float32
def test_prefixes_are_shared():
    """Three sequences of a pool that would not hold them apart."""
    x, options = inputs(), dict(**GROUPED, rotary=Rotary())
    x = jnp.concatenate([jnp.broadcast_to(x[:1, :16], (B, 16, FEATURES)), x[:, 16:]], axis=1)
    params, apply = make("linen", x, **options)
    session = Session("linen", params, True, pages=2 + B, **options)
    session(x[:, :16], q_lengths=jnp.array([16, 0, 0]))
    for target in (1, 2):
        session.table = session.table.share(0, target, 16)
    assert_close(session(x[:, 16:]), jax.jit(functools.partial(apply, is_causal=True))(params, x)[:, 16:])
    assert session.table.num_free() == 0


@in_float32
@BOTH
def test_a_cache_of_another_dtype(kind):
    """Attention is computed in the cache's dtype; the output has the layer's."""
    x = inputs()
    params, apply = make(kind, x, **GROUPED)
    decoder = Decoder(kind, params, (B, CAPACITY, FEATURES), cache_dtype="bfloat16", **GROUPED)
    out = decoder(x)
    assert out.dtype == x.dtype and decoder.arrays["cached_key"].dtype == jnp.bfloat16
    assert_close(out, jax.jit(functools.partial(apply, is_causal=True))(params, x), 0.05)
    default = Decoder(kind, params, (B, CAPACITY, FEATURES), **GROUPED, param_dtype="float16")
    assert default.arrays["cached_value"].dtype == jnp.float16


def made_of_size(text, shape):
    """The operations of a compiled program that make an array of this shape anew."""
    size = ",".join(map(str, shape))
    return re.findall(rf"= \w+\[{size}\]\S* (copy|copy-start|fusion|transpose|dynamic-update-slice|scatter)\(", text)


@BOTH
@PAGED
def test_updates_in_place(kind, paged, dtype):
    options = dict(**GROUPED, rotary=Rotary(), dtype=dtype)
    x = inputs(dtype=dtype)
    params, _ = make(kind, x, **options)
    with jax.default_device(jax.devices()[0]):
        session = Session(kind, params, paged, **options)
    decoder, keys = session.decoder, session.decoder.arrays["cached_key"]
    call = {"page_table": session.table} if paged else {}
    compiled = decoder.step.lower(decoder.cache, decoder.rest, x[:, :1], call).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * keys.nbytes
    assert not made_of_size(compiled.as_text(), keys.shape)
    pointer = keys.unsafe_buffer_pointer()
    session(x[:, :1])
    assert decoder.arrays["cached_key"].unsafe_buffer_pointer() == pointer


def test_nnx_jit_updates_in_place(dtype):
    layer = NnxAttention(in_features=FEATURES, **GROUPED, dtype=dtype, rngs=nnx.Rngs(0))
    layer.init_cache((B, CAPACITY, FEATURES))
    step = nnx.jit(lambda layer, x: layer(x, decode=True), donate_argnums=0)
    x, pointer = inputs(dtype=dtype), layer.cached_value[...].unsafe_buffer_pointer()
    for i in range(3):
        step(layer, x[:, i : i + 1])
    assert layer.cached_value[...].unsafe_buffer_pointer() == pointer
    assert layer.cache_index[...].tolist() == [3] * B


@in_float32
def test_nnx_views():
    """nnx.view switches a model to decoding, and set_attributes too."""
    layer = NnxAttention(in_features=FEATURES, **GROUPED, rngs=nnx.Rngs(0))
    x = inputs()
    view = nnx.view(layer, decode=True, batch_size=B, max_length=CAPACITY)
    outs = [view(x[:, :9]), view(x[:, 9:])]
    assert_close(jnp.concatenate(outs, axis=1), layer(x, is_causal=True))
    assert layer.cached_key is None and view.cached_key.shape == (B, CAPACITY, 2, H)
    layer.init_cache((B, CAPACITY, FEATURES))
    layer.set_attributes(decode=True)
    assert_close(layer(x[:, :9]), outs[0])
    layer.init_cache((B, CAPACITY, FEATURES))  # begins anew
    assert_close(layer(x[:, :9]), outs[0])


@in_float32
def test_loop_on_the_device():
    """Steps inside lax.scan, with the cache as its carry."""
    x, options = inputs(), dict(**GROUPED, rotary=Rotary())
    params, apply = make("nnx", x, **options)
    decoder = Decoder("nnx", params, (B, CAPACITY, FEATURES), **options)

    @jax.jit
    def run(cache, rest, x):
        def body(cache, token):
            out, cache = decoder.step(cache, rest, token[:, None], {})
            return cache, out[:, 0]

        return jax.lax.scan(body, cache, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    assert_close(run(decoder.cache, decoder.rest, x), jax.jit(functools.partial(apply, is_causal=True))(params, x))


@in_float32
@BOTH
def test_sharded_cache(kind):
    """Batch over four devices and KV heads over two: each writes to its part of the cache, and nothing is gathered."""
    rules = (("batch", "data"), ("heads", "model"), ("kv_heads", "model"), ("embed", None), ("head_dim", None))
    devices = np.array(jax.devices("cpu")).reshape(4, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    options = dict(**GROUPED, rotary=Rotary())
    x = inputs(shape=(4, T, FEATURES))
    params, apply = make(kind, x, **options)
    expected = jax.jit(functools.partial(apply, is_causal=True))(params, x)
    with jax.set_mesh(mesh), linen.logical_axis_rules(rules):
        place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
        params = {
            name: {
                "kernel": place(p["kernel"], *(("model",) if name == "out" else (None, "model"))),
                "bias": place(p["bias"], *(() if name == "out" else ("model",))),
            }
            for name, p in params.items()
        }
        if kind == "nnx":
            decoder = Decoder(kind, params, (4, CAPACITY, FEATURES), **options, axis_names=AxisNames())
        else:
            decoder = Decoder(kind, params, (4, CAPACITY, FEATURES), **options)
            axes = LinenAttention(**options, decode=True, axis_names=AxisNames())
            boxes = axes.init(jax.random.key(0), jnp.zeros((4, CAPACITY, FEATURES)))["cache"]
            specs = linen.logical_to_mesh_sharding(linen.get_partition_spec(boxes), mesh, rules)
            decoder.cache = jax.device_put(decoder.cache, specs)
        for name in ("cached_key", "cached_value"):
            assert decoder.arrays[name].sharding.spec == P("data", None, "model", None)
        x = place(x, "data")
        compiled = decoder.step.lower(decoder.cache, decoder.rest, x[:, :5], {}).compile()
        assert not re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", compiled.as_text())
        outs = [decoder(x[:, :5]), decoder(x[:, 5:])]
    assert_close(jnp.concatenate(outs, axis=1), expected)


def mistakes():
    x = inputs()
    layer = NnxAttention(HEADS, FEATURES, decode=True, rngs=nnx.Rngs(0))
    layer.init_cache((B, CAPACITY, FEATURES))
    table = PageTable.create(B, 4, 12, PAGE)
    paged = NnxAttention(HEADS, FEATURES, decode=True, rngs=nnx.Rngs(0))
    paged.init_paged_cache(12, PAGE)
    linen_layer = LinenAttention(HEADS, decode=True)
    params = linen_layer.init(jax.random.key(0), x)["params"]
    mask = jnp.ones((T, CAPACITY), bool)

    def without_cache():
        return linen_layer.apply({"params": params}, x, mutable=["cache"])

    return {
        "no-cache": (ValueError, "init_cache", lambda: NnxAttention(HEADS, FEATURES, rngs=nnx.Rngs(0))(x, decode=True)),
        "linen-no-cache": (ValueError, r"init\(...\)\['cache'\]", without_cache),
        "mask": (NotImplementedError, "q_lengths says which", lambda: layer(x, mask=mask)),
        "kv-lengths": (ValueError, "q_lengths counts", lambda: layer(x, kv_lengths=jnp.ones(B, int))),
        "cache-shape": (ValueError, r"\(B, max_length, features\); got \(3, 32\)", lambda: layer.init_cache((B, 32))),
        "axes": (ValueError, r"\(B, T, features\)", lambda: layer(x[0])),
        "keys": (ValueError, "same T new tokens", lambda: layer(x, x[:, :3])),
        "batch": (ValueError, "for 3 sequences", lambda: layer(x[:2])),
        "no-table": (ValueError, "paged, which needs one", lambda: paged(x)),
        "table": (ValueError, "contiguous, which takes none", lambda: layer(x, page_table=table)),
        "page-size": (ValueError, "multiple of 8", lambda: paged.init_paged_cache(12, 10)),
        "without-decode": (ValueError, "page_table", lambda: layer(x, decode=False, page_table=table)),
        "q-lengths": (ValueError, "q_lengths", lambda: layer(x, q_lengths=jnp.ones(2, int))),
    }


# Not even their layers can be made on a GPU, which has no float32 kernel.
@pytest.mark.parametrize("case", mistakes() if jax.default_backend() != "gpu" else ())
def test_mistakes_are_named(case):
    error, message, call = mistakes()[case]
    with pytest.raises(error, match=message):
        call()
