"""Random calls for compute-sanitizer to watch: all public functions that have kernels, shapes, features, forward and
backward, mapped axes, padding that holds NaN, and lengths and page tables that name what is not there.

usage: python tests/sanitize_gpu.py [calls] [seed]

Prints each call before it makes it, and checks that what should be finite is. CONTRIBUTING.md has the commands.
"""

from __future__ import annotations

import functools
import random
import sys

import jax
import numpy as np

import jax_flash


def normal(rng, shape, dtype):
    return rng.standard_normal(shape, np.float32).astype(dtype)


def poison(x, lengths):
    """NaN in rows (B, rows, ...) from `lengths` (B,) on."""
    for row, length in zip(x, lengths, strict=True):
        row[length:] = np.nan
    return x


def some_shape(pick):
    G = pick.choice((1, 1, 2, 3, 4, 8))
    H = pick.choice((8, 40, 59, 64, 80, 96, 111, 128, 192, 256))
    return pick.randint(1, 3), pick.choice((1, 2, 3)), G, H, pick.choice(("float16", "bfloat16"))


def some_lengths(pick) -> tuple[int, int]:
    T, S = (pick.choice((1, 7, 63, 64, 113, 128, 130, 200, 257, 400)) for _ in range(2))
    return T, S


def check_gradients(attend, q, k, v, cotangents) -> None:
    @jax.jit
    def run(q, k, v, cotangents):
        outs, pull = jax.vjp(attend, q, k, v)
        return jax.tree.leaves(outs)[0], *pull(cotangents)

    for name, x in zip(("out", "dq", "dk", "dv"), run(q, k, v, cotangents), strict=True):
        assert np.isfinite(np.asarray(x, np.float32)).all(), name


def attention(pick, rng) -> None:
    B, K, G, H, dtype = some_shape(pick)
    T, S = some_lengths(pick)
    options = dict(
        causal=pick.random() < 0.4,
        window_size=pick.choice((None, None, None, 0, 30, (20, 3), (None, 40))),
        softcap=pick.choice((None, None, None, 3.0)),
        softmax_scale=pick.choice((None, None, 0.3)),
        deterministic=pick.random() < 0.4,
    )
    arrays = {}
    q_lengths, kv_lengths = [T] * B, [S] * B
    if pick.random() < 0.3:
        q_lengths = arrays["q_lengths"] = np.array([pick.randint(0, T) for _ in range(B)], np.int32)
    if pick.random() < 0.4:
        kv_lengths = arrays["kv_lengths"] = np.array([pick.randint(0, S) for _ in range(B)], np.int32)
    if pick.random() < 0.3:
        shape = [size if pick.random() < 0.5 else 1 for size in (B, K * G, T)]
        arrays["mask"] = rng.random((*shape, S)) < pick.choice((0.02, 0.7))
    print(f"attention {dtype} B{B} T{T} S{S} N{K * G} K{K} H{H}", options, sorted(arrays), flush=True)
    q, d_out = (poison(normal(rng, (B, T, K * G, H), dtype), q_lengths) for _ in range(2))
    k, v = (poison(normal(rng, (B, S, K, H), dtype), kv_lengths) for _ in range(2))
    d_lse = normal(rng, (B, K * G, T), np.float32)
    attend = functools.partial(jax_flash.attention, **options, **arrays, return_softmax_lse=True)
    check_gradients(jax.vmap(attend) if not arrays and pick.random() < 0.5 else attend, q, k, v, (d_out, d_lse))


def dot_product_attention(pick, rng) -> None:
    B, K, G, H, dtype = some_shape(pick)
    T, S = some_lengths(pick)
    options = dict(is_causal=pick.random() < 0.4, local_window_size=pick.choice((None, None, 25, (40, 3))))
    arrays = {}
    if pick.random() < 0.3:
        arrays["query_seq_lengths"] = np.array([pick.randint(0, T) for _ in range(B)], np.int32)
        arrays["key_value_seq_lengths"] = np.array([pick.randint(0, S) for _ in range(B)], np.int32)
    if pick.random() < 0.3:
        arrays["mask"] = rng.random((B, pick.choice((1, K * G)), T, S)) < 0.5
    print(f"dot_product_attention {dtype} B{B} T{T} S{S} N{K * G} K{K} H{H}", options, sorted(arrays), flush=True)
    q, d_out = (normal(rng, (B, T, K * G, H), dtype) for _ in range(2))
    k, v = (normal(rng, (B, S, K, H), dtype) for _ in range(2))
    attend = functools.partial(jax_flash.dot_product_attention, **options, **arrays)
    check_gradients(attend, q, k, v, d_out)


def kvcache(pick, rng) -> None:
    B, K, G, H, dtype = some_shape(pick)
    T = pick.choice((1, 1, 2, 5, 40, 150))  # the last two often go to the forward kernels
    T_new = pick.choice((0, T, max(1, T // 2)))
    page = pick.choice((0, 0, 8, 24))
    capacity = pick.choice((48, 240, 720, 2400))
    options = dict(
        causal=pick.random() < 0.6,
        window_size=pick.choice((None, None, (50, -1), (10, 3))),
        softcap=pick.choice((None, None, 3.0)),
        num_splits=pick.choice((None, None, 1, 3, 40)),
        rotary_interleaved=pick.random() < 0.5,
    )
    rows, length = (B * capacity // page + 2, page) if page else (B + pick.choice((0, 2)), capacity)
    a = {"q": normal(rng, (B, T, K * G, H), dtype)}
    for name in ("k_cache", "v_cache"):
        a[name] = normal(rng, (rows, length, K, H), dtype)
    a["cache_seqlens"] = np.array([pick.randint(0, capacity) for _ in range(B)], np.int32)
    if page:
        a["block_table"] = rng.permutation(rows)[: B * capacity // page].reshape(B, -1).astype(np.int32)
    elif rows > B:
        a["cache_batch_idx"] = rng.permutation(rows)[:B].astype(np.int32)
    if pick.random() < 0.3:
        a["cache_leftpad"] = np.array([pick.randint(0, n) for n in a["cache_seqlens"]], np.int32)
    if T_new:
        a["k"], a["v"] = (normal(rng, (B, T_new, K, H), dtype) for _ in range(2))
    if T_new and H >= 32 and pick.random() < 0.4:
        angle = rng.uniform(0, 6, (capacity + T, 16))
        a["rotary_cos"], a["rotary_sin"] = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    if pick.random() < 0.2:
        for name in ("cache_seqlens", "block_table", "cache_batch_idx", "cache_leftpad"):
            if name in a:  # to some that are too small, and some that are too large
                a[name] += rng.choice([-(2**20), -3, 0, 0, 3, 2**20], a[name].shape).astype(np.int32)
    elif not page and rows == B:  # positions that hold nothing
        for name in ("k_cache", "v_cache"):
            poison(a[name], a["cache_seqlens"])
    print(f"kvcache {dtype} B{B} T{T} S{capacity} N{K * G} K{K} H{H} page{page}", options, sorted(a), flush=True)
    call = jax.jit(lambda a: jax_flash.flash_attn_with_kvcache(**a, **options)[0])
    assert np.isfinite(np.asarray(call(a), np.float32)).all()


def main() -> None:
    calls, seed = (int(x) for x in (sys.argv[1:] + ["100", "0"][len(sys.argv) - 1 :])[:2])
    assert jax.default_backend() == "gpu", "this is about the GPU's kernels"
    pick, rng = random.Random(seed), np.random.default_rng(seed)
    for _ in range(calls):
        pick.choice((attention, attention, dot_product_attention, kvcache, kvcache))(pick, rng)
    print(f"{calls} calls are done")


if __name__ == "__main__":
    main()
