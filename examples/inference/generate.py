"""Generate text with a Llama-architecture model: a KV cache, jitted steps, and jax_flash for the attention.

    python examples/inference/generate.py --prompt "Why is the sky blue?"

The text goes to standard output as it comes, everything else to standard error.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
import time

try:
    import gguf_model
    import jax
    import jax.numpy as jnp
    import llama
    import numpy as np
    import tokenizer
except ImportError as error:
    sys.exit(f"generate.py: {error}. Install what it needs with: pip install '.[examples]'")

ATTENTION = {"jax_flash": llama.attend_jax_flash, "xla": llama.attend_xla}

# Tokens of one call: to hand hundreds of arrays to the device costs the host more than a small model's step takes.
BURST = 8

_jit = functools.partial(jax.jit, static_argnames=("config", "attention", "sampling"), donate_argnames="cache")


@_jit
def step(weights, tokens, cache, length, key, *, config, attention, sampling):
    """Feed tokens [1, T] behind `length` that the cache has. Return the token that follows [1, 1], and the cache."""
    logits, cache = llama.forward(weights, config, tokens, cache, length[None], ATTENTION[attention])
    return sample(logits, jax.random.fold_in(key, length), *sampling)[:, None], cache


@_jit
def burst(weights, token, cache, length, key, **options):
    """Feed a token [1, 1], the one that follows, and so on. Return the BURST tokens that follow, the last of them
    [1, 1], and the cache."""

    def one(state, _):
        token, cache, length = state
        token, cache = step(weights, token, cache, length, key, **options)
        return (token, cache, length + 1), token[0, 0]

    (token, cache, _), tokens = jax.lax.scan(one, (token, cache, length), length=BURST)
    return tokens, token, cache


def sample(logits, key, temperature, top_k, top_p):
    """The next token [B] of logits [B, V]: the best one at temperature 0, else drawn among the likely ones."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    sorted_logits, sorted_tokens = jax.lax.top_k(logits / temperature, top_k or logits.shape[-1])
    probabilities = jax.nn.softmax(sorted_logits)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of all likelier tokens; 0 for the best one
    choice = jax.random.categorical(key, jnp.where(before < top_p, sorted_logits, -jnp.inf))
    return jnp.take_along_axis(sorted_tokens, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


class Generator:
    """A loaded model with its compiled steps. Iterate `run(prompt)` for the new token ids."""

    def __init__(self, config, weights, dtype, *, attention="jax_flash", sampling=(0.0, 0, 1.0), seed=0):
        self.config, self.weights, self.dtype = config, weights, dtype
        self.options = dict(config=config, attention=attention, sampling=sampling)
        self.key = jax.random.key(seed)
        self.seconds = dict.fromkeys(("compile", "prefill", "decode"), 0.0)

    def run(self, prompt, max_tokens, stop_ids=frozenset()):
        """Yield up to max_tokens ids, ending before the first of stop_ids. Fills in `self.seconds`."""
        # A multiple of 64 positions: nearby lengths share compiled programs. The last burst may go past max_tokens.
        capacity = -(-(len(prompt) + max_tokens + BURST) // 64) * 64
        cache = llama.init_cache(self.config, 1, capacity, self.dtype)
        tokens = jnp.asarray([prompt], jnp.int32)
        position = jnp.int32(0)

        begin = time.perf_counter()
        prefill = step.lower(self.weights, tokens, cache, position, self.key, **self.options).compile()
        decode = burst.lower(self.weights, tokens[:, :1], cache, position, self.key, **self.options).compile()
        self.seconds["compile"] = time.perf_counter() - begin

        begin = time.perf_counter()
        token, cache = prefill(self.weights, tokens, cache, position, self.key)
        token.block_until_ready()
        self.seconds["prefill"] = time.perf_counter() - begin

        begin = time.perf_counter()
        tokens, position, left = token, len(prompt), max_tokens
        while left > 0:
            current = tokens
            if left > current.size:
                # The device starts on what follows these before the host has looked at them.
                tokens, token, cache = decode(self.weights, token, cache, jnp.int32(position), self.key)
                position += BURST
            for identifier in np.asarray(current).ravel()[:left].tolist():
                if identifier in stop_ids:
                    return
                yield identifier
                self.seconds["decode"] = time.perf_counter() - begin
            left -= current.size


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, help="a GGUF file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--prompt", default="Explain in three sentences why the sky is blue.")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is, without a chat template")
    parser.add_argument("--max-tokens", type=int, default=128, help="how many to generate at most (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest only (default: among all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest of this total probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attention", choices=ATTENTION, default="jax_flash")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16, float32 on CPU")
    arguments = parser.parse_args(argv)
    if arguments.max_tokens < 1:
        parser.error("--max-tokens must be at least 1")
    if arguments.temperature < 0 or arguments.top_k < 0 or not 0 < arguments.top_p <= 1:
        parser.error("--temperature and --top-k must not be negative, and --top-p must be in (0, 1]")
    return arguments


def main(argv=None):
    arguments = parse_arguments(argv)
    dtype = jnp.dtype(arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    path = arguments.model or gguf_model.default_path()

    begin = time.perf_counter()
    config, weights, metadata = gguf_model.load(path, dtype)
    text = tokenizer.ChatTokenizer(metadata)
    prompt = text.encode(arguments.prompt) if arguments.raw else text.encode_chat(arguments.prompt)
    if not prompt:
        raise gguf_model.ModelError("the prompt is empty")
    if len(prompt) + arguments.max_tokens > config.context_length:
        raise gguf_model.ModelError(
            f"the prompt's {len(prompt)} tokens and --max-tokens {arguments.max_tokens} exceed "
            f"the model's context of {config.context_length}"
        )
    log(f"{path.name}: {config.layers} layers, {config.heads} heads, {config.kv_heads} KV heads, {dtype}")
    loading = time.perf_counter() - begin
    log(f"{jax.devices()[0].device_kind}, attention by {arguments.attention}, loaded in {loading:.1f} s")

    sampling = (arguments.temperature, min(arguments.top_k, config.vocabulary), arguments.top_p)
    generator = Generator(config, weights, dtype, attention=arguments.attention, sampling=sampling, seed=arguments.seed)
    to_text, count = text.stream(), 0
    for token in generator.run(prompt, arguments.max_tokens, text.stop_ids):
        print(to_text(token), end="", flush=True)
        count += 1
    print()

    seconds = generator.seconds
    log(f"compiled in {seconds['compile']:.1f} s")
    log(f"prefill {len(prompt)} tokens: {len(prompt) / seconds['prefill']:.0f} tokens/s")
    if count > 1:  # the first token comes out of the prefill
        log(f"decode {count - 1} tokens: {(count - 1) / seconds['decode']:.1f} tokens/s")


def log(message):
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except gguf_model.ModelError as error:
        sys.exit(f"generate.py: {error}")
