"""The handlers, called as XLA calls them and not as this package does: what does not fit together is an error that says
what, on every backend, and never a read or a write outside the buffers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash import _ffi
from jax_flash._ffi import _native
from jax_flash._operands import TABLE, in_order, results
from jax_flash._spec import Band, Spec

# What the letters of the operand table stand for here.
SIZES = dict(b=2, k=3, g=2, t=5, s=40, h=32, u=2, r=2, n=3, p=50, d=8, w=2)
B, K, G, T, S, H, T_NEW, PAGES, POSITIONS = (SIZES[letter] for letter in "bkgtshunp")
PAGE, POOL, LENGTH = 8, 7, 9

DECODE, PREFILL = 0, 1  # the kernels of KvcacheKernel


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
            has_side_effect=True,  # XLA drops a call whose results are empty
            input_output_aliases={names.index(a): results.index(b) for a, b in aliases.items()},
        )
        outs = call(*(values(name, *operand) for name, operand in self.operands.items()), **self.attributes)
        return dict(zip(self.results, jax.block_until_ready(outs), strict=True))


def values(name: str, shape: tuple, dtype: str) -> jax.Array:
    """Ones, but for lengths and page numbers, with which every query sees keys and no page has two writers."""
    if name == "block_table":
        return jnp.arange(np.prod(shape), dtype=dtype).reshape(shape)
    each = dict(mask=2**32 - 1, q_lengths=T, kv_lengths=S, lengths=LENGTH, leftpad=0, lse=20)
    return jnp.full(shape, each.get(name, 1) if jnp.dtype(dtype).itemsize == 4 else 1, dtype)


def targets(dtype: str, platform: str) -> dict[str, Callable[[], Call]]:
    """Calls that are right, which the cases below spoil."""

    def make(call, extras, band=None, workspace=None, **sizes):
        sizes, band = SIZES | sizes, band or Band()

        def array(name):
            row = TABLE[name]
            # A mask is shared by the query heads of a KV head here.
            shape = tuple(1 if letter == "G" else sizes[letter.lower()] for letter in row.memory)
            return shape, dtype if row.type == "input" else "float32" if row.type.startswith("input") else row.type

        required = [name for name, row in TABLE.items() if row.roles[call] in ("required", "updated")]
        operands = in_order({name: array(name) for name in (*required, *extras)})
        outs = {name: array(name) for name in results(call, operands)}
        if workspace:
            outs["workspace"] = ((workspace,), "uint8")
        attributes = _ffi.attributes(Spec(0.5, band=band), operands)
        return Call(f"jax_flash_{call}", operands, outs, attributes, {name: name for name in outs if name in operands})

    extras = ("mask", "q_lengths", "kv_lengths")
    per_kv_head, per_rows, per_keys, rows = _native.backward_workspace(H)
    scratch = dict(backward=B * K * (per_kv_head + G * -(-T // rows) * per_rows + (G > 1) * -(-S // rows) * per_keys))
    scratch["kvcache"] = 1 if platform == "cpu" else 2**24

    def kvcache(*extras, **sizes):
        return make(
            "kvcache", ("lengths", "leftpad", "cos", "sin", *extras), Band(None, 0), scratch["kvcache"], **sizes
        )

    return {
        "forward": lambda: make("forward", extras, workspace=_native.FORWARD_WORKSPACE),
        "backward": lambda: make("backward", ("dlse", *extras), workspace=scratch["backward"]),
        "kvcache": lambda: kvcache("k_new", "v_new"),
        "paged": lambda: kvcache("k_new", "v_new", "block_table", r=POOL, s=PAGE),
        "read-only": kvcache,
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


def sized(**sizes):
    """An axis of another size in every array that has it."""

    def change(call):
        for arrays in (call.operands, call.results):
            for name, (shape, dtype) in arrays.items():
                if name != "workspace":
                    shape = tuple(sizes.get(axis, n) for axis, n in zip(TABLE[name].memory, shape, strict=True))
                arrays[name] = (shape, dtype)

    return change


def without(*names):
    """Arrays that are not passed, whatever the options announce."""

    def change(call):
        for name in names:
            arrays, name = (call.results, name[7:]) if name.startswith("result_") else (call.operands, name)
            arrays.pop(name, None)
            call.aliases.pop(name, None)

    return change


def also(name, shape, dtype="int32"):
    """One operand more, announced and in its place."""

    def change(call):
        call.operands = in_order(call.operands | {name: (shape, dtype)})
        announced(name)(call)

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
            call.attributes["options"][_native.OPTIONS.index(name)] = value

    return change


def score(softmax_scale=1.0, softcap=0.0):
    return attribute(score=np.array([softmax_scale, softcap], np.float32))


def announced(*names, present=True):
    """Whether the options say that the call has these operands."""

    def change(call):
        at = _native.OPTIONS.index("present")
        for name in names:
            bit = 1 << list(TABLE).index(name)
            call.attributes["options"][at] &= ~bit
            call.attributes["options"][at] |= bit if present else 0

    return change


def aliases(**pairs):
    return lambda call: setattr(call, "aliases", pairs)


def every(*changes):
    def change(call):
        for each in changes:
            each(call)

    return change


SHARED = "may not share memory with"
RANGES = (also("key_ranges", (B, K, T, 2)), also("query_ranges", (B, K, S, 2)))

# (the call, how it is spoilt, what the error says)
CASES = {
    # forward
    "q of rank 4": ("forward", array(q=(B, T, K * G, H)), "q must have 5 axes"),
    "q and k of rank 70": ("forward", array(q=(1,) * 70, k=(1,) * 69), "q must have 5 axes"),
    "k of rank 5": ("forward", array(k=(B, S, K, 1, H)), "k must have the axes"),
    "a scalar q": ("forward", array(q=()), "q must have 5 axes"),
    "k with another batch": ("forward", array(k=(B + 1, S, K, H)), "k must have the axes bskh with b=2"),
    "k with other heads": ("forward", array(k=(B, S, K + 1, H)), "k must have the axes"),
    "k with another head dim": ("forward", array(k=(B, S, K, H - 1)), "k must have the axes"),
    "v shorter than k": ("forward", array(v=(B, S - 1, K, H)), "v must have the axes"),
    "mapped axes of q alone": ("forward", array(q=(1, B, T, K, G, H)), "k must have the axes"),
    "other mapped axes of k": (
        "forward",
        array(q=(3, B, T, K, G, H), k=(2, B, S, K, H)),
        r"k must have the axes \(3\) \+ bskh",
    ),
    "v of another dtype": ("forward", array(v="int8"), "v has the wrong dtype; it must be input, that of q"),
    "k of half the size": ("forward", array(k="int16"), "k has the wrong dtype"),
    "int8": ("forward", array(q="int8", k="int8", v="int8", result_o="int8"), "float32, float16 or bfloat16"),
    "head dim 0": ("forward", sized(h=0), r"the axis h must lie in \[1, 256\]; got 0"),
    "head dim 257": ("forward", sized(h=257), r"the axis h must lie in \[1, 256\]; got 257"),
    "o of another shape": ("forward", array(result_o=(B, T, K, G, H - 1)), "o must have the axes"),
    "o of another dtype": ("forward", array(result_o="int8"), "o has the wrong dtype"),
    "lse with its axes turned": ("forward", array(result_lse=(B, T, K, G)), "lse must have the axes"),
    "lse in half precision": ("forward", array(result_lse="float16"), "lse has the wrong dtype"),
    "mask with too few words": ("forward", array(mask=(B, K, 1, T, 1)), "mask must have the axes bkGTw"),
    "mask of another number of rows": ("forward", array(mask=(B, K, 1, T - 1, 2)), "mask must have the axes"),
    "mask of another group": ("forward", array(mask=(B, K, G + 1, T, 2)), "mask must have the axes"),
    "mask of rank 4": ("forward", array(mask=(B, K, T, 2)), "mask must have the axes"),
    "mask for one head": ("forward", array(mask=(B, 1, 1, T, 2)), "mask must have the axes"),
    "mask of bools": ("forward", array(mask="bool"), "mask has the wrong dtype; it must be uint32"),
    "q_lengths without heads": ("forward", array(q_lengths=(B,)), "q_lengths must have the axes"),
    "kv_lengths of int16": ("forward", array(kv_lengths="int16"), "kv_lengths has the wrong dtype"),
    "a length for each query": ("forward", array(kv_lengths=(B, T)), "kv_lengths must have the axes"),
    "a diagonal for each query": ("forward", also("diagonal", (B, K, T)), "diagonal must have the axes"),
    "a diagonal of floats": ("forward", also("diagonal", (B, K), "float32"), "diagonal has the wrong dtype"),
    "key_ranges without query_ranges": ("backward", RANGES[0], "key_ranges and query_ranges come together"),
    "ranges without ends": (
        "forward",
        every(RANGES[0], array(key_ranges=(B, K, T, 1))),
        "key_ranges must have the axes bkt2 with b=2, k=3, t=5, 2=2",
    ),
    "query_ranges for each query": (
        "backward",
        every(*RANGES, array(query_ranges=(B, K, T, 2))),
        "query_ranges must have the axes",
    ),
    "query_ranges in forward": ("forward", RANGES[1], "query_ranges is not an operand of this call"),
    "sinks for KV heads": ("forward", also("sinks", (B, K), "float32"), "sinks must have the axes bkg"),
    "sinks in half precision": ("kvcache", also("sinks", (B, K, G), "float16"), "sinks has the wrong dtype"),
    "no v": ("forward", without("v", "mask", "q_lengths", "kv_lengths"), "v is announced, but missing"),
    "no operand": ("forward", without("q", "k", "v", "mask", "q_lengths", "kv_lengths"), "q is announced, but missing"),
    "v not announced": ("forward", announced("v", present=False), "v is missing"),
    "announced, but missing": ("forward", without("kv_lengths"), "kv_lengths is announced, but missing"),
    "not announced": ("forward", announced("kv_lengths", present=False), "more operands than the options announce"),
    "a surplus operand": ("forward", surplus("operands"), "more operands than the options announce"),
    "an operand of backward": ("forward", announced("dlse"), "dlse is not an operand of this call"),
    "an operand of kvcache": ("forward", also("lengths", (B,)), "lengths is not an operand of this call"),
    "a result announced": ("forward", announced("o"), "o is not an operand of this call"),
    "no lse": ("forward", without("result_lse"), "lse has the wrong dtype"),
    "a forward workspace of 7 bytes": ("forward", array(result_workspace=(7,)), "the workspace must hold 8 bytes"),
    "no forward workspace": ("forward", without("result_workspace"), "the result workspace is missing"),
    "a surplus result": ("forward", surplus("results"), "more results than such a call has"),
    "a scale of NaN": ("forward", score(np.nan), "softmax_scale must be finite"),
    "a softcap below 0": ("forward", score(softcap=-1), "softcap must be finite and not negative"),
    "a softcap of infinity": ("forward", score(softcap=np.inf), "softcap must be finite and not negative"),
    "another order of axes": ("forward", option(memory_order=0), "k must have the axes bksh"),
    "o in q's place": ("forward", aliases(q="o"), f"the result o {SHARED} q"),
    # backward
    "o shorter than q": ("backward", array(o=(B, T - 1, K, G, H)), "o must have the axes"),
    "do of another head dim": ("backward", array(do=(B, T, K, G, H + 1)), "do must have the axes"),
    "do of another dtype": ("backward", array(do="int8"), "do has the wrong dtype"),
    "the forward's lse in memory order": ("backward", array(lse=(B, T, K, G)), "lse must have the axes"),
    "dlse in half precision": ("backward", array(dlse="float16"), "dlse has the wrong dtype"),
    "dlse for fewer rows": ("backward", array(dlse=(B, K, G, T - 1)), "dlse must have the axes"),
    "dq like k": ("backward", array(result_dq=(B, S, K, H)), "dq must have the axes"),
    "dk for each query head": ("backward", array(result_dk=(B, S, K * G, H)), "dk must have the axes"),
    "dv shorter than v": ("backward", array(result_dv=(B, S - 1, K, H)), "dv must have the axes"),
    "dv in another dtype": ("backward", array(result_dv="int8"), "dv has the wrong dtype"),
    "an empty workspace": ("backward", array(result_workspace=(0,)), "workspace must hold"),
    "a workspace of one byte": ("backward", array(result_workspace=(1,)), "workspace must hold"),
    "a workspace of two axes": ("backward", array(result_workspace=(2**10, 2**10)), "workspace must have the axes x"),
    "a workspace of floats": ("backward", array(result_workspace="float32"), "workspace has the wrong dtype"),
    "no workspace": ("backward", without("result_workspace"), "the result workspace is missing"),
    "a surplus gradient": ("backward", surplus("results", (B, S, K, H)), "more results than such a call has"),
    "no dlse": ("backward", without("dlse"), "dlse has the wrong dtype"),
    "dlse not announced": ("backward", announced("dlse", present=False), "mask has the wrong dtype"),
    "no o": ("backward", every(without("o"), announced("o", present=False)), "o is missing"),
    "half of the ranges": ("backward", RANGES[1], "key_ranges and query_ranges come together"),
    "dq in q's place": ("backward", aliases(q="dq"), f"the result dq {SHARED} q"),
    "dq in o's place": ("backward", aliases(o="dq"), f"the result dq {SHARED} o"),
    "dq in do's place": ("backward", aliases(do="dq"), f"the result dq {SHARED} do"),
    "dk in k's place": ("backward", aliases(k="dk"), f"the result dk {SHARED} k"),
    "dv in k's place": ("backward", aliases(k="dv"), f"the result dv {SHARED} k"),
    "dv in v's place": ("backward", aliases(v="dv"), f"the result dv {SHARED} v"),
    # kvcache
    "k_cache of rank 5": ("kvcache", array(k_cache=(B, S, K, 1, H)), "k_cache must have the axes rskh"),
    "mapped axes of the cache alone": ("kvcache", array(k_cache=(1, B, S, K, H)), "k_cache must have the axes"),
    "v_cache shorter than k_cache": ("kvcache", array(v_cache=(B, S - 1, K, H)), "v_cache must have the axes"),
    "v_cache of another dtype": ("kvcache", array(v_cache="int8"), "v_cache has the wrong dtype"),
    "a row too few": ("read-only", sized(r=1), "a row for each sequence; got 1 rows for 2"),
    "a row too many": ("read-only", sized(r=3), "a row for each sequence; got 3 rows for 2"),
    "a cache of more than 2^29 positions": ("read-only", sized(b=0, r=0, s=2**29 + 1), "the axis s must lie in"),
    "more than 2^31 rows": ("read-only", sized(r=2**31, s=0), f"the product of the axes Vr may be at most {2**31 - 1}"),
    "0 heads of a paged cache": ("paged", sized(k=0), "the axis k must lie in"),
    "0 query heads for a KV head": ("paged", sized(g=0), "the axis g must lie in"),
    "head dim 0 of a cache": ("kvcache", sized(h=0), "the axis h must lie in"),
    "head dim 257 of a cache": ("kvcache", sized(h=257), "the axis h must lie in"),
    "more than 2^29 rows of a KV head": ("read-only", sized(b=0, r=0, t=2**28, g=3), "the product of the axes tg"),
    "pages of 0 positions": ("paged", sized(s=0), "the axis s must lie in"),
    "a block table of no pages": ("paged", sized(n=0), "the axis n must lie in"),
    "a block table of too many pages": ("paged", sized(b=0, n=2**29), "the product of the axes ns"),
    "a block table of 2^32 + 1 pages": ("paged", sized(b=0, n=2**32 + 1), "the axis n must lie in"),
    "a block table for one sequence": ("paged", array(block_table=(1, PAGES)), "block_table must have the axes bn"),
    "a block table of int64's halves": (
        "paged",
        array(block_table=(B, 2 * PAGES, 1)),
        "block_table must have the axes",
    ),
    "a block table of int8": ("paged", array(block_table="int8"), "block_table has the wrong dtype"),
    "batch_index beside a block table": ("paged", also("batch_index", (B,)), "exclude each other"),
    "one new head for three": ("kvcache", array(k_new=(B, T_NEW, 1, H)), "k_new must have the axes"),
    "more new tokens than queries": ("kvcache", sized(u=T + 1), r"the axis u must lie in \[0, 5\]; got 6"),
    "fewer new values than keys": ("kvcache", array(v_new=(B, T_NEW - 1, K, H)), "v_new must have the axes"),
    "k_new of another rank": ("kvcache", array(k_new=(B, K, H)), "k_new must have the axes"),
    "k_new of another dtype": ("kvcache", array(k_new="int8"), "k_new has the wrong dtype"),
    "k_new alone": ("kvcache", every(without("v_new"), announced("v_new", present=False)), "come together"),
    "v_new alone": (
        "read-only",
        also("v_new", (B, T_NEW, K, H), "float32"),
        "come together|v_new has the wrong dtype",  # where q is half precision
    ),
    "cos alone": ("kvcache", every(without("sin"), announced("sin", present=False)), "come together"),
    "sin alone": ("kvcache", every(without("cos"), announced("cos", present=False)), "come together"),
    "a length for all": ("kvcache", array(lengths=(1,)), "lengths must have the axes"),
    "lengths of int8": ("kvcache", array(lengths="int8"), "lengths has the wrong dtype"),
    "leftpad per head": ("kvcache", array(leftpad=(B, K)), "leftpad must have the axes"),
    "rotary tables of int8": ("kvcache", array(cos="int8", sin="int8"), "it must be input or float32"),
    "rotary tables of uint32": ("kvcache", array(cos="uint32", sin="uint32"), "it must be input or float32"),
    "sin of int8": ("kvcache", array(sin="int8"), "sin has the wrong dtype"),
    "sin with fewer positions": ("kvcache", array(sin=(POSITIONS - 1, 8)), "sin must have the axes pd"),
    "rotary tables wider than the head": ("kvcache", sized(d=H), "the rotary dim must be"),
    "rotary tables of an odd width": ("kvcache", sized(d=12), "the rotary dim must be"),
    "rotary tables of no position": ("kvcache", sized(p=0), "the axis p must lie in"),
    "rotary tables of no width": ("kvcache", sized(d=0), "the rotary dim must be"),
    "rotary tables of 2^61 columns": ("kvcache", every(sized(p=0, d=2**61)), "the axis p must lie in"),
    "rotary tables of rank 1": ("kvcache", array(cos=(8,), sin=(8,)), "cos must have the axes"),
    "a rotary table for each sequence": ("kvcache", array(cos=(B, 9, 8), sin=(B, 9, 8)), "cos must have the axes"),
    "the result o of another shape": ("kvcache", array(result_o=(B, T, K, H)), "o must have the axes"),
    "the result lse of another order": ("kvcache", array(result_lse=(B, T, K, G)), "lse must have the axes"),
    "the result lse in half precision": ("kvcache", array(result_lse="float16"), "lse has the wrong dtype"),
    "the result k_cache shorter": (
        "kvcache",
        every(aliases(), array(result_k_cache=(B, S - 1, K, H))),
        "k_cache must have the axes",
    ),
    "the result v_cache of another dtype": (
        "kvcache",
        every(aliases(), array(result_v_cache="int8")),
        "v_cache has the wrong dtype",
    ),
    "no result v_cache": ("kvcache", without("result_v_cache"), "v_cache must have the axes"),
    "no result cache": ("kvcache", without("result_v_cache", "result_k_cache"), "k_cache must have the axes"),
    "a third result cache": ("kvcache", surplus("results", (B, S, K, H)), "more results than such a call has"),
    "a result cache where nothing is appended": (
        "read-only",
        surplus("results", (B, S, K, H)),
        "more results than such a call has",
    ),
    "crossed caches": ("kvcache", aliases(k_cache="v_cache", v_cache="k_cache"), SHARED),
    "v's result in k's place": ("kvcache", aliases(k_cache="v_cache"), f"the result v_cache {SHARED} k_cache"),
    "k's result in v's place": ("kvcache", aliases(v_cache="k_cache"), f"the result k_cache {SHARED} v_cache"),
    "o in q's place by prefill": (
        "kvcache",
        every(aliases(q="o", k_cache="k_cache", v_cache="v_cache"), option(kvcache_kernel=PREFILL)),
        f"the result o {SHARED} q",
    ),
    "o in q's place by prefill, read-only": (
        "read-only",
        every(aliases(q="o"), option(kvcache_kernel=PREFILL)),
        f"the result o {SHARED} q",
    ),
    "a kernel that does not exist": ("kvcache", option(kvcache_kernel=2), "no such kvcache_kernel"),
    "a kernel below 0": ("kvcache", option(kvcache_kernel=-1), "no such kvcache_kernel"),
    "an operand announced, but missing": ("kvcache", announced("block_table"), "block_table has the wrong dtype"),
    "the last operand announced, but missing": ("kvcache", without("sin"), "sin is announced, but missing"),
    "all operands announced": ("read-only", option(present=2 ** len(TABLE) - 1), "is not an operand of this call"),
    "an operand not announced": ("kvcache", announced("leftpad", present=False), "cos has the wrong dtype"),
    "k_cache not announced": ("kvcache", announced("k_cache", present=False), "k_cache is missing"),
    "a bit for no operand": ("kvcache", option(present=1 << len(TABLE)), "unknown operands are announced"),
    "negative bits": ("kvcache", option(present=-1), "unknown operands are announced"),
    "a mask": ("kvcache", also("mask", (B, K, 1, T, 2), "uint32"), "mask is not an operand of this call"),
    "a surplus operand of kvcache": ("kvcache", surplus("operands"), "more operands than the options announce"),
    "no caches": (
        "kvcache",
        without(*(name for name in TABLE if name != "q")),
        "the operand k_cache is announced, but missing",
    ),
    "the other order of axes": ("kvcache", option(memory_order=0), "k_cache must have the axes rksh"),
    "a negative number of splits": ("kvcache", option(num_splits=-1), "num_splits must lie in"),
    "a number of splits that wraps": ("kvcache", option(num_splits=2**32 + 1), "num_splits must lie in"),
    # attributes
    "options of int32": (
        "forward",
        lambda call: call.attributes.update(options=call.attributes["options"].astype(np.int32)),
        "options must be 9 int64",
    ),
    "an option too few": (
        "backward",
        lambda call: call.attributes.update(options=call.attributes["options"][:-1]),
        "options must be 9 int64",
    ),
    "an option too many": (
        "kvcache",
        lambda call: call.attributes.update(options=np.append(call.attributes["options"], 0)),
        "options must be 9 int64",
    ),
    "options as a number": ("kvcache", attribute(options=np.int64(3)), "options must be 9 int64"),
    "options as text": ("forward", attribute(options="111111111"), "options must be 9 int64"),
    "no options": ("kvcache", no_attribute("options"), "options must be 9 int64"),
    "no score": ("kvcache", no_attribute("score"), "score must be 2 float32"),
    "no attributes": ("backward", every(no_attribute("score"), no_attribute("options")), "options must be 9 int64"),
    "score of float64": ("forward", attribute(score=np.zeros(2)), "score must be 2 float32"),
    "score without softcap": ("backward", attribute(score=np.zeros(1, np.float32)), "score must be 2 float32"),
    "a scale of infinity": ("kvcache", score(np.inf), "softmax_scale must be finite"),
    "a softcap of NaN": ("kvcache", score(softcap=np.nan), "softcap must be finite"),
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
    assert f"{call.target}: " in str(raised.value)


@pytest.mark.parametrize("target", ["forward", "backward", "kvcache", "paged", "read-only"])
def test_what_is_spoilt_above_is_right(target, dtype, platform):
    results = targets(dtype, platform)[target]().run()
    for name in {"o", "lse", "dq", "dk", "dv", "k_cache", "v_cache"} & {*results}:
        assert jnp.isfinite(results[name][0]).all(), name


@pytest.mark.parametrize("target", ["forward", "backward"])
def test_ranges_a_diagonal_and_sinks_are_operands(target, dtype, platform):
    call = targets(dtype, platform)[target]()
    ranges = RANGES if target == "backward" else RANGES[:1]
    every(*ranges, also("diagonal", (B, K)), also("sinks", (B, K, G), "float32"))(call)
    call.run()


@pytest.mark.parametrize("target", ["kvcache", "paged", "read-only"])
def test_o_may_lie_in_the_place_of_q_by_decode(target, dtype, platform):
    call = targets(dtype, platform)[target]()
    option(kvcache_kernel=DECODE)(call)
    apart = call.run()
    call.aliases |= dict(q="o")
    for name, x in call.run().items():
        if name != "workspace":
            np.testing.assert_array_equal(x, apart[name], name)


def test_kvcache_workspace(dtype, platform):
    if platform == "cpu":
        pytest.skip("the CPU kernels take no workspace")
    call = targets(dtype, platform)["kvcache"]()
    array(result_workspace=(8,))(call)
    with pytest.raises(jax.errors.JaxRuntimeError, match="workspace must hold"):
        call.run()


def test_a_k_new_of_no_token_leaves_the_caches(dtype, platform):
    """Also where their results are buffers of their own."""
    for aliased in (True, False):
        call = targets(dtype, platform)["kvcache"]()
        sized(u=0)(call)
        if not aliased:
            call.aliases = {}
        results = call.run()
        assert (results["k_cache"] == 1).all() and (results["v_cache"] == 1).all()
