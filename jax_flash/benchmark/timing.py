"""Timing of compiled functions that take turns, so that a drifting clock favours none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import jax


def seconds_per_call(function: Callable, arguments: tuple, calls: int) -> float:
    """The mean over calls that are all in flight before the first is waited for."""
    result = None
    start = time.perf_counter()
    for _ in range(calls):
        result = function(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def take_turns(
    functions: Mapping[str, Callable], arguments: tuple, budget: float = 0.1, rounds: int = 5
) -> dict[str, float]:
    """Median seconds a call of each function; in every round each runs for about `budget` seconds."""
    calls = {}
    for name, function in functions.items():
        seconds_per_call(function, arguments, 2)  # compiles and warms up
        once = seconds_per_call(function, arguments, 1)
        calls[name] = max(1, min(200, int(budget / max(once, 1e-5))))
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds_per_call(function, arguments, calls[name]))
    return {name: statistics.median(each) for name, each in times.items()}
