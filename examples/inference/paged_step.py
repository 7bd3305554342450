"""The model over a paged cache, as two jitted programs: a chunk of one prompt, and the next tokens of a batch.

    token, state = prefill(weights, tokens, row, count, sampling, state, config=config)
    tokens, state = decode(weights, tokens, rows, left, sampling, state, config=config, steps=1)

The state is the page table and the caches of all layers. It is donated, so that both programs change it in place.

Letters: B sequences of this call, T tokens of each; R rows of the page table, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import llama

from jax_flash import cache as kvcache
from jax_flash import flash_attn_with_kvcache


class State(NamedTuple):
    table: kvcache.PageTable
    caches: list[llama.LayerCache]  # keys and values [num_pages, page_size, K, H] of each layer
    lost: jax.Array  # int32: tokens that found no page; whoever plans the pages looks at it


class Sampling(NamedTuple):
    """How each of B sequences chooses its next tokens."""

    temperature: jax.Array  # f32 [B], 0: always the likeliest
    top_p: jax.Array  # f32 [B], draws among the likeliest tokens of this total probability
    chance: jax.Array  # f32 [steps, B], uniform in [0, 1 - 2^-23]: what each draw is decided by


def create_state(config, dtype, *, rows, max_pages, num_pages, page_size):
    caches = [
        kvcache.paged(num_pages, page_size, config.kv_heads, config.head_dim, dtype) for _ in range(config.layers)
    ]
    return State(kvcache.PageTable.create(rows, max_pages, num_pages, page_size), caches, jnp.int32(0))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def prefill(weights, tokens, row, count, sampling, state, *, config):
    """Feed the first `count` of tokens [T] to the sequence in `row`. Return the token that follows them, and the state.

    Chunks of a few fixed lengths T serve prompts of any length: what is behind the first `count` is padding. It is
    written behind the sequence's end, where it is overwritten or has no page, and only padding attends to it.
    """
    following, state = _step(weights, config, tokens[None], row[None], count[None], sampling, 0, state)
    return following[0], state


@functools.partial(jax.jit, static_argnames=("config", "steps"), donate_argnames="state")
def decode(weights, tokens, rows, left, sampling, state, *, config, steps):
    """Feed tokens [B] to the sequences in rows [B], then what follows, `steps` times or where fewer are left [B], so
    often. Return the tokens that follow, [steps, B], and the state.

    A row outside the table, or with nothing left, is computed and changes nothing.
    """

    def one(carry, i):
        tokens, state = carry
        counts = (i < left).astype(jnp.int32)
        tokens, state = _step(weights, config, tokens[:, None], rows, counts, sampling, i, state)
        return (tokens, state), tokens

    (_, state), following = jax.lax.scan(one, (tokens, state), jnp.arange(steps))
    return following, state


@functools.partial(jax.jit, donate_argnames="table")
def share(table, source, target, tokens):
    """Let the sequence in row `target` begin with the first tokens of the one in `source`: whole pages, shared."""
    return table.share(source, target, tokens)


@functools.partial(jax.jit, donate_argnames="table")
def release(table, finished):
    return table.release(finished)


def _step(weights, config, tokens, rows, counts, sampling, draw, state):
    """Feed the first counts [B] of tokens [B, T] to the sequences in rows [B]; the tokens that follow [B]."""
    table, R = state.table, state.table.lengths.shape[0]
    fed = jnp.zeros(R, jnp.int32).at[rows].add(counts, mode="drop")
    table, fits = table.reserve(fed)
    runs = (counts > 0) & fits.at[rows].get(mode="fill", fill_value=False)
    lengths = table.lengths[rows]
    # Without pages nothing is written.
    pages = jnp.where(runs[:, None], table.block_table[rows], -1)

    def attend(q, k, v, cache, lengths, rotary):
        out, *cache = flash_attn_with_kvcache(
            q,
            *cache,
            k,
            v,
            rotary_cos=rotary[0],
            rotary_sin=rotary[1],
            cache_seqlens=lengths,
            block_table=pages,
            causal=True,
        )
        return out, tuple(cache)

    last = jnp.maximum(counts - 1, 0)
    logits, caches = llama.forward(weights, config, tokens, state.caches, lengths, attend, last)
    following = _sample(logits, sampling.temperature, sampling.top_p, sampling.chance[draw])
    lost = state.lost + jnp.sum(jnp.where(fits, 0, fed), dtype=jnp.int32)
    return following, State(table.advance(jnp.where(fits, fed, 0)), caches, lost)


def _sample(logits, temperature, top_p, chance):
    """The next token [B] of logits [B, V]. Nobody waits for a draw, or a sort, that no sequence asked for."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    random = temperature > 0

    def draw():
        weights = jax.nn.softmax(logits / jnp.where(random, temperature, 1.0)[:, None], axis=-1)
        weights = jax.lax.cond(jnp.any(random & (top_p < 1)), nucleus, lambda weights: weights, weights)
        total = jnp.cumsum(weights, axis=-1)
        # The first token whose share of the total reaches beyond the chance; one of weight 0 never does.
        chosen = jnp.sum(total <= chance[:, None] * total[:, -1:], axis=-1, dtype=jnp.int32)
        return jnp.where(random, chosen, greedy)

    def nucleus(weights):
        falling = -jnp.sort(-weights, axis=-1)
        before = jnp.cumsum(falling, axis=-1) - falling  # of all likelier tokens; 0 for the best one
        kept = (before <= 0) | (before < top_p[:, None])
        least = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(weights < least, 0.0, weights)

    return jax.lax.cond(jnp.any(random), draw, lambda: greedy)
