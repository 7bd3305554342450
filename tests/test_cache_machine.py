"""PageTable against a model of plain Python lists, over random sequences of everything that one can do to it."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jax_flash import cache, flash_attn_with_kvcache
from jax_flash.cache import PageTable

K, H, PAGE = 1, 16, 8
# (B, max_pages, num_pages): a pool that is too small for all, one that is too large, one where pages are the limit.
POOLS = [(3, 3, 6), (2, 3, 8), (4, 7, 7)]
DTYPES = [np.int32, np.int8, np.uint8, np.uint32]

reserve, advance, release, share = map(
    jax.jit, (PageTable.reserve, PageTable.advance, PageTable.release, PageTable.share)
)
append, gather = jax.jit(cache.append), jax.jit(cache.gather)


@jax.jit
def attend(keys, values, lengths, block_table):
    """With scores of 0: the mean of the values that each sequence sees."""
    q = jnp.zeros((lengths.shape[0], 1, K, H), keys.dtype)
    return flash_attn_with_kvcache(q, keys, values, cache_seqlens=lengths, block_table=block_table)[0]


@st.composite
def counts(draw):
    """Numbers of tokens for as many sequences as there may be, now and then absurd ones."""
    info = np.iinfo(draw(st.sampled_from(DTYPES)))
    count = st.integers(0, 9)
    if draw(st.integers(0, 3)) == 3:
        count |= st.sampled_from([-1, info.min, info.max, 25]).filter(lambda n: n >= info.min)
    return np.array(draw(st.lists(count, min_size=4, max_size=4)), info.dtype)


class Pages(RuleBasedStateMachine):
    """The model: for each sequence its pages, which are lists of tokens, and how many tokens it counts.

    A page that two sequences share is one list. Which number a page has in the pool is the table's business.
    """

    @initialize(pool=st.sampled_from(POOLS))
    def create(self, pool):
        self.B, self.max_pages, self.num_pages = pool
        self.pages = [[] for _ in range(self.B)]
        self.lengths = [0] * self.B
        self.table = PageTable.create(*pool, PAGE)
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.float16
        self.caches = cache.paged(self.num_pages, PAGE, K, H, dtype)
        self.written = 0

    def owners(self, page) -> int:
        return sum(any(page is each for each in row) for row in self.pages)

    def num_free(self) -> int:
        return self.num_pages - len({id(page) for row in self.pages for page in row})

    @rule(tokens=counts())
    def reserve(self, tokens):
        self.table, fits = reserve(self.table, tokens[: self.B])
        free, expected = self.num_free(), []
        for row, length, count in zip(self.pages, self.lengths, tokens.tolist(), strict=False):
            wanted = -(-(length + max(count, 0)) // PAGE)
            needed = max(wanted - len(row), 0)
            if wanted > self.max_pages:
                expected.append(False)
                continue
            expected.append(needed <= max(free, 0))
            free -= needed  # also where it does not fit: the sequences are served in order
            if expected[-1]:
                row += [[None] * PAGE for _ in range(needed)]
        assert fits.tolist() == expected

    @rule(tokens=counts())
    def advance(self, tokens):
        self.table = advance(self.table, tokens[: self.B])
        for i, count in enumerate(tokens[: self.B].tolist()):
            self.lengths[i] = min(self.lengths[i] + max(count, 0), len(self.pages[i]) * PAGE)

    @rule(T=st.sampled_from([1, 5, 11]))
    def append(self, T):
        new = 1 + self.written + np.arange(self.B * T).reshape(self.B, T)
        self.written += new.size
        shown = jnp.broadcast_to(jnp.asarray(new, self.caches[0].dtype)[..., None, None], (self.B, T, K, H))
        self.caches = append(*self.caches, shown, -shown, self.table.lengths, self.table.block_table)
        for row, length, tokens in zip(self.pages, self.lengths, new.tolist(), strict=True):
            for position, token in enumerate(tokens, start=length):
                if position < len(row) * PAGE:
                    page = row[position // PAGE]
                    assert self.owners(page) == 1, "a shared page is written to"
                    page[position % PAGE] = token

    @rule(T=st.sampled_from([5, 1, 11]))
    def step(self, T):
        """What a server does with T tokens of every sequence."""
        tokens = np.full(4, T, np.int32)
        self.reserve(tokens)
        self.append(T)
        self.advance(tokens)

    @rule(finished=st.sets(st.integers(0, 3), min_size=1, max_size=2))
    def release(self, finished):
        finished = finished & set(range(self.B))
        self.table = release(self.table, np.isin(np.arange(self.B), list(finished)))
        for i in finished:
            self.pages[i], self.lengths[i] = [], 0

    @rule(giver=st.integers(0, 3), taker=st.integers(0, 3), tokens=st.integers(8, 40) | st.integers(-9, 9))
    def share(self, giver, taker, tokens):
        givers = [i for i in range(self.B) if self.lengths[i] >= PAGE] or range(self.B)
        self.share_rows(givers[giver % len(givers)], taker % self.B, tokens)

    @rule(pair=st.tuples(st.sampled_from([-1, 0, 5, 2**31 - 1]), st.integers(0, 3)), swap=st.booleans())
    def share_with_nobody(self, pair, swap):
        self.share_rows(*(pair[::-1] if swap else pair), 2**31 - 1)

    def share_rows(self, source, target, tokens):
        self.table = share(self.table, source, target, tokens)
        if source != target and 0 <= source < self.B and 0 <= target < self.B:
            whole = max(min(tokens, self.lengths[source]), 0) // PAGE
            self.pages[target], self.lengths[target] = self.pages[source][:whole], whole * PAGE

    def tokens(self, i: int) -> list[int | None]:
        """None: counted, but never written."""
        return list(itertools.chain(*self.pages[i]))[: self.lengths[i]]

    @rule()
    def attend(self):
        out = np.asarray(attend(*self.caches, self.table.lengths, self.table.block_table), np.float32)
        for i in range(self.B):
            tokens = self.tokens(i)
            if None not in tokens:
                mean = -np.mean(tokens) if tokens else 0.0
                np.testing.assert_allclose(out[i], np.full((1, K, H), mean), rtol=2e-3)

    @invariant()
    def the_table_is_the_model(self):
        block_table, references = np.asarray(self.table.block_table), np.asarray(self.table.references)
        assert self.table.lengths.tolist() == self.lengths
        assert int(self.table.num_free()) == self.num_free() == (references == 0).sum()
        number = {}  # of a page of the model
        for row, pages in zip(block_table.tolist(), self.pages, strict=True):
            assert row[len(pages) :] == [-1] * (self.max_pages - len(pages))
            for entry, page in zip(row, pages, strict=False):
                assert 0 <= entry < self.num_pages and number.setdefault(id(page), entry) == entry
                assert references[entry] == self.owners(page)
        assert len(set(number.values())) == len(number), "two pages have one number"

    @invariant()
    def what_was_written_is_read_back(self):
        keys, values = (np.asarray(gather(x, self.table.lengths, self.table.block_table)) for x in self.caches)
        for i in range(self.B):
            expected = self.tokens(i)
            known = np.array([token is not None for token in expected], bool)
            want = np.array([token or 0 for token in expected])[known][:, None, None]
            np.testing.assert_array_equal(
                keys[i, : len(expected)][known], np.broadcast_to(want, (*want.shape[:1], K, H))
            )
            np.testing.assert_array_equal(values[i, : len(expected)][known], -keys[i, : len(expected)][known])
            assert not keys[i, len(expected) :].any()


TestPages = Pages.TestCase
# Derandomised: the same programs in every run. Tokens stay below 2048, where float16 counts exactly.
TestPages.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, database=None)
