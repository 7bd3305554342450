"""examples/inference/serve.py with OpenAI's own client: answers over HTTP are those of greedy decoding alone."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

for needed in ("gguf", "tokenizers", "jinja2", "openai", "httpx", "starlette", "uvicorn"):
    pytest.importorskip(needed)

ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT / "examples" / "inference"))

import gguf_model  # noqa: E402
import httpx  # noqa: E402
import openai  # noqa: E402
import serve  # noqa: E402
import tokenizer  # noqa: E402
import uvicorn  # noqa: E402
from tiny_engine import PAGE, alone, count_programs, load_tiny, make_engine  # noqa: E402
from tiny_gguf import tiny_settings, tiny_tensors, write_gguf  # noqa: E402

SYSTEM = {"role": "system", "content": "answer as the oracle would"}

pytestmark = [
    pytest.mark.skipif(jax.default_backend() == "gpu", reason="float32 has no CUDA kernel yet"),
    pytest.mark.usefixtures("quick_compilation"),
]


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


@contextlib.contextmanager
def serving(running, text, *, max_tokens=16):
    """A server on a port of its own; its address."""
    with serving_app(serve.Front(running, text, "tiny", max_tokens=max_tokens).app()) as address:
        yield address


@contextlib.contextmanager
def serving_app(app):
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="module")
def server(model):
    running = make_engine(model, stop_ids=model[2].stop_ids)
    running.compile()
    with serving(running, model[2]) as address:
        yield running, address


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(client, content, **options):
    messages = [SYSTEM, {"role": "user", "content": content}]
    options = dict(temperature=0, max_tokens=12) | options
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def expected(model, content, max_tokens=12):
    """The text of greedy decoding alone."""
    text = model[2]
    prompt = text.encode_messages([SYSTEM, {"role": "user", "content": content}])
    to_text = text.stream()
    return "".join(map(to_text, alone(model, prompt, max_tokens, text.stop_ids)))


def streamed(chunks):
    chunks = [choice for chunk in chunks for choice in chunk.choices]
    assert chunks[0].delta.role == "assistant"
    assert [bool(choice.finish_reason) for choice in chunks] == [False] * (len(chunks) - 1) + [True]
    return "".join(choice.delta.content or "" for choice in chunks), chunks[-1].finish_reason


def until(condition):
    """Waits for what the engine's thread does."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")


def test_32_requests_at_once(model, client):
    random = np.random.default_rng(1)
    contents = ["".join(random.choice(list("abc the"), size=n)) for n in random.integers(1, 90, 8)] * 4
    limits = random.integers(1, 20, 8).tolist() * 4

    def one(i):
        if i % 2:
            return streamed(ask(client, contents[i], max_tokens=limits[i], stream=True))[0]
        return ask(client, contents[i], max_tokens=limits[i]).choices[0].message.content

    before = count_programs()
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(one, range(32)))
    assert count_programs() == before
    wanted = [expected(model, content, limit) for content, limit in zip(contents[:8], limits[:8], strict=True)]
    assert answers == wanted * 4


def test_streaming_gives_what_a_whole_answer_has(model, client):
    whole = ask(client, "what is the time")
    assert whole.choices[0].message.content == expected(model, "what is the time")
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    chunks = list(ask(client, "what is the time", stream=True, stream_options={"include_usage": True}))
    assert streamed(chunks) == (whole.choices[0].message.content, "length")
    assert chunks[-1].usage.completion_tokens == 12 and not chunks[-1].choices
    # The system message and more is in the cache by now.
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens // PAGE * PAGE


def test_a_stop_string_ends_the_text_before_it(model, client):
    text = expected(model, "tell me", 30)
    stop = text[8:11]
    wanted = text[: text.index(stop)]
    whole = ask(client, "tell me", max_tokens=30, stop=["never said", stop])
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (wanted, "stop")
    assert streamed(ask(client, "tell me", max_tokens=30, stop=stop, stream=True)) == (wanted, "stop")
    # What might have been the beginning of a stop string comes after all.
    assert streamed(ask(client, "tell me", max_tokens=30, stop=text[-1] + "?!", stream=True)) == (text, "length")


def test_completions(model, client):
    prompt = model[2].encode("the the")
    to_text = model[2].stream()
    text = "".join(map(to_text, alone(model, prompt, 9)))
    options = dict(model="tiny", temperature=0, max_tokens=9)
    for form in ("the the", ["the the"], prompt, [prompt]):
        assert client.completions.create(prompt=form, **options).choices[0].text == text
    chunks = list(client.completions.create(prompt="the the", stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_text_parts_and_the_older_and_the_newer_names(model, client):
    parts = [{"type": "text", "text": "see "}, {"type": "text", "text": "this"}]
    messages = [SYSTEM | {"role": "developer"}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_completion_tokens=5)
    assert answer.choices[0].message.content == expected(model, "see this", 5)
    # Without a limit the server's own holds.
    assert client.chat.completions.create(model="tiny", messages=messages, seed=1).usage.completion_tokens == 16


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_pages(server, stream, monkeypatch):
    running, address = server
    turn = running.turn
    monkeypatch.setattr(running, "turn", lambda: (time.sleep(0.02), turn())[1])  # a hundred of them are needed
    until(lambda: running.requests() == 0)
    running.forget()
    body = change(max_tokens=200, stream=stream, temperature=0)  # sampled, the text might end sooner
    if stream:
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as response:
            assert next(response.iter_lines()).startswith("data: ")
            assert running.requests() == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/chat/completions", json=body, timeout=0.3)
    until(lambda: running.requests() == 0)
    assert running.free_pages() == 64


def change(**fields):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | fields
    return {name: value for name, value in body.items() if value != "absent"}


BAD_BODIES = [
    ([1], None, "must be a JSON object"),
    (change(model="absent"), "model", "must provide a model"),
    (change(messages="absent"), "messages", "at least one message"),
    (change(messages=[]), "messages", "at least one message"),
    (change(messages="hello"), "messages", "messages must be a list; got 'hello'"),
    (change(messages=["hello"]), "messages[0]", "an object with role and content"),
    (change(messages=[{"role": "robot", "content": ""}]), "messages[0].role", "system, user, assistant; got 'robot'"),
    (change(messages=[{"role": "user"}]), "messages[0].content", "must be a string"),
    (
        change(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        "messages[0].content",
        "list of text parts",
    ),
    (change(messages=[{"role": "user", "content": "\ud800"}]), "messages", "not Unicode text"),
    (change(max_tokens=0), "max_tokens", "at least 1; got 0"),
    (change(max_tokens=1.5), "max_tokens", "an integer; got 1.5"),
    (change(max_tokens=True), "max_tokens", "an integer; got True"),
    (change(max_tokens=250), "messages", "exceed the context of 256"),
    (change(messages=[{"role": "user", "content": "a" * 300}]), "messages", "exceed the context of 256"),
    (change(temperature=3), "temperature", "from 0 to 2; got 3"),
    (change(temperature="hot"), "temperature", "a number; got 'hot'"),
    (change(top_p=-0.1), "top_p", "from 0 to 1"),
    (change(seed="x"), "seed", "an integer"),
    (change(stop=["a"] * 5), "stop", "up to four strings"),
    (change(stop=[""]), "stop", "none of them empty"),
    (change(stream="yes"), "stream", "true or false"),
    (change(stream_options={"include_usage": True}), "stream_options", "stream = true"),
    (change(n=2), "n", "does not support n; got 2"),
    (change(logprobs=True), "logprobs", "does not support logprobs"),
    (change(tools=[{"type": "function"}]), "tools", "does not support tools"),
    (change(response_format={"type": "json_object"}), "response_format", "does not support response_format"),
    (change(temprature=1), None, "unrecognized request argument: 'temprature'"),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD_BODIES)
def test_a_bad_body_is_named(server, body, param, message):
    response = httpx.post(f"{server[1]}/v1/chat/completions", content=json.dumps(body))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert message in error["message"] and error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


@pytest.mark.parametrize("prompt", ["", [], ["a", "b"], [[1], [2]], [1, "a"], [True], [100000], [-1], 5, None])
def test_a_bad_prompt_is_named(server, prompt):
    response = httpx.post(f"{server[1]}/v1/completions", json={"model": "tiny", "prompt": prompt})
    assert response.status_code == 400 and response.json()["error"]["param"] == "prompt", response.text


def test_other_mistakes_have_their_own_status(server, client):
    address = server[1]
    with pytest.raises(openai.NotFoundError, match="'gpt-9' does not exist; this server has 'tiny'") as caught:
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "hi", max_tokens=1000)
    assert caught.value.code == "context_length_exceeded"
    for content in (b"{", b"", b"\xff", b"[" * 100000):
        response = httpx.post(f"{address}/v1/chat/completions", content=content)
        assert response.status_code == 400 and "not JSON" in response.json()["error"]["message"]
    large = httpx.post(f"{address}/v1/chat/completions", content=b" " * (8 * 2**20 + 1))
    assert large.status_code == 413 and "larger than" in large.json()["error"]["message"]
    assert httpx.get(f"{address}/v1/chat/completions").status_code == 405
    assert "/v1/nothing" in httpx.get(f"{address}/v1/nothing").json()["error"]["message"]


@pytest.mark.parametrize(
    ("template", "message"),
    [("{{ raise_exception('roles must alternate') }}", "roles must alternate"), ("{{ '' }}", "the prompt is empty")],
)
def test_what_the_template_does_not_take_is_the_clients_to_know(model, template, message):
    text = tokenizer.ChatTokenizer(tiny_settings() | {"tokenizer.chat_template": template})
    with serving(make_engine(model), text) as address:
        response = httpx.post(f"{address}/v1/chat/completions", json=change())
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_an_engine_that_fails_ends_the_server(model, capfd):
    running, stopped = make_engine(model), threading.Event()
    running.turn = lambda: 1 / 0
    front = serve.Front(running, model[2], "tiny", max_tokens=9, stop=stopped.set)
    with serving_app(front.app()) as address:
        for stream in (False, True):
            response = httpx.post(f"{address}/v1/chat/completions", json=change(stream=stream))
            assert response.status_code == (200 if stream else 503) and "the server has stopped" in response.text
    assert front.failed and stopped.is_set() and "ZeroDivisionError" in capfd.readouterr().err


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", tiny_settings(), tiny_tensors())


def test_bench(file, capsys):
    options = ["--slots", "2", "--pages", "64", "--page-size", "8", "--chunk", "16"]
    serve.main(["--model", str(file), "--bench", "4", *options])
    captured = capsys.readouterr()
    assert [line.split(":")[0] for line in captured.out.splitlines()[:2]] == ["one after another", "4 at once"]
    assert "times the tokens per second" in captured.out and "compiled 5 programs" in captured.err


def test_ctrl_c_ends_the_server_in_order(file):
    """Also while it answers: the client is told, and there is no traceback."""
    command = [sys.executable, str(ROOT / "examples/inference/serve.py"), "--model", str(file), "--port", "0"]
    command += ["--slots", "1", "--chunk", "16"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        log = []
        for line in process.stderr:
            log.append(line)
            if found := re.search(r"serving .tiny. on (http://127\.0\.0\.1:\d+/v1)", line):
                break
        body = {"model": "tiny", "prompt": "on", "max_tokens": 250, "stream": True}
        with httpx.stream("POST", f"{found[1]}/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            list(lines)
        log += process.stderr.readlines()
    assert process.returncode == 130, "".join(log)
    assert "Traceback" not in "".join(log)


@pytest.mark.parametrize(
    "options",
    [
        ["--slots", "0"],
        ["--page-size", "12"],
        ["--max-tokens", "0"],
        ["--port", "70000"],
        ["--bench", "0"],
        ["--pages", "-1"],
    ],
)
def test_bad_options_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        serve.parse_arguments(options)
    assert f"{options[0]} " in capsys.readouterr().err.splitlines()[-1]


def test_a_port_that_is_taken_is_named_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(gguf_model.ModelError) as caught:
        serve.main(["--port", str(taken.getsockname()[1]), "--model", "none.gguf"])
    assert "cannot listen on 127.0.0.1 port" in str(caught.value)


def test_a_context_beyond_the_models_is_refused(file):
    with pytest.raises(gguf_model.ModelError, match="--context 300 exceeds the model's 256"):
        serve.main(["--model", str(file), "--port", "0", "--context", "300"])
