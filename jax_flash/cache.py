"""KV caches for flash_attn_with_kvcache: how to make them, which pages belong to whom, and how to get the tokens back.

A contiguous cache has a row per sequence. A paged cache is a pool of pages, and a PageTable says which pages each
sequence has, in order; sequences may share the pages of a common beginning. All of it works under jit with static
shapes, so that requests may come and go without compiling anything again.

Shapes and dtypes that contradict each other are a ValueError. Values that are only known on the device never are:
each function says what it makes of them, and none of them can corrupt a sequence or lose a page.

>>> import jax, jax.numpy as jnp
>>> from jax_flash import cache, flash_attn_with_kvcache
>>> keys, values = cache.paged(num_pages=64, page_size=16, num_heads=2, head_dim=64)
>>> table = cache.PageTable.create(num_sequences=4, max_pages=8, num_pages=64, page_size=16)
>>> q, k, v = (jax.random.normal(jax.random.key(i), (4, 5, 2, 64), jnp.bfloat16) for i in range(3))
>>> table, fits = table.reserve(5)
>>> out, keys, values = flash_attn_with_kvcache(
...     q, keys, values, k, v, cache_seqlens=table.lengths, block_table=table.block_table, causal=True
... )
>>> table = table.advance(jnp.where(fits, 5, 0))
>>> out.shape, table.lengths.tolist(), int(table.num_free())
((4, 5, 2, 64), [5, 5, 5, 5], 60)
"""

from __future__ import annotations

import dataclasses
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jax_flash import _validate

__all__ = ["PageTable", "append", "contiguous", "gather", "paged"]

Arrays = tuple[jax.Array, jax.Array]  # keys and values


def contiguous(batch: int, length: int, num_heads: int, head_dim: int, dtype=jnp.bfloat16) -> Arrays:
    """Keys and values (batch, length, num_heads, head_dim), zeros. One pair for each layer of a model."""
    return _zeros("cache.contiguous", dtype, batch=batch, length=length, num_heads=num_heads, head_dim=head_dim)


def paged(num_pages: int, page_size: int, num_heads: int, head_dim: int, dtype=jnp.bfloat16) -> Arrays:
    """Keys and values (num_pages, page_size, num_heads, head_dim), zeros. A pair per layer, one PageTable for all."""
    _check_page_size("cache.paged", page_size)
    return _zeros(
        "cache.paged", dtype, num_pages=num_pages, page_size=page_size, num_heads=num_heads, head_dim=head_dim
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
    """Which pages of a pool belong to which sequences. Immutable: every method returns a new table.

    block_table  (B, max_pages) int32: the pages of each sequence in order, -1 behind them
    lengths      (B,) int32: the tokens in them; cache_seqlens of the next call
    references   (num_pages,) int32: how many sequences have a page; 0: it is free

    Counts of tokens are integers (B,), or one integer for all sequences; a negative one counts as 0.
    """

    block_table: jax.Array
    lengths: jax.Array
    references: jax.Array
    page_size: int = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def create(cls, num_sequences: int, max_pages: int, num_pages: int, page_size: int) -> PageTable:
        """A table in which no sequence has a page. A sequence may grow to max_pages * page_size tokens.

        Raises ValueError for a negative size and for a page_size that is not a multiple of 8, NotImplementedError for
        sequences of more than 2^29 tokens.
        """
        name = "PageTable.create"
        _check_page_size(name, page_size)
        sizes = dict(num_sequences=num_sequences, max_pages=max_pages, num_pages=num_pages)
        for each, size in sizes.items():
            _check_size(name, each, size)
        _check_capacity(name, max_pages * page_size)
        return cls(
            block_table=jnp.full((num_sequences, max_pages), -1, jnp.int32),
            lengths=jnp.zeros(num_sequences, jnp.int32),
            references=jnp.zeros(num_pages, jnp.int32),
            page_size=int(page_size),
        )

    def num_free(self) -> jax.Array:
        """How many pages nobody has."""
        return jnp.sum(self.references == 0, dtype=jnp.int32)

    def reserve(self, tokens: jax.Array | int) -> tuple[PageTable, jax.Array]:
        """Gives each sequence the pages that its next tokens need.

        Sequences are served in order. Returns the table, and for each sequence whether its tokens fit: False where the
        pool is exhausted or the sequence would be longer than it may be. Such a sequence gets nothing, nor does any
        behind it that needs pages when the pool is exhausted.
        """
        B, max_pages = self.block_table.shape
        # One more than there is place for does not fit, and neither does any larger number.
        tokens = jnp.clip(_integers("PageTable.reserve", "tokens", tokens, (B,)), 0, max_pages * self.page_size + 1)
        held = self._held()
        wanted = -(-(self.lengths + tokens) // self.page_size)
        needed = jnp.maximum(wanted - held, 0)
        fits = wanted <= max_pages
        needed = jnp.where(fits, needed, 0)
        before = jnp.cumsum(needed) - needed
        fits &= (needed == 0) | (before + needed <= self.num_free())
        needed = jnp.where(fits, needed, 0)
        # Free pages in order; page `rank` of them goes to the rank-th new entry of the table.
        num_pages = self.references.shape[0]
        (free,) = jnp.nonzero(self.references == 0, size=num_pages, fill_value=num_pages)
        entry = jnp.arange(max_pages, dtype=jnp.int32)[None]
        new = (entry >= held[:, None]) & (entry < (held + needed)[:, None])
        rank = jnp.clip(before[:, None] + entry - held[:, None], 0, max(0, num_pages - 1))
        pages = free[rank].astype(jnp.int32) if num_pages else jnp.full((B, max_pages), -1, jnp.int32)
        block_table = jnp.where(new, pages, self.block_table)
        references = self.references.at[jnp.where(new, pages, num_pages)].add(1, mode="drop")
        return dataclasses.replace(self, block_table=block_table, references=references), fits

    def advance(self, tokens: jax.Array | int) -> PageTable:
        """Counts tokens that were appended, as far as there are pages for them: no others were stored."""
        place = self._held() * self.page_size - self.lengths
        tokens = _integers("PageTable.advance", "tokens", tokens, self.lengths.shape)
        return dataclasses.replace(self, lengths=self.lengths + jnp.clip(tokens, 0, place))

    def release(self, finished: jax.Array) -> PageTable:
        """Takes the pages of the sequences where finished, bool (B,), is True.

        A page that nobody else has is free again.
        """
        B, num_pages = self.lengths.shape[0], self.references.shape[0]
        finished = _validate.as_array("PageTable.release", "finished", finished)
        if finished.shape != (B,) or finished.dtype != jnp.bool_:
            raise ValueError(
                f"PageTable.release: finished must be bool (B,) = ({B},), True for the sequences that end; got "
                f"{_validate.show(finished)}"
            )
        gone = jnp.where(finished[:, None] & (self.block_table >= 0), self.block_table, num_pages)
        return dataclasses.replace(
            self,
            block_table=jnp.where(finished[:, None], -1, self.block_table),
            lengths=jnp.where(finished, 0, self.lengths),
            references=self.references.at[gone].add(-1, mode="drop"),
        )

    def share(self, source: jax.Array | int, target: jax.Array | int, tokens: jax.Array | int) -> PageTable:
        """Lets sequence `target` begin with the first tokens of sequence `source`, in the same pages.

        What the target had before is released. Only whole pages are shared: its length becomes min(tokens, source's
        length), rounded down to a multiple of page_size. What it appends goes to pages of its own.

        All three are one integer each. Where source or target is an array that names no sequence, or both name the
        same, nothing changes; of a Python integer that is a ValueError.
        """
        name, B = "PageTable.share", self.lengths.shape[0]
        for each, index in (("source", source), ("target", target)):
            if isinstance(index, numbers.Integral) and not 0 <= index < B:
                raise ValueError(f"{name}: {each} must name one of the {B} sequences, from 0; got {index}")
        if isinstance(source, numbers.Integral) and isinstance(target, numbers.Integral) and source == target:
            raise ValueError(f"{name}: source and target must be two sequences; got {source} for both")
        source, target, tokens = (
            _integers(name, each, x, ()) for each, x in (("source", source), ("target", target), ("tokens", tokens))
        )
        sequence = jnp.arange(B, dtype=jnp.int32)
        is_source = sequence == source
        is_target = (sequence == target) & (source != target) & jnp.any(is_source)
        table = self.release(is_target)
        length = jnp.max(jnp.where(is_source, self.lengths, 0), initial=0)
        pages = jnp.where(jnp.any(is_target), jnp.clip(tokens, 0, length) // self.page_size, 0)
        row = jnp.max(jnp.where(is_source[:, None], self.block_table, -1), axis=0, initial=-1)
        row = jnp.where(jnp.arange(row.shape[0], dtype=jnp.int32) < pages, row, -1)
        num_pages = self.references.shape[0]
        return dataclasses.replace(
            table,
            block_table=jnp.where(is_target[:, None], row[None], table.block_table),
            lengths=jnp.where(is_target, pages * self.page_size, table.lengths),
            references=table.references.at[jnp.where(row >= 0, row, num_pages)].add(1, mode="drop"),
        )

    def _held(self) -> jax.Array:
        return jnp.sum(self.block_table >= 0, axis=1, dtype=jnp.int32)


def append(
    k_cache: jax.Array,
    v_cache: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache_seqlens: jax.Array | int,
    block_table: jax.Array | None = None,
) -> Arrays:
    """Writes k and v behind what each sequence holds, without attending: what flash_attn_with_kvcache writes.

    ====================  ============================  ==============================================
    array                 shape                         dtype
    ====================  ============================  ==============================================
    k_cache, v_cache      (B, S, K, H)                  any real one
    ... or, paged         (num_pages, page_size, K, H)  any real one
    k, v                  (B, T, K, H)                  as the caches; or both floating, then rounded
    cache_seqlens         (B,), or one integer          any integer
    block_table           (B, max_pages)                any integer
    ====================  ============================  ==============================================

    Args:
      k_cache: the keys so far, a row per sequence or per page.
      v_cache: the values so far.
      k: the keys of the new tokens.
      v: their values.
      cache_seqlens: how many tokens each sequence holds; clamped to [0, capacity].
      block_table: the caches are pages, and this names the pages of each sequence in order.

    Returns:
      The caches. Tokens past the capacity (S, or max_pages * page_size) are dropped, and so are those that belong to
      an entry of block_table outside [0, num_pages).

    Raises:
      ValueError: shapes or dtypes contradict each other.
      NotImplementedError: a capacity of more than 2^29 tokens.

    >>> import jax.numpy as jnp
    >>> from jax_flash import cache
    >>> caches = cache.contiguous(batch=1, length=8, num_heads=2, head_dim=4)
    >>> new = jnp.ones((1, 3, 2, 4), jnp.bfloat16)
    >>> keys, values = cache.append(*caches, new, new, cache_seqlens=2)
    >>> keys[0, :, 0, 0].tolist()
    [0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    """
    name = "cache.append"
    arrays = {"k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    k_cache, v_cache, k, v = (_validate.as_array(name, each, x) for each, x in arrays.items())
    table, B, capacity = _check_cache(name, "k_cache", k_cache, block_table)
    shown = arrays if table is None else arrays | {"block_table": table}
    got = ", ".join(f"{each} {_validate.show(x)}" for each, x in shown.items())
    if k_cache.shape != v_cache.shape or k_cache.dtype != v_cache.dtype:
        raise ValueError(f"{name}: k_cache and v_cache must have one shape and one dtype; got {got}")
    K, H = k_cache.shape[2:]
    if k.ndim != 4 or k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (B, K, H):
        raise ValueError(f"{name}: k and v must be (B, T, K, H) = ({B}, T, {K}, {H}); got {got}")
    floating = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (k_cache, k, v))
    if not floating and not k.dtype == v.dtype == k_cache.dtype:
        raise ValueError(
            f"{name}: k and v must have the dtype of the caches, or all be floating; got {got}. Cast with x.astype(...)"
        )
    lengths = jnp.clip(_integers(name, "cache_seqlens", cache_seqlens, (B,)), 0, capacity)
    position = lengths[:, None] + jnp.arange(k.shape[1], dtype=jnp.int32)[None]
    row, offset = _place(k_cache, position, table)

    def write(cache, new):
        return cache.at[row, offset].set(new.astype(cache.dtype), mode="drop")

    return write(k_cache, k), write(v_cache, v)


def gather(
    cache: jax.Array, cache_seqlens: jax.Array | int, block_table: jax.Array | None = None, length: int | None = None
) -> jax.Array:
    """The tokens of each sequence in order, zeros behind the last.

    Args:
      cache: keys or values, (B, S, K, H) or (num_pages, page_size, K, H), of any real dtype.
      cache_seqlens: integers (B,), or one for all: how many tokens each sequence holds; clamped to [0, capacity]. A
        paged cache has as many sequences as block_table.
      block_table: integers (B, max_pages): the cache is pages, and this names the pages of each sequence in order.
        Entries outside [0, num_pages) are pages of zeros.
      length: how many tokens of each sequence are wanted. Default: the capacity, S or max_pages * page_size.

    Returns:
      (B, length, K, H), the dtype of the cache.

    Raises:
      ValueError: shapes or dtypes contradict each other.
      NotImplementedError: a capacity of more than 2^29 tokens.

    >>> import jax.numpy as jnp
    >>> from jax_flash import cache
    >>> pages = jnp.arange(16.0).reshape(2, 8, 1, 1)
    >>> cache.gather(pages, 3, block_table=jnp.array([[1], [0]]), length=4)[..., 0, 0].tolist()
    [[8.0, 9.0, 10.0, 0.0], [0.0, 1.0, 2.0, 0.0]]
    """
    name = "cache.gather"
    cache = _validate.as_array(name, "cache", cache)
    table, B, capacity = _check_cache(name, "cache", cache, block_table)
    if length is None:
        length = capacity
    _check_size(name, "length", length)
    if 0 in cache.shape:  # XLA does not gather from nothing
        return jnp.zeros((B, length, *cache.shape[2:]), cache.dtype)
    lengths = jnp.clip(_integers(name, "cache_seqlens", cache_seqlens, (B,)), 0, capacity)
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (B, length))
    row, offset = _place(cache, position, table)
    tokens = cache.at[row, offset].get(mode="fill", fill_value=0)
    return jnp.where((position < lengths[:, None])[..., None, None], tokens, 0)


def _place(cache: jax.Array, position: jax.Array, block_table: jax.Array | None) -> Arrays:
    """Row and offset of each position (B, T), from 0; a row that does not exist where there is no place."""
    rows, size = cache.shape[:2]
    if block_table is None:
        row = jnp.broadcast_to(jnp.arange(position.shape[0], dtype=jnp.int32)[:, None], position.shape)
        return jnp.where(position < size, row, rows), position
    entry = position // max(size, 1)
    page = jnp.take_along_axis(block_table, entry, axis=1, mode="clip")
    exists = (entry < block_table.shape[1]) & (page >= 0) & (page < rows)
    return jnp.where(exists, page, rows), position % max(size, 1)


def _zeros(function: str, dtype, **sizes: int) -> Arrays:
    for name, size in sizes.items():
        _check_size(function, name, size)
    return jnp.zeros(tuple(sizes.values()), dtype), jnp.zeros(tuple(sizes.values()), dtype)


def _check_size(function: str, name: str, size) -> None:
    if export.is_symbolic_dim(size):
        return
    if not isinstance(size, numbers.Integral) or isinstance(size, bool) or int(size) < 0:
        raise ValueError(f"{function}: {name} must be an integer, at least 0; got {size!r}")


def _check_page_size(function: str, size) -> None:
    integer = isinstance(size, numbers.Integral) and not isinstance(size, bool)
    if not (integer and int(size) > 0 and int(size) % 8 == 0):
        raise ValueError(f"{function}: page_size must be a positive multiple of 8; got {size!r}")


def _check_capacity(function: str, capacity) -> None:
    if not export.is_symbolic_dim(capacity) and capacity > _validate.MAX_LENGTH:
        raise NotImplementedError(f"{function}: a sequence holds at most {_validate.MAX_LENGTH} tokens; got {capacity}")


def _check_cache(function: str, name: str, cache: jax.Array, block_table) -> tuple[jax.Array | None, int, int]:
    """The block table as int32, the number of sequences, and how many tokens each of them may have."""
    if cache.ndim != 4:
        raise ValueError(
            f"{function}: {name} must be (B, S, K, H) or (num_pages, page_size, K, H); got {_validate.show(cache)}"
        )
    if not (jnp.issubdtype(cache.dtype, jnp.floating) or jnp.issubdtype(cache.dtype, jnp.integer)):
        raise ValueError(f"{function}: {name} must have a real dtype; got {_validate.show(cache)}")
    B, capacity = cache.shape[:2]
    if block_table is not None:
        wanted = "integers (B, max_pages)"
        block_table = _int32(function, "block_table", block_table, wanted)
        if block_table.ndim != 2:
            raise ValueError(f"{function}: block_table must be {wanted}; got {_validate.show(block_table)}")
        B, capacity = block_table.shape[0], block_table.shape[1] * capacity
    _check_capacity(function, capacity)
    return block_table, B, capacity


def _integers(function: str, name: str, x, shape: tuple[int, ...]) -> jax.Array:
    """x in int32 and of `shape`: (B,), where one integer is for all sequences, or ()."""
    wanted = f"integers (B,) = {shape}, or one integer" if shape else "one integer"
    x = _int32(function, name, x, wanted)
    if x.shape not in ((), shape):
        raise ValueError(f"{function}: {name} must be {wanted}; got {_validate.show(x)}")
    return jnp.broadcast_to(x, shape)


def _int32(function: str, name: str, x, wanted: str) -> jax.Array:
    """x in int32. A number that int32 cannot hold becomes the nearest that it can: it must not change its sign."""
    least, most = -(2**31), 2**31 - 1
    if isinstance(x, numbers.Integral) and not isinstance(x, bool):
        x = np.array(min(max(int(x), least), most), np.int32)
    if isinstance(x, jax.Array) or hasattr(x, "__jax_array__"):
        x = jnp.asarray(x)
    elif not isinstance(x, np.ndarray):
        raise ValueError(f"{function}: {name} must be {wanted}; got {x!r}")
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{function}: {name} must be {wanted}; got {_validate.show(x)}")
    info = jnp.iinfo(x.dtype)
    if info.min < least or info.max > most:
        clip = np.clip if isinstance(x, np.ndarray) else jnp.clip  # jnp's would cut NumPy's numbers to 32 bits first
        x = clip(x, max(int(info.min), least), min(int(info.max), most))
    return jnp.asarray(x, jnp.int32)
