"""Ring attention: sequences that are split over devices.

Each device holds a part of the queries, keys and values, and the keys and values go round: `ring_attention`. In causal
attention, devices that hold early tokens have less to do than those with late ones, unless each holds some of both:
`zigzag`.

>>> import functools, jax, jax.numpy as jnp, jax_flash
>>> from jax.sharding import NamedSharding, PartitionSpec as P
>>> mesh = jax.make_mesh((2,), ("context",), devices=jax.devices("cpu")[:2])
>>> x = jax.random.normal(jax.random.key(0), (1, 16, 4, 64))
>>> x = jax_flash.ring.zigzag(x, 2, axis=1)  # once, where the data is made
>>> x = jax.device_put(x, NamedSharding(mesh, P(None, "context")))
>>> attend = functools.partial(jax_flash.ring_attention, axis_name="context", causal=True, layout="zigzag")
>>> shared = jax.shard_map(attend, mesh=mesh, in_specs=P(None, "context"), out_specs=P(None, "context"))
>>> jax.jit(shared)(x, x, x).shape
(1, 16, 4, 64)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import _derivative, _sharding, _validate
from jax_flash._spec import Band, Spec

__all__ = ["positions", "ring_attention", "unzigzag", "zigzag"]

_NAME = "ring_attention"
LAYOUTS = ("contiguous", "zigzag")


def zigzag(x: jax.Array, devices: int, axis: int = 1) -> jax.Array:
    """Tokens from the order of the text to that of the zigzag layout: of 2 * devices equal chunks, device i comes to
    hold chunks i and 2 * devices - 1 - i, so that all have the same work in causal attention.

    Args:
      x: anything that has tokens along `axis`: ids, positions, segment ids, labels, q, k, v.
      devices: how many the tokens will be split over.
      axis: the axis of the tokens, whose size is a multiple of 2 * devices.

    Returns:
      x in the other order, to be split over the devices in equal contiguous parts.

    Raises:
      ValueError: the tokens cannot be divided so.

    The layout is that of Brandon et al., Striped Attention (https://arxiv.org/abs/2311.09431), by larger pieces, as
    Llama 3's training has it (https://arxiv.org/abs/2407.21783).

    >>> import jax.numpy as jnp, jax_flash
    >>> jax_flash.ring.zigzag(jnp.arange(8), 2, axis=0).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]
    """
    return _take_chunks(x, axis, _order(x, devices, axis))


def unzigzag(x: jax.Array, devices: int, axis: int = 1) -> jax.Array:
    """The inverse of `zigzag`: tokens back in the order of the text.

    >>> import jax.numpy as jnp, jax_flash
    >>> jax_flash.ring.unzigzag(jnp.array([0, 1, 6, 7, 2, 3, 4, 5]), 2, axis=0).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return _take_chunks(x, axis, np.argsort(_order(x, devices, axis)))


def _order(x, devices: int, axis: int) -> np.ndarray:
    if devices < 1 or x.shape[axis] % (2 * devices) != 0:
        raise ValueError(
            f"zigzag: the size of axis {axis} must be a multiple of twice the number of devices, 2 * {devices}; got "
            f"shape {x.shape}. Pad the tokens"
        )
    return np.stack([np.arange(devices), 2 * devices - 1 - np.arange(devices)], axis=1).ravel()


def _take_chunks(x, axis: int, order: np.ndarray):
    axis %= x.ndim
    chunks = x.reshape(*x.shape[:axis], len(order), x.shape[axis] // len(order), *x.shape[axis + 1 :])
    return jnp.take(chunks, order, axis=axis).reshape(x.shape)


def positions(size: int, *, axis_name: str, layout: str = "contiguous") -> jax.Array:
    """Inside shard_map: where in the text this device's tokens are, (size,) int32, as rotary embeddings want it.

    Args:
      size: how many tokens each device holds.
      axis_name: the mesh axis, or axes, that the tokens are split over.
      layout: "contiguous" or "zigzag".

    >>> import functools, jax, jax_flash
    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jax.make_mesh((2,), ("context",), devices=jax.devices("cpu")[:2])
    >>> of_device = functools.partial(jax_flash.ring.positions, 4, axis_name="context", layout="zigzag")
    >>> jax.shard_map(of_device, mesh=mesh, in_specs=(), out_specs=P("context"))().tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]
    """
    return _Tokens.of(axis_name, layout, size).positions(jax.lax.axis_index(axis_name))


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str | tuple[str, ...],
    layout: str = "contiguous",
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    q_lengths: jax.Array | None = None,
    kv_lengths: jax.Array | None = None,
    sinks: jax.Array | None = None,
    deterministic: bool = False,
    return_softmax_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`attention` inside shard_map, to sequences that are split over the n devices of a mesh axis.

    The keys and values go round from device to device while each computes with those that it has, and what comes of
    each step is merged by its log-sum-exp in float32. The memory of a device is that of its own tokens. Of a window
    only the steps are made in which some query sees some key.

    =====================  ==================  =====================================
    array, on each device  shape               dtype
    =====================  ==================  =====================================
    q, and the output      (B, T / n, N, H)    bfloat16, float16, float32 (CPU only)
    k, v                   (B, S / n, K, H)    as q
    q_lengths, kv_lengths  (B,)                any integer
    sinks                  (N,)                any float
    log-sum-exp            (B, N, T / n)       float32
    =====================  ==================  =====================================

    Args:
      q: this device's queries.
      k: its keys.
      v: its values.
      axis_name: the mesh axis that the tokens are split over, or several of them.
      layout: which tokens a device has. "contiguous": device i those of part i. "zigzag": as `jax_flash.ring.zigzag`
        puts them, which divides the work of causal attention evenly.
      softmax_scale: what the products q.k are multiplied by, default 1 / sqrt(H).
      causal: as for `attention`, of the whole sequences: query i sees keys j <= i + s - t.
      window_size: likewise.
      softcap: scores become softcap * tanh(score / softcap).
      q_lengths: the number of valid queries in each whole sequence, the same on all devices.
      kv_lengths: the number of valid keys in each whole sequence, the same on all devices.
      sinks: of each query head one score more, without a value, in the softmax of all its valid queries. It has a
        gradient.
      deterministic: gradients are equal bit for bit whenever the call is repeated.
      return_softmax_lse: also return the log-sum-exp of the scores, which has a gradient.

    Returns:
      The output, like q; or (output, log-sum-exp) with return_softmax_lse.

    Raises:
      ValueError: the arguments contradict each other, or axis_name is no axis of the shard_map around.
      NotImplementedError: they make sense but there is no kernel for them; the message says what to do.

    Liu et al., Ring Attention (https://arxiv.org/abs/2310.01889).

    >>> import functools, jax, jax_flash
    >>> from jax.sharding import NamedSharding, PartitionSpec as P
    >>> mesh = jax.make_mesh((2,), ("context",), devices=jax.devices("cpu")[:2])
    >>> x = jax.random.normal(jax.random.key(0), (1, 16, 4, 64))
    >>> x = jax.device_put(x, NamedSharding(mesh, P(None, "context")))
    >>> attend = functools.partial(jax_flash.ring_attention, axis_name="context", window_size=(7, 0))
    >>> shared = jax.shard_map(attend, mesh=mesh, in_specs=P(None, "context"), out_specs=P(None, "context"))
    >>> jax.jit(shared)(x, x, x).shape
    (1, 16, 4, 64)
    """
    arrays = {"q": q, "k": k, "v": v, "q_lengths": q_lengths, "kv_lengths": kv_lengths, "sinks": sinks}
    arrays = {name: _validate.as_array(_NAME, name, x) for name, x in arrays.items() if x is not None or name in "qkv"}
    q, k, v = (arrays[name] for name in "qkv")
    _validate.check_qkv(_NAME, q, k, v)
    if q.ndim != 4:
        raise ValueError(f"{_NAME}: q, k and v must be (B, T, N, H); got q {_validate.show(q)}. Add an axis: q[None]")
    for name in ("q_lengths", "kv_lengths"):
        if name in arrays:
            _validate.check_lengths(_NAME, name, arrays[name], q)
            arrays[name] = _validate.int32(arrays[name])
    if "sinks" in arrays:
        _validate.check_sinks(_NAME, arrays["sinks"], q)
    spec = _validate.make_spec(
        _NAME,
        q.shape[-1],
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        deterministic=_validate.static_bool(_NAME, "deterministic", deterministic),
    )
    if spec.softmax_scale <= 0:
        raise NotImplementedError(f"{_NAME}: softmax_scale must be positive; got {softmax_scale}. Negate q")
    with_lse = _validate.static_bool(_NAME, "return_softmax_lse", return_softmax_lse)
    ring = _Ring(spec, axis_name, *(_Tokens.of(axis_name, layout, x.shape[1]) for x in (q, k)))
    sinks = arrays.pop("sinks", None)
    # With the device, since what does not vary over the axis has to be made to, as the results do.
    arrays = _sharding.vary_together(arrays | {"device": jax.lax.axis_index(axis_name)})
    out, lse = _attend(ring, arrays)
    if sinks is not None:
        out, lse = _with_sinks(out, lse, sinks, arrays.get("q_lengths"), ring.queries.positions(arrays["device"]))
    return (out, lse) if with_lse else out


def _with_sinks(out, lse, sinks, q_lengths, position):
    """A score more in each softmax."""
    with_sink = jnp.logaddexp(lse, sinks.astype(jnp.float32)[None, :, None])
    if q_lengths is not None:
        with_sink = jnp.where(position[None, None] < q_lengths[:, None, None], with_sink, -jnp.inf)
    share = _share(lse, with_sink)
    return (out * _per_row(share)).astype(out.dtype), with_sink


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """Which of a sequence's tokens each device holds: `size` each, in rising order."""

    devices: int
    size: int
    zigzag: bool

    @classmethod
    def of(cls, axis_name, layout: str, size: int) -> _Tokens:
        if layout not in LAYOUTS:
            raise ValueError(f"{_NAME}: layout must be one of {', '.join(map(repr, LAYOUTS))}; got {layout!r}")
        if not isinstance(size, int):
            raise NotImplementedError(f"{_NAME}: the number of tokens must be static, not symbolic; got {size}")
        if layout == "zigzag" and size % 2:
            raise ValueError(f"{_NAME}: in the zigzag layout each device holds an even number of tokens; got {size}")
        try:
            devices = jax.lax.axis_size(axis_name)
        except NameError:
            raise ValueError(
                f"{_NAME}: axis_name must be an axis of the mesh of the jax.shard_map around; got {axis_name!r}"
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
class _Ring:
    """What is static in a call."""

    spec: Spec
    axis_name: str | tuple[str, ...]
    queries: _Tokens
    keys: _Tokens

    def steps(self, lengths: bool) -> list[int]:
        """How far the keys have come in each step that is made: at step r, device i has those of device i - r."""
        n = self.keys.devices
        return [r for r in range(n) if r == 0 or lengths or any(self._sees(i, (i - r) % n) for i in range(n))]

    def _sees(self, device: int, of_device: int) -> bool:
        """Whether any query of a device sees any key of another one."""
        band, shift = self.spec.band, self.keys.total - self.queries.total
        ends = [
            (first + shift, first + shift + self.queries.size // len(chunks) - 1)
            for chunks in [self.queries.chunks(device)]
            for first in chunks
        ]
        k_chunks = self.keys.chunks(of_device)
        return any(
            (band.right is None or first <= end + band.right)
            and (band.left is None or first + self.keys.size // len(k_chunks) - 1 >= begin - band.left)
            for begin, end in ends
            for first in k_chunks
        )

    def move(self, arrays, by: int):
        """Each array to the device that stands so far ahead."""
        n = self.keys.devices
        if by % n == 0:
            return arrays
        ahead = [(i, (i + by) % n) for i in range(n)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis_name, ahead), arrays)

    def operands(self, arrays, k, v, step: int) -> dict[str, jax.Array]:
        """Those of the call in which this device attends to the keys that have come so far."""
        operands = {"q": arrays["q"], "k": k, "v": v}
        band, lengths = self.spec.band, [arrays.get(name) for name in ("q_lengths", "kv_lengths")]
        if band == Band() and lengths == [None, None]:
            return operands
        device = arrays["device"]
        of_device = (device - step) % self.keys.devices
        t, s = (
            tokens.total if length is None else jnp.clip(length, 0, tokens.total)[:, None]
            for tokens, length in zip((self.queries, self.keys), lengths, strict=True)
        )
        i = self.queries.positions(device)[None]
        begin, end = jnp.zeros_like(i), jnp.full_like(i, self.keys.total)
        if band.left is not None:
            begin = i + (s - t) - band.left
        if band.right is not None:
            end = i + (s - t) + band.right + 1
        # Queries that are not valid come last, and see nothing where begin and end do not fall.
        begin, end = (jnp.where(i < t, jnp.clip(x, 0, s), self.keys.total) for x in (begin, end))
        begin, end = (self.keys.count_before(of_device, x) for x in (begin, jnp.maximum(begin, end)))
        ranges = jnp.stack([begin, end], axis=-1)
        B, K = k.shape[0], k.shape[2]
        operands["key_ranges"] = jnp.broadcast_to(ranges[:, None], (B, K, *ranges.shape[1:]))
        return operands

    def plain_spec(self) -> Spec:
        """The ranges say what the band says."""
        return dataclasses.replace(self.spec, band=Band())


def _share(part, whole):
    """exp(part - whole) of log-sum-exps, 0 where there is nothing."""
    return jnp.where(part == -jnp.inf, 0.0, jnp.exp(part - jnp.where(whole == -jnp.inf, 0.0, whole)))


def _per_row(x):
    """(B, N, T) to (B, T, N, 1)."""
    return jnp.swapaxes(x, 1, 2)[..., None]


def _forward(ring: _Ring, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    kv = arrays["k"], arrays["v"]
    steps = ring.steps("q_lengths" in arrays or "kv_lengths" in arrays)
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        arriving = None if following is None else ring.move(kv, following - step)  # while this step computes
        o, own = _derivative.forward(ring.plain_spec(), ring.operands(arrays, *kv, step))
        if step == 0:
            out, lse = o.astype(jnp.float32), own
        else:
            whole = jnp.logaddexp(lse, own)
            out = out * _per_row(_share(lse, whole)) + o * _per_row(_share(own, whole))
            lse = whole
        kv = arriving
    return out.astype(arrays["q"].dtype), lse


_attend = jax.custom_vjp(_forward, nondiff_argnums=(0,))


def _attend_forward(ring: _Ring, arrays):
    out, lse = _forward(ring, arrays)
    return (out, lse), (arrays, out, lse)


def _attend_backward(ring: _Ring, residuals, cotangents):
    arrays, out, lse = residuals
    results = {"o": out, "lse": lse} | dict(zip(("do", "dlse"), cotangents, strict=True))
    # Or else XLA keeps what came round in the forward pass, all of the sequence, until here.
    kv, results = jax.lax.optimization_barrier(((arrays["k"], arrays["v"]), results))
    steps = ring.steps("q_lengths" in arrays or "kv_lengths" in arrays)
    dq, dkv = 0.0, (0.0, 0.0)
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        arriving = None if following is None else ring.move(kv, following - step)
        gradients = _derivative.backward(ring.plain_spec(), ring.operands(arrays, *kv, step) | results)
        dq = dq + gradients["q"].astype(jnp.float32)
        dkv = tuple(sum_ + gradients[name].astype(jnp.float32) for sum_, name in zip(dkv, "kv", strict=True))
        # The gradients go along with their keys and values, and in the end home.
        dkv = ring.move(dkv, -step if following is None else following - step)
        kv = arriving
    dk, dv = dkv
    gradients = {"q": dq, "k": dk, "v": dv}
    return ({name: gradients[name].astype(x.dtype) if name in gradients else None for name, x in arrays.items()},)


_attend.defvjp(_attend_forward, _attend_backward)
