"""What both MultiHeadAttention layers compute: all but the parameters and the variables, which Flax's two APIs keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_flash.cache import PageTable
from jax_flash.flax._attention_fn import attention_fn
from jax_flash.kvcache import flash_attn_with_kvcache
from jax_flash.rotary import Rotary

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class AxisNames:
    """Logical names of the axes of a layer's parameters and cache, for Flax's logical axis rules.

    ===================  =======================================
    query's kernel       (embed, heads, head_dim)
    key's and value's    (embed, kv_heads, head_dim)
    out's kernel         (heads, head_dim, embed)
    a norm's scale       (head_dim,)
    sinks                (heads,)
    contiguous cache     (batch, None, kv_heads, head_dim)
    paged cache          (None, None, kv_heads, head_dim)
    ===================  =======================================

    >>> from jax_flash.flax import AxisNames
    >>> AxisNames(embed="fsdp").kernel("key")
    ('fsdp', 'kv_heads', 'head_dim')
    """

    batch: str | None = "batch"
    embed: str | None = "embed"
    heads: str | None = "heads"
    kv_heads: str | None = "kv_heads"
    head_dim: str | None = "head_dim"

    def kernel(self, projection: str) -> tuple[str | None, ...]:
        """The axes of the kernel of "query", "key", "value" or "out"."""
        heads = self.heads if projection in ("query", "out") else self.kv_heads
        if projection == "out":
            return (heads, self.head_dim, self.embed)
        return (self.embed, heads, self.head_dim)

    def bias(self, projection: str) -> tuple[str | None, ...]:
        """The axes of its bias."""
        return self.kernel(projection)[2 if projection == "out" else 1 :]

    def cache(self, paged: bool) -> tuple[str | None, ...]:
        """The axes of the cached keys and values."""
        return (None if paged else self.batch, None, self.kv_heads, self.head_dim)


class Options(NamedTuple):
    """How a layer attends; its arguments of the same names."""

    rotary: Rotary | None
    window_size: int | tuple[int | None, int | None] | None
    softcap: float | None
    softmax_scale: float | None


class Projections(NamedTuple):
    """A layer's submodules, as functions; the norms may be None."""

    query: Callable[[Array], Array]  # (..., T, features) to (..., T, N, H)
    key: Callable[[Array], Array]  # (..., S, features) to (..., S, K, H)
    value: Callable[[Array], Array]
    out: Callable[[Array], Array]  # (..., T, N, H) to (..., T, features)
    query_norm: Callable[[Array], Array] | None
    key_norm: Callable[[Array], Array] | None
    sinks: Array | None  # (N,)


class Cache(NamedTuple):
    """The keys and values so far; see jax_flash.cache."""

    key: Array  # (B, S, K, H), or paged (num_pages, page_size, K, H)
    value: Array
    lengths: Array | None  # (B,) int32, the tokens that each sequence holds; None: paged, and the page table knows


def head_sizes(
    num_heads: int, num_kv_heads: int | None, in_features: int, qkv_features: int | None, head_dim: int | None
) -> tuple[int, int]:
    """(number of KV heads, head dim), from a layer's arguments."""
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"MultiHeadAttention: num_heads must be a multiple of num_kv_heads; got {num_heads} and {num_kv_heads}"
        )
    if head_dim is not None and head_dim < 1:
        raise ValueError(f"MultiHeadAttention: head_dim must be at least 1; got {head_dim}")
    features = in_features if qkv_features is None else qkv_features
    if head_dim is None:
        if features % num_heads:
            raise ValueError(
                f"MultiHeadAttention: num_heads must divide qkv_features (default: the input's features), or head_dim "
                f"must be given; got {num_heads} and {features}"
            )
        head_dim = features // num_heads
    elif qkv_features not in (None, num_heads * head_dim):
        raise ValueError(
            f"MultiHeadAttention: qkv_features, if given beside head_dim, must be num_heads * head_dim = "
            f"{num_heads * head_dim}; got {qkv_features}"
        )
    return num_kv_heads, head_dim


def multi_head_attention(
    options: Options,
    projections: Projections,
    inputs_q: Array,
    inputs_k: Array | None,
    inputs_v: Array | None,
    cache: Cache | None,
    *,
    mask: Array | None,
    is_causal: bool,
    input_positions: Array | None,
    q_lengths: Array | None,
    kv_lengths: Array | None,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    page_table: PageTable | None,
) -> tuple[Array, Cache | None]:
    """The layer's output, and the cache after it if there is one."""
    if inputs_k is None and inputs_v is not None:
        raise ValueError("MultiHeadAttention: inputs_v needs inputs_k; to use one array for both, give inputs_k")
    keys = inputs_q if inputs_k is None else inputs_k
    inputs = (inputs_q, keys, keys if inputs_v is None else inputs_v)
    _check_inputs(options, inputs, input_positions)
    q_lengths, kv_lengths = (n if n is None else jnp.asarray(n) for n in (q_lengths, kv_lengths))
    if cache is not None:
        if q_segment_ids is not None or kv_segment_ids is not None:
            raise ValueError("MultiHeadAttention: segment ids are not for a cache, whose sequences are not packed")
        _check_decode(inputs_q, keys, cache, mask, q_lengths, kv_lengths, page_table)
        return _with_cache(options, projections, inputs, cache, input_positions, q_lengths, page_table)
    if page_table is not None:
        raise ValueError("MultiHeadAttention: page_table is for a cache; it needs decode=True")
    if inputs_k is None:  # queries and keys are the same tokens, so one of the lengths says both
        q_lengths = kv_lengths if q_lengths is None else q_lengths
        kv_lengths = q_lengths if kv_lengths is None else kv_lengths
    out = attention_fn(
        *_project(options, projections, inputs, input_positions),
        mask=mask,
        is_causal=is_causal,
        q_lengths=q_lengths,
        kv_lengths=kv_lengths,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        sinks=projections.sinks,
        window_size=options.window_size,
        softcap=options.softcap,
        softmax_scale=options.softmax_scale,
    )
    return checkpoint_name(projections.out(out), "out_proj"), None


def _project(options, projections, inputs, positions):
    """Queries, keys and values as attention wants them, (..., T, heads, H)."""
    inputs_q, inputs_k, inputs_v = inputs
    query, key, value = projections.query(inputs_q), projections.key(inputs_k), projections.value(inputs_v)
    if projections.query_norm is not None:
        query, key = projections.query_norm(query), projections.key_norm(key)
    if options.rotary is not None:
        if query.shape[-3] != key.shape[-3]:
            raise ValueError(
                "MultiHeadAttention: rotary needs queries and keys at the same positions, so of the same length; "
                f"got inputs_q {inputs_q.shape}, inputs_k {inputs_k.shape}"
            )
        query, key = options.rotary(query, positions), options.rotary(key, positions)
    # Named here, so that a backward pass that finds them saved need not project, norm and turn again.
    names = ("query_proj", "key_proj", "value_proj")
    return [checkpoint_name(x, name) for x, name in zip((query, key, value), names, strict=True)]


def _with_cache(options, projections, inputs, cache, positions, q_lengths, page_table):
    """Appends T tokens to the cache, and attends from them to all that it then holds, in one call of its kernel."""
    T, S = inputs[0].shape[1], cache.key.shape[1]
    if page_table is None:
        held, block_table, capacity, place = cache.lengths, None, S, S
    else:
        held, block_table = page_table.lengths, page_table.block_table
        capacity = S * block_table.shape[1]
        place = S * jnp.sum(block_table >= 0, axis=1, dtype=jnp.int32)
    token = jnp.arange(T, dtype=jnp.int32)[None]
    # Turned here rather than by the kernel: that wants tables of all positions, which somebody would have to keep.
    projected = _project(options, projections, inputs, held[:, None] + token if positions is None else positions)
    query, key, value = (x.astype(cache.key.dtype) for x in projected)
    out, k_cache, v_cache = flash_attn_with_kvcache(
        query,
        cache.key,
        cache.value,
        key,
        value,
        cache_seqlens=held,
        block_table=block_table,
        causal=True,
        window_size=options.window_size,
        softcap=options.softcap,
        softmax_scale=options.softmax_scale,
        sinks=projections.sinks,
    )
    new = T
    if q_lengths is not None:
        new = jnp.clip(q_lengths, 0, T).astype(jnp.int32)
        out = jnp.where((token < new[:, None])[..., None, None], out, 0)
    # Past the capacity the kernel drops tokens, padding too, and takes the last query for the last token that fits, so
    # the others would see too little; tokens without a page are zeros. What only the device knows cannot raise an
    # error: not-a-number says that something is wrong.
    lost = ((held + T > capacity) | (held + new > place)) & (new > 0)
    out = projections.out(out.astype(projected[0].dtype))
    lengths = None if cache.lengths is None else cache.lengths + new
    return jnp.where(lost[:, None, None], jnp.nan, out), Cache(k_cache, v_cache, lengths)


def _check_inputs(options, inputs, input_positions) -> None:
    shapes = [x.shape for x in inputs]
    if any(len(shape) < 2 for shape in shapes) or len({shape[:-2] for shape in shapes}) > 1:
        raise ValueError(
            "MultiHeadAttention: inputs must be (batch..., length, features) with the same batch axes; got inputs_q "
            f"{shapes[0]}, inputs_k {shapes[1]}, inputs_v {shapes[2]}"
        )
    if options.rotary is not None and not isinstance(options.rotary, Rotary):
        raise ValueError(f"MultiHeadAttention: rotary must be a jax_flash.rotary.Rotary; got {options.rotary!r}")
    if options.rotary is None and input_positions is not None:
        raise ValueError("MultiHeadAttention: input_positions are for the rotary embedding; the layer needs rotary=...")


def _check_decode(inputs_q, inputs_k, cache, mask, q_lengths, kv_lengths, page_table) -> None:
    if inputs_q.ndim != 3 or inputs_k.shape[:2] != inputs_q.shape[:2]:
        raise ValueError(
            "MultiHeadAttention: with a cache, inputs_q must be (B, T, features) and inputs_k, if given, hold the same "
            f"T new tokens; got {inputs_q.shape} and {inputs_k.shape}"
        )
    if mask is not None:
        raise NotImplementedError(
            "MultiHeadAttention: a mask together with a cache is not supported; a cache is always causal, and "
            "q_lengths says which of the new tokens are padding"
        )
    if kv_lengths is not None:
        raise ValueError("MultiHeadAttention: the cache knows its kv_lengths; q_lengths counts the valid new tokens")
    if (page_table is None) != (cache.lengths is not None):
        has = "contiguous, which takes none" if page_table is not None else "paged, which needs one"
        raise ValueError(f"MultiHeadAttention: page_table does not fit the cache, which is {has}")
    sequences = cache.lengths.shape[0] if page_table is None else page_table.lengths.shape[0]
    if inputs_q.shape[0] != sequences:
        raise ValueError(f"MultiHeadAttention: the cache is for {sequences} sequences; got inputs_q {inputs_q.shape}")
    if q_lengths is not None and q_lengths.shape != (sequences,):
        raise ValueError(f"MultiHeadAttention: q_lengths must be ({sequences},) integers; got {q_lengths.shape}")
