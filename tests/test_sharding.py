"""Meshes of eight CPU devices: the right numbers, and no communication where none is needed."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash
from jax_flash import reference

B, T, S, H = 4, 16, 24, 32
COLLECTIVES = ("all-gather", "all-reduce", "collective-permute", "all-to-all", "reduce-scatter")


def make_mesh(kind, shape=(2, 4), names=("data", "model")):
    devices = np.array(jax.devices("cpu")[: math.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(devices, names, axis_types=(kind,) * len(names))


def make_args(N, K, extras=False):
    rng = np.random.default_rng(0)
    with jax.default_device(jax.devices("cpu")[0]):
        args = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H))]
        if extras:
            args += [jnp.asarray(rng.random((B, N, T, S)) < 0.7), jnp.array([3, S, 0, 9], jnp.int32)]
        else:
            args += [None, None]
    return args


def attend(attention, q, k, v, mask, kv_lengths):
    return attention(q, k, v, mask, kv_lengths=kv_lengths, causal=True, return_softmax_lse=True)


def loss(attention, *args):
    out, lse = attend(attention, *args)
    return (out * jnp.cos(out)).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()


def collectives(compiled) -> set[str]:
    return set(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled.as_text()))


def place(mesh, args, specs):
    return [None if x is None else jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(args, specs, strict=True)]


def assert_close(ours, exact):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, 2e-5, 2e-5 * max(1.0, np.abs(np.asarray(b)[np.isfinite(b)]).max()))


def exact(args):
    grad = jax.grad(functools.partial(loss, reference.attention), (0, 1, 2))
    with jax.default_device(jax.devices("cpu")[0]):
        return attend(reference.attention, *args), grad(*args)


def run(mesh, args):
    """((out, lse), grads), and the collectives in either program."""
    with jax.set_mesh(mesh):
        forward = jax.jit(functools.partial(attend, jax_flash.attention)).lower(*args).compile()
        backward = jax.jit(jax.grad(functools.partial(loss, jax_flash.attention), (0, 1, 2))).lower(*args).compile()
        return (forward(*args), backward(*args)), collectives(forward), collectives(backward)


BOTH = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)

# heads, KV heads, how q and k and v are placed
PLACEMENTS = {
    "batch": (8, 4, P("data"), P("data")),
    "batch-over-both": (8, 4, P(("data",)), P(("data",))),
    "heads": (8, 8, P(None, None, "model"), P(None, None, "model")),
    "heads-over-both": (8, 8, P(None, None, ("data", "model")), P(None, None, ("data", "model"))),
    "batch-and-heads": (8, 8, P("data", None, "model"), P("data", None, "model")),
    "grouped": (8, 4, P("data", None, "model"), P("data", None, "model")),
    "one-kv-head": (8, 1, P("data"), P("data")),
    "replicated": (8, 2, P(), P()),
}


@BOTH
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "mask-and-lengths"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_no_communication(kind, placement, extras):
    N, K, q_spec, k_spec = PLACEMENTS[placement]
    mesh, args = make_mesh(kind), make_args(N, K, extras)
    batch = P(*q_spec[:1])
    placed = place(mesh, args, (q_spec, k_spec, k_spec, batch, batch))
    (outs, grads), forward, backward = run(mesh, placed)
    assert_close((outs, grads), exact(args))
    assert not forward and not backward
    assert outs[0].sharding.is_equivalent_to(placed[0].sharding, 4)
    for gradient, x in zip(grads, placed, strict=False):
        assert gradient.sharding.is_equivalent_to(x.sharding, 4)


@BOTH
@pytest.mark.parametrize("K", [1, 2])
def test_more_head_shards_than_kv_heads(kind, K):
    """On explicit axes nothing is gathered in the forward pass; on automatic axes it is still right."""
    mesh, args = make_mesh(kind), make_args(8, K, extras=True)
    placed = place(mesh, args, (P("data", None, "model"), P("data"), P("data"), P("data"), P("data")))
    results, forward, _ = run(mesh, placed)
    assert_close(results, exact(args))
    assert kind == AxisType.Auto or not forward


@pytest.mark.parametrize("K", [1, 2])
def test_repeated_kv_heads_spare_the_gather(K):
    """The way out on automatic axes: k and v repeated to as many heads as there are shards, and split."""
    mesh, args = make_mesh(AxisType.Auto), make_args(8, K)
    placed = place(mesh, args, (P("data", None, "model"), P("data"), P("data"), P(), P()))

    def repeated(q, k, v, *extras):
        split = NamedSharding(mesh, P("data", None, "model"))
        k, v = (jax.lax.with_sharding_constraint(jnp.repeat(x, 4 // K, axis=2), split) for x in (k, v))
        return attend(jax_flash.attention, q, k, v, *extras)

    with jax.set_mesh(mesh):
        compiled = jax.jit(repeated).lower(*placed).compile()
    assert_close(compiled(*placed), exact(args)[0])
    assert not collectives(compiled)


@BOTH
def test_sharded_time_is_right_or_refused(kind):
    mesh, args = make_mesh(kind), make_args(8, 4)
    placed = place(mesh, args, (P(None, "data"), P(), P(), P(), P()))
    if kind == AxisType.Explicit:
        with pytest.raises(NotImplementedError, match="only the batch and the heads"):
            run(mesh, placed)
    else:
        assert_close(run(mesh, placed)[0], exact(args))


@BOTH
def test_vmap_over_a_sharded_axis(kind):
    mesh = make_mesh(kind)
    args = [jnp.stack([x, 2 * x]) for x in make_args(4, 2)[:3]]
    placed = place(mesh, args, [P("data")] * 3)

    def mapped(attention):
        one = functools.partial(attention, causal=True)
        return jax.vmap(one, spmd_axis_name="data" if kind == AxisType.Auto else None)

    with jax.set_mesh(mesh):
        compiled = jax.jit(mapped(jax_flash.attention)).lower(*placed).compile()
    assert_close(compiled(*placed), jax.vmap(functools.partial(reference.attention, causal=True))(*args))
    assert not collectives(compiled)
    if kind == AxisType.Explicit:  # queries mapped alone over a sharded axis do not go into the heads
        with jax.set_mesh(mesh):
            alone = jax.jit(jax.vmap(jax_flash.attention, (0, None, None)))
            out = alone(placed[0], *place(mesh, [x[0] for x in args[1:]], [P(), P()]))
        assert_close(out, jax.vmap(reference.attention, (0, None, None))(args[0], args[1][0], args[2][0]))


@BOTH
@pytest.mark.parametrize("mapped", ["q", "mask", "q-and-mask"])
def test_vmap_over_part_of_the_arguments_keeps_each_device_its_own(mapped, kind):
    """Over a sharded axis: nothing is gathered, and each device calls the kernel for its own part alone."""
    mesh, (q, k, v, *_) = make_mesh(kind, (8,), ("x",)), make_args(4, 2)
    axes = (0 if "q" in mapped.split("-") else None, None, None, 0 if "mask" in mapped else None)
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((8, *q.shape)), q.dtype) if axes[0] == 0 else q
    mask = jnp.asarray(rng.random((8, B, 4, T, S) if axes[3] == 0 else (B, 4, T, S)) < 0.7)
    args = q, k, v, mask
    placed = place(mesh, args, [P() if axis is None else P("x") for axis in axes])
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.vmap(jax_flash.attention, axes)).lower(*placed).compile()
    out = compiled(*placed)
    assert_close(out, jax.vmap(reference.attention, axes)(*args))
    assert not collectives(compiled)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("x")), 5)
    (call,) = re.findall(r"= \(f32\[([\d,]+)\].* custom-call\(.*jax_flash_forward", compiled.as_text())
    assert math.prod(map(int, call.split(","))) == out.size // 8


@pytest.mark.parametrize("option", ["plain", "causal", "window", "mask", "lengths", "all"])
@pytest.mark.parametrize("K", [8, 2])
def test_dot_product_attention_on_explicit_axes(K, option):
    """Rows that see nothing included, which get the mean of the values."""
    mesh, (q, k, v, mask, lengths) = make_mesh(AxisType.Explicit), make_args(8, K, extras=True)
    options = {
        "plain": {},
        "causal": dict(is_causal=True),
        "window": dict(local_window_size=(2, 1)),
        "mask": dict(mask=mask.at[0, :, 3].set(False)),
        "lengths": dict(query_seq_lengths=jnp.array([T, 3, T, 0], jnp.int32), key_value_seq_lengths=lengths),
    }
    options["all"] = {name: x for each in list(options.values()) for name, x in each.items()}
    options = options[option]
    arrays = {"mask": P("data", "model"), "query_seq_lengths": P("data"), "key_value_seq_lengths": P("data")}
    arrays = {name: spec for name, spec in arrays.items() if name in options}
    static = {name: x for name, x in options.items() if name not in arrays}
    kv = P("data", None, "model") if K == 8 else P("data")
    args = place(mesh, (q, k, v), (P("data", None, "model"), kv, kv))
    placed = dict(zip(arrays, place(mesh, [options[name] for name in arrays], arrays.values()), strict=True))

    def run(attention, q, k, v, extras):
        out, pull = jax.vjp(functools.partial(attention, **static, **extras), q, k, v)
        return out, pull(jnp.cos(out))

    with jax.set_mesh(mesh):
        ours = jax.jit(functools.partial(run, jax_flash.dot_product_attention))(*args, placed)
    with jax.default_device(jax.devices("cpu")[0]):
        exact = run(jax.nn.dot_product_attention, q, k, v, {name: options[name] for name in arrays})
    assert_close(ours, exact)
    assert ours[0].sharding.is_equivalent_to(args[0].sharding, 4)


@BOTH
@pytest.mark.parametrize("manual", [{"data", "model"}, {"data"}], ids=["manual", "partly-manual"])
@pytest.mark.parametrize("shared", [False, True], ids=["split", "shared-kv"])
def test_shard_map(kind, manual, shared):
    """Gradients of what every device shares are summed over the devices."""
    mesh, args = make_mesh(kind), make_args(8, 4)[:3]
    if shared:
        args[1:] = [jnp.broadcast_to(x[:1], x.shape) for x in args[1:]]
    inputs = [args[0], *(x[:1] if shared else x for x in args[1:])]
    k_spec = P() if shared else P("data")
    placed = place(mesh, inputs, (P("data"), k_spec, k_spec))

    def body(q, k, v):
        k, v = (jnp.broadcast_to(x, (q.shape[0], *x.shape[1:])) for x in (k, v))
        return jax_flash.attention(q, k, v, causal=True, return_softmax_lse=True)

    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(P("data"), k_spec, k_spec), out_specs=P("data"), axis_names=manual
    )

    def total(attend, *args):
        out, lse = attend(*args)
        return (out * jnp.cos(out)).sum() + lse.sum()

    def plain(q, k, v):
        k, v = (jnp.broadcast_to(x, (B, *x.shape[1:])) for x in (k, v))
        return reference.attention(q, k, v, causal=True, return_softmax_lse=True)

    with jax.set_mesh(mesh):
        outs = jax.jit(mapped)(*placed)
        grads = jax.jit(jax.grad(functools.partial(total, mapped), (0, 1, 2)))(*placed)
    assert_close(outs, plain(*inputs))
    assert_close(grads, jax.grad(functools.partial(total, plain), (0, 1, 2))(*inputs))


def test_shard_map_of_replicated_keys():
    """k and v enter replicated and are used by queries that vary: dk and dv are sums over the mesh."""
    mesh, (q, k, v, *_) = make_mesh(AxisType.Auto, (8,), ("data",)), make_args(8, 4)
    q = jnp.concatenate([q, q + 1], axis=0)
    k, v = k[0], v[0]

    def total(wrap, q, k, v):
        body = jax.vmap(functools.partial(wrap, causal=True), (0, None, None))
        if wrap is jax_flash.attention:
            body = jax.shard_map(body, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data"))
        return (body(q, k, v) ** 2).sum()

    def plain(q, k, v, **options):
        return reference.attention(q[None], k[None], v[None], **options)[0]

    grads = jax.jit(jax.grad(functools.partial(total, jax_flash.attention), (0, 1, 2)))(q, k, v)
    assert_close(grads, jax.grad(functools.partial(total, plain), (0, 1, 2))(q, k, v))


@BOTH
def test_scan_and_remat(kind):
    mesh, args = make_mesh(kind), make_args(8, 4)[:3]
    placed = place(mesh, args, [P("data", None, "model")] * 3)

    def total(attention, q, k, v):
        layer = jax.checkpoint(lambda q, _: (attention(q, k, v, causal=True), None))
        return (jax.lax.scan(layer, q, None, length=3)[0] ** 2).sum()

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(functools.partial(total, jax_flash.attention), (0, 1, 2))).lower(*placed).compile()
    assert_close(compiled(*placed), jax.grad(functools.partial(total, reference.attention), (0, 1, 2))(*args))
    assert not collectives(compiled)


def test_export_of_a_sharded_program():
    mesh, args = make_mesh(AxisType.Auto), make_args(8, 4)[:3]
    placed = place(mesh, args, [P("data", None, "model")] * 3)
    run = jax.jit(functools.partial(jax_flash.attention, causal=True))
    safe = [jax.export.DisabledSafetyCheck.custom_call("jax_flash_forward")]
    exported = jax.export.export(run, platforms=["cpu"], disabled_checks=safe)(*placed)
    assert exported.nr_devices == 8
    compiled = jax.jit(exported.call).lower(*placed).compile()
    assert_close(compiled(*placed), reference.attention(*args, causal=True))
    assert not collectives(compiled)


def test_one_device_program_does_not_transpose():
    """On one CPU device the call takes the arrays as they lie."""
    args = make_args(8, 4)[:3]
    with jax.default_device(jax.devices("cpu")[0]):
        text = jax.jit(functools.partial(jax_flash.attention, causal=True)).lower(*args).compile().as_text()
    assert not re.search(r" (transpose|copy)\(", text)
