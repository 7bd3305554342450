"""flash_attn_with_kvcache: what it computes, that it works in place, its transforms, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kvcache_oracle import CASES, Case, oracle

import jax_flash
from jax_flash import flash_attn_with_kvcache

# Bounds for the output (values are standard normal) and the LSE.
TOLERANCE = {"float32": (1e-5, 1e-5), "float16": (4e-3, 1e-3), "bfloat16": (2e-2, 1e-3)}


def call(case: Case, arrays, **options):
    return flash_attn_with_kvcache(**arrays, **(case.options() | options), return_softmax_lse=True)


def jitted(case: Case, **options):
    return jax.jit(lambda arrays: call(case, arrays, **options))


def bits(x):
    """NaN equals NaN this way."""
    return np.ascontiguousarray(x).view(f"uint{8 * x.dtype.itemsize}")


def check(case: Case, arrays, got) -> None:
    """Compares with the oracle; what the call does not append must be as it was, bit for bit."""
    out, lse, k_cache, v_cache = (np.asarray(x) for x in got)
    want_out, want_lse, want_k, want_v = oracle(case, arrays)
    assert out.dtype == case.dtype and lse.dtype == np.float32
    bound, lse_bound = TOLERANCE[case.dtype]
    np.testing.assert_allclose(out.astype(np.float32), want_out, rtol=0, atol=bound)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=lse_bound)
    np.testing.assert_array_equal(bits(v_cache), bits(want_v))
    old = np.all(bits(arrays["k_cache"]) == bits(want_k), axis=(2, 3))
    np.testing.assert_array_equal(bits(k_cache[old]), bits(want_k[old]))
    # A rotated key is rounded once, from sums in any order.
    np.testing.assert_allclose(k_cache[~old].astype(np.float32), want_k[~old].astype(np.float32), rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_oracle(case):
    arrays = case.arrays()
    check(case, arrays, jitted(case)(arrays))


@pytest.mark.parametrize(
    "case", [Case("float32", T=2, T_new=2, rotary=32), Case("float32", page=16, T=9, T_new=9)], ids=lambda c: c.id
)
def test_float32(case, platform):
    if platform != "cpu":
        pytest.skip("float32 is for the CPU")
    arrays = case.arrays()
    check(case, arrays, jitted(case)(arrays))


@pytest.mark.parametrize("case", [Case(S=4000, B=2), Case(S=4000, B=2, splits=5, page=16)], ids=lambda case: case.id)
def test_repeats_are_equal(case):
    arrays = case.arrays()
    run = jitted(case)
    first = run(arrays)
    for _ in range(20):
        for x, y in zip(first, run(arrays), strict=True):
            np.testing.assert_array_equal(bits(np.asarray(x)), bits(np.asarray(y)))


def test_the_callers_caches_stay_as_they_were():
    arrays = {name: jnp.asarray(x) for name, x in Case(T=2, T_new=2).arrays().items()}
    before = {name: np.array(x) for name, x in arrays.items()}
    jax.block_until_ready(call(Case(T=2, T_new=2), arrays))
    for name, x in arrays.items():
        np.testing.assert_array_equal(bits(np.asarray(x)), bits(before[name]))


def test_nothing_to_append_returns_the_caches():
    arrays = {name: jnp.asarray(x) for name, x in Case(T_new=0).arrays().items()}
    _, _, k_cache, v_cache = call(Case(T_new=0), arrays)
    assert k_cache is arrays["k_cache"] and v_cache is arrays["v_cache"]


# In place.


def cache_copies(text: str, shape: tuple[int, ...]) -> list[str]:
    """Lines of compiled HLO that make another array as large as the cache."""
    size = np.prod(shape)
    lines = []
    for line in text.splitlines():
        made = re.match(
            r"\s*(?:ROOT )?%?[\w.-]+ = \w+\[([\d,]+)\]\S* (copy|copy-start|fusion|transpose|dynamic-update-slice)\(",
            line,
        )
        if made and np.prod([int(n) for n in made[1].split(",")]) == size:
            lines.append(line)
    return lines


@pytest.mark.parametrize(
    "case", [Case(H=128, S=512), Case(H=128, S=512, page=16), Case(H=128, S=512, batch_index=(2, 1, 0))]
)
def test_donated_caches_are_updated_in_place(case):
    arrays = {name: jnp.asarray(x) for name, x in case.arrays().items()}
    caches = {name: arrays.pop(name) for name in ("k_cache", "v_cache")}
    step = jax.jit(lambda caches, rest: call(case, caches | rest), donate_argnums=0)
    compiled = step.lower(caches, arrays).compile()
    assert not cache_copies(compiled.as_text(), caches["k_cache"].shape)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * caches["k_cache"].nbytes
    assert memory.temp_size_in_bytes < caches["k_cache"].nbytes + 2**23
    pointer = caches["k_cache"].unsafe_buffer_pointer()
    assert step(caches, arrays)[2].unsafe_buffer_pointer() == pointer


@pytest.mark.parametrize("loop", ["while_loop", "scan"])
def test_loops_carry_the_caches_in_place(loop):
    case = Case(H=128, S=512, B=2, lengths=(3, 9))
    arrays = {name: jnp.asarray(x) for name, x in case.arrays().items()}

    def step(state):
        q, k_cache, v_cache, lengths = state
        out, k_cache, v_cache = flash_attn_with_kvcache(
            q, k_cache, v_cache, q[:, :, :2], q[:, :, 2:4], cache_seqlens=lengths, causal=True
        )
        return out, k_cache, v_cache, lengths + 1

    def run(state):
        if loop == "scan":
            return jax.lax.scan(lambda s, _: (step(s), None), state, length=20)[0]
        return jax.lax.while_loop(lambda s: s[3][0] < 23, step, state)

    state = (arrays["q"], jnp.nan_to_num(arrays["k_cache"]), jnp.nan_to_num(arrays["v_cache"]), arrays["cache_seqlens"])
    compiled = jax.jit(run, donate_argnums=0).lower(state).compile()
    assert not cache_copies(compiled.as_text(), state[1].shape)
    expected = state
    for _ in range(20):
        expected = jax.jit(step)(expected)
    for x, y in zip(compiled(state), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def test_state_of_a_flax_module():
    nnx = pytest.importorskip("flax.nnx")

    class Layer(nnx.Module):
        def __init__(self):
            self.k, self.v = (nnx.Variable(jnp.zeros((2, 128, 2, 64), jnp.bfloat16)) for _ in range(2))
            self.length = nnx.Variable(jnp.zeros((2,), jnp.int32))

        def __call__(self, q):
            out, k, v = flash_attn_with_kvcache(
                q, self.k[...], self.v[...], q[:, :, :2], q[:, :, 2:], cache_seqlens=self.length[...], causal=True
            )
            self.k[...], self.v[...], self.length[...] = k, v, self.length[...] + 1
            return out

    layer = Layer()
    graph, state = nnx.split(layer)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, q):
        layer = nnx.merge(graph, state)
        out = layer(q)
        return nnx.state(layer), out

    q = jnp.ones((2, 1, 4, 64), jnp.bfloat16)
    assert not cache_copies(step.lower(state, q).compile().as_text(), (2, 128, 2, 64))
    for _ in range(3):
        state, out = step(state, q)
    assert int(jax.tree.leaves(state["length"])[0][0]) == 3
    np.testing.assert_array_equal(np.asarray(out, np.float32), 1)


# The guide configuration of FlashAttention inference.


def test_guide_configuration():
    """Batch 1, 32 heads, head dim 128, bfloat16, a cache of zeros for 8192 positions, growing token by token."""
    k_cache = v_cache = jnp.zeros((1, 8192, 32, 128), jnp.bfloat16)
    cache_seqlens = jnp.array([0], jnp.int32)
    step = jax.jit(
        functools.partial(flash_attn_with_kvcache, causal=True, num_splits=4, return_softmax_lse=True),
        donate_argnums=(1, 2),
    )
    v_cache = v_cache + 0
    rng = np.random.default_rng(0)
    keys, values = [], []
    for _ in range(6):
        q, k, v = (jnp.asarray(rng.standard_normal((1, 1, 32, 128)), jnp.bfloat16) for _ in range(3))
        out, lse, k_cache, v_cache = step(q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens)
        cache_seqlens = cache_seqlens + 1
        keys.append(np.asarray(k, np.float32)[0, 0])
        values.append(np.asarray(v, np.float32)[0, 0])
        score = np.einsum("nh,snh->ns", np.asarray(q, np.float32)[0, 0], np.stack(keys)) * 128**-0.5
        want = np.log(np.exp(score).sum(-1))
        np.testing.assert_allclose(np.asarray(lse)[0, :, 0], want, atol=1e-3)
        weight = np.exp(score - want[:, None])
        np.testing.assert_allclose(
            np.asarray(out, np.float32)[0, 0], np.einsum("ns,snh->nh", weight, np.stack(values)), atol=2e-2
        )


# Transforms.

VMAP = [
    Case(T=2, T_new=2, rotary=32),
    Case(T=2, T_new=2, page=16),
    Case(T_new=0, batch_index=(2, 0, 1)),
    Case(T=2, T_new=2, batch_index=(3, 0, 4), extra_rows=2, leftpad=True),
]


@pytest.mark.parametrize("case", VMAP, ids=lambda case: case.id)
@pytest.mark.parametrize(
    "unmapped", [(), ("q",), ("cache_seqlens", "k"), ("rotary_cos", "rotary_sin", "block_table", "cache_batch_idx")]
)
def test_vmap(case, unmapped):
    several = [case.arrays(seed) for seed in range(3)]
    for arrays in several[1:]:
        arrays |= {name: several[0][name] for name in unmapped if name in arrays}
    for arrays in several:  # what is filled follows from the lengths and pages, which are no longer its own
        for name in ("k_cache", "v_cache"):
            arrays[name] = np.where(np.isnan(arrays[name]), arrays[name].dtype.type(0), arrays[name])
    shared = {name: several[0][name] for name in unmapped if name in several[0]}
    stacked = {name: np.stack([a[name] for a in several]) for name in several[0] if name not in shared}
    got = jax.jit(jax.vmap(lambda mapped: call(case, mapped | shared)))(stacked)
    for i, arrays in enumerate(several):
        check(case, arrays, [x[i] for x in got])


@pytest.mark.parametrize(
    "axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=lambda t: t.name
)
@pytest.mark.parametrize(
    "case", [Case(B=8, N=16, K=4, T=2, T_new=2, rotary=32), Case(B=8, N=8, K=4, T_new=0)], ids=lambda c: c.id
)
def test_batch_and_heads_are_sharded_without_communication(case, axis_type):
    devices = jax.devices("cpu")[:8]
    mesh = Mesh(np.array(devices).reshape(4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    arrays = case.arrays()
    both = PartitionSpec("data", None, "model")
    specs = dict.fromkeys(("q", "k_cache", "v_cache", "k", "v"), both) | {"cache_seqlens": PartitionSpec("data")}
    placed = {
        name: jax.device_put(x, NamedSharding(mesh, specs.get(name, PartitionSpec()))) for name, x in arrays.items()
    }
    with jax.set_mesh(mesh):
        compiled = jitted(case).lower(placed).compile()
        got = compiled(placed)
    text = compiled.as_text()
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", text)
    assert got[0].sharding.is_equivalent_to(NamedSharding(mesh, both), 4)
    check(case, arrays, got)


def test_shard_map_over_paged_caches():
    case = Case(N=8, K=4, page=16, T=2, T_new=2)
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("model",))
    arrays = case.arrays()
    heads = PartitionSpec(None, None, "model")
    specs = {name: heads if x.ndim == 4 else PartitionSpec() for name, x in arrays.items()}
    run = jax.shard_map(
        lambda arrays: call(case, arrays),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(heads, PartitionSpec(None, "model"), heads, heads),
    )
    check(case, arrays, jax.jit(run)(arrays))


def test_no_gradient():
    arrays = {name: jnp.asarray(x) for name, x in Case().arrays().items()}

    def loss(q):
        return call(Case(), arrays | {"q": q})[0].astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="attention"):
        jax.grad(loss)(arrays["q"])


# What is refused.

BAD = {
    "rank": (dict(q=(1, 4, 64)), "must be"),
    "heads": (dict(q=(3, 1, 7, 64)), "multiple"),
    "head_dim": (dict(q=(3, 1, 8, 32)), "head dim"),
    "batch": (dict(q=(2, 1, 8, 64), k=None, v=None, cache_seqlens=None), "row for each sequence"),
    "k_alone": (dict(v=None), "go together"),
    "k_shape": (dict(k=(3, 1, 4, 64), v=(3, 1, 4, 64)), "k and v must be"),
    "too_many_new": (dict(k=(3, 2, 2, 64), v=(3, 2, 2, 64)), "at most as many"),
    "no_lengths": (dict(cache_seqlens=None), "need cache_seqlens"),
    "lengths_shape": (dict(cache_seqlens=np.zeros(4, np.int32)), "shape"),
    "float_lengths": (dict(cache_seqlens=np.zeros(3, np.float32)), "integers"),
    "page_size": (
        dict(block_table=np.zeros((3, 2), np.int32), k_cache=(9, 12, 2, 64), v_cache=(9, 12, 2, 64)),
        "multiple of 8",
    ),
    "table_shape": (dict(block_table=np.zeros((2, 2), np.int32)), "block_table must be"),
    "table_and_index": (dict(block_table=np.zeros((3, 2), np.int32), cache_batch_idx=np.zeros(3, np.int32)), "exclude"),
    "table_of_rows_and_index": (
        dict(block_table=np.zeros((5, 2), np.int32), cache_batch_idx=np.zeros(3, np.int32)),
        "exclude each other: the rows of a block table are those of q",
    ),
    "list_of_lengths": (
        dict(cache_seqlens=[0]),
        r"cache_seqlens must be an array \(B,\), or one integer .*; got \[0\]",
    ),
    "head_dim_of_cache": (dict(k_cache=(3, 200, 2, 32), v_cache=(3, 200, 2, 32)), "q and k_cache must share head dim"),
    "dtype_of_cache": (
        dict(k_cache=np.zeros((3, 200, 2, 64), np.float16)),
        "q, k_cache and v_cache must have one dtype",
    ),
    "cos_alone": (dict(rotary_cos=np.ones((200, 16), np.float32)), "go together"),
    "rotary_dim": (
        dict(rotary_cos=np.ones((200, 12), np.float32), rotary_sin=np.ones((200, 12), np.float32)),
        "multiple of 16",
    ),
    "rotary_too_wide": (
        dict(rotary_cos=np.ones((200, 40), np.float32), rotary_sin=np.ones((200, 40), np.float32)),
        "at most the head dim",
    ),
    "rotary_without_k": (
        dict(rotary_cos=np.ones((200, 16), np.float32), rotary_sin=np.ones((200, 16), np.float32), k=None, v=None),
        "need k and v",
    ),
    "cache_shapes": (dict(v_cache=(3, 100, 2, 64)), "one shape"),
    "splits": (dict(num_splits=-1), "num_splits"),
    "window": (dict(window_size=(-2, 0)), "window_size"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_mistake(name):
    change, message = BAD[name]
    arguments = Case().arrays() | {"causal": True}
    for key, value in change.items():
        if value is None:
            arguments.pop(key)
        else:
            arguments[key] = (
                jnp.zeros(value, jnp.bfloat16) if isinstance(value, tuple) and key != "window_size" else value
            )
    with pytest.raises(ValueError, match=message):
        flash_attn_with_kvcache(**arguments)


@pytest.mark.parametrize("quantised", ["int8", "float8_e4m3fn"])
def test_quantised_caches_are_refused(quantised):
    cache = jnp.zeros((3, 8, 2, 64), quantised)
    with pytest.raises(NotImplementedError, match=f"quantised caches .* x.astype.* k_cache {quantised}"):
        flash_attn_with_kvcache(jnp.zeros((3, 1, 4, 64), jnp.bfloat16), cache, cache)


def test_empty_calls():
    for B, T in ((0, 1), (2, 0)):
        q, cache = jnp.zeros((B, T, 4, 64), jnp.bfloat16), jnp.zeros((B, 16, 2, 64), jnp.bfloat16)
        out, lse, _, _ = flash_attn_with_kvcache(q, cache, cache, return_softmax_lse=True)
        assert out.shape == q.shape and lse.shape == (B, 4, T)


EMPTY_CACHES = {  # the cache, other arguments, and the log-sum-exp before and after appending: of how many zeros
    "no-pages": ((0, 8, 2, 16), dict(block_table=jnp.zeros((2, 3), jnp.int32)), (24, 4)),
    "no-pages-in-the-table": ((4, 8, 2, 16), dict(block_table=jnp.zeros((2, 0), jnp.int32)), (0, 0)),
    "empty-pages": ((4, 0, 2, 16), dict(block_table=jnp.zeros((2, 3), jnp.int32)), (0, 0)),
    "no-rows": ((0, 8, 2, 16), dict(cache_batch_idx=jnp.zeros(2, jnp.int32)), (0, 0)),
    "no-positions": ((2, 0, 2, 16), {}, (0, 0)),
}


@pytest.mark.parametrize("case", EMPTY_CACHES)
def test_empty_caches(case, dtype):
    """Pages that do not exist are zeros, rows that do not exist hold nothing, and what is appended there is dropped."""
    shape, options, zeros = EMPTY_CACHES[case]
    q, new, cache = jnp.ones((2, 1, 4, 16), dtype), jnp.ones((2, 1, 2, 16), dtype), jnp.ones(shape, dtype)
    table = jnp.ones((4, 8), jnp.float32)
    append = dict(k=new, v=new, cache_seqlens=3, rotary_cos=table, rotary_sin=table, causal=True)
    for seen, more in zip(zeros, ({}, append), strict=True):
        out, lse, k_cache, v_cache = flash_attn_with_kvcache(
            q, cache, cache, **options, **more, return_softmax_lse=True
        )
        assert out.shape == q.shape and not np.asarray(out).any()
        np.testing.assert_allclose(lse, np.log(seen) if seen else -np.inf, rtol=1e-6)
        assert k_cache.shape == v_cache.shape == shape and (np.asarray(k_cache) == 1).all()


SYMBOLIC = {
    "batch": (Case("float32", rotary=16, T=2, T_new=2), dict(q="b", k_cache="b", v_cache="b", k="b", v="b")),
    "capacity": (Case("float32"), dict(k_cache="b s", v_cache="b s", q="b", k="b", v="b")),
    "pages": (
        Case("float32", page=16),
        dict(k_cache="p", v_cache="p", q="b", k="b", v="b", block_table="b n"),
    ),
    "rows": (Case("float32", batch_index=(3, 0, 4), extra_rows=2), dict(k_cache="r s", v_cache="r s")),
}


@pytest.mark.parametrize("case", SYMBOLIC)
def test_export_with_symbolic_sizes(case, platform):
    """By the name of its target, which the docstring tells."""
    case, letters = SYMBOLIC[case]
    if platform != "cpu":
        case = dataclasses.replace(case, dtype="bfloat16")
    arrays = case.arrays()
    symbols = dict(zip("bspnr", jax.export.symbolic_shape("b, s, p, n, r"), strict=True))
    if "b" in letters["q"] if "q" in letters else False:
        letters = letters | {"cache_seqlens": "b"}
    shapes = {
        name: jax.ShapeDtypeStruct(
            tuple(symbols[x] for x in letters.get(name, "").split()) + x.shape[len(letters.get(name, "").split()) :],
            x.dtype,
        )
        for name, x in arrays.items()
    }
    (target,) = re.findall(r'custom_call\("(\w+)"\)', flash_attn_with_kvcache.__doc__)
    safe = [jax.export.DisabledSafetyCheck.custom_call(target)]
    exported = jax.export.export(jitted(case), disabled_checks=safe)(shapes)
    check(case, arrays, exported.call(arrays))


@pytest.mark.parametrize("K", [1, 2])
def test_more_head_shards_than_kv_heads_on_explicit_axes(K, dtype):
    case = Case(dtype, B=4, N=8, K=K, H=16, S=24, T=2, T_new=2, rotary=16)
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = Mesh(np.array(jax.devices("cpu")).reshape(2, 4), ("data", "model"), axis_types=kinds)
    arrays = case.arrays()
    specs = dict.fromkeys(("k_cache", "v_cache", "k", "v", "cache_seqlens"), PartitionSpec("data"))
    specs["q"] = PartitionSpec("data", None, "model")
    placed = {
        name: jax.device_put(x, NamedSharding(mesh, specs.get(name, PartitionSpec()))) for name, x in arrays.items()
    }
    with jax.set_mesh(mesh):
        got = jitted(case)(placed)
    check(case, arrays, got)
    for result, name in zip(got[::2], ("q", "k_cache"), strict=True):
        assert result.sharding.is_equivalent_to(placed[name].sharding, 4)


def test_doctest():
    import doctest

    assert doctest.testmod(jax_flash.kvcache, optionflags=doctest.ELLIPSIS).failed == 0
