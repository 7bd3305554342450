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
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_flash import _call, _exchange, _ring, _sharding, _validate
from jax_flash._context import LAYOUTS, NAME, Split, Tokens, take_chunks, zigzag_order

__all__ = [
    "IMPLEMENTATIONS",
    "LAYOUTS",
    "positions",
    "ring_attention",
    "sharded_attention",
    "unzigzag",
    "zigzag",
]

_SHARDED = "sharded_attention"

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
        keys and values, for few KV heads and short sequences; the work is as even as in the ring. "auto": all_to_all
        for causal attention to contiguous tokens, where it can be, since there the ring has a third less speed; else
        the ring.
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
    spec, arrays = _call.positive_scale(spec, arrays)
    with_lse = _validate.static_bool(NAME, "return_softmax_lse", return_softmax_lse)
    if implementation not in ("auto", *IMPLEMENTATIONS):
        names = ", ".join(map(repr, ("auto", *IMPLEMENTATIONS)))
        raise ValueError(f"{NAME}: implementation must be one of {names}; got {implementation!r}")
    split = Split(spec, axis_name, *(Tokens.of(axis_name, layout, x.shape[1]) for x in (q, k)))
    if implementation == "auto":
        by_heads = split.is_uneven() and k.shape[2] % split.devices == 0
        implementation = "all_to_all" if by_heads else "ring"
    if implementation == "all_to_all" and k.shape[2] % split.devices:
        raise ValueError(
            f"{NAME}: all_to_all needs a number of KV heads that the {split.devices} devices divide; got k "
            f"{_validate.show(k)}. Use the ring"
        )
    # With the device, since what does not vary over the axis has to be made to, as the results do.
    arrays = _sharding.vary_together(arrays | {"device": jax.lax.axis_index(axis_name)})
    out, lse = IMPLEMENTATIONS[implementation](split, arrays)
    return (out, lse) if with_lse else out


def sharded_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    sharding: NamedSharding | PartitionSpec | None = None,
    q_lengths: jax.Array | None = None,
    kv_lengths: jax.Array | None = None,
    sinks: jax.Array | None = None,
    return_softmax_lse: bool = False,
    **options,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`ring_attention` outside of shard_map, to whole arrays whose sequence axis is sharded.

    Args:
      q: (B, T, N, H).
      k: (B, S, K, H).
      v: (B, S, K, H).
      sharding: of q, k and v, alike: the batch, the tokens and the heads may each be split over axes of the mesh. A
        PartitionSpec is one on the mesh of `jax.set_mesh`. Default: that of q, where it is known: on explicit axes, and
        outside of jit.
      q_lengths: (B,), as `ring_attention` takes them.
      kv_lengths: (B,).
      sinks: (N,).
      return_softmax_lse: also return the log-sum-exp (B, N, T).
      **options: what else `ring_attention` takes but axis_name.

    Returns:
      The output, like q, sharded likewise; or (output, log-sum-exp) with return_softmax_lse.

    Raises:
      ValueError: the sharding is not known, splits what cannot be split, or q, k and v are known to be sharded
        otherwise; and as `ring_attention`.

    >>> import jax, jax_flash
    >>> from jax.sharding import NamedSharding, PartitionSpec as P
    >>> mesh = jax.make_mesh((2,), ("context",), devices=jax.devices("cpu")[:2])
    >>> x = jax.random.normal(jax.random.key(0), (1, 16, 4, 64))
    >>> x = jax.device_put(x, NamedSharding(mesh, P(None, "context")))
    >>> jax_flash.ring.sharded_attention(x, x, x, causal=True).shape
    (1, 16, 4, 64)
    """
    arrays = {"q": q, "k": k, "v": v, "q_lengths": q_lengths, "kv_lengths": kv_lengths, "sinks": sinks}
    arrays = {key: _validate.as_array(_SHARDED, key, x) for key, x in arrays.items() if x is not None or key in "qkv"}
    _validate.check_qkv(_SHARDED, *(arrays[key] for key in "qkv"))
    mesh, spec = _mesh_and_spec(sharding, {key: _known_sharding(arrays[key]) for key in "qkv"})
    batch, tokens, heads, _ = (*spec, *[None] * (4 - len(spec)))
    specs = dict.fromkeys("qkv", spec)
    specs |= {"q_lengths": PartitionSpec(batch), "kv_lengths": PartitionSpec(batch), "sinks": PartitionSpec(heads)}
    axes = [axis for part in (batch, tokens, heads) if part for axis in (part if isinstance(part, tuple) else (part,))]

    def attend(arrays):
        return ring_attention(**arrays, axis_name=spec[1], return_softmax_lse=return_softmax_lse, **options)

    split = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=({key: specs[key] for key in arrays},),
        out_specs=(spec, PartitionSpec(batch, heads, tokens)) if return_softmax_lse else spec,
        axis_names=set(axes),
    )

    def whole(arrays):
        if AxisType.Explicit in mesh.axis_types:  # lengths and sinks may lie anywhere
            arrays = {key: jax.sharding.reshard(x, NamedSharding(mesh, specs[key])) for key, x in arrays.items()}
        return split(arrays)

    return jax.jit(whole)(arrays)


def _mesh_and_spec(sharding, known: dict[str, NamedSharding | None]):
    """Of q, k and v, from what the caller says and what is known of each."""
    if sharding is None:
        sharding = known["q"]
    if isinstance(sharding, NamedSharding):
        mesh, spec = sharding.mesh, sharding.spec
    else:
        mesh, spec = jax.sharding.get_abstract_mesh(), sharding
    if spec is None:
        raise ValueError(f"{_SHARDED}: how q is sharded is not known here; give it as sharding=, or use ring_attention")
    if mesh.empty:
        raise ValueError(f"{_SHARDED}: a PartitionSpec needs jax.set_mesh(mesh) around; or give a NamedSharding")
    if len(spec) < 2 or spec[1] is None:
        raise ValueError(f"{_SHARDED}: the tokens must be split; got {spec}. Use jax_flash.attention")
    if len(spec) > 3 and spec[3] is not None:
        raise ValueError(f"{_SHARDED}: the head dim cannot be split; got {spec}. Reshard q, k and v")
    for key, own in known.items():
        if own is not None and not own.is_equivalent_to(NamedSharding(own.mesh, spec), 4):
            raise ValueError(f"{_SHARDED}: {key} must be sharded {spec}, as q is; got {own.spec}. Reshard it")
    return mesh, spec


def _known_sharding(x) -> NamedSharding | None:
    """That of explicit axes, or of an array that is no tracer."""
    own = jax.typeof(x).sharding
    if any(part is not None for part in own.spec):
        return own
    own = getattr(x, "sharding", None) if not isinstance(x, Tracer) else None
    return own if isinstance(own, NamedSharding) else None
