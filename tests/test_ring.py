"""Ring attention on CPU devices against the reference on the whole sequences, and what goes from device to device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash
from jax_flash import reference, ring

pytestmark = pytest.mark.usefixtures("quick_compilation")

T, N, K, H = 32, 4, 2, 16


def make_mesh(n, data=1, kind=AxisType.Auto):
    devices = np.array(jax.devices("cpu")[: data * n]).reshape(data, n)
    return jax.sharding.Mesh(devices, ("data", "context"), axis_types=(kind,) * 2)


def normal(*shape, seed=0, dtype=jnp.float32):
    with jax.default_device(jax.devices("cpu")[0]):
        return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def make_qkv(B=2, T=T, S=T, dtype=jnp.float32):
    return [normal(B, size, heads, H, seed=i, dtype=dtype) for i, (size, heads) in enumerate(((T, N), (S, K), (S, K)))]


def sharded(n, layout, mesh, **options):
    """(q, k, v, named arrays) of whole sequences to (out, lse) of them, through a ring of n devices."""
    names = [name for name in ("q_lengths", "kv_lengths", "sinks") if name in options]
    static = {name: x for name, x in options.items() if name not in names}
    specs = {"sinks": P(), "q_lengths": P("data"), "kv_lengths": P("data")}

    def attend(q, k, v, *rest):
        named = dict(zip(names, rest, strict=True))
        return jax_flash.ring_attention(
            q, k, v, axis_name="context", layout=layout, return_softmax_lse=True, **static, **named
        )

    tokens = P("data", "context")
    attend = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, *(specs[name] for name in names)),
        out_specs=(tokens, P("data", None, "context")),
    )

    def whole(q, k, v):
        if layout == "zigzag":
            q, k, v = (ring.zigzag(x, n) for x in (q, k, v))
        q, k, v = (place(x, mesh, tokens) for x in (q, k, v))
        out, lse = attend(q, k, v, *(options[name] for name in names))
        out, lse = place(out, mesh, P()), place(lse, mesh, P())
        return (ring.unzigzag(out, n), ring.unzigzag(lse, n, axis=2)) if layout == "zigzag" else (out, lse)

    return whole


def place(x, mesh, spec):
    """Constrained on automatic axes, and resharded on explicit ones."""
    if mesh.axis_types[0] == AxisType.Explicit:
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def loss(attend, *qkv):
    out, lse = attend(*qkv)
    out = out.astype(jnp.float32)
    return jnp.sum(out * jnp.sin(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape))) + jnp.sum(
        jnp.where(lse == -jnp.inf, 0.0, jnp.cos(lse))
    )


def both(attend, qkv):
    return attend(*qkv), jax.grad(functools.partial(loss, attend), (0, 1, 2))(*qkv)


def check(n, layout, qkv, kind=AxisType.Auto, data=1, tolerance=1e-5, **options):
    mesh = make_mesh(n, data, kind)
    with jax.set_mesh(mesh):
        ours = jax.jit(functools.partial(both, sharded(n, layout, mesh, **options)))(qkv)
    exact = [x.astype(jnp.float32) for x in qkv]
    options.pop("implementation", None)
    with jax.default_device(jax.devices("cpu")[0]):
        theirs = both(functools.partial(reference.attention, return_softmax_lse=True, **options), exact)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(1.0, float(jnp.max(jnp.abs(jnp.where(jnp.isfinite(b), b, 0.0)))))
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0, atol=tolerance * scale)


LAYOUTS = pytest.mark.parametrize("layout", ring.LAYOUTS)
lengths = np.array([5, T], np.int32)

OPTIONS = {
    "full": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(5, 0)),
    "both-sides": dict(window_size=(9, 3), softcap=2.0),
    "lengths": dict(causal=True, q_lengths=lengths, kv_lengths=np.array([9, 17], np.int32)),
    "kv-lengths": dict(kv_lengths=np.array([0, 20], np.int32)),
    "sinks": dict(causal=True, q_lengths=lengths, sinks=np.array([0.5, -1.0, 2.0, -np.inf], np.float32)),
}


@LAYOUTS
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_whole_sequences(options, layout):
    check(2, layout, make_qkv(), **options)


@LAYOUTS
def test_windows_skip_steps(layout):
    check(4, layout, make_qkv(), window_size=(5, 2))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("implementation", ["all_to_all", "all_gather"])
def test_other_implementations(implementation, options):
    check(2, "zigzag", make_qkv(), implementation=implementation, **options)


@pytest.mark.parametrize("implementation", ["all_to_all", "all_gather"])
def test_other_implementations_on_contiguous_tokens(implementation):
    check(2, "contiguous", make_qkv(S=64), data=2, kind=AxisType.Explicit, implementation=implementation, causal=True)


@pytest.mark.parametrize("n", [1, 2, 8])
def test_any_number_of_devices(n):
    check(n, "zigzag", make_qkv(), causal=True)


@LAYOUTS
@pytest.mark.parametrize("S", [16, 64])
def test_other_number_of_keys(S, layout):
    check(2, layout, make_qkv(S=S), causal=True)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_batch_on_another_axis(kind):
    check(2, "zigzag", make_qkv(), kind=kind, data=2, causal=True)


def test_negative_scale():
    check(2, "zigzag", make_qkv(), causal=True, softmax_scale=-0.3)


def test_bfloat16():
    check(4, "zigzag", make_qkv(dtype=jnp.bfloat16), causal=True, tolerance=0.02)


def test_gradient_of_sinks():
    sinks, mesh, qkv = normal(N), make_mesh(4), make_qkv()

    def of_sinks(attend, sinks):
        return loss(attend(sinks), *qkv)

    with jax.set_mesh(mesh):
        ours = jax.jit(
            jax.grad(functools.partial(of_sinks, lambda x: sharded(4, "zigzag", mesh, causal=True, sinks=x)))
        )(sinks)
    theirs = jax.grad(
        functools.partial(
            of_sinks, lambda x: functools.partial(reference.attention, causal=True, sinks=x, return_softmax_lse=True)
        )
    )(sinks)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def permutes(f, *args) -> int:
    lowered = jax.jit(f).lower(*args)
    others = r" (?:all-gather|all-reduce|all-to-all|reduce-scatter)(?:-start)?\("
    assert not re.findall(others, lowered.compile().as_text())
    return lowered.as_text().count("stablehlo.collective_permute")  # XLA for CPUs may find some of them equal


def communication(n, layout="contiguous", T=T, **options):
    """The permutes of the forward pass, and of forward and backward together."""
    mesh = make_mesh(n)
    attend = jax.shard_map(
        functools.partial(jax_flash.ring_attention, axis_name="context", layout=layout, **options),
        mesh=mesh,
        in_specs=P("data", "context"),
        out_specs=P("data", "context"),
    )
    qkv = [jax.device_put(x, NamedSharding(mesh, P("data", "context"))) for x in make_qkv(T=T, S=T)]

    def both(q, k, v):
        _, pull = jax.vjp(attend, q, k, v)
        return pull(q)

    return permutes(attend, *qkv), permutes(both, *qkv)


@pytest.mark.parametrize("n", [1, 2, 4])
@LAYOUTS
def test_keys_and_values_move_once_a_step(n, layout):
    forward, together = communication(n, layout, causal=True)
    assert forward == 2 * (n - 1)
    assert together - forward == (4 * (n - 1) + 2 if n > 1 else 0)  # gradients go along, and home


def test_a_window_makes_the_steps_that_it_needs():
    assert communication(8, window_size=(4, 0))[0] == 2 * 1
    assert communication(8, window_size=(5, 0))[0] == 2 * 2
    assert communication(8, window_size=(4, 4))[0] == 2 * 2


def test_gradients_repeat_bit_for_bit():
    mesh, qkv = make_mesh(4), make_qkv()
    f = jax.jit(functools.partial(both, sharded(4, "zigzag", mesh, causal=True, deterministic=True)))
    with jax.set_mesh(mesh):
        jax.tree.map(np.testing.assert_array_equal, f(qkv), f(qkv))


def on_mesh(x, mesh, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_outside_of_shard_map(kind):
    """With batch and heads split too; as the arrays are sharded, and under jit as they are said to be."""
    devices = np.array(jax.devices("cpu")[:8]).reshape(2, 2, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "context", "model"), axis_types=(kind,) * 3)
    spec, qkv, sinks = P("data", "context", "model"), make_qkv(), normal(N)
    options = dict(causal=True, kv_lengths=lengths)
    theirs = both(functools.partial(reference.attention, **options, sinks=sinks, return_softmax_lse=True), qkv)
    placed = [on_mesh(x, mesh, spec) for x in qkv]
    attend = functools.partial(ring.sharded_attention, **options, sinks=sinks, return_softmax_lse=True)
    out, lse = attend(*placed)
    assert out.sharding.spec[:3] == tuple(spec) and lse.sharding.spec == P("data", "model", "context")
    with jax.set_mesh(mesh):
        gradients = jax.jit(jax.grad(functools.partial(loss_of_whole, attend, mesh, spec), (0, 1, 2)))(*placed)
    for a, b in zip((out, lse, *gradients), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def loss_of_whole(attend, mesh, spec, *qkv):
    out, lse = attend(*qkv, sharding=NamedSharding(jax.sharding.get_abstract_mesh(), spec))
    return loss(lambda *_: (place(out, mesh, P()), place(lse, mesh, P())), *qkv)


def test_errors_outside_of_shard_map():
    q, k, v = make_qkv()
    mesh = make_mesh(2)
    with pytest.raises(ValueError, match="how q is sharded is not known here; give it as sharding="):
        jax.jit(ring.sharded_attention)(q, k, v)
    with pytest.raises(ValueError, match="a PartitionSpec needs jax"):
        ring.sharded_attention(q, k, v, sharding=P(None, "context"))
    with pytest.raises(ValueError, match=r"k must be sharded .*, as q is; got .* Reshard it"):
        q, k = on_mesh(q, mesh, P(None, "context")), on_mesh(k, mesh, P("context"))
        ring.sharded_attention(q, k, v)
    for spec, what in ((P("context"), "the tokens must be split"), (P(None, "data", None, "context"), "the head dim")):
        with pytest.raises(ValueError, match=what):
            ring.sharded_attention(v, v, v, sharding=NamedSharding(mesh, spec))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_zigzag_and_back(axis):
    x = normal(8, 8, 8)
    y = ring.zigzag(x, 4, axis)
    np.testing.assert_array_equal(ring.unzigzag(y, 4, axis), x)
    np.testing.assert_array_equal(jnp.moveaxis(y, axis, 0)[:2], jnp.moveaxis(x, axis, 0)[jnp.array([0, 7])])


COLLECTIVES = [
    ("all_to_all", "contiguous", {"all-to-all"}),
    ("all_gather", "contiguous", {"all-gather"}),
    ("auto", "contiguous", {"all-to-all"}),
    ("auto", "zigzag", {"collective-permute"}),
]


@pytest.mark.parametrize("implementation, layout, names", COLLECTIVES)
def test_collectives_of_implementations(implementation, layout, names):
    mesh = make_mesh(2)
    options = dict(causal=True, implementation=implementation, layout=layout)
    attend = jax.shard_map(
        functools.partial(jax_flash.ring_attention, axis_name="context", **options),
        mesh=mesh,
        in_specs=P("data", "context"),
        out_specs=P("data", "context"),
    )
    qkv = [jax.device_put(x, NamedSharding(mesh, P("data", "context"))) for x in make_qkv()]
    text = jax.jit(attend).lower(*qkv).compile().as_text()
    found = re.findall(r" (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", text)
    assert set(found) == names


@LAYOUTS
def test_positions(layout):
    of_device = functools.partial(ring.positions, 4, axis_name="context", layout=layout)
    ours = jax.shard_map(of_device, mesh=make_mesh(4), in_specs=(), out_specs=P("context"))()
    expected = jnp.arange(16, dtype=jnp.int32)
    np.testing.assert_array_equal(ours, ring.zigzag(expected, 4, 0) if layout == "zigzag" else expected)


def test_errors():
    q, k, v = make_qkv()
    with pytest.raises(ValueError, match="must be an axis of the mesh of the jax"):
        jax_flash.ring_attention(q, k, v, axis_name="context")
    with pytest.raises(ValueError, match="multiple of twice the number of devices"):
        ring.zigzag(q, 5)

    def call(n=2, **options):
        attend = functools.partial(jax_flash.ring_attention, axis_name="context", **options)
        jax.shard_map(attend, mesh=make_mesh(n), in_specs=P(None, "context"), out_specs=P(None, "context"))(q, k, v)

    with pytest.raises(ValueError, match="implementation must be one of 'auto', 'ring', 'all_to_all'"):
        call(implementation="tree")
    with pytest.raises(ValueError, match=r"all_to_all needs .* that the 4 devices divide; got k"):
        call(4, implementation="all_to_all")
    with pytest.raises(ValueError, match="layout must be one of 'contiguous', 'zigzag'; got 'striped'"):
        call(layout="striped")
