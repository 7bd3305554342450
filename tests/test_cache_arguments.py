"""What jax_flash.cache makes of awkward arguments: lengths of every kind, tables that name no page, and mistakes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jax_flash import cache, flash_attn_with_kvcache
from jax_flash.cache import PageTable

INT32_MAX = 2**31 - 1


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


# --- lengths and block tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_append_writes_what_the_kernel_writes(paged, dtype):
    """For lengths and pages inside and outside the cache."""
    rng = np.random.default_rng(0)
    shape = (6, 8, 2, 16) if paged else (6, 24, 2, 16)
    caches, new = ([jnp.asarray(rng.standard_normal(each), dtype) for _ in range(2)] for each in (shape, (6, 5, 2, 16)))
    lengths = jnp.array([0, 7, 21, 24, -1, INT32_MAX])
    block_table = jnp.array([[0, 1, 2], [3, -1, 2], [0, 4, 6], [5, 5, 5], [5, INT32_MAX, 0], [1, 2, 3]])
    options = {"cache_seqlens": lengths, "block_table": block_table if paged else None}
    q = jnp.zeros((6, 5, 2, 16), dtype)
    _, *expected = flash_attn_with_kvcache(q, *caches, *new, **options)
    for append in (cache.append, jax.jit(cache.append)):
        for got, want in zip(append(*caches, *new, **options), expected, strict=True):
            np.testing.assert_array_equal(got, want)


LENGTHS = {
    "int": (3, 3),
    "numpy-integer": (np.int64(3), 3),
    "scalar": (jnp.int32(3), 3),
    "negative": (jnp.array([-1, -1]), 0),
    "long": (jnp.array([INT32_MAX, 201]), 200),
    "int8": (jnp.array([-128, -1], jnp.int8), 0),
    "int8-most": (jnp.array([127, 127], jnp.int8), 127),
    "uint8": (jnp.array([200, 255], jnp.uint8), 200),
    "uint32": (jnp.array([2**32 - 1, 2**31], jnp.uint32), 200),
    "int64": (np.array([2**32, 2**62]), 200),
    "int64-negative": (np.array([-(2**32) + 3, -(2**63)]), 0),
    "uint64": (np.array([2**32, 2**64 - 1], np.uint64), 200),
    "huge-int": (2**70, 200),
    "huge-negative-int": (-(2**70), 0),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_lengths_are_clamped_and_never_wrap(case):
    """In a cache of 200 tokens, for which no narrow dtype has a number."""
    lengths, held = LENGTHS[case]
    keys, values = cache.append(*cache.contiguous(2, 200, 1, 1), *[jnp.ones((2, 2, 1, 1), jnp.bfloat16)] * 2, lengths)
    want = np.zeros((2, 200, 1, 1))
    want[:, held : held + 2] = 1
    np.testing.assert_array_equal(keys, want)
    np.testing.assert_array_equal(values, want)
    tokens = cache.gather(jnp.ones((2, 200, 1, 1)), lengths)
    assert tokens.sum(axis=(1, 2, 3)).tolist() == [held, held]


@pytest.mark.parametrize("page", [2**32, -(2**32), 2**32 + 1, -1, 200, 127])
def test_a_block_table_names_no_other_page(page):
    """200 pages, of which int8 can count some; page 1 and page 127 exist."""
    pages = jnp.broadcast_to(jnp.arange(1.0, 201)[:, None, None, None], (200, 8, 1, 1))
    dtype = np.int8 if page == 127 else np.int64
    tokens = cache.gather(pages, 16, np.array([[page, 1]], dtype))
    assert tokens[0, ::8, 0, 0].tolist() == [128.0 if page == 127 else 0.0, 2.0]


def test_counts_of_a_page_table_never_wrap():
    table = PageTable.create(num_sequences=2, max_pages=3, num_pages=4, page_size=8)
    grown, fits = table.reserve(8)
    assert fits.tolist() == [True, True]
    grown = grown.advance(8)
    for tokens in (INT32_MAX, 2**40, np.array([2**32, 2**62]), jnp.full(2, 2**32 - 1, jnp.uint32), jnp.full(2, 17)):
        after, fits = grown.reserve(tokens)
        assert fits.tolist() == [False, False]
        np.testing.assert_array_equal(after.block_table, grown.block_table)
        assert grown.advance(tokens).lengths.tolist() == [8, 8]  # there is no page for more
    for tokens in (-1, -(2**40), np.array([-(2**32) + 8, -(2**63)]), jnp.full(2, -128, jnp.int8)):
        after, fits = grown.reserve(tokens)
        assert fits.tolist() == [True, True] and int(after.num_free()) == 2
        assert grown.advance(tokens).lengths.tolist() == [8, 8]
        shared = table.reserve(8)[0].advance(jnp.array([8, 0])).share(0, 1, int(np.max(tokens)))
        assert shared.lengths.tolist() == [8, 0] and int(shared.num_free()) == 3


def sixteen_and_nine() -> PageTable:
    table, _ = PageTable.create(num_sequences=3, max_pages=3, num_pages=6, page_size=8).reserve(jnp.array([16, 9, 0]))
    return table.advance(jnp.array([16, 9, 0]))


def test_sharing_releases_what_the_target_had():
    table = sixteen_and_nine().share(0, 1, 8)
    assert table.lengths.tolist() == [16, 8, 0]
    assert table.block_table.tolist() == [[0, 1, -1], [0, -1, -1], [-1, -1, -1]]
    assert table.references.tolist() == [2, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("pair", [(0, 3), (0, -1), (3, 0), (-1, 0), (INT32_MAX, 1), (1, 1)])
def test_sharing_with_nobody_changes_nothing(pair):
    table = sixteen_and_nine()
    for share in (PageTable.share, jax.jit(PageTable.share)):
        after = share(table, *map(jnp.int32, pair), 9)
        jax.tree.map(np.testing.assert_array_equal, after, table)
    with pytest.raises(ValueError, match=r"PageTable.share: .*(one of the 3 sequences|two sequences)"):
        table.share(*pair, 9)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_tables_and_caches(sizes):
    B, _, num_pages = sizes
    table = PageTable.create(*sizes, page_size=8)
    table, fits = jax.jit(PageTable.reserve)(table, jnp.ones(B, jnp.int32))
    assert fits.tolist() == [False] * B
    table = jax.jit(PageTable.share)(table.advance(1), 0, 1, 8).release(jnp.ones(B, bool))
    assert int(table.num_free()) == num_pages and not table.lengths.any()
    caches = cache.paged(num_pages, 8, 2, 4)
    new = jnp.ones((B, 3, 2, 4), jnp.bfloat16)
    keys, _ = cache.append(*caches, new, new, 0, table.block_table)
    assert not keys.any()
    tokens = cache.gather(keys, 3, table.block_table, length=5)
    assert tokens.shape == (B, 5, 2, 4) and not tokens.any()


def test_symbolic_sizes_export():
    b, n, m, s = export.symbolic_shape("b, n, m, s")
    shape = jax.ShapeDtypeStruct
    new, lengths = shape((b, 3, 2, 4), jnp.float32), shape((b,), jnp.int32)

    @jax.jit
    def both(keys, new, lengths, block_table=None):
        keys, _ = cache.append(keys, keys, new, new, lengths, block_table)
        return cache.gather(keys, lengths + 3, block_table)

    contiguous = export.export(both)(shape((b, s, 2, 4), jnp.float32), new, lengths)
    paged = export.export(both)(shape((n, 8, 2, 4), jnp.float32), new, lengths, shape((b, m), jnp.int32))
    arrays = zeros(2, 16, 2, 4), jnp.ones((2, 3, 2, 4)), jnp.array([1, 9])
    np.testing.assert_array_equal(contiguous.call(*arrays), both(*arrays))
    arrays = zeros(5, 8, 2, 4), *arrays[1:], jnp.array([[4, 1], [0, 2]])
    np.testing.assert_array_equal(paged.call(*arrays), both(*arrays))


def test_values_are_rounded_to_the_dtype_of_the_caches():
    new = jnp.full((1, 1, 1, 1), 1 / 3)
    keys, _ = cache.append(*cache.contiguous(1, 8, 1, 1), new, new, 0)
    assert keys.dtype == jnp.bfloat16 and keys[0, 0, 0, 0] == jnp.bfloat16(1 / 3)
    quantised = cache.contiguous(1, 8, 1, 1, jnp.int8)
    keys, _ = cache.append(*quantised, *[jnp.full((1, 1, 1, 1), -7, jnp.int8)] * 2, 0)
    assert cache.gather(keys, 1)[0, :2, 0, 0].tolist() == [-7, 0]


# --- mistakes ---------------------------------------------------------------------------------------------------------


def append(k_cache=(2, 8, 2, 4), v_cache=None, k=(2, 1, 2, 4), v=None, lengths=0, table=None, dtypes=("float32",) * 4):
    shapes = k_cache, v_cache or k_cache, k, v or k
    arrays = (zeros(*shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    return cache.append(*arrays, lengths, table)


def int32(*shape):
    return zeros(*shape, dtype=jnp.int32)


APPEND = {
    "one-head": (dict(k=(2, 1, 1, 4)), r"\(2, T, 2, 4\); got .* k float32\(2, 1, 1, 4\)"),
    "head-dim": (dict(k=(2, 1, 2, 8)), r"\(2, T, 2, 4\)"),
    "one-sequence": (dict(k=(1, 1, 2, 4)), r"\(2, T, 2, 4\)"),
    "rank": (dict(k=(1, 2, 4)), r"\(2, T, 2, 4\)"),
    "v-length": (dict(v=(2, 2, 2, 4)), r"k and v must be"),
    "cache-rank": (dict(k_cache=(8, 2, 4)), r"k_cache must be \(B, S, K, H\) or .* got float32\(8, 2, 4\)"),
    "short-v-cache": (dict(v_cache=(2, 7, 2, 4)), r"one shape and one dtype; got .* v_cache float32\(2, 7, 2, 4\)"),
    "v-cache-dtype": (dict(dtypes=("float32", "bfloat16", "float32", "float32")), "one shape and one dtype"),
    "complex": (dict(dtypes=("float32", "float32", "complex64", "complex64")), "dtype of the caches"),
    "complex-cache": (dict(dtypes=("complex64",) * 4), "real dtype"),
    "float-into-int8": (dict(dtypes=("int8", "int8", "float32", "float32")), "dtype of the caches.* Cast with"),
    "int8-into-float": (dict(dtypes=("float32", "float32", "int8", "int8")), "dtype of the caches"),
    "int32-into-int8": (dict(dtypes=("int8", "int8", "int8", "int32")), "dtype of the caches"),
    "lengths": (
        dict(lengths=int32(3)),
        r"cache_seqlens must be integers \(B,\) = \(2,\), or one integer; got int32\(3,\)",
    ),
    "one-length": (dict(lengths=int32(1)), r"got int32\(1,\)"),
    "lengths-rank": (dict(lengths=int32(2, 1)), r"got int32\(2, 1\)"),
    "float-lengths": (dict(lengths=zeros(2)), r"cache_seqlens must be integers .* got float32\(2,\)"),
    "bool-lengths": (dict(lengths=True), "or one integer; got True"),
    "list": (dict(lengths=[0, 0]), r"or one integer; got \[0, 0\]"),
    "no-lengths": (dict(lengths=None), "or one integer; got None"),
    "table-rows": (dict(table=int32(1, 3)), r"\(1, T, 2, 4\); got .* block_table int32\(1, 3\)"),
    "table-rank": (dict(table=int32(3)), r"block_table must be integers \(B, max_pages\); got int32\(3,\)"),
    "table-dtype": (dict(table=zeros(2, 3)), r"block_table must be integers .* got float32\(2, 3\)"),
    "table-list": (dict(table=[[0, 1], [2, 3]]), r"block_table must be integers"),
}


@pytest.mark.parametrize("case", APPEND)
def test_append_refuses(case):
    arguments, message = APPEND[case]
    with pytest.raises(ValueError, match=r"^cache.append: .*" + message):
        append(**arguments)


GATHER = {
    "rank": (dict(cache=zeros(8, 2, 4)), r"cache must be \(B, S, K, H\)"),
    "complex": (dict(cache=zeros(2, 8, 2, 4, dtype=jnp.complex64)), "real dtype"),
    "lengths": (dict(cache_seqlens=int32(3)), r"\(B,\) = \(2,\)"),
    "table-rows": (dict(cache_seqlens=int32(2), block_table=int32(1, 3)), r"\(B,\) = \(1,\)"),
    "table-rank": (dict(block_table=int32(3)), r"block_table must be integers \(B, max_pages\)"),
    "length": (dict(length=-1), "length must be an integer, at least 0; got -1"),
    "length-dtype": (dict(length=2.0), "length must be an integer, at least 0; got 2.0"),
}


@pytest.mark.parametrize("case", GATHER)
def test_gather_refuses(case):
    arguments, message = GATHER[case]
    with pytest.raises(ValueError, match=r"^cache.gather: .*" + message):
        cache.gather(**{"cache": zeros(2, 8, 2, 4), "cache_seqlens": 0, **arguments})


@pytest.mark.parametrize("page_size", [0, -8, 7, True, 8.0, None])
def test_page_sizes_that_are_refused(page_size):
    for create in (lambda: PageTable.create(2, 3, 4, page_size), lambda: cache.paged(4, page_size, 2, 4)):
        with pytest.raises(ValueError, match="page_size must be a positive multiple of 8; got"):
            create()


@pytest.mark.parametrize("size", [-1, True, 2.0, None])
def test_sizes_that_are_refused(size):
    for i, name in enumerate(("num_sequences", "max_pages", "num_pages")):
        sizes = [2, 3, 4]
        sizes[i] = size
        with pytest.raises(ValueError, match=f"PageTable.create: {name} must be an integer, at least 0; got {size}"):
            PageTable.create(*sizes, page_size=8)
    with pytest.raises(ValueError, match=f"cache.contiguous: head_dim must be an integer, at least 0; got {size}"):
        cache.contiguous(1, 8, 2, size)


def test_sequences_are_not_longer_than_the_kernel_takes():
    with pytest.raises(NotImplementedError, match="at most 536870912 tokens; got 1073741824"):
        PageTable.create(1, 2**27, 4, 8)
    huge = jax.ShapeDtypeStruct((1, 2**29 + 1, 1, 1), jnp.int8)
    with pytest.raises(NotImplementedError, match="at most 536870912 tokens"):
        jax.eval_shape(lambda x: cache.gather(x, 0, length=1), huge)


TABLE = {
    "one-entry": (
        lambda table: table.release(jnp.ones(1, bool)),
        r"release: finished must be bool \(B,\) = \(3,\).*bool\(1,\)",
    ),
    "integers": (lambda table: table.release(int32(3)), r"release: finished must be bool .* got int32\(3,\)"),
    "list": (lambda table: table.release([True] * 3), "release: finished must be a JAX or NumPy array"),
    "reserve": (lambda table: table.reserve(int32(2)), r"reserve: tokens must be integers \(B,\) = \(3,\)"),
    "reserve-float": (lambda table: table.reserve(1.0), "reserve: tokens must be integers .* got 1.0"),
    "advance": (lambda table: table.advance(jnp.ones(3, bool)), r"advance: tokens must be integers .* got bool\(3,\)"),
    "share-rank": (lambda table: table.share(0, int32(1), 8), r"share: target must be one integer; got int32\(1,\)"),
    "share-float": (lambda table: table.share(0, 1, zeros()), r"share: tokens must be one integer; got float32\(\)"),
}


@pytest.mark.parametrize("case", TABLE)
def test_page_table_refuses(case):
    call, message = TABLE[case]
    with pytest.raises(ValueError, match=r"^PageTable\." + message):
        call(sixteen_and_nine())
