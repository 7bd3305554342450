"""The derivative of attention: a reverse-mode rule over a spec and a dict of operands, with gradients by the table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jax_flash import _primitive, _ranges
from jax_flash._operands import TABLE, merge_heads, split_heads
from jax_flash._spec import Spec


def forward(spec: Spec, operands: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The output (B, T, N, H) and the log-sum-exp (B, N, T). q, k and v are the API's arrays, the rest as the table
    has it."""
    results = _primitive.bind("forward", spec, operands | {"q": split_heads("q", operands["q"], _kv_heads(operands))})
    return merge_heads("o", results["o"]), merge_heads("lse", results["lse"])


def attend(spec: Spec, operands: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """`forward` with its derivative."""
    for name, x in operands.items():
        if TABLE[name].gradient:
            operands = operands | {name: _primitive.reverse_mode_p.bind(x, tangent=False)}
    return _differentiable(spec, operands)


_differentiable = jax.custom_vjp(forward, nondiff_argnums=(0,))


def _attend_forward(spec: Spec, operands):
    operands = {name: x.value for name, x in operands.items()}
    out, lse = attend(spec, operands)
    # Named here, where they are both results and residuals, so that saving them spares the kernel a second run.
    out, lse = checkpoint_name(out, "jax_flash_out"), checkpoint_name(lse, "jax_flash_lse")
    return (out, lse), operands | {"o": out, "lse": lse}


def _attend_backward(spec: Spec, residuals, cotangents):
    d_out, d_lse = cotangents
    arrays = residuals | {"do": jnp.zeros_like(residuals["o"]) if isinstance(d_out, SymbolicZero) else d_out}
    if not isinstance(d_lse, SymbolicZero):
        arrays["dlse"] = d_lse
    gradients = backward(spec, arrays)
    return ({name: gradients.get(name) for name in residuals if name not in ("o", "lse")},)


def backward(spec: Spec, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The gradients of `forward`'s operands that have one, by name. arrays: those operands, the results o and lse, and
    their cotangents do and, if there are any, dlse."""
    if "key_ranges" in arrays:
        arrays = arrays | {"query_ranges": _ranges.seen_from_keys(arrays["key_ranges"], arrays["k"].shape[1])}
    per_head = ("q", "o", "do", "lse", "dlse")
    K = _kv_heads(arrays)
    arrays = arrays | {name: split_heads(name, arrays[name], K) for name in per_head if name in arrays}
    if "sinks" not in arrays:
        results = _primitive.bind("backward", spec, arrays)
    else:
        # The kernels know rows that see no key, whose cotangents may be anything, by a log-sum-exp of -inf. These have
        # that of the sink alone, but for the kernels' rounding, and an output of zeros.
        sink = arrays["sinks"][..., None]
        unseen = arrays["lse"] <= sink + 1e-6 * (1 + jnp.abs(sink))
        unseen &= _per_query(jnp.all(arrays["o"] == 0, axis=-1))
        results = _primitive.bind("backward", spec, arrays | {"lse": jnp.where(unseen, -jnp.inf, arrays["lse"])})
        results["dsinks"] = _sinks_gradient(arrays, unseen)
    results["dq"] = merge_heads("dq", results["dq"])
    return {name: results[row.gradient] for name, row in TABLE.items() if row.gradient in results}


def _per_query(x) -> jax.Array:
    """(B, T, K, G) as the log-sum-exp lies, (B, K, G, T)."""
    return jnp.moveaxis(x, 1, -1)


def _sinks_gradient(arrays, unseen) -> jax.Array:
    """A sink has a probability and no value: what the softmax's other derivatives leave is all that there is."""
    products = arrays["o"].astype(jnp.float32) * arrays["do"].astype(jnp.float32)
    delta = jnp.where(unseen, 0.0, _per_query(jnp.sum(products, axis=-1)))
    if "dlse" in arrays:
        delta = delta - arrays["dlse"]
    has_sink = arrays["lse"] != -jnp.inf  # not queries past their length, whose cotangents may be anything
    p = jnp.exp(arrays["sinks"][..., None] - jnp.where(has_sink, arrays["lse"], jnp.inf))
    return -jnp.sum(jnp.where(has_sink, p * delta, 0.0), axis=-1)


def _kv_heads(operands) -> int:
    return operands["k"].shape[2]


_differentiable.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
