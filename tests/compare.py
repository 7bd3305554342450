"""How close is close: the oracle is the reference in float32, and what is allowed follows from the same reference run
in the input's dtype."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import reference

# The LSE is float32 whatever the inputs are, and the kernels compute exp and log to a few units in the last place.
LSE_TOLERANCE = 1e-4
# What has a gradient besides q, k and v.
GRADIENTS = ("sinks",)


def close(name: str, ours, oracle, rough, factor: float) -> None:
    """max |ours - oracle| <= factor * max |rough - oracle| + a little."""
    oracle, rough = (np.asarray(x, np.float32) for x in (oracle, rough))
    within(name, ours, oracle, np.abs(rough - oracle).max(initial=0), factor)


def within(name: str, ours, oracle, deviation: float, factor: float) -> None:
    """max |ours - oracle| <= factor * deviation + a little. deviation: by how much rounding in the dtype changes it."""
    dtype = ours.dtype
    ours, oracle = (np.asarray(x, np.float32) for x in (ours, oracle))
    assert ours.shape == oracle.shape, f"{name}: shape {ours.shape}, not {oracle.shape}"
    assert np.isfinite(ours).all(), f"{name}: not finite in {np.argwhere(~np.isfinite(ours))[:5].tolist()}"
    if ours.size == 0:
        return
    # In float32 the rough run is the oracle itself, and sums of a thousand products in another order differ by this.
    little = 1e-5 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps) / 4
    allowed = factor * deviation + little * max(1.0, np.abs(oracle).max())
    error = np.abs(ours - oracle)
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error.max() <= allowed, f"{name}: off by {error.max():.3g} at {worst}, allowed {allowed:.3g}"


def close_lse(ours, oracle) -> None:
    assert ours.dtype == jnp.float32
    ours, oracle = np.asarray(ours), np.asarray(oracle)
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(oracle), "lse: rows that see no key")
    seen = ~np.isneginf(oracle)
    np.testing.assert_allclose(ours[seen], oracle[seen], LSE_TOLERANCE, LSE_TOLERANCE, err_msg="lse")


# Compiling it takes longer than running it, so it is compiled with little optimisation.
@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 0})
def _reference(options: tuple, compute_dtype: str, q, k, v, extras: dict, cotangents):
    attend = functools.partial(
        reference.attention, **dict(options), return_softmax_lse=True, compute_dtype=compute_dtype
    )
    some = [x.astype(compute_dtype) for x in (q, k, v)] + [extras[name] for name in GRADIENTS if name in extras]
    outs, pull = jax.vjp(_of_floats(attend, extras), *some)
    return outs, pull((cotangents[0].astype(compute_dtype), cotangents[1]))


def _of_floats(attend, extras: dict):
    """attend as a function of q, k, v and the extras that have a gradient."""
    names = [name for name in GRADIENTS if name in extras]
    return lambda q, k, v, *more: attend(q, k, v, **dict(extras) | dict(zip(names, more, strict=True)))


def run_reference(options: tuple, compute_dtype: str, qkv: dict, extras: dict, cotangents):
    """(out, lse), (dq, dk, dv, ...) of the reference; out, dq, dk, dv in compute_dtype."""
    return _reference(options, compute_dtype, *qkv.values(), extras, cotangents)


def check(case, attend, qkv: dict, extras: dict) -> None:
    """Compares a function of (q, k, v, **extras), its LSE and all its gradients with the reference's."""
    options, cotangents = tuple(case.options().items()), case.cotangents()

    @jax.jit
    def run(q, k, v, extras, cotangents):
        more = [extras[name] for name in GRADIENTS if name in extras]
        outs, pull = jax.vjp(_of_floats(attend, extras), q, k, v, *more)
        return outs, pull(cotangents)

    (out, lse), grads = run(*qkv.values(), extras, cotangents)
    (oracle, oracle_lse), oracle_grads = run_reference(options, "float32", qkv, extras, cotangents)
    (rough, _), rough_grads = run_reference(options, case.dtype, qkv, extras, cotangents)
    assert out.dtype == case.dtype and all(g.dtype == case.dtype for g in grads[:3])
    close("out", out, oracle, rough, 3.0 if case.softcap else 2.0)
    close_lse(lse, oracle_lse)
    if "sinks" in extras:
        # A sink's gradient is a sum over the products of o and its cotangent, and o is rounded to its dtype: errors of
        # half a unit, of either sign. (The rough run does not round the o that it differentiates.)
        products = np.asarray(oracle, np.float32) * np.asarray(cotangents[0], np.float32)
        rounding = float(jnp.finfo(case.dtype).eps) / 2 * np.sqrt((products**2).sum((0, 1, 3)))
        rough_grads = *rough_grads[:3], rough_grads[3] + rounding
    names = ("dq", "dk", "dv", *(f"d{name}" for name in GRADIENTS if name in extras))
    for name, ours, exact, inexact in zip(names, grads, oracle_grads, rough_grads, strict=True):
        close(name, ours, exact, inexact, 3.0)
