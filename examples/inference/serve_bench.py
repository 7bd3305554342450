"""`serve.py --bench N`: tokens per second and time to first token, of N requests at once and one after another.

The requests go to the engine itself, without HTTP. Their prompts are random tokens of mixed lengths, so that no two
begin alike; their answers have mixed lengths too, and no token ends them.
"""

from __future__ import annotations

import sys
import time

import engine
import numpy as np
from tqdm import tqdm


def run(running: engine.Engine, count: int) -> float:
    """Prints both measurements; returns how many times the tokens per second many at once have."""
    running.stop_ids = frozenset()
    random = np.random.default_rng(0)
    longest = min(128, running.context // 2)
    prompts = [
        random.integers(running.vocabulary, size=n).tolist() for n in random.integers(longest // 8, longest + 1, count)
    ]
    limits = random.integers(longest // 4, longest + 1, count).tolist()
    print(f"{count} requests: {sum(map(len, prompts))} tokens of prompts, {sum(limits)} of answers", file=sys.stderr)
    alone = _measure(running, prompts, limits, "one after another", at_once=False)
    together = _measure(running, prompts, limits, f"{count} at once", at_once=True)
    print(f"{together / alone:.2f} times the tokens per second")
    return together / alone


def _measure(running, prompts, limits, name, *, at_once) -> float:
    running.forget()  # what a measurement before this one left in the cache
    first = []  # seconds from a request's coming to its first token
    with tqdm(total=sum(limits), desc=name, unit="token", file=sys.stderr) as bar:
        begin = time.perf_counter()
        for prompt, limit in zip(prompts, limits, strict=True):
            running.submit(engine.Request(prompt, limit, _watch(first, bar)))
            while not at_once and running.turn():
                pass
        while running.turn():
            pass
        seconds = time.perf_counter() - begin
    rate, median, worst = sum(limits) / seconds, np.median(first), np.max(first)
    print(f"{name}: {rate:.1f} tokens/s; first token after {median:.2f} s (median), {worst:.2f} s (worst)")
    return rate


def _watch(first, bar):
    begin, seen = time.perf_counter(), []

    def emit(tokens, _):
        if not seen:
            first.append(time.perf_counter() - begin)
        seen.extend(tokens)
        bar.update(len(tokens))

    return emit
