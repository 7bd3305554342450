"""Random calls of the public functions against oracles in NumPy: every option, awkward and empty sizes, lengths out of
range, NaN in what must not be read, under vmap, jit and checkpoint. As many as the profile says; what fails is a Case,
which then becomes a line in cases.py, or of kvcache_oracle.py."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import Meaning, attend, valid, visible
from cases import Case
from compare import close_lse, within
from hypothesis import given
from hypothesis import strategies as st
from kvcache_oracle import Case as CacheCase
from test_kvcache import call as call_kvcache
from test_kvcache import check as check_kvcache

import jax_flash

pytestmark = pytest.mark.usefixtures("quick_compilation")

MEANINGS = {
    "attention": Meaning(),
    "attention_fn": Meaning(top_left=True),
    "dot_product_attention": Meaning(top_left=True, mean_where_unseen=True),
}
JAX_NN = dict(
    softmax_scale="scale",
    causal="is_causal",
    window_size="local_window_size",
    q_lengths="query_seq_lengths",
    kv_lengths="key_value_seq_lengths",
)
DIFFERENTIABLE = ("q", "k", "v", "sinks")
# From small sets, so that many calls share a compiled program.
SIZES = [(5, 7), (1, 40), (17, 3), (70, 130), (33, 33), (0, 4), (4, 0), (1, 1)]
HEADS = [(1, 1), (4, 2), (3, 1), (2, 2), (0, 0)]
HEAD_DIMS = [8, 64, 40, 1, 59, 128]
LENGTH_DTYPES = [np.int32, np.int8, np.uint8, np.int64]


@st.composite
def cases(draw, platform):
    T, S = draw(st.sampled_from(SIZES))
    N, K = draw(st.sampled_from(HEADS))
    B = draw(st.sampled_from([1, 2, 0]))
    side = st.sampled_from([None, 0, 1, 6, 50])
    window = draw(st.sampled_from(["none", "one", "two"]))
    window = None if window == "none" else draw(side) if window == "one" else (draw(side), draw(side))
    lengths = st.none() | st.tuples(*[st.sampled_from([S, S + 3, T, 1, 0, -2, 2, 120])] * B)
    mask = None
    if draw(st.booleans()):
        mask = tuple(draw(st.sampled_from([size, 1])) for size in (B, N, T, S))[
            draw(st.sampled_from([0, 0, 1, 2, 3])) :
        ]
    return Case(
        dtype=draw(st.sampled_from(["bfloat16", "float16", *(["float32"] if platform == "cpu" else [])])),
        **dict(B=B, T=T, S=S, N=N, K=K, H=draw(st.sampled_from(HEAD_DIMS))),
        causal=draw(st.booleans()),
        window=window,
        softcap=draw(st.sampled_from([None, None, 2.0, 20.0])),
        scale=draw(st.sampled_from([None, None, 1.0, -0.5, 0.0])),
        mask=mask,
        q_lengths=draw(lengths),
        kv_lengths=draw(lengths),
        segments=draw(st.sampled_from([None, None, None, 0, 2])),
        sinks=draw(st.sampled_from([None, None, None, 1.0])),
    )


def arrays_of(case, seed, length_dtype, poison):
    """q, k, v and the extras, by name, and the cotangents, all NumPy; poison: NaN where nothing is to be read."""
    qkv, extras = case.arrays(seed)
    arrays = {name: np.array(x) for name, x in (qkv | extras).items()}
    cotangents = [np.array(x) for x in case.cotangents(seed + 1000)]
    info = np.iinfo(length_dtype)
    for name in ("q_lengths", "kv_lengths"):
        if name in arrays:
            lengths = np.clip(arrays[name].astype(np.int64), info.min, min(info.max, 2**40)).astype(length_dtype)
            arrays[name] = lengths if poison else np.roll(lengths, seed)
            for b, length in enumerate(lengths if poison else ()):
                for x in (arrays["q"], *cotangents[:1]) if name == "q_lengths" else (arrays["k"], arrays["v"]):
                    x[b, max(0, int(length)) :] = np.nan
                if name == "q_lengths":
                    cotangents[1][b, :, max(0, int(length)) :] = np.nan
    return arrays, cotangents


def rounded_to(dtype, x):
    return x.astype(np.float32).astype(jnp.dtype(dtype)).astype(np.float64)


def exact_and_rough(case, meaning, arrays, cotangents):
    """The results, and what they are off by where every matrix product is rounded as in the case's dtype."""
    rounded = functools.partial(rounded_to, case.dtype)
    qkv = [np.nan_to_num(np.asarray(arrays[name], np.float32)) for name in "qkv"]
    extras = {name: x for name, x in arrays.items() if name not in "qkv"}
    cotangents = [np.where(np.isfinite(x), np.asarray(x, np.float32), 0) for x in cotangents]
    return [
        {"out": out, "lse": lse, **dict(zip(DIFFERENTIABLE, gradients, strict=True))}
        for (out, lse), gradients in (
            attend(case, meaning, qkv, extras, cotangents),
            attend(case, meaning, qkv, extras, cotangents, rounded),
        )
    ]


def deviations(case, meaning, results):
    """By how much rounding changes each result, at most; with more sequences where values are few."""
    times = 1 + 1000 // max(1, case.B * min(case.T, case.S) * case.K * case.H)
    mask = case.mask
    if mask is not None and len(mask) == 4 and mask[0] == case.B:
        mask = (mask[0] * times, *mask[1:])
    lengths = {name: x and x * times for name, x in (("q_lengths", case.q_lengths), ("kv_lengths", case.kv_lengths))}
    more = dataclasses.replace(case, B=case.B * times, mask=mask, **lengths)
    pairs = [*results, exact_and_rough(more, meaning, *arrays_of(more, 100, np.int64, poison=False))]
    return {
        name: max(np.abs(exact[name] - rough[name]).max(initial=0) for exact, rough in pairs)
        for name in ("out", *DIFFERENTIABLE)
    }


def public(function, case, batchless):
    """The function as one of a dict of arrays, that returns (out, lse or None)."""
    if function == "attention_fn":
        pytest.importorskip("flax")
        from jax_flash.flax import attention_fn as call
    else:
        call = getattr(jax_flash, function)
    options = {name: x for name, x in case.options().items() if x is not None}
    if function == "attention":
        options["return_softmax_lse"] = True
    names = (
        JAX_NN
        if function == "dot_product_attention"
        else {"causal": "is_causal"}
        if call is not jax_flash.attention
        else {}
    )

    def run(arrays):
        if batchless:
            arrays = {n: x if n == "sinks" or (n == "mask" and x.ndim < 4) else x[0] for n, x in arrays.items()}
        keywords = {names.get(name, name): x for name, x in (arrays | options).items() if name not in "qkv"}
        outs = call(*(arrays[name] for name in "qkv"), **keywords)
        out, lse = outs if isinstance(outs, tuple) else (outs, None)
        return (out[None], lse if lse is None else lse[None]) if batchless else (out, lse)

    return run


@pytest.mark.parametrize("function", MEANINGS)
@given(data=st.data())
def test_attention(function, platform, data):
    case = data.draw(cases(platform), "case")
    meaning = MEANINGS[function]
    if function == "dot_product_attention":
        case = dataclasses.replace(case, softcap=None, segments=None, sinks=None)
    batchless = case.B == 1 and data.draw(st.booleans(), "batchless")
    if batchless and function == "dot_product_attention":
        case = dataclasses.replace(case, q_lengths=None, kv_lengths=None)
    poison = not meaning.mean_where_unseen and data.draw(st.booleans(), "poison")
    length_dtype = data.draw(st.sampled_from(LENGTH_DTYPES), "length_dtype")
    seed = data.draw(st.integers(0, 3), "seed")

    # The axes of vmap: which arguments have each, and how many examples it has.
    names = list(arrays_of(case, 0, length_dtype, poison)[0])
    some = st.lists(st.sampled_from(names), min_size=1, unique=True).map(frozenset)
    levels = data.draw(st.sampled_from([0, 0, 1, 2]).flatmap(lambda n: st.tuples(*[some] * n)), "vmap")
    sizes = data.draw(st.tuples(*[st.integers(1, 3)] * len(levels)), "sizes")
    jits = data.draw(st.tuples(*[st.booleans()] * (len(levels) + 1)), "jit")

    def own(name, index):
        return tuple(i if name in level else 0 for i, level in zip(index, levels, strict=True))

    indices = list(itertools.product(*map(range, sizes)))
    each = {at: arrays_of(case, seed + at_seed, length_dtype, poison) for at_seed, at in enumerate(indices)}
    examples, expected = {}, {}
    for index in indices:
        arrays = {name: each[own(name, index)][0][name] for name in names}
        cotangents = each[index][1]
        if function != "attention":
            cotangents[1][:] = 0
        if poison and platform == "cpu":  # whatever the cotangents of rows that see nothing are
            extras = {name: x for name, x in arrays.items() if name not in "qkv"}
            unseen = ~visible(case, extras, meaning.top_left).any(-1)
            cotangents[0][unseen.swapaxes(1, 2)] = np.inf
            cotangents[1][unseen if "sinks" not in names else ~valid(case, extras)] = np.nan
        examples[index] = arrays, cotangents
        expected[index] = exact_and_rough(case, meaning, arrays, cotangents)
    allowed = deviations(case, meaning, expected.values())

    # The call.
    run = public(function, case, batchless)
    run = jax.jit(run) if jits[0] else run
    for level, jit in zip(reversed(levels), jits[1:], strict=True):
        run = jax.vmap(run, ({name: 0 if name in level else None for name in names},))
        run = jax.jit(run) if jit else run

    def stacked(name):
        picked = [each[i][0][name] for i in indices if i == own(name, i)]
        lead = [size for size, level in zip(sizes, levels, strict=True) if name in level]
        return jnp.asarray(np.stack(picked).reshape(*lead, *picked[0].shape)) if lead else picked[0]

    inputs = {name: stacked(name) for name in names}
    floats = {name: jnp.asarray(inputs.pop(name)) for name in DIFFERENTIABLE if name in inputs}
    (out, lse), pull = jax.vjp(lambda floats: run(floats | inputs), floats)

    def over(what):
        return np.stack([what(i) for i in indices]).reshape(*sizes, *what(indices[0]).shape)

    d_out, d_lse = (jnp.asarray(over(lambda i, at=at: examples[i][1][at])) for at in range(2))
    (gradients,) = pull((d_out, None if lse is None else d_lse))

    # The comparison.
    assert out.dtype == case.dtype
    within("out", out, over(lambda i: expected[i][0]["out"]), allowed["out"], 3.0 if case.softcap else 2.0)
    if lse is not None:
        close_lse(lse, over(lambda i: expected[i][0]["lse"]))
    for name, gradient in gradients.items():
        exact, rough = (over(lambda i, at=at, name=name: expected[i][at][name]) for at in range(2))
        for at, level in reversed(list(enumerate(levels))):
            if name not in level:  # each vmap sums what its examples share
                exact, rough = exact.sum(at), rounded_to(gradient.dtype, rough.sum(at))
        assert gradient.dtype == floats[name].dtype
        within(f"d{name}", gradient, exact, max(allowed[name], np.abs(exact - rough).max(initial=0)), 3.0)
    forget_programs()


_calls = itertools.count(1)


def forget_programs():
    """Each call is a program or two of its own, and a night has many."""
    if next(_calls) % 500 == 0:
        jax.clear_caches()


@st.composite
def cache_cases(draw, platform):
    N, K = draw(st.sampled_from([(1, 1), (4, 2), (3, 1), (0, 0)]))
    B = draw(st.sampled_from([1, 3, 0]))
    T = draw(st.sampled_from([1, 2, 5, 20, 0]))
    S = draw(st.sampled_from([24, 40, 8, 0]))
    page = draw(st.sampled_from([0, 8, 24]))
    H = draw(st.sampled_from([16, 64, 40, 1]))
    T_new = draw(st.integers(0, T)) if T < 6 else draw(st.sampled_from([0, T]))
    rotary = draw(st.sampled_from([0, 16])) if H >= 16 and T_new else 0
    extra_rows, batch_index = 0, None
    if not page and draw(st.booleans()):
        extra_rows = draw(st.sampled_from([0, 2]))
        rows = draw(st.permutations(range(B + extra_rows)))[:B]
        outside = st.sampled_from([None, None, None, -1, B + extra_rows])
        batch_index = tuple(row if (other := draw(outside)) is None else other for row in rows)
    side = st.sampled_from([-1, 0, 1, 6, 50])
    return CacheCase(
        dtype=draw(st.sampled_from(["bfloat16", "float16", *(["float32"] if platform == "cpu" else [])])),
        **dict(B=B, T=T, T_new=T_new, N=N, K=K, H=H, S=S, page=page, rotary=rotary, extra_rows=extra_rows),
        lengths=draw(st.tuples(*[st.integers(-2, S + 3)] * B)),
        interleaved=draw(st.booleans()),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.tuples(side, side)),
        softcap=draw(st.sampled_from([None, None, 2.0])),
        scale=draw(st.sampled_from([None, None, 1.0, -0.5])),
        splits=draw(st.sampled_from([None, 1, 3])),
        sinks=draw(st.sampled_from([False, False, True])),
        leftpad=draw(st.booleans()),
        batch_index=batch_index,
        holes=draw(st.booleans()) if page and B and S else False,
    )


@given(data=st.data())
def test_kvcache(platform, data):
    """Positions that hold nothing are NaN, and stay as they are, bit for bit."""
    case = data.draw(cache_cases(platform), "case")
    seeds = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=2), "seeds")
    several = [case.arrays(seed) for seed in seeds]
    jit = jax.jit if data.draw(st.booleans(), "jit") else lambda f: f
    run = jit(functools.partial(call_kvcache, case))
    if len(several) == 1 and data.draw(st.booleans(), "plain"):
        got = [run(several[0])]
    else:
        mapped = data.draw(st.lists(st.sampled_from(list(several[0])), min_size=1, unique=True), "mapped")
        if seeds[0] != seeds[-1]:  # what is held follows from them, and so does what is NaN
            mapped = list(several[0])
        axes = {name: 0 if name in mapped else None for name in several[0]}
        stacked = {
            name: np.stack([arrays[name] for arrays in several]) if name in mapped else x
            for name, x in several[0].items()
        }
        results = jit(jax.vmap(run, (axes,)))(stacked)
        got = [[x[i] for x in results] for i in range(len(several))]
    for arrays, result in zip(several, got, strict=True):
        check_kvcache(case, arrays, result)
    forget_programs()
