"""Segment ids, in any order: sorted by them, stably, a segment's tokens lie one behind the other in their old order, so
that each query sees a contiguous range of keys, whatever causal and windows say of the old positions."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_flash._ranges import count_up_to
from jax_flash._spec import Band


class Sorted(NamedTuple):
    """Of one sequence of T queries and S keys."""

    q_order: jax.Array  # (T,), int32: the query that comes to each place; those without a segment come last
    k_order: jax.Array  # (S,)
    q_length: jax.Array  # (), int32: how many have a segment
    kv_length: jax.Array
    key_ranges: jax.Array  # (T, 2), int32: the sorted keys that each sorted query sees


def sort(band: Band, q_ids, kv_ids, q_length, kv_length) -> Sorted:
    """From the ids (T,) and (S,) of one sequence, and how many of its queries and keys are valid."""
    q_ids, q_order, t = _by_segment(q_ids, q_length)
    kv_ids, k_order, s = _by_segment(kv_ids, kv_length)
    first = count_up_to(kv_ids, q_ids, 0, s, jax.lax.lt)
    behind = count_up_to(kv_ids, q_ids, 0, s)
    # The keys of the query's segment are those, in the order of their old positions.
    diagonal = q_order if band.top_left else q_order + kv_length - q_length
    begin, end = first, behind
    if band.left is not None:
        begin = first + count_up_to(k_order, diagonal - band.left - 1, first, behind)
    if band.right is not None:
        end = first + count_up_to(k_order, diagonal + band.right, first, behind)
    valid = jnp.arange(q_ids.shape[0], dtype=jnp.int32) < t
    begin, end = (jnp.where(valid, x, s) for x in (begin, end))
    return Sorted(q_order, k_order, t, s, jnp.stack([begin, end], axis=-1))


def _by_segment(ids, length):
    """The ids in order, which token each of them is, and how many tokens have a segment."""
    place = jnp.arange(ids.shape[0], dtype=jnp.int32)
    none = (ids < 0) | (place >= length)
    _, ids, order = jax.lax.sort((none.astype(jnp.int32), ids, place), num_keys=2, is_stable=True)
    return ids, order, jnp.sum(~none, dtype=jnp.int32)


def inverse(order):
    """(B, T): the place that each token comes to."""
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def permute(x, axis: int, order, back):
    """x (B, ...) with its axis in another order, (B, T); back is the order's inverse, which the gradient takes."""
    return _take(x, axis, order)


def _take(x, axis, order):
    return jax.vmap(lambda row, to: row.take(to, axis=axis - 1, mode="clip"))(x, order)


def _permute_forward(x, axis, order, back):
    return _take(x, axis, order), back


def _permute_backward(axis, back, cotangent):
    return _take(cotangent, axis, back), None, None


permute.defvjp(_permute_forward, _permute_backward)
