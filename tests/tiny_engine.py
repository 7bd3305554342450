"""The engine of examples/inference on the tiny model, for its tests and the server's."""

from __future__ import annotations

import engine
import generate
import gguf_model
import jax
import jax.numpy as jnp
import llama
import paged_step
import tokenizer
from tiny_gguf import tiny_settings, tiny_tensors, write_gguf

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
PAGE = 8  # tokens


def load_tiny(folder):
    """A model with random weights, and its tokenizer."""
    settings = tiny_settings() | {"tokenizer.chat_template": TEMPLATE}
    config, weights, metadata = gguf_model.load(write_gguf(folder / "tiny.gguf", settings, tiny_tensors()), jnp.float32)
    return config, weights, tokenizer.ChatTokenizer(metadata)


def make_engine(model, *, stop_ids=frozenset(), **options):
    defaults = dict(context=256, slots=4, num_pages=64, page_size=PAGE, chunk=32, burst=2)
    config, weights, _ = model
    return engine.Engine(config, weights, jnp.float32, stop_ids=stop_ids, **(defaults | options))


def count_programs():
    """How many versions of each have been compiled."""
    programs = (paged_step.prefill, paged_step.decode, paged_step.share, paged_step.release)
    return [program._cache_size() for program in programs]


def alone(model, prompt, max_tokens, stop_ids=frozenset()):
    """Greedy decoding by generate.py's step, of one sequence in a contiguous cache."""
    config, weights, _ = model
    cache = llama.init_cache(config, 1, 320, jnp.float32)
    options = dict(config=config, attention="jax_flash", sampling=(0.0, 0, 1.0))
    tokens, left = [], list(prompt)
    for position in range(len(prompt) + max_tokens - 1):
        token = jnp.asarray([[left.pop(0) if left else tokens[-1]]], jnp.int32)
        token, cache = generate.step(weights, token, cache, jnp.int32(position), jax.random.key(0), **options)
        if not left:
            tokens.append(int(token[0, 0]))
            if tokens[-1] in stop_ids:
                return tokens[:-1]
    return tokens
