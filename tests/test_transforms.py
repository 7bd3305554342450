"""vmap in every pattern, and jit, grad, remat, scan, export and the compilation cache around the primitives."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import jax_flash
from jax_flash import reference

B, T, S, N, K, H = 2, 5, 7, 4, 2, 8
ARGUMENTS = ("q", "k", "v", "mask", "q_lengths", "kv_lengths")
SHAPES = dict(q=(B, T, N, H), k=(B, S, K, H), v=(B, S, K, H), mask=(B, N, T, S), q_lengths=(B,), kv_lengths=(B,))
MAPPED = 3


def make(name, dtype, lead=()):
    """A random argument with extra axes in front."""
    rng = np.random.default_rng(ARGUMENTS.index(name))
    shape = (*lead, *SHAPES[name])
    if name == "mask":
        return jnp.asarray(rng.random(shape) < 0.7)
    if name.endswith("lengths"):
        return jnp.asarray(rng.integers(0, S + 2, shape), jnp.int32)
    return jnp.asarray(rng.standard_normal(shape), dtype)


def attend(attention, q, k, v, mask, q_lengths, kv_lengths):
    return attention(q, k, v, mask, q_lengths=q_lengths, kv_lengths=kv_lengths, causal=True, return_softmax_lse=True)


def loss(attention, *args):
    """Uses the output and the LSE, both nonlinearly."""
    out, lse = attend(attention, *args)
    out = out.astype(jnp.float32)
    return jnp.sum(out * jnp.cos(out)) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) ** 2)


def assert_same(transform, args, dtype):
    """transform(attention)(*args) is right in every leaf, shapes included."""
    ours = jax.jit(transform(jax_flash.attention))(*args)
    exact = [x.astype(jnp.float32) if x.dtype == jnp.dtype(dtype) else x for x in args]
    oracle = jax.jit(transform(reference.attention))(*exact)
    tolerance = 2e-5 if dtype == "float32" else 1e-2
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(oracle), strict=True):
        assert a.shape == b.shape
        scale = max([1.0, *np.abs(np.asarray(b)[np.isfinite(b)])])
        np.testing.assert_allclose(np.asarray(a, np.float32), b, tolerance, tolerance * scale)


# Every choice of mapped arguments among q, k, v and mask, with lengths mapped in some; axes other than the first too.
PATTERNS = [
    p for p in itertools.product([None, 0, 1], [None, 0], [None, 1], [None, 0]) if any(a is not None for a in p)
]
PATTERNS = [(*p, *((None, None), (0, None), (None, 0), (0, 0))[i % 4]) for i, p in enumerate(PATTERNS)]
PATTERNS += [(None,) * 4 + (0, None), (None,) * 4 + (None, 0), (0, None, None, None, None, None), (4, 2, 1, 3, 1, 0)]
PATTERNS += [(None, None, None, 2, None, None), (0, None, None, 1, None, None)]


@pytest.mark.parametrize("axes", PATTERNS, ids=lambda axes: "-".join("x" if a is None else str(a) for a in axes))
def test_vmap(axes, dtype):
    args = []
    for name, axis in zip(ARGUMENTS, axes, strict=True):
        x = make(name, dtype, () if axis is None else (MAPPED,))
        args.append(x if axis is None else jnp.moveaxis(x, 0, axis))

    def everything(attention):
        mapped = jax.vmap(functools.partial(attend, attention), axes)
        per_example = jax.vmap(jax.grad(functools.partial(loss, attention), (0, 1, 2)), axes)
        total = jax.grad(lambda *a: jax.vmap(functools.partial(loss, attention), axes)(*a).sum(), (0, 1, 2))
        return lambda *a: (mapped(*a), per_example(*a), total(*a))

    assert_same(everything, args, dtype)


@pytest.mark.parametrize("mask_shape", [(1, 1, T, S), (B, 1, 1, S), (1, N, 1, S)], ids=str)
def test_vmap_of_q_and_a_shared_mask(mask_shape, dtype):
    q, k, v = make("q", dtype, (MAPPED,)), make("k", dtype), make("v", dtype)
    masks = jnp.asarray(np.random.default_rng(0).random((MAPPED, *mask_shape)) < 0.7)

    def both(attention):
        def f(q, k, v, masks):
            unmapped = jax.vmap(lambda q: attention(q, k, v, masks[0]))(q)
            return unmapped, jax.vmap(lambda q, m: attention(q, k, v, m))(q, masks)

        return f

    assert_same(both, (q, k, v, masks), dtype)


def test_nested_vmap(dtype):
    q, k, v = make("q", dtype, (2, 3)), make("k", dtype, (3,)), make("v", dtype, (2,))

    def nested(attention):
        one = functools.partial(attention, causal=True, return_softmax_lse=True)
        two = jax.vmap(jax.vmap(one, (0, 0, None)), (0, None, 0))

        def f(q, k, v):
            only_q = jax.vmap(jax.vmap(one, (0, None, None)), (1, None, None))(q, k[0], v[0])
            grad = jax.grad(lambda *a: two(*a)[0].astype(jnp.float32).var(), (0, 1, 2))(q, k, v)
            hessian_free = jax.vmap(jax.grad(lambda *a: jax.vmap(one, (0, 0, None))(*a)[0].astype(jnp.float32).var()))
            return two(q, k, v), only_q, grad, hessian_free(q, jnp.stack([k, k]), v)

        return f

    assert_same(nested, (q, k, v), dtype)


def test_vmap_of_q_alone_reads_k_once(dtype):
    """Mapped queries become query heads: k and v enter the kernel at their own size."""
    q, k, v = make("q", dtype, (MAPPED,)), make("k", dtype), make("v", dtype)
    text = jax.jit(jax.vmap(jax_flash.attention, (0, None, None))).lower(q, k, v).as_text()
    (call,) = [line for line in text.splitlines() if "@jax_flash_forward" in line]
    assert call.count(f"tensor<{B}x{S}x{K}x{H}x") == 2 and f"x{S}x{K}x{H}x" not in text.replace(
        f"<{B}x{S}x{K}x{H}x", ""
    )


def test_vmap_of_no_examples(dtype):
    q, k, v = (make(name, dtype, (0,)) for name in "qkv")
    assert jax.vmap(jax_flash.attention)(q, k, v).shape == q.shape
    assert jax.vmap(jax_flash.attention, (0, None, None))(q, make("k", dtype), make("v", dtype)).shape == q.shape


def test_scan_and_remat(dtype):
    q, k, v = (make(name, dtype) for name in "qkv")

    def layers(attention):
        def f(q, k, v):
            step = jax.checkpoint(lambda q, _: (attention(q, k, v, causal=True), None))
            return jax.lax.scan(step, q, None, length=3)[0].astype(jnp.float32).var()

        return jax.value_and_grad(f, (0, 1, 2))

    assert_same(layers, (q, k, v), dtype)


def forward_calls(policy, dtype):
    """How often the forward primitive stands in the program of a layer's value and gradient."""
    q, k, v = (make(name, dtype) for name in "qkv")
    layer = jax.checkpoint(lambda q: jax_flash.attention(jnp.sin(q), k, v).astype(jnp.float32).sum(), policy=policy)

    def count(jaxpr):
        nested = sum(count(inner) for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params))
        return nested + sum(eqn.primitive.name == "attention_forward" for eqn in jaxpr.eqns)

    return count(jax.make_jaxpr(jax.value_and_grad(layer))(q).jaxpr)


def test_checkpoint_names_spare_a_second_forward(dtype):
    names = jax.checkpoint_policies.save_only_these_names("jax_flash_out", "jax_flash_lse")
    assert forward_calls(names, dtype) == 1
    assert forward_calls(jax.checkpoint_policies.nothing_saveable, dtype) == 2


FORWARD = {
    "jvp": lambda f, *args: jax.jvp(f, args, args),
    "jvp-of-jit": lambda f, *args: jax.jvp(jax.jit(f), args, args),
    "jit-of-jvp": lambda f, *args: jax.jit(lambda *a: jax.jvp(f, a, a))(*args),
    "jacfwd": lambda f, *args: jax.jacfwd(f)(*args),
    "linearize": lambda f, *args: jax.linearize(f, *args)[1](*args),
    "hessian": lambda f, *args: jax.hessian(lambda *a: f(*a).sum())(*args),
    "jvp-of-grad": lambda f, *args: jax.jvp(jax.grad(lambda *a: f(*a).sum()), args, args),
}


@pytest.mark.parametrize("transform", FORWARD)
def test_forward_mode_is_refused(transform, dtype):
    args = [make(name, dtype) for name in "qkv"]
    with pytest.raises(NotImplementedError, match=r"no forward mode .*jax_flash\.reference\.attention"):
        FORWARD[transform](jax_flash.attention, *args)


def test_second_order_is_refused(dtype):
    args = [make(name, dtype) for name in "qkv"]

    def loss(*args):
        return (jax_flash.attention(*args) ** 2).sum()

    with pytest.raises(NotImplementedError, match=r"derivative of its backward pass .*jax_flash\.reference\.attention"):
        jax.grad(lambda *a: jax.grad(loss)(*a).sum())(*args)
    assert jax.jacrev(loss)(*args).shape == args[0].shape


def test_without_jit(dtype):
    args = [make(name, dtype) for name in "qkv"]
    with jax.disable_jit():
        out = jax_flash.attention(*args)
    np.testing.assert_array_equal(out, jax_flash.attention(*args))


def test_debug_infs_under_jit(dtype):
    """As documented: a log-sum-exp of -inf that is not asked for is not reported there."""
    q, k, v = (make(name, dtype) for name in "qkv")
    attend = functools.partial(jax_flash.attention, kv_lengths=jnp.array([0, S]))
    with jax.debug_infs(True):
        assert np.isfinite(np.asarray(jax.jit(attend)(q, k, v), np.float32)).all()
        with pytest.raises(FloatingPointError, match="inf"):
            jax.jit(functools.partial(attend, return_softmax_lse=True))(q, k, v)


SAFE = [jax.export.DisabledSafetyCheck.custom_call(f"jax_flash_{d}") for d in ("forward", "backward")]


def test_export(dtype):
    args = [make(name, dtype) for name in ARGUMENTS]
    run = jax.jit(jax.grad(functools.partial(loss, jax_flash.attention), (0, 1, 2)))
    exported = jax.export.export(run, disabled_checks=SAFE)(*args)
    for a, b in zip(exported.call(*args), run(*args), strict=True):
        np.testing.assert_array_equal(a, b)


def test_export_with_symbolic_shapes(dtype):
    b, t, s = jax.export.symbolic_shape("b, t, s")
    shapes = dict(q=(b, t, N, H), k=(b, s, K, H), v=(b, s, K, H), mask=(b, N, t, s), q_lengths=(b,), kv_lengths=(b,))
    args = [make(name, dtype) for name in ARGUMENTS]
    run = jax.jit(jax.grad(functools.partial(loss, jax_flash.attention), (0, 1, 2)))
    symbolic = [jax.ShapeDtypeStruct(shapes[name], x.dtype) for name, x in zip(ARGUMENTS, args, strict=True)]
    exported = jax.export.export(run, disabled_checks=SAFE)(*symbolic)
    for a, b in zip(exported.call(*args), run(*args), strict=True):
        np.testing.assert_array_equal(a, b)


# The axes of vmap of q and of the mask, whose own shape may be less than (B, N, T, S).
SYMBOLIC_VMAP = {
    "q": (0, None, None),
    "q-and-shared-mask": (0, None, "b, 1, 1, s"),
    "mask": (None, 0, "b, N, t, s"),
    "small-mask": (None, 0, "t, s"),
    "q-and-mask": (0, 0, "b, 1, t, s"),
}


@pytest.mark.parametrize("case", SYMBOLIC_VMAP)
def test_vmap_over_part_exports_with_symbolic_shapes(case, dtype):
    q_axis, mask_axis, mask_shape = SYMBOLIC_VMAP[case]
    axes = (q_axis, None, None, mask_axis)
    names = dict(zip("mbts", jax.export.symbolic_shape("m, b, t, s"), strict=True)) | {"N": N, "K": K, "H": H, "1": 1}
    sizes = dict(m=MAPPED, b=B, t=T, s=S, N=N, K=K, H=H) | {"1": 1}
    shapes = ["b, t, N, H", "b, s, K, H", "b, s, K, H", mask_shape]
    shapes = [x if axis is None else f"m, {x}" for x, axis in zip(shapes, axes, strict=True)]
    symbolic, args = [], []
    for name, letters in zip(("q", "k", "v", "mask"), shapes, strict=True):
        if letters is None:
            symbolic.append(None)
            args.append(None)
            continue
        rng = np.random.default_rng(0)
        x = rng.standard_normal(tuple(sizes[letter] for letter in letters.split(", ")))
        args.append(jnp.asarray(x > 0) if name == "mask" else jnp.asarray(x, dtype))
        symbolic.append(jax.ShapeDtypeStruct(tuple(names[letter] for letter in letters.split(", ")), args[-1].dtype))
    run = jax.jit(jax.vmap(functools.partial(jax_flash.attention, return_softmax_lse=True), axes))
    exported = jax.export.export(run, disabled_checks=SAFE)(*symbolic)
    for a, b in zip(exported.call(*args), run(*args), strict=True):
        np.testing.assert_array_equal(a, b)


def test_export_for_a_platform_without_kernels():
    """Other platforms get the reference: no call of ours is in the program."""
    args = [make(name, "float32") for name in ARGUMENTS]
    run = jax.jit(jax.grad(functools.partial(loss, jax_flash.attention), (0, 1, 2)))
    exported = jax.export.export(run, platforms=["tpu"])(*args)
    assert "jax_flash" not in exported.mlir_module().split("loc(")[0]


def test_persistent_compilation_cache(tmp_path, dtype):
    """A second compilation of the same program is read from the disk."""
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    args = [make(name, dtype) for name in "qkv"]
    options = dict(
        jax_compilation_cache_dir=str(tmp_path),
        jax_persistent_cache_min_compile_time_secs=0.0,
        jax_persistent_cache_min_entry_size_bytes=-1,
    )
    with cache_options(**options):
        for _ in range(2):
            hits.clear()
            out = jax.jit(lambda *a: jax_flash.attention(*a, causal=True) + 1)(*args)
            jax.block_until_ready(out)
    assert "/jax/compilation_cache/cache_hits" in hits


class cache_options:
    """Sets global options and puts them back."""

    def __init__(self, **options):
        self.options = options

    def __enter__(self):
        from jax.experimental.compilation_cache import compilation_cache

        compilation_cache.reset_cache()
        self.before = {name: getattr(jax.config, name) for name in self.options}
        for name, value in self.options.items():
            jax.config.update(name, value)

    def __exit__(self, *_):
        from jax.experimental.compilation_cache import compilation_cache

        for name, value in self.before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
