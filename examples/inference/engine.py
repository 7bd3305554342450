"""Continuous batching: requests come, share a paged cache, and go, while one thread runs the model turn by turn.

    engine = Engine(config, weights, dtype, context=8192, slots=16, num_pages=512, page_size=16)
    engine.submit(Request([1, 2, 3], max_tokens=20, emit=print))
    while engine.turn():
        pass

A turn computes a chunk's worth of prompts and then some tokens for every request that answers, so that long prompts
hold up nobody for long. What was computed for one request and is how another one begins is shared, in whole pages,
and stays in the cache after the request until its pages are wanted.

A request starts when there are pages for its prompt and its longest answer, and waits until then: a request that has
started is never short of pages.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable

import numpy as np
import paged_step


class TooLong(ValueError):
    """The request could never run: it exceeds the context, or the whole pool of pages."""


@dataclasses.dataclass(eq=False)
class Request:
    """`emit` gets new tokens as they come, in the engine's thread, and with the last of them why the answer ends:
    "stop" (the model is done), "length", "cancelled" or "error"; before that, None."""

    prompt: list[int]
    max_tokens: int
    emit: Callable[[list[int], str | None], None]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0  # the same seed draws the same answer, whatever else is running
    answered: int = 0  # tokens emitted
    shared: int = 0  # tokens of the prompt that were in the cache already

    def __post_init__(self):
        self.random = np.random.default_rng(self.seed)

    @property
    def capacity(self) -> int:
        """Tokens that it may have in the cache: the last of the answer is never fed."""
        return len(self.prompt) + self.max_tokens - 1


@dataclasses.dataclass(eq=False)
class _Row:
    """A row of the page table. Without a request it keeps its tokens for whoever begins alike, or has none."""

    index: int
    tokens: list[int] = dataclasses.field(default_factory=list)  # in the cache
    request: Request | None = None
    following: int = 0  # the answer's last token, to be fed next
    used: int = 0  # when, in turns


class Engine:
    """`submit` and `cancel` may be called by any thread, `turn` or `run` by one alone."""

    def __init__(
        self,
        config,
        weights,
        dtype,
        *,
        context: int,
        slots: int,
        num_pages: int,
        page_size: int,
        chunk: int = 128,
        burst: int = 1,
        stop_ids: frozenset[int] = frozenset(),
    ):
        """
        Args:
          context: how many tokens prompt and answer may have together.
          slots: how many requests run at once.
          num_pages: pages of page_size tokens, for all requests together.
          chunk: about how many tokens of prompts a turn computes.
          burst: how many tokens a turn computes for each answer.
          stop_ids: tokens that end an answer, and are not part of it.
        """
        self._options = dict(weights=weights, config=config)
        self._slots, self._page_size, self._burst = slots, page_size, burst
        self.context, self.vocabulary, self.stop_ids = context, config.vocabulary, stop_ids
        # Programs are compiled for these sizes alone: at most half of one is padding.
        self._chunks, self._batches = _sizes(chunk, 16), _sizes(slots, 1)
        # As many rows again keep what finished requests computed.
        self._rows = [_Row(i) for i in range(2 * slots)]
        self._num_pages = num_pages
        # Padding of the last chunk must not exceed a row: the kernel would clamp, and so shift, its positions.
        max_pages = self._pages(context + chunk)
        self._state = paged_step.create_state(
            config, dtype, rows=len(self._rows), max_pages=max_pages, num_pages=num_pages, page_size=page_size
        )
        self._waiting: collections.deque[Request] = collections.deque()
        self._filling: _Row | None = None  # the row whose prompt is being computed
        self._full = False  # the first of those waiting found no room, and nothing has changed since
        self._turns = 0
        self._changed = threading.Condition()  # guards the next two
        self._inbox: list[tuple[bool, Request]] = []  # whether it comes or goes
        self._open = True

    # --- any thread ---------------------------------------------------------------------------------------------------

    def check(self, prompt: int, max_tokens: int) -> None:
        """Raises TooLong for a request of so many tokens that could never run."""
        if prompt + max_tokens > self.context:
            raise TooLong(
                f"the prompt's {prompt} tokens and {max_tokens} of the answer exceed the context of {self.context}"
            )
        pages = self._pages(prompt + max_tokens - 1)
        if pages > self._num_pages:
            raise TooLong(
                f"the prompt's {prompt} tokens and {max_tokens} of the answer take {pages} pages, "
                f"and the cache has {self._num_pages}"
            )

    def submit(self, request: Request) -> None:
        if not request.prompt or request.max_tokens < 1:
            raise ValueError("a request needs a prompt, and an answer of at least one token")
        self.check(len(request.prompt), request.max_tokens)
        self._post(True, request)

    def cancel(self, request: Request) -> None:
        """Ends a request and frees its pages. One that has ended already is left alone."""
        self._post(False, request)

    def requests(self) -> int:
        """How many are waiting or running."""
        with self._changed:
            coming = sum(comes for comes, _ in self._inbox)
        return coming + len(self._waiting) + len(self._running())

    def close(self) -> None:
        """Lets `run` return after its turn."""
        with self._changed:
            self._open = False
            self._changed.notify()

    def _post(self, comes: bool, request: Request) -> None:
        with self._changed:
            if self._open:
                self._inbox.append((comes, request))
                self._changed.notify()
                return
        if comes:
            request.emit([], "error")

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Turns until `close`, sleeping while there is nothing to do. Requests that are then left end with "error"."""
        try:
            while self._open:
                if not self.turn():
                    with self._changed:
                        self._changed.wait_for(lambda: self._inbox or not self._open)
        finally:
            self.close()
            left = [r for comes, r in self._inbox if comes] + [r.request for r in self._running()] + [*self._waiting]
            for request in left:
                request.emit([], "error")

    def turn(self) -> bool:
        """Whether any request is left."""
        self._turns += 1
        self._read_inbox()
        budget = self._chunks[-1]
        while budget > 0 and (self._filling or self._admit()):
            budget -= self._fill(self._filling)
        if answering := [row for row in self._running() if row is not self._filling]:
            self._answer(answering)
        return bool(self._waiting or self._running())

    def compile(self, progress=lambda programs: programs) -> int:
        """Compiles every program that will run, by running it on nothing. `progress` wraps the list of them.

        Returns how many there are.
        """
        nobody = np.int32(len(self._rows))
        runs = [lambda n=n: self._prefill(np.zeros(n, np.int32), nobody, np.int32(0), []) for n in self._chunks]
        runs += [lambda n=n: self._decode([], n) for n in self._batches]
        runs += [lambda: self._share(0, 1, 0), lambda: self._release([])]
        for run in progress(runs):
            run()
        self._state.lost.block_until_ready()
        return len(runs)

    def free_pages(self) -> int:
        """Pages that no request has, running or finished."""
        return int(self._state.table.num_free())

    def forget(self) -> None:
        """Drops what finished requests left in the cache."""
        self._release([row for row in self._rows if row.request is None])

    def _read_inbox(self) -> None:
        with self._changed:
            inbox, self._inbox = self._inbox, []
        for comes, request in inbox:
            if comes:
                self._waiting.append(request)
                continue
            row = next((row for row in self._running() if row.request is request), None)
            if row:
                self._filling = None if row is self._filling else self._filling
                self._release([row])
            elif request in self._waiting:
                self._waiting.remove(request)
                self._full = False
            else:
                continue
            request.emit([], "cancelled")

    def _running(self) -> list[_Row]:
        return [row for row in self._rows if row.request]

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page_size)

    def _admit(self) -> bool:
        """Gives the first of those waiting a row, if there is one, and pages enough to finish. Nobody overtakes."""
        if not self._waiting or self._full:
            return False
        running = self._running()
        request = self._waiting[0]
        source, shared = self._longest_beginning(request.prompt)
        promised = sum(self._pages(row.request.capacity) - self._pages(len(row.tokens)) for row in running)
        wanted = promised + self._pages(request.capacity) - shared // self._page_size
        evicted = self._make_room(wanted, source, shared) if len(running) < self._slots else None
        if evicted is None:
            self._full = True
            return False
        # What is shared stays when the row that it comes from goes.
        self._release([row for row in evicted if row is not source])
        row = next(row for row in self._rows if row.request is None and not row.tokens)
        if source:
            self._share(source.index, row.index, shared)
            row.tokens = request.prompt[:shared]
            source.used = self._turns
        if source in evicted:
            self._release([source])
        row.request, request.shared = self._waiting.popleft(), shared
        self._filling = row
        return True

    def _longest_beginning(self, prompt: list[int]) -> tuple[_Row | None, int]:
        """The row that begins most like the prompt, and how many tokens of it can be shared: whole pages, and not the
        prompt's last token, since what follows that has to be computed."""
        best, length = None, 0
        for row in self._rows:
            common = min(len(row.tokens), len(prompt) - 1)
            different = np.flatnonzero(np.not_equal(row.tokens[:common], prompt[:common]))
            common = int(different[0]) if different.size else common
            common -= common % self._page_size
            if common > length:
                best, length = row, common
        return best, length

    def _make_room(self, pages: int, source: _Row | None, shared: int) -> list[_Row] | None:
        """Which finished rows must go so that there are so many free pages and a free row; None if all do not suffice.

        Those that were not used for longest go first, and the source last.
        """
        table, references = (np.array(x) for x in (self._state.table.block_table, self._state.table.references))
        if source:
            references[table[source.index, : shared // self._page_size]] += 1
        has_row = any(row.request is None and not row.tokens for row in self._rows)
        finished, evicted = [row for row in self._rows if row.request is None and row.tokens], []
        for row in sorted(finished, key=lambda row: (row is source, row.used)):
            if has_row and np.sum(references == 0) >= pages:
                break
            held = table[row.index]
            references[held[held >= 0]] -= 1
            has_row |= row is not source
            evicted.append(row)
        return evicted if has_row and np.sum(references == 0) >= pages else None

    def _fill(self, row: _Row) -> int:
        """Computes the next chunk of a prompt, and with the last one its first token. Returns the chunk's size."""
        request = row.request
        left = len(request.prompt) - len(row.tokens)
        # A chunk that would be padding for the most part is cut into smaller ones.
        size = max((size for size in self._chunks if size <= 2 * left), default=self._chunks[0])
        part = request.prompt[len(row.tokens) : len(row.tokens) + size]
        chunk = np.zeros(size, np.int32)
        chunk[: len(part)] = part
        following = self._prefill(chunk, np.int32(row.index), np.int32(len(part)), [request])
        row.tokens += part
        if len(row.tokens) == len(request.prompt):
            self._filling = None
            self._hand_out(row, [int(following)])
        return size

    def _answer(self, rows: list[_Row]) -> None:
        """Computes the next tokens of these rows, as many as a burst has."""
        following = self._decode(rows)
        for column, row in enumerate(rows):
            count = min(self._burst, row.request.max_tokens - row.request.answered)
            tokens = following[:count, column].tolist()
            row.tokens += [row.following, *tokens[:-1]]
            self._hand_out(row, tokens)

    def _hand_out(self, row: _Row, tokens: list[int]) -> None:
        request = row.request
        end = next((i for i, token in enumerate(tokens) if token in self.stop_ids), None)
        tokens = tokens[:end]
        request.answered += len(tokens)
        reason = "stop" if end is not None else "length" if request.answered == request.max_tokens else None
        if reason:
            if lost := int(self._state.lost):
                raise RuntimeError(f"{lost} tokens found no page: the engine promised more than there are")
            row.request, row.used, self._full = None, self._turns, False
        else:
            row.following = tokens[-1]
        request.emit(tokens, reason)

    # --- the compiled programs ----------------------------------------------------------------------------------------

    def _prefill(self, chunk, row, count, requests):
        following, self._state = paged_step.prefill(
            tokens=chunk, row=row, count=count, sampling=_sampling(requests, 1), state=self._state, **self._options
        )
        return following

    def _decode(self, rows: list[_Row], size: int | None = None) -> np.ndarray:
        size = size or next(size for size in self._batches if size >= len(rows))
        tokens, left = np.zeros(size, np.int32), np.zeros(size, np.int32)
        indices = np.full(size, len(self._rows), np.int32)
        for i, row in enumerate(rows):
            tokens[i], indices[i] = row.following, row.index
            left[i] = row.request.max_tokens - row.request.answered
        following, self._state = paged_step.decode(
            tokens=tokens,
            rows=indices,
            left=left,
            sampling=_sampling([row.request for row in rows], size, self._burst),
            state=self._state,
            steps=self._burst,
            **self._options,
        )
        return np.asarray(following)

    def _share(self, source: int, target: int, tokens: int) -> None:
        table = paged_step.share(self._state.table, *(np.int32(x) for x in (source, target, tokens)))
        self._state = self._state._replace(table=table)

    def _release(self, rows: list[_Row]) -> None:
        finished = np.zeros(len(self._rows), bool)
        for row in rows:
            finished[row.index] = True
            row.tokens, row.request = [], None
        self._state = self._state._replace(table=paged_step.release(self._state.table, finished))
        self._full = False


def _sizes(largest: int, least: int) -> list[int]:
    """The largest, half of it, and so on, rising."""
    sizes = [largest]
    while sizes[-1] // 2 >= least:
        sizes.append(sizes[-1] // 2)
    return sizes[::-1]


def _sampling(requests: list[Request], size: int, steps: int = 1) -> paged_step.Sampling:
    temperature, top_p = np.zeros(size, np.float32), np.ones(size, np.float32)
    chance = np.zeros((steps, size), np.float32)
    for i, request in enumerate(requests):
        temperature[i], top_p[i] = request.temperature, request.top_p
        if request.temperature > 0:
            chance[:, i] = request.random.integers(2**23, size=steps) / 2**23
    return paged_step.Sampling(temperature, top_p, chance)
