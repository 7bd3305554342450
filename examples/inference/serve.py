"""Serve several prompts at once with continuous batching: a paged KV cache, requests that come and go, one jitted step.

    python examples/inference/serve.py
    python examples/inference/serve.py --prompts my_prompts.txt --slots 8

A batch has a fixed number of slots. A request takes a free slot, its tokens take pages of a common pool, and when it is
finished both go to the next request; nothing is compiled again. What all prompts begin with (the chat template's system
message) is computed once, and every request shares its pages.

The answers go to standard output as they are finished, everything else to standard error.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
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
    from tqdm import tqdm

    from jax_flash import cache as kvcache
    from jax_flash import flash_attn_with_kvcache
except ImportError as error:
    sys.exit(f"serve.py: {error}. Install what it needs with: pip install '.[examples]'")

PROMPTS = [
    "Explain in three sentences why the sky is blue.",
    "List three uses of a paper clip.",
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Give me a simple recipe for pancakes.",
    "Who wrote Romeo and Juliet, and what is it about?",
    "Translate 'good morning' into Spanish and German.",
    "Why do leaves change their colour in autumn?",
]


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("caches", "table"))
def step(weights, tokens, active, caches, table, *, config):
    """Feed tokens [B, T] to the sequences where active [B]; return each one's likeliest next token, and whether it
    fitted.

    T is 1 in the serving loop. A slot that is not active, or that found no page, is computed and changes nothing.
    """
    count = jnp.where(active, tokens.shape[1], 0)
    table, fits = table.reserve(count)
    runs = active & fits
    # Without pages nothing is written.
    pages = jnp.where(runs[:, None], table.block_table, -1)

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

    logits, caches = llama.forward(weights, config, tokens, caches, table.lengths, attend)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), runs, caches, table.advance(jnp.where(runs, count, 0))


@functools.partial(jax.jit, donate_argnames="table")
def share_prefix(table, slot, tokens):
    """Let the sequence in `slot` begin with the prefix, which the last row of the table holds."""
    return table.share(table.lengths.shape[0] - 1, slot, tokens)


@functools.partial(jax.jit, donate_argnames="table")
def release(table, finished):
    return table.release(finished)


@dataclasses.dataclass
class Request:
    """A prompt on its way: the tokens that the model has not seen yet, and what it has answered so far."""

    number: int
    prompt: str
    waiting: collections.deque
    answer: list = dataclasses.field(default_factory=list)
    seen: int = 0  # tokens in the cache


class Server:
    """Slots, pages, and the model. `serve(prompts)` yields finished requests."""

    def __init__(self, config, weights, dtype, *, slots, num_pages, page_size, max_tokens, stop_ids):
        self.config, self.weights, self.stop_ids = config, weights, stop_ids
        self.slots, self.page_size, self.max_tokens = slots, page_size, max_tokens
        max_pages = min(num_pages, -(-config.context_length // page_size))
        # One sequence more than there are slots holds the prefix.
        self.table = kvcache.PageTable.create(slots + 1, max_pages, num_pages, page_size)
        self.caches = [
            kvcache.paged(num_pages, page_size, config.kv_heads, config.head_dim, dtype) for _ in range(config.layers)
        ]
        self.requests = [None] * slots
        self.steps = self.fed = 0

    def serve(self, prompts):
        """prompts: pairs of text and token ids. Yields Requests in the order in which they finish."""
        self.prefix = self._prefill(common_prefix([ids for _, ids in prompts]))
        queue = collections.deque(Request(i, text, collections.deque(ids)) for i, (text, ids) in enumerate(prompts))
        while queue or any(self.requests):
            while queue and None in self.requests and self._has_room(queue[0]):
                self._admit(queue.popleft())
            if not any(self.requests):
                raise gguf_model.ModelError(
                    f"the pool of {self.table.references.shape[0]} pages is too small for request {queue[0].number}"
                )
            yield from self._advance()

    def _prefill(self, tokens):
        """Run what all prompts share through the last row, page by page; the number of tokens that it then holds."""
        size = self.page_size
        usable = len(tokens) // size * size
        only_last = jnp.arange(self.slots + 1) == self.slots
        for begin in range(0, usable, size):
            batch = np.zeros((self.slots + 1, size), np.int32)
            batch[-1] = tokens[begin : begin + size]
            self._step(batch, only_last)
        return usable

    def _has_room(self, request):
        """Pages for the whole prompt and answer, beside what the running requests may still need."""

        def pages(tokens):
            return -(-tokens // self.page_size)

        budget = int(self.table.references.shape[0]) - pages(self.prefix)
        for each in [r for r in self.requests if r] + [request]:
            total = len(each.waiting) + self.max_tokens + (0 if each is request else each.seen)
            budget -= pages(total) - pages(self.prefix)
        return budget >= 0

    def _admit(self, request):
        slot = self.requests.index(None)
        self.table = share_prefix(self.table, slot, self.prefix)
        for _ in range(self.prefix):
            request.waiting.popleft()
        request.seen = self.prefix
        self.requests[slot] = request

    def _advance(self):
        """One token for every running request: of its prompt as long as there are any, then of its answer."""
        batch = np.zeros((self.slots + 1, 1), np.int32)
        active = np.zeros(self.slots + 1, bool)
        for slot, request in enumerate(self.requests):
            if request:
                batch[slot, 0] = request.waiting.popleft()
                active[slot] = True
        following, runs = self._step(batch, active)
        finished = np.zeros(self.slots + 1, bool)
        for slot, request in enumerate(self.requests):
            if not request:
                continue
            if not runs[slot]:
                raise gguf_model.ModelError(f"request {request.number} is longer than the cache or the model's context")
            request.seen += 1
            if request.waiting:
                continue
            token = int(following[slot])
            ends = token in self.stop_ids
            if not ends:
                request.answer.append(token)
                request.waiting.append(token)
            if ends or len(request.answer) == self.max_tokens:
                finished[slot] = True
        if finished.any():
            self.table = release(self.table, finished)
        for slot in np.flatnonzero(finished):
            request, self.requests[slot] = self.requests[slot], None
            yield request

    def _step(self, batch, active):
        following, runs, self.caches, self.table = step(
            self.weights, batch, active, self.caches, self.table, config=self.config
        )
        self.steps += 1
        self.fed += int(np.sum(active)) * batch.shape[1]
        return np.asarray(following), np.asarray(runs)


def common_prefix(sequences):
    """What all of them begin with, short of the last token of the shortest: that one has to be answered."""
    shortest = min(sequences, key=len)
    shared = sum(itertools.takewhile(bool, (len({ids[i] for ids in sequences}) == 1 for i in range(len(shortest)))))
    return shortest[: min(shared, len(shortest) - 1)]


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, help="a GGUF file (default: SmolLM2-135M-Instruct)")
    parser.add_argument(
        "--prompts", type=pathlib.Path, help="a text file, one prompt a line (default: eight of our own)"
    )
    parser.add_argument("--slots", type=int, default=4, help="how many requests run at once (default: 4)")
    parser.add_argument("--pages", type=int, default=0, help="size of the pool (default: enough for every slot)")
    parser.add_argument("--page-size", type=int, default=16, help="tokens of a page, a multiple of 8 (default: 16)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16, float32 on CPU")
    arguments = parser.parse_args(argv)
    if min(arguments.slots, arguments.max_tokens) < 1 or arguments.pages < 0:
        parser.error("--slots and --max-tokens must be at least 1, and --pages not negative")
    if arguments.page_size < 8 or arguments.page_size % 8:
        parser.error("--page-size must be a multiple of 8")
    return arguments


def main(argv=None):
    arguments = parse_arguments(argv)
    dtype = jnp.dtype(arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    config, weights, metadata = gguf_model.load(arguments.model or gguf_model.default_path(), dtype)
    text = tokenizer.ChatTokenizer(metadata)
    try:
        lines = PROMPTS if arguments.prompts is None else arguments.prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise gguf_model.ModelError(f"{arguments.prompts}: {error}") from error
    prompts = [(line, text.encode_chat(line)) for line in lines if line.strip()]
    if not prompts:
        raise gguf_model.ModelError("there are no prompts")
    if not all(ids for _, ids in prompts):
        raise gguf_model.ModelError("the prompt is empty")
    longest = max(len(ids) for _, ids in prompts) + arguments.max_tokens
    if longest > config.context_length:
        raise gguf_model.ModelError(f"{longest} tokens exceed the model's context of {config.context_length}")
    pages = arguments.pages or (arguments.slots + 1) * -(-longest // arguments.page_size)
    server = Server(
        config,
        weights,
        dtype,
        slots=arguments.slots,
        num_pages=pages,
        page_size=arguments.page_size,
        max_tokens=arguments.max_tokens,
        stop_ids=text.stop_ids,
    )
    log(f"{len(prompts)} requests, {arguments.slots} slots, {pages} pages of {arguments.page_size} tokens, {dtype}")
    begin, generated = time.perf_counter(), 0
    with tqdm(total=len(prompts), unit="request", file=sys.stderr) as bar:
        for request in server.serve(prompts):
            generated += len(request.answer)
            seconds = time.perf_counter() - begin
            tqdm.write(f"[{request.number}] {request.prompt}\n{text.decode(request.answer).strip()}\n", file=sys.stdout)
            bar.set_postfix_str(f"{generated / seconds:.0f} tokens/s")
            bar.update()
    seconds = time.perf_counter() - begin
    log(
        f"{generated} tokens in {seconds:.1f} s with compilation: {generated / seconds:.0f} tokens/s; "
        f"{server.steps} steps, {server.fed / server.steps:.1f} tokens a step; {server.prefix} tokens shared by all"
    )


def log(message):
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except gguf_model.ModelError as error:
        sys.exit(f"serve.py: {error}")
