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

import jax
import numpy as np

from jax_flash import _exchange, _ring, _sharding, _validate
from jax_flash._context import LAYOUTS, NAME, Split, Tokens, take_chunks, zigzag_order

__all__ = ["IMPLEMENTATIONS", "LAYOUTS", "positions", "ring_attention", "unzigzag", "zigzag"]

IMPLEMENTATIONS = {
    "ring": _ring.attend,
    "all_to_all": _exchange.attend_by_heads,
    "all_gather": _exchange.attend_gathered,
}


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
    return take_chunks(x, axis, zigzag_order(x, devices, axis))


def unzigzag(x: jax.Array, devices: int, axis: int = 1) -> jax.Array:
    """The inverse of `zigzag`: tokens back in the order of the text.

    >>> import jax.numpy as jnp, jax_flash
    >>> jax_flash.ring.unzigzag(jnp.array([0, 1, 6, 7, 2, 3, 4, 5]), 2, axis=0).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return take_chunks(x, axis, np.argsort(zigzag_order(x, devices, axis)))


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
    return Tokens.of(axis_name, layout, size).positions(jax.lax.axis_index(axis_name))


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str | tuple[str, ...],
    layout: str = "contiguous",
    implementation: str = "ring",
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
    only the steps are made in which some query sees some key. There are two other implementations, with the same
    results but for rounding.

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
      implementation: "ring". "all_to_all": each device gets all tokens of N / n query heads and K / n KV heads, which n
        must divide, and the output goes back; the work is even in both layouts. "all_gather": each device gets all
        keys and values, for few KV heads and short sequences; the work is as even as in the ring.
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
    arrays = {name: _validate.as_array(NAME, name, x) for name, x in arrays.items() if x is not None or name in "qkv"}
    q, k, v = (arrays[name] for name in "qkv")
    _validate.check_qkv(NAME, q, k, v)
    if q.ndim != 4:
        raise ValueError(f"{NAME}: q, k and v must be (B, T, N, H); got q {_validate.show(q)}. Add an axis: q[None]")
    for name in ("q_lengths", "kv_lengths"):
        if name in arrays:
            _validate.check_lengths(NAME, name, arrays[name], q)
            arrays[name] = _validate.int32(arrays[name])
    if "sinks" in arrays:
        _validate.check_sinks(NAME, arrays["sinks"], q)
    spec = _validate.make_spec(
        NAME,
        q.shape[-1],
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        deterministic=_validate.static_bool(NAME, "deterministic", deterministic),
    )
    if spec.softmax_scale <= 0:
        raise NotImplementedError(f"{NAME}: softmax_scale must be positive; got {softmax_scale}. Negate q")
    with_lse = _validate.static_bool(NAME, "return_softmax_lse", return_softmax_lse)
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"{NAME}: implementation must be one of {names}; got {implementation!r}")
    split = Split(spec, axis_name, *(Tokens.of(axis_name, layout, x.shape[1]) for x in (q, k)))
    if implementation == "all_to_all" and k.shape[2] % split.devices:
        raise ValueError(
            f"{NAME}: all_to_all needs a number of KV heads that the {split.devices} devices divide; got k "
            f"{_validate.show(k)}. Use the ring"
        )
    # With the device, since what does not vary over the axis has to be made to, as the results do.
    arrays = _sharding.vary_together(arrays | {"device": jax.lax.axis_index(axis_name)})
    out, lse = IMPLEMENTATIONS[implementation](split, arrays)
    return (out, lse) if with_lse else out
