"""Bands below the public API: sides of any sign, from the top left, the bottom right or a diagonal per sequence, and
tables of ranges; forward and backward against the primitives' meaning in plain jax.numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import close, close_lse

from jax_flash import _primitive, _reference
from jax_flash._spec import Band, Spec

B, T, S, K, G, H = 2, 150, 270, 2, 2, 64

BANDS = {
    "strictly causal": Band(None, -1, True),
    "right of the diagonal": Band(-3, 40, True),
    "left of the diagonal": Band(90, -20),
    "nothing between the sides": Band(-9, 4),
    "far right": Band(-260, None, True),
    "top-left window": Band(30, 17, True),
    "bottom-right window": Band(30, 17),
}


def operands(dtype: str, **more) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"q": (B, T, K, G, H), "k": (B, S, K, H), "v": (B, S, K, H)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()} | more


def per_head(values) -> jax.Array:
    return jnp.broadcast_to(jnp.array(values, jnp.int32)[:, None], (B, K))


def tables(begin, end) -> dict[str, jax.Array]:
    """key_ranges and query_ranges from each query's range of keys; both sides never fall."""
    begin, end, j = np.asarray(begin), np.asarray(end), np.arange(S)
    first = np.searchsorted(end, j, side="right")  # with end > j
    behind = np.searchsorted(begin, j, side="right")  # the last with begin <= j
    key_ranges, query_ranges = np.stack([begin, end], -1), np.stack([first, behind], -1)
    return {
        "key_ranges": jnp.asarray(np.broadcast_to(key_ranges, (B, K, T, 2)), jnp.int32),
        "query_ranges": jnp.asarray(np.broadcast_to(query_ranges, (B, K, S, 2)), jnp.int32),
    }


def check(spec: Spec, arrays: dict[str, jax.Array]) -> None:
    dtype = arrays["q"].dtype
    exact = {name: x.astype(jnp.float32) if x.dtype == dtype else x for name, x in arrays.items()}
    of_backward = {name: arrays[name] for name in ("query_ranges",) if name in arrays}
    of_forward = {name: x for name, x in arrays.items() if name not in of_backward}
    ours, want = _primitive.bind("forward", spec, of_forward), _reference.EVALUATE["forward"](spec, exact)
    rough = _reference.EVALUATE["forward"](spec, arrays)
    # In 16 bits the reference rounds its result alone, so half a unit more is allowed for our probabilities.
    close("o", ours["o"], want["o"], rough["o"], 4.0)
    close_lse(ours["lse"], want["lse"])
    rng = np.random.default_rng(1)
    cotangents = {
        "do": jnp.asarray(rng.normal(size=(B, T, K, G, H)), dtype),
        "dlse": jnp.ones((B, K, G, T), jnp.float32),
    }
    gradients = _primitive.bind("backward", spec, arrays | ours | cotangents)
    exact |= {"do": cotangents["do"].astype(jnp.float32), "dlse": cotangents["dlse"]}
    for name, exact_gradient in _reference.EVALUATE["backward"](spec, exact).items():
        close(name, gradients[name], exact_gradient, exact_gradient * (1 + float(jnp.finfo(dtype).eps)), 4.0)


@pytest.mark.parametrize("lengths", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("band", BANDS)
def test_sides_of_any_sign(band, lengths, dtype):
    more = {"q_lengths": per_head([T, 77]), "kv_lengths": per_head([201, S])} if lengths else {}
    check(Spec(H**-0.5, band=BANDS[band]), operands(dtype, **more))


@pytest.mark.parametrize("diagonal", [(0, 120), (-70, 269), (2**31 - 1, -(2**31)), (300, -149)], ids=str)
def test_a_diagonal_for_each_sequence(diagonal, dtype):
    check(Spec(H**-0.5, band=Band(25, 0)), operands(dtype, diagonal=per_head(diagonal)))


RANGES = {
    "packed": (np.repeat([0, 60, 100], 50), np.repeat([60, 100, 270], 50)),
    "with a gap": (np.repeat([0, 200, 200], 50), np.repeat([40, 200, 260], 50)),
    "sliding": (np.arange(T), np.minimum(np.arange(T) + 70, S)),
    "none": (np.zeros(T, int), np.zeros(T, int)),
}


@pytest.mark.parametrize("band", [Band(), Band(None, 0, True), Band(40, 9)], ids=["open", "causal", "window"])
@pytest.mark.parametrize("ranges", RANGES)
def test_tables_of_ranges(ranges, band, dtype):
    check(Spec(H**-0.5, band=band), operands(dtype, **tables(*RANGES[ranges])))
