"""Sequences that are split over the devices of a mesh axis: who holds which tokens, and what these see."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash._spec import Band, Spec

NAME = "ring_attention"
LAYOUTS = ("contiguous", "zigzag")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Which of a sequence's tokens each device holds: `size` each, in rising order."""

    devices: int
    size: int
    zigzag: bool

    @classmethod
    def of(cls, axis_name, layout: str, size: int) -> Tokens:
        if layout not in LAYOUTS:
            raise ValueError(f"{NAME}: layout must be one of {', '.join(map(repr, LAYOUTS))}; got {layout!r}")
        if not isinstance(size, int):
            raise NotImplementedError(f"{NAME}: the number of tokens must be static, not symbolic; got {size}")
        if layout == "zigzag" and size % 2:
            raise ValueError(f"{NAME}: in the zigzag layout each device holds an even number of tokens; got {size}")
        try:
            devices = jax.lax.axis_size(axis_name)
        except NameError:
            raise ValueError(
                f"{NAME}: axis_name must be an axis of the mesh of the jax.shard_map around; got {axis_name!r}"
            ) from None
        return cls(devices, size, layout == "zigzag")

    @property
    def total(self) -> int:
        return self.devices * self.size

    def chunks(self, device) -> list:
        """The first tokens of the chunks that a device holds; they are equally long."""
        if not self.zigzag:
            return [device * self.size]
        return [device * (self.size // 2), (2 * self.devices - 1 - device) * (self.size // 2)]

    def positions(self, device) -> jax.Array:
        """(size,), int32"""
        chunks = self.chunks(device)
        steps = jnp.arange(self.size // len(chunks), dtype=jnp.int32)
        return jnp.concatenate([first + steps for first in chunks])

    def count_before(self, device, position):
        """How many of a device's tokens come before a position."""
        chunks = self.chunks(device)
        return sum(jnp.clip(position - first, 0, self.size // len(chunks)) for first in chunks)


@dataclasses.dataclass(frozen=True)
class Split:
    """What is static in a call to split sequences."""

    spec: Spec
    axis_name: str | tuple[str, ...]
    queries: Tokens
    keys: Tokens

    @property
    def devices(self) -> int:
        return self.keys.devices

    def is_uneven(self) -> bool:
        """Whether some devices' queries see many more keys than those of others."""
        return not self.keys.zigzag and (self.spec.band.left is None) != (self.spec.band.right is None)

    def key_ranges(self, arrays) -> tuple[jax.Array, jax.Array] | None:
        """The positions (B or 1, T) at which the keys that this device's queries see begin and end; None: all do."""
        band, lengths = self.spec.band, [arrays.get(name) for name in ("q_lengths", "kv_lengths")]
        if band == Band() and lengths == [None, None]:
            return None
        t, s = (
            tokens.total if length is None else jnp.clip(length, 0, tokens.total)[:, None]
            for tokens, length in zip((self.queries, self.keys), lengths, strict=True)
        )
        i = self.queries.positions(arrays["device"])[None]
        begin, end = jnp.zeros_like(i), jnp.full_like(i, self.keys.total)
        if band.left is not None:
            begin = i + (s - t) - band.left
        if band.right is not None:
            end = i + (s - t) + band.right + 1
        # Queries that are not valid come last, and see nothing where begin and end do not fall.
        begin, end = (jnp.where(i < t, jnp.clip(x, 0, s), self.keys.total) for x in (begin, end))
        return begin, jnp.maximum(begin, end)

    def operands(self, q, k, v, ranges) -> tuple[Spec, dict[str, jax.Array]]:
        """A call of `_derivative` to keys that these queries see so: begin and end among them, or None."""
        spec, operands = dataclasses.replace(self.spec, band=Band()), {"q": q, "k": k, "v": v}
        if ranges is not None:
            table = jnp.stack(ranges, axis=-1)
            B, K = k.shape[0], k.shape[2]
            operands["key_ranges"] = jnp.broadcast_to(table[:, None], (B, K, *table.shape[1:]))
        return spec, operands


def zigzag_order(x, devices: int, axis: int) -> np.ndarray:
    if devices < 1 or x.shape[axis] % (2 * devices) != 0:
        raise ValueError(
            f"zigzag: the size of axis {axis} must be a multiple of twice the number of devices, 2 * {devices}; got "
            f"shape {x.shape}. Pad the tokens"
        )
    return np.stack([np.arange(devices), 2 * devices - 1 - np.arange(devices)], axis=1).ravel()


def take_chunks(x, axis: int, order: np.ndarray):
    axis %= x.ndim
    chunks = x.reshape(*x.shape[:axis], len(order), x.shape[axis] // len(order), *x.shape[axis + 1 :])
    return jnp.take(chunks, order, axis=axis).reshape(x.shape)


def with_sinks(results, split: Split, arrays) -> tuple[jax.Array, jax.Array]:
    """The output and the log-sum-exp with one score more in each softmax, if there are sinks."""
    out, lse = results
    if "sinks" not in arrays:
        return out, lse
    more = jnp.logaddexp(lse, arrays["sinks"].astype(jnp.float32)[None, :, None])
    if "q_lengths" in arrays:
        position = split.queries.positions(arrays["device"])[None, None]
        more = jnp.where(position < arrays["q_lengths"][:, None, None], more, -jnp.inf)
    return (out * per_row(share(lse, more))).astype(out.dtype), more


def share(part, whole):
    """exp(part - whole) of log-sum-exps, 0 where there is nothing."""
    return jnp.where(part == -jnp.inf, 0.0, jnp.exp(part - jnp.where(whole == -jnp.inf, 0.0, whole)))


def per_row(x):
    """(B, N, T) to (B, T, N, 1)."""
    return jnp.swapaxes(x, 1, 2)[..., None]
