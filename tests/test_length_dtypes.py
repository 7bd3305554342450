"""Lengths and indices of every integer dtype, in every function that takes some: a narrow dtype has no number for the
clamp's limit, and what does not fit 32 bits must be clamped before it is cut to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash import attention, dot_product_attention, flash_attn_with_kvcache, reference

B, T = 2, 3


def attention_fn(*args, **options):
    pytest.importorskip("flax")
    from jax_flash.flax import attention_fn

    return attention_fn(*args, **options)


def jax_nn(q, k, v, q_lengths=None, kv_lengths=None):
    return dot_product_attention(q, k, v, query_seq_lengths=q_lengths, key_value_seq_lengths=kv_lengths)


FUNCTIONS = {
    "attention": attention,
    "dot_product_attention": jax_nn,
    "attention_fn": attention_fn,
    "reference": reference.attention,
}


def qkv(S, dtype, queries=T):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((B, n, 1, 8)), dtype) for n in (queries, S, S)]


def same(a, b):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


# The lengths, S, and what they are clamped to.
LENGTHS = {
    "int8": (jnp.array([5, 127], jnp.int8), 200, [5, 127]),
    "uint8": (jnp.array([5, 255], jnp.uint8), 300, [5, 255]),
    "uint8-past-the-end": (jnp.array([5, 255], jnp.uint8), 200, [5, 200]),
    "int16": (jnp.array([5, 32767], jnp.int16), 33000, [5, 32767]),
    "uint32": (jnp.array([5, 2**32 - 1], jnp.uint32), 20, [5, 20]),
    "int64": (np.array([2**32, -(2**32)]), 20, [20, 0]),
    "int64-extremes": (np.array([2**63 - 1, -(2**63)]), 20, [20, 0]),
    "uint64": (np.array([2**32 + 5, 2**64 - 1], np.uint64), 20, [20, 20]),
}


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_kv_lengths(function, case, dtype):
    lengths, S, clamped = LENGTHS[case]
    q, k, v = qkv(S, dtype)
    call = FUNCTIONS[function]
    same(call(q, k, v, kv_lengths=lengths), call(q, k, v, kv_lengths=jnp.array(clamped, jnp.int32)))


@pytest.mark.parametrize("case", ["int8", "uint8-past-the-end", "int64", "uint64"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_q_lengths(function, case, dtype):
    lengths, queries, clamped = LENGTHS[case]
    q, k, v = qkv(9, dtype, queries)
    call = FUNCTIONS[function]
    same(call(q, k, v, q_lengths=lengths), call(q, k, v, q_lengths=jnp.array(clamped, jnp.int32)))


@pytest.mark.parametrize("function", ["attention", "attention_fn"])
def test_one_length_of_arrays_without_batch_axis(function, dtype):
    """As indexing a NumPy array gives it."""
    q, k, v = (x[0] for x in qkv(20, dtype))
    lengths = np.array([2**32 + 3, 7])
    for length, clamped in zip(lengths, (20, 7), strict=True):
        got, want = (FUNCTIONS[function](q, k, v, kv_lengths=x) for x in (length, jnp.int32(clamped)))
        same(got, want)


@pytest.mark.parametrize("case", LENGTHS)
def test_kvcache_lengths(case, dtype):
    lengths, S, clamped = LENGTHS[case]
    q, k, v = qkv(S, dtype)
    for name in ("cache_seqlens", "cache_leftpad"):
        got, want = (
            flash_attn_with_kvcache(q, k, v, **{name: x}, return_softmax_lse=True)[:2]
            for x in (lengths, jnp.array(clamped, jnp.int32))
        )
        jax.tree.map(same, got, want)


@pytest.mark.parametrize("length", [2**31, 2**40, -(2**31) - 1, 10**30, -(10**30)])
def test_kvcache_takes_any_python_integer(length, dtype):
    q, k, v = qkv(20, dtype)
    want = flash_attn_with_kvcache(q, k, v, cache_seqlens=20 if length > 0 else 0)[0]
    same(flash_attn_with_kvcache(q, k, v, cache_seqlens=length)[0], want)


@pytest.mark.parametrize("index", [2**32, 2**32 + 1, -(2**32), 2**63 - 1])
def test_indices_name_no_other_row_or_page(index, dtype):
    q, k, v = qkv(24, dtype)
    indices = {
        "cache_batch_idx": (np.array([index, 1]), jnp.array([-1, 1]), k, v),
        "block_table": (np.array([[index], [1]]), jnp.array([[-1], [1]]), k, v),
    }
    for name, (wide, none, *caches) in indices.items():
        got, want = (
            flash_attn_with_kvcache(q, *caches, **{name: x}, return_softmax_lse=True)[:2] for x in (wide, none)
        )
        jax.tree.map(same, got, want)
        assert not np.asarray(got[0][0]).any() and np.asarray(got[0][1]).any()
