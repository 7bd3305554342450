"""Ring attention: keys and values go from device to device while each computes with those that it has."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_flash import _derivative
from jax_flash._context import Split, per_row, share, with_sinks


def attend(split: Split, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The output (B, T / n, N, H) and the log-sum-exp (B, N, T / n)."""
    return with_sinks(_rotate(split, {name: x for name, x in arrays.items() if name != "sinks"}), split, arrays)


def _steps(split: Split, lengths: bool) -> list[int]:
    """How far the keys have come in each step that is made: at step r, device i has those of device i - r."""
    n = split.devices
    return [r for r in range(n) if r == 0 or lengths or any(_sees(split, i, (i - r) % n) for i in range(n))]


def _sees(split: Split, device: int, of_device: int) -> bool:
    """Whether any query of a device sees any key of another one, where there are no lengths."""
    band, shift = split.spec.band, split.keys.total - split.queries.total
    q_chunks, k_chunks = split.queries.chunks(device), split.keys.chunks(of_device)
    q_size, k_size = split.queries.size // len(q_chunks), split.keys.size // len(k_chunks)
    return any(
        (band.right is None or k <= q + shift + q_size - 1 + band.right)
        and (band.left is None or k + k_size - 1 >= q + shift - band.left)
        for q in q_chunks
        for k in k_chunks
    )


def _move(split: Split, arrays, by: int):
    """Each array to the device that stands so far ahead."""
    n = split.devices
    if by % n == 0:
        return arrays
    ahead = [(i, (i + by) % n) for i in range(n)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, split.axis_name, ahead), arrays)


def _operands(split: Split, arrays, k, v, step: int):
    """The call in which this device attends to the keys that have come so far."""
    ranges = split.key_ranges(arrays)
    if ranges is not None:
        of_device = (arrays["device"] - step) % split.devices
        ranges = tuple(split.keys.count_before(of_device, position) for position in ranges)
    return split.operands(arrays["q"], k, v, ranges)


def _forward(split: Split, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    kv = arrays["k"], arrays["v"]
    made = _steps(split, "q_lengths" in arrays or "kv_lengths" in arrays)
    for step, following in zip(made, [*made[1:], None], strict=True):
        arriving = None if following is None else _move(split, kv, following - step)  # while this step computes
        o, own = _derivative.forward(*_operands(split, arrays, *kv, step))
        if step == 0:
            out, lse = o.astype(jnp.float32), own
        else:
            whole = jnp.logaddexp(lse, own)
            out = out * per_row(share(lse, whole)) + o * per_row(share(own, whole))
            lse = whole
        kv = arriving
    return out.astype(arrays["q"].dtype), lse


_rotate = jax.custom_vjp(_forward, nondiff_argnums=(0,))


def _rotate_forward(split: Split, arrays):
    out, lse = _forward(split, arrays)
    return (out, lse), (arrays, out, lse)


def _rotate_backward(split: Split, residuals, cotangents):
    arrays, out, lse = residuals
    results = {"o": out, "lse": lse} | dict(zip(("do", "dlse"), cotangents, strict=True))
    # Or else XLA keeps what came round in the forward pass, all of the sequence, until here.
    kv, results = jax.lax.optimization_barrier(((arrays["k"], arrays["v"]), results))
    made = _steps(split, "q_lengths" in arrays or "kv_lengths" in arrays)
    dq, dkv = 0.0, (0.0, 0.0)
    for step, following in zip(made, [*made[1:], None], strict=True):
        arriving = None if following is None else _move(split, kv, following - step)
        spec, operands = _operands(split, arrays, *kv, step)
        gradients = _derivative.backward(spec, operands | results)
        dq = dq + gradients["q"].astype(jnp.float32)
        dkv = tuple(sum_ + gradients[name].astype(jnp.float32) for sum_, name in zip(dkv, "kv", strict=True))
        # The gradients go along with their keys and values, and in the end home.
        dkv = _move(split, dkv, -step if following is None else following - step)
        kv = arriving
    dk, dv = dkv
    gradients = {"q": dq, "k": dk, "v": dv}
    return ({name: gradients[name].astype(x.dtype) if name in gradients else None for name, x in arrays.items()},)


_rotate.defvjp(_rotate_forward, _rotate_backward)
