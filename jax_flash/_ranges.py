"""Tables of ranges: of packed sequences each query sees a contiguous range of keys, whose begin and end never fall from
one query to the next. The kernels find by them which blocks of keys a block of queries visits, and the other way
round."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_flash._spec import Band
from jax_flash._validate import MAX_LENGTH


class Packed(NamedTuple):
    """Of sequences that lie one behind the other."""

    key_ranges: jax.Array  # (T, 2), int32: the keys that each query sees
    valid_q: jax.Array  # (T,), bool: whether a query is a token of a sequence
    valid_k: jax.Array  # (S,)
    q_length: jax.Array  # (), int32: behind the last sequence's last query
    kv_length: jax.Array


def of_packed(band: Band, T, S, cu_seqlens_q, cu_seqlens_k, seqused_q=None, seqused_k=None) -> Packed:
    """What each query sees of T queries and S keys.

    The sequences' first tokens, (B + 1,) int32, are clamped to the arrays and never fall. seqused_q and seqused_k, (B,)
    or None, are how many of its tokens a sequence uses. The band is aligned to the bottom right of each sequence; its
    sides are at least 0.
    """
    start_q, start_k = _rising(cu_seqlens_q, T), _rising(cu_seqlens_k, S)
    i, j = jnp.arange(T, dtype=jnp.int32), jnp.arange(S, dtype=jnp.int32)
    of_query, of_key = count_up_to(start_q[1:], i), count_up_to(start_k[1:], j)
    first_q, end_q, valid_q = _slot(start_q, seqused_q, of_query, i)
    _, _, valid_k = _slot(start_k, seqused_k, of_key, j)
    first_k, end_k, _ = _slot(start_k, seqused_k, of_query, i)
    diagonal = i - first_q + first_k + (end_k - first_k) - (end_q - first_q)  # the key on the diagonal of query i
    begin = first_k if band.left is None else jnp.clip(diagonal - band.left, first_k, end_k)
    end = end_k if band.right is None else jnp.clip(diagonal + band.right + 1, first_k, end_k)
    # A query that is no token of a sequence sees nothing, at a place where begin and end do not fall.
    begin, end = (jnp.where(valid_q, x, end_k) for x in (begin, end))
    return Packed(jnp.stack([begin, end], axis=-1), valid_q, valid_k, start_q[-1], start_k[-1])


def _rising(cu_seqlens, total):
    """Sequences' first tokens within [0, total], none before the one before."""
    return jax.lax.cummax(jnp.clip(cu_seqlens, 0, total))


def _slot(start, used, sequence, position):
    """Where the sequences begin and where what they use ends, and whether the positions are in between."""
    B = start.shape[0] - 1
    first, end = start.at[sequence].get(mode="clip"), start.at[sequence + 1].get(mode="clip")
    if used is not None and B > 0:
        end = jnp.minimum(end, first + jnp.clip(used, 0, start[-1]).at[sequence].get(mode="clip"))
    return first, end, (sequence < B) & (position < end)


def seen_from_keys(key_ranges: jax.Array, S) -> jax.Array:
    """The ranges of queries (S, 2) that see each key, from the ranges of keys (T, 2) that each query sees."""
    begin, end = key_ranges[:, 0], key_ranges[:, 1]
    j = jnp.arange(S, dtype=jnp.int32)
    return jnp.stack([count_up_to(end, j), count_up_to(begin, j)], axis=-1)


def count_up_to(rising, x, begin: ArrayLike = 0, end: ArrayLike | None = None, compare=jax.lax.le):
    """How many of rising[begin:end], values that never fall, are at most x, or what else `compare` says; begin and end
    may be arrays like x."""
    n = rising.shape[0]
    end = n if end is None else end
    count = jnp.zeros(x.shape, jnp.int32)
    if isinstance(n, int) and n == 0:
        return count
    # jnp.searchsorted wants n to be known, or compares all with all.
    for bit in reversed(range(n.bit_length() if isinstance(n, int) else MAX_LENGTH.bit_length())):
        more = count + (1 << bit)
        reached = compare(rising.at[begin + more - 1].get(mode="clip"), x)
        count = jnp.where((begin + more <= end) & reached, more, count)
    return count
