"""Sequences split over all devices by ring_attention, in TFLOP/s per device, beside attention to one device's part.

Causal; work is counted as FlashAttention's papers do: 2 B N T S H floating-point operations forward, 2.5 times that
backward.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec

import jax_flash
from jax_flash.benchmark.timing import take_turns


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    devices = jax.devices()
    mesh, tokens = jax.make_mesh((len(devices),), ("context",)), PartitionSpec(None, "context")
    print(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}, {options.dtype}, TFLOP/s per device")
    print(f"{'tokens':>8} {'implementation':>22} | {'forward':>8} {'of one':>7} | {'with backward':>13} {'of one':>7}")

    one = functools.partial(jax_flash.attention, causal=True)
    length = options.lengths[0] // len(devices)
    alone = _rates({"": one}, length, 1, options, None)[""]
    print(f"{length:8} {'one device':>22} | {alone[0]:8.4g} {1:7.3f} | {alone[1]:13.4g} {1:7.3f}", flush=True)
    for length in options.lengths:
        functions = {}
        for implementation in jax_flash.ring.IMPLEMENTATIONS:
            if implementation == "all_to_all" and options.kv_heads % len(devices):
                continue
            for layout in jax_flash.ring.LAYOUTS:
                attend = functools.partial(
                    jax_flash.ring_attention,
                    axis_name="context",
                    causal=True,
                    implementation=implementation,
                    layout=layout,
                )
                shared = jax.shard_map(attend, mesh=mesh, in_specs=tokens, out_specs=tokens)
                functions[f"{implementation} {layout}"] = shared
        rates = _rates(functions, length, len(devices), options, NamedSharding(mesh, tokens))
        for name, (forward, both) in rates.items():
            print(f"{length:8} {name:>22} | {forward:8.4g} {forward / alone[0]:7.3f}"
                  f" | {both:13.4g} {both / alone[1]:7.3f}", flush=True)  # fmt: skip


def _rates(functions, length: int, devices: int, options, sharding) -> dict[str, tuple[float, float]]:
    N, K, H = options.heads, options.kv_heads, options.head_dim
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (
        jax.device_put(jax.random.normal(key, (1, length, heads, H), options.dtype), sharding)
        for key, heads in zip(keys, (N, K, K, N), strict=True)
    )
    work = 2 * N * length * length * H / devices / 1e12
    forward = take_turns({name: jax.jit(f) for name, f in functions.items()}, (q, k, v), options.budget)
    both = take_turns(
        {name: jax.jit(_with_backward(f)) for name, f in functions.items()}, (q, k, v, d_out), options.budget
    )
    return {name: (work / forward[name], 3.5 * work / both[name]) for name in functions}


def _with_backward(function):
    def both(q, k, v, d_out):
        out, pull = jax.vjp(function, q, k, v)
        return out, pull(d_out)

    return both


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(prog="python -m jax_flash.benchmark.split", description=__doc__)
    parser.add_argument(
        "--lengths",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[32768, 65536] if gpu else [1024],
        metavar="T,...",
        help="of all devices together; the first one's part is timed on one device too",
    )
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128 if gpu else 64)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--budget", type=float, default=0.1, help="seconds a function runs in each of five rounds")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
