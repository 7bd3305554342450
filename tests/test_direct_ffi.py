"""The handlers, called as XLA calls them and not as this package does: what does not fit together is an error that says
what, on every backend, and never a read or a write outside the buffers.

How a call states itself to its handler is known to `targets`, `OPERANDS` and `OPTIONS` alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash import _ffi, _kvcache_primitive, _primitive

B, K, G, T, S, H = 2, 3, 2, 5, 40, 32
T_NEW, LENGTH, POSITIONS, PAGES, PAGE = 2, 9, 50, 3, 8

# Of kvcache, in order.
OPERANDS = _kvcache_primitive.Operands._fields
OPTIONS = ("present", "time_major", "left", "right", "num_splits", "rotary_interleaved")


@dataclasses.dataclass
class Call:
    """What a call consists of; arrays are (shape, dtype), in order."""

    target: str
    operands: dict[str, tuple]
    results: dict[str, tuple]
    attributes: dict
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)  # operand: result

    def run(self) -> dict[str, jax.Array]:
        names, results = list(self.operands), list(self.results)
        # JAX itself refuses to alias what differs.
        aliases = {a: b for a, b in self.aliases.items() if self.operands[a] == self.results[b]}
        call = jax.ffi.ffi_call(
            self.target,
            [jax.ShapeDtypeStruct(*result) for result in self.results.values()],
            input_output_aliases={names.index(a): results.index(b) for a, b in aliases.items()},
        )
        outs = call(*(values(name, *operand) for name, operand in self.operands.items()), **self.attributes)
        return dict(zip(self.results, jax.block_until_ready(outs), strict=True))


def values(name: str, shape: tuple, dtype: str) -> jax.Array:
    """Ones, but for lengths and page numbers, with which every query sees keys and no page has two writers."""
    if name == "block_table":
        return jnp.arange(np.prod(shape), dtype=dtype).reshape(shape)
    each = dict(mask=2**32 - 1, q_lengths=T, kv_lengths=S, lengths=LENGTH, leftpad=0)
    return jnp.full(shape, each.get(name, 1) if jnp.dtype(dtype).itemsize == 4 else 1, dtype)


def targets(dtype: str, platform: str) -> dict[str, Callable[[], Call]]:
    """Calls that are right, which the cases below spoil."""
    query, key, statistic = ((B, T, K, G, H), dtype), ((B, S, K, H), dtype), ((B, K, G, T), "float32")
    extras = {
        "mask": ((B, K, 1, T, (S + 31) // 32), "uint32"),
        "q_lengths": ((B, K), "int32"),
        "kv_lengths": ((B, K), "int32"),
    }

    def attributes(present, **more):
        return dict(
            softmax_scale=np.float32(0.5),
            softcap=np.float32(0),
            left=_ffi.side(None),
            right=_ffi.side(None),
            top_left=False,
            has_mask="mask" in present,
            has_q_lengths="q_lengths" in present,
            has_kv_lengths="kv_lengths" in present,
            time_major=True,
            **more,
        )

    def forward():
        operands = dict(q=query, k=key, v=key) | extras
        return Call("jax_flash_forward", operands, dict(o=query, lse=statistic), attributes(extras))

    def backward():
        operands = dict(q=query, k=key, v=key, o=query, lse=statistic, do=query, dlse=statistic) | extras
        aval = jax.core.ShapedArray((B, K, G, T, H), np.dtype(dtype))
        results = dict(dq=query, dk=key, dv=key, workspace=(_primitive._workspace(aval).shape, "uint8"))
        return Call("jax_flash_backward", operands, results, attributes(extras, deterministic=False, has_dlse=True))

    def kvcache(paged, append=True):
        cache = ((7, PAGE, K, H), dtype) if paged else ((B, S, K, H), dtype)
        new, table, vector = ((B, T_NEW, K, H), dtype), ((POSITIONS, 8), "float32"), ((B,), "int32")
        optional = dict(k_new=new, v_new=new) if append else {}
        optional |= dict(lengths=vector, leftpad=vector)
        optional |= dict(block_table=((B, PAGES), "int32")) if paged else {}
        optional |= dict(cos=table, sin=table)
        options = dict(
            present=sum(1 << OPERANDS[3:].index(name) for name in optional), time_major=1, left=_ffi.side(None)
        )
        options |= dict(right=0, num_splits=0, rotary_interleaved=0)
        results = dict(o=query, lse=statistic, workspace=((1 if platform == "cpu" else 2**24,), "uint8"))
        results |= dict(k_cache=cache, v_cache=cache) if append else {}
        return Call(
            "jax_flash_kvcache",
            dict(q=query, k_cache=cache, v_cache=cache) | optional,
            results,
            dict(options=np.array([*options.values()], np.int64), score=np.array([0.5, 0], np.float32)),
            dict(k_cache="k_cache", v_cache="v_cache") if append else {},
        )

    return {
        "forward": forward,
        "backward": backward,
        "kvcache": lambda: kvcache(paged=False),
        "paged": lambda: kvcache(paged=True),
        "read-only": lambda: kvcache(paged=False, append=False),
    }


# Ways to spoil a call.


def array(**changed):
    """Operands or results with other shapes (a tuple) or dtypes (a string); results are named result_..."""

    def change(call):
        for name, new in changed.items():
            arrays, name = (call.results, name[7:]) if name.startswith("result_") else (call.operands, name)
            shape, dtype = arrays[name]
            arrays[name] = (shape, new) if isinstance(new, str) else (new, dtype)

    return change


def without(*names):
    def change(call):
        for name in names:
            arrays, name = (call.results, name[7:]) if name.startswith("result_") else (call.operands, name)
            arrays.pop(name, None)
            call.aliases.pop(name, None)

    return change


def surplus(where, shape=(3,), dtype="float32"):
    return lambda call: getattr(call, where).update(surplus=(shape, dtype))


def attribute(**changed):
    return lambda call: call.attributes.update(changed)


def no_attribute(name):
    return lambda call: call.attributes.pop(name)


def option(**changed):
    def change(call):
        for name, value in changed.items():
            call.attributes["options"][OPTIONS.index(name)] = value

    return change


def announced(name, present=True):
    """The bit of an optional operand of kvcache."""

    def change(call):
        bit = 1 << OPERANDS[3:].index(name)
        call.attributes["options"][0] &= ~bit
        call.attributes["options"][0] |= bit if present else 0

    return change


def aliases(**pairs):
    return lambda call: setattr(call, "aliases", pairs)


def first(name, shape, dtype="int32"):
    """An operand before cos and sin, for those that a call has not."""

    def change(call):
        items = [(n, a) for n, a in call.operands.items() if n not in ("cos", "sin")]
        call.operands = dict([*items, (name, (shape, dtype)), *((n, call.operands[n]) for n in ("cos", "sin"))])

    return change


def every(*changes):
    def change(call):
        for each in changes:
            each(call)

    return change


NUMBER = "Wrong number of (arguments|results)|does not match"

# (the call, how it is spoilt, what the error says)
CASES = {
    # forward
    "q of rank 4": ("forward", array(q=(B, T, K * G, H)), "ranks 5 and 4"),
    "q and k of rank 70": ("forward", array(q=(1,) * 70, k=(1,) * 69), "ranks 5 and 4"),
    "k of rank 5": ("forward", array(k=(B, S, K, 1, H)), "ranks 5 and 4"),
    "a scalar q": ("forward", array(q=()), "ranks 5 and 4"),
    "k with another batch": ("forward", array(k=(B + 1, S, K, H)), "k must have shape"),
    "k with other heads": ("forward", array(k=(B, S, K + 1, H)), "k must have shape"),
    "k with another head dim": ("forward", array(k=(B, S, K, H - 1)), "k must have shape"),
    "v shorter than k": ("forward", array(v=(B, S - 1, K, H)), "v must have shape"),
    "v of another dtype": ("forward", array(v="int8"), "v has the wrong dtype"),
    "k of half the size": ("forward", array(k="int16"), "k has the wrong dtype"),
    "int8": ("forward", array(q="int8", k="int8", v="int8", result_o="int8"), "float32, float16 or bfloat16"),
    "head dim 0": ("forward", array(q=(B, T, K, G, 0), k=(B, S, K, 0)), "head dim"),
    "head dim 257": ("forward", array(q=(B, T, K, G, 257), k=(B, S, K, 257)), "head dim"),
    "more than 2^29 keys": ("forward", array(k=(0, 2**29 + 1, K, H), q=(0, T, K, G, H)), "2\\^29"),
    "more than 2^29 queries": ("forward", array(k=(0, S, K, H), q=(0, 2**29 + 1, K, G, H)), "2\\^29"),
    "o of another shape": ("forward", array(result_o=(B, T, K, G, H - 1)), "o must have shape"),
    "o of another dtype": ("forward", array(result_o="int8"), "o has the wrong dtype"),
    "lse with its axes turned": ("forward", array(result_lse=(B, T, K, G)), "lse must have shape"),
    "lse in half precision": ("forward", array(result_lse="float16"), "lse has the wrong dtype"),
    "mask with too few words": ("forward", array(mask=(B, K, 1, T, 1)), "mask must have shape"),
    "mask of another number of rows": ("forward", array(mask=(B, K, 1, T - 1, 2)), "mask must have shape"),
    "mask of another group": ("forward", array(mask=(B, K, G + 1, T, 2)), "mask must have shape"),
    "mask of rank 4": ("forward", array(mask=(B, K, T, 2)), "mask must have rank 5"),
    "mask of bools": ("forward", array(mask="bool"), "mask has the wrong dtype"),
    "q_lengths without heads": ("forward", array(q_lengths=(B,)), "q_lengths must have shape"),
    "kv_lengths of int16": ("forward", array(kv_lengths="int16"), "kv_lengths has the wrong dtype"),
    "a length for each query": ("forward", array(kv_lengths=(B, T)), "kv_lengths must have shape"),
    "no v": ("forward", without("v", "mask", "q_lengths", "kv_lengths"), NUMBER),
    "announced, but missing": ("forward", without("kv_lengths"), "kv_lengths is announced, but missing"),
    "not announced": ("forward", attribute(has_kv_lengths=False), "more operands"),
    "a surplus operand": ("forward", surplus("operands"), "more operands"),
    "no lse": ("forward", without("result_lse"), NUMBER),
    "a surplus result": ("forward", surplus("results"), NUMBER),
    "no softmax_scale": ("forward", no_attribute("softmax_scale"), "softmax_scale"),
    "no time_major": ("forward", no_attribute("time_major"), "time_major"),
    "softmax_scale of float64": ("forward", attribute(softmax_scale=np.float64(1)), "softmax_scale"),
    "softmax_scale of NaN": ("forward", attribute(softmax_scale=np.float32(np.nan)), "softmax_scale must be finite"),
    "softcap below 0": ("forward", attribute(softcap=np.float32(-1)), "softcap"),
    "softcap of infinity": ("forward", attribute(softcap=np.float32(np.inf)), "softcap"),
    "a side as float": ("forward", attribute(left=np.float32(1)), "left"),
    "a side as text": ("forward", attribute(right="1"), "right"),
    "another order of axes": ("forward", attribute(time_major=False), "must have shape"),
    # backward
    "o shorter than q": ("backward", array(o=(B, T - 1, K, G, H)), "o must have shape"),
    "do of another head dim": ("backward", array(do=(B, T, K, G, H + 1)), "do must have shape"),
    "do of another dtype": ("backward", array(do="int8"), "do has the wrong dtype"),
    "the forward's lse in memory order": ("backward", array(lse=(B, T, K, G)), "lse must have shape"),
    "dlse in half precision": ("backward", array(dlse="float16"), "dlse has the wrong dtype"),
    "dlse for fewer rows": ("backward", array(dlse=(B, K, G, T - 1)), "dlse must have shape"),
    "dq like k": ("backward", array(result_dq=(B, S, K, H)), "dq must have shape"),
    "dk for each query head": ("backward", array(result_dk=(B, S, K * G, H)), "dk must have shape"),
    "dv shorter than v": ("backward", array(result_dv=(B, S - 1, K, H)), "dv must have shape"),
    "dv in another dtype": ("backward", array(result_dv="int8"), "dv has the wrong dtype"),
    "an empty workspace": ("backward", array(result_workspace=(0,)), "workspace must hold"),
    "a workspace of one byte": ("backward", array(result_workspace=(1,)), "workspace must hold"),
    "no workspace": ("backward", without("result_workspace"), NUMBER),
    "a surplus gradient": ("backward", surplus("results", (B, S, K, H)), NUMBER),
    "no dlse": ("backward", without("dlse"), "must have|wrong dtype|missing"),
    "dlse not announced": ("backward", attribute(has_dlse=False), "must have|wrong dtype|more operands"),
    "no deterministic": ("backward", no_attribute("deterministic"), "deterministic"),
    # kvcache
    "q for a cache of rank 5": ("kvcache", array(k_cache=(B, S, K, 1, H)), "ranks 5 and 4"),
    "mapped axes of the cache alone": ("kvcache", array(k_cache=(1, B, S, K, H)), "ranks 5 and 4"),
    "v_cache shorter than k_cache": ("kvcache", array(v_cache=(B, S - 1, K, H)), "v_cache must have shape"),
    "v_cache of another dtype": ("kvcache", array(v_cache="int8"), "v_cache has the wrong dtype"),
    "a row too few": ("read-only", array(k_cache=(1, S, K, H), v_cache=(1, S, K, H)), "a row for each sequence"),
    "a cache of more than 2^29 positions": (
        "read-only",
        array(q=(0, T, K, G, H), k_cache=(0, 2**29 + 1, K, H), v_cache=(0, 2**29 + 1, K, H)),
        "2\\^29 positions",
    ),
    "more than 2^31 rows": (
        "read-only",
        array(k_cache=(2**31, 0, K, H), v_cache=(2**31, 0, K, H)),
        "2\\^31 - 1 positions",
    ),
    "0 heads of a paged cache": (
        "paged",
        every(
            array(q=(B, T, 0, G, H), result_o=(B, T, 0, G, H), result_lse=(B, 0, G, T)),
            array(k_cache=(7, PAGE, 0, H), v_cache=(7, PAGE, 0, H), k_new=(B, 2, 0, H), v_new=(B, 2, 0, H)),
            array(result_k_cache=(7, PAGE, 0, H), result_v_cache=(7, PAGE, 0, H)),
        ),
        "a head",
    ),
    "0 query heads for a KV head": ("paged", array(q=(B, T, K, 0, H), result_o=(B, T, K, 0, H)), "a head"),
    "pages of 0 positions": (
        "paged",
        array(k_cache=(7, 0, K, H), v_cache=(7, 0, K, H), result_k_cache=(7, 0, K, H), result_v_cache=(7, 0, K, H)),
        "1 to 2\\^29 positions",
    ),
    "a block table of no pages": ("paged", array(block_table=(B, 0)), "1 to 2\\^29 positions"),
    "a block table of too many pages": ("paged", array(block_table=(0, 2**29)), "1 to 2\\^29 positions"),
    "a block table of 2^32 + 1 pages": ("paged", array(block_table=(0, 2**32 + 1)), "1 to 2\\^29 positions"),
    "a block table for one sequence": ("paged", array(block_table=(1, PAGES)), "block_table must have shape"),
    "a block table of int64's halves": ("paged", array(block_table=(B, 2 * PAGES, 1)), "block_table must have shape"),
    "a block table of int8": ("paged", array(block_table="int8"), "block_table has the wrong dtype"),
    "batch_index beside a block table": (
        "paged",
        every(without("leftpad"), announced("leftpad", False), first("batch_index", (B,)), announced("batch_index")),
        "exclude each other",
    ),
    "one new head for three": ("kvcache", array(k_new=(B, T_NEW, 1, H)), "k_new must have shape"),
    "more new tokens than queries": (
        "kvcache",
        array(k_new=(B, T + 1, K, H), v_new=(B, T + 1, K, H)),
        "more new tokens than queries",
    ),
    "fewer new values than keys": ("kvcache", array(v_new=(B, T_NEW - 1, K, H)), "v_new must have shape"),
    "k_new of another rank": ("kvcache", array(k_new=(B, K, H)), "k_new must have shape"),
    "k_new of another dtype": ("kvcache", array(k_new="int8"), "k_new has the wrong dtype"),
    "k_new alone": ("kvcache", every(without("v_new"), announced("v_new", False)), "come together"),
    "cos alone": ("kvcache", every(without("sin"), announced("sin", False)), "come together"),
    "a length for all": ("kvcache", array(lengths=(1,)), "lengths must have shape"),
    "lengths of int8": ("kvcache", array(lengths="int8"), "lengths has the wrong dtype"),
    "leftpad per head": ("kvcache", array(leftpad=(B, K)), "leftpad must have shape"),
    "rotary tables of int8": ("kvcache", array(cos="int8", sin="int8"), "float32 or as q"),
    "rotary tables of uint32": ("kvcache", array(cos="uint32", sin="uint32"), "float32 or as q"),
    "sin of int8": ("kvcache", array(sin="int8"), "sin has the wrong dtype"),
    "sin with fewer positions": ("kvcache", array(sin=(POSITIONS - 1, 8)), "sin must have shape"),
    "rotary tables wider than the head": ("kvcache", array(cos=(9, H), sin=(9, H)), "rotary tables"),
    "rotary tables of an odd width": ("kvcache", array(cos=(9, 12), sin=(9, 12)), "rotary tables"),
    "rotary tables of no position": ("kvcache", array(cos=(0, 8), sin=(0, 8)), "rotary tables"),
    "rotary tables of no width": ("kvcache", array(cos=(9, 0), sin=(9, 0)), "rotary tables"),
    "rotary tables of 2^61 columns": ("kvcache", array(cos=(0, 2**61), sin=(0, 2**61)), "rotary tables"),
    "rotary tables of rank 1": ("kvcache", array(cos=(8,), sin=(8,)), "rotary tables"),
    "a rotary table for each sequence": ("kvcache", array(cos=(B, 9, 8), sin=(B, 9, 8)), "cos must have shape"),
    "the result o of another shape": ("kvcache", array(result_o=(B, T, K, H)), "o must have shape"),
    "the result lse of another order": ("kvcache", array(result_lse=(B, T, K, G)), "lse must have shape"),
    "the result lse in half precision": ("kvcache", array(result_lse="float16"), "lse has the wrong dtype"),
    "the result k_cache shorter": (
        "kvcache",
        every(aliases(), array(result_k_cache=(B, S - 1, K, H))),
        "the result k_cache must have shape",
    ),
    "the result v_cache of another dtype": (
        "kvcache",
        every(aliases(), array(result_v_cache="int8")),
        "the result v_cache has the wrong dtype",
    ),
    "no result v_cache": ("kvcache", without("result_v_cache"), "the caches are results"),
    "no result cache": ("kvcache", without("result_v_cache", "result_k_cache"), "the caches are results"),
    "a third result cache": ("kvcache", surplus("results", (B, S, K, H)), "the caches are results"),
    "result caches where nothing is appended": (
        "read-only",
        every(surplus("results", (B, S, K, H)), array()),
        "the caches are results",
    ),
    "crossed caches": ("kvcache", aliases(k_cache="v_cache", v_cache="k_cache"), "may be aliased only"),
    "v's result in k's place": ("kvcache", aliases(k_cache="v_cache"), "may be aliased only"),
    "k's result in v's place": ("kvcache", aliases(v_cache="k_cache"), "may be aliased only"),
    "an operand announced, but missing": ("kvcache", announced("block_table"), "must have|wrong dtype|missing|hold"),
    "all operands announced": ("read-only", option(present=255), "."),
    "an operand not announced": ("kvcache", announced("leftpad", False), "float32 or as q"),
    "a bit for no operand": ("kvcache", option(present=1 << 8), "unknown operands"),
    "negative bits": ("kvcache", option(present=-1), "unknown operands"),
    "a surplus operand of kvcache": ("kvcache", surplus("operands"), "more operands"),
    "no caches": ("kvcache", without(*OPERANDS[1:]), NUMBER),
    "the other order of axes": ("kvcache", option(time_major=0), "must have shape|a row for each"),
    "a negative number of splits": ("kvcache", option(num_splits=-1), "num_splits"),
    "a number of splits that wraps": ("kvcache", option(num_splits=2**32 + 1), "num_splits"),
    "options of int32": (
        "kvcache",
        lambda call: call.attributes.update(options=call.attributes["options"].astype(np.int32)),
        "options must be an array",
    ),
    "an option too few": (
        "kvcache",
        lambda call: call.attributes.update(options=call.attributes["options"][:-1]),
        "options must be an array of 6",
    ),
    "an option too many": (
        "kvcache",
        lambda call: call.attributes.update(options=np.append(call.attributes["options"], 0)),
        "options must be an array of 6",
    ),
    "options as a number": ("kvcache", attribute(options=np.int64(3)), "options must be an array"),
    "no options": ("kvcache", no_attribute("options"), "options must be an array"),
    "no score": ("kvcache", no_attribute("score"), "score must be an array"),
    "score of float64": ("kvcache", attribute(score=np.zeros(2)), "score must be an array"),
    "score without softcap": ("kvcache", attribute(score=np.zeros(1, np.float32)), "score must be an array of 2"),
    "a scale of infinity": ("kvcache", attribute(score=np.array([np.inf, 0], np.float32)), "softmax_scale"),
    "a softcap of NaN": ("kvcache", attribute(score=np.array([1, np.nan], np.float32)), "softcap"),
}


@pytest.mark.parametrize("name", CASES)
def test_is_an_error(name, dtype, platform):
    target, spoil, message = CASES[name]
    call = targets(dtype, platform)[target]()
    spoil(call)
    with pytest.raises(Exception, match=message) as raised:
        call.run()
    assert isinstance(raised.value, jax.errors.JaxRuntimeError), raised.value
    assert "INVALID_ARGUMENT" in str(raised.value)


@pytest.mark.parametrize("target", ["forward", "backward", "kvcache", "paged", "read-only"])
def test_what_is_spoilt_above_is_right(target, dtype, platform):
    results = targets(dtype, platform)[target]().run()
    for name in {"o", "lse", "dq", "dk", "dv", "k_cache", "v_cache"} & {*results}:
        assert jnp.isfinite(results[name][0]).all(), name


def test_kvcache_workspace(dtype, platform):
    if platform == "cpu":
        pytest.skip("the CPU kernels take no workspace")
    call = targets(dtype, platform)["kvcache"]()
    array(result_workspace=(8,))(call)
    with pytest.raises(jax.errors.JaxRuntimeError, match="workspace must hold"):
        call.run()


def test_output_of_many_queries_in_their_buffer(dtype, platform):
    if platform == "cpu":
        pytest.skip("on GPUs few queries may share it")
    for length in (T, 300):
        call = targets(dtype, platform)["kvcache"]()
        rows = B, length, K, G, H
        array(q=rows, result_o=rows, result_lse=(B, K, G, length))(call)
        call.aliases |= dict(q="o")
        if length == T:
            call.run()
        else:
            with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT.*o may take the buffer of q"):
                call.run()


def test_a_k_new_of_no_token_leaves_the_caches(dtype, platform):
    """Also where their results are buffers of their own."""
    for aliased in (True, False):
        call = targets(dtype, platform)["kvcache"]()
        array(k_new=(B, 0, K, H), v_new=(B, 0, K, H))(call)
        if not aliased:
            call.aliases = {}
        results = call.run()
        assert (results["k_cache"] == 1).all() and (results["v_cache"] == 1).all()
