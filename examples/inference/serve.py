"""Serve a Llama-architecture model over HTTP in OpenAI's form: chat completions, streamed or whole, many at once.

    python examples/inference/serve.py
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"model":
      "SmolLM2-135M-Instruct.Q4_1", "messages": [{"role": "user", "content": "Why is the sky blue?"}], "stream": true}'

    python examples/inference/serve.py --bench 16

The engine, in engine.py, batches what comes in; this file is the front. It listens on the loopback interface unless
--host says otherwise: there is no authentication.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import pathlib
import signal
import socket
import sys
import threading
import time
import traceback

try:
    import engine
    import gguf_model
    import jax
    import jax.numpy as jnp
    import openai_form
    import serve_bench
    import tokenizer
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"serve.py: {error}. Install what it needs with: pip install '.[examples]'")

_MAX_BODY = 8 * 2**20  # bytes of a request


class Stopped(Exception):
    """The engine runs no more, so that nothing can be answered."""


class Front:
    """The routes of one model and its engine. `stop` is called if the engine fails: no request can succeed after it."""

    def __init__(
        self, running: engine.Engine, text: tokenizer.ChatTokenizer, model: str, *, max_tokens: int, stop=lambda: None
    ):
        self._engine, self._text, self._model = running, text, model
        self._max_tokens, self._stop, self.failed = max_tokens, stop, False
        self._started = int(time.time())

    def app(self) -> Starlette:
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.one_model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
        ]
        handlers = {openai_form.BadRequest: _bad_request, HTTPException: _http_error}
        handlers |= {Stopped: _stopped, Exception: _server_error}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._run_engine)

    @contextlib.asynccontextmanager
    async def _run_engine(self, _):
        def run():
            try:
                self._engine.run()
            except Exception:
                traceback.print_exc()
                self.failed = True
                self._stop()

        thread = threading.Thread(target=run, name="engine", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._engine.close()
            await asyncio.to_thread(thread.join)

    async def models(self, _):
        models = [openai_form.model(self._model, self._started)]
        return JSONResponse({"object": "list", "data": models})

    async def one_model(self, request):
        if (name := request.path_params["model"]) != self._model:
            raise openai_form.BadRequest(f"the model {name!r} does not exist", "model", "model_not_found", 404)
        return JSONResponse(openai_form.model(self._model, self._started))

    async def chat(self, request):
        wanted = openai_form.read_chat(await _json(request), self._model)
        return await self._answer(request, wanted, openai_form.Reply(self._model, chat=True))

    async def complete(self, request):
        wanted = openai_form.read_completion(await _json(request), self._model)
        return await self._answer(request, wanted, openai_form.Reply(self._model, chat=False))

    async def _answer(self, request, wanted: openai_form.Wanted, reply: openai_form.Reply):
        prompt = await asyncio.to_thread(self._prompt, wanted)  # long ones take a while
        run = _Run(self._engine, self._text, wanted, prompt, self._max_tokens)
        if wanted.stream:
            return _EventStream(run, reply, wanted.include_usage)
        answer = asyncio.create_task(run.whole())
        gone = asyncio.create_task(_disconnect(request))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return JSONResponse(reply.whole(answer.result(), run.reason, run.usage()))
            return JSONResponse({}, status_code=499)  # nobody reads it
        finally:
            run.cancel()
            answer.cancel()
            gone.cancel()

    def _prompt(self, wanted: openai_form.Wanted) -> list[int]:
        where = "messages" if wanted.messages else "prompt"
        try:
            if wanted.messages:
                prompt = self._text.encode_messages(wanted.messages)
            elif isinstance(wanted.prompt, str):
                prompt = self._text.encode(wanted.prompt)
            else:
                prompt = self._text.check(wanted.prompt)
        except gguf_model.ModelError as error:
            raise openai_form.BadRequest(str(error), where) from error
        if not prompt:
            raise openai_form.BadRequest("the prompt is empty", where)
        return prompt


class _Run:
    """One request's way through the engine, seen from the event loop."""

    def __init__(self, running, text, wanted, prompt, max_tokens):
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue()

        def emit(*event):
            with contextlib.suppress(RuntimeError):  # the loop may be closed already
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        # Who does not say how long the answer may be gets what there is room for.
        limit = wanted.max_tokens or max(1, min(max_tokens, running.context - len(prompt)))
        self._engine, self._text = running, openai_form.Text(text.stream(), wanted.stop)
        self._request = engine.Request(prompt, limit, emit, wanted.temperature, wanted.top_p, wanted.seed)
        self.reason, self._answered = None, 0
        try:
            running.submit(self._request)
        except engine.TooLong as error:
            where = "messages" if wanted.messages else "prompt"
            raise openai_form.BadRequest(str(error), where, "context_length_exceeded") from error

    async def parts(self):
        """Yields text; then `reason` says why it ends."""
        while self.reason is None:
            tokens, self.reason = await self._events.get()
            self._answered += len(tokens)
            text = self._text.add(tokens, last=self.reason is not None)
            if self._text.stopped:
                self.reason = "stop"
            if self.reason in ("error", "cancelled"):
                raise Stopped("the server has stopped")
            if text:
                yield text

    async def whole(self) -> str:
        return "".join([part async for part in self.parts()])

    def usage(self) -> dict:
        return openai_form.usage(len(self._request.prompt), self._answered, self._request.shared)

    def cancel(self) -> None:
        """Frees what the request still has; one that is finished has nothing."""
        self._engine.cancel(self._request)


class _EventStream(StreamingResponse):
    """An answer as server-sent events. However it ends, also by the client's going away, the request ends with it."""

    def __init__(self, run: _Run, reply: openai_form.Reply, include_usage: bool):
        self._run = run
        super().__init__(self._events(run, reply, include_usage), media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._run.cancel()

    @staticmethod
    async def _events(run, reply, include_usage):
        try:
            if first := reply.first():
                yield _event(first)
            async for text in run.parts():
                yield _event(reply.part(text, None))
            yield _event(reply.part("", run.reason))
            if include_usage:
                yield _event(reply.usage(run.usage()))
            yield "data: [DONE]\n\n"
        except Stopped as error:  # the status is sent already
            yield _event(openai_form.error(str(error), "server_error"))


def _event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _json(request):
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MAX_BODY:
            raise openai_form.BadRequest(f"the body is larger than {_MAX_BODY} bytes", status=413)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise openai_form.BadRequest(f"the body is not JSON: {error}") from error


async def _disconnect(request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _bad_request(_, error):
    return JSONResponse(openai_form.error(str(error), param=error.param, code=error.code), error.status)


async def _http_error(request, error):
    message = f"{error.detail}: {request.method} {request.url.path}"
    return JSONResponse(openai_form.error(message), error.status_code, error.headers)


async def _stopped(_, error):
    return JSONResponse(openai_form.error(str(error), "server_error"), 503)


async def _server_error(_, error):
    return JSONResponse(openai_form.error(str(error), "server_error"), 500)


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, help="a GGUF file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    parser.add_argument("--slots", type=int, default=16, help="how many requests run at once (default: 16)")
    parser.add_argument("--context", type=int, default=0, help="tokens of the longest request (default: up to 8192)")
    parser.add_argument(
        "--pages", type=int, default=0, help="of the cache (default: 512 tokens a slot, or one context)"
    )
    parser.add_argument("--page-size", type=int, default=16, help="tokens of a page, a multiple of 8 (default: 16)")
    parser.add_argument("--chunk", type=int, default=0, help="tokens of prompts per turn (default: 512, 128 on CPU)")
    parser.add_argument("--burst", type=int, default=0, help="tokens of each answer per turn (default: 4, 1 on CPU)")
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer that names no limit (default: 512)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16, float32 on CPU")
    parser.add_argument("--bench", type=int, metavar="N", help="do not serve; time N requests at once and one by one")
    arguments = parser.parse_args(argv)
    on_cpu = jax.default_backend() == "cpu"
    arguments.chunk = arguments.chunk or (128 if on_cpu else 512)
    arguments.burst = arguments.burst or (1 if on_cpu else 4)
    arguments.dtype = jnp.dtype(arguments.dtype or ("float32" if on_cpu else "bfloat16"))
    for name in ("slots", "chunk", "burst", "max_tokens", "bench"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.pages < 0 or arguments.context < 0:
        parser.error("--pages and --context must not be negative")
    if arguments.page_size < 8 or arguments.page_size % 8:
        parser.error("--page-size must be a multiple of 8")
    if not 0 <= arguments.port < 2**16:
        parser.error("--port must be from 0 to 65535")
    return arguments


def create_engine(arguments, config, weights, stop_ids):
    if arguments.context > config.context_length:
        raise gguf_model.ModelError(f"--context {arguments.context} exceeds the model's {config.context_length}")
    context = arguments.context or min(config.context_length, 8192)
    pages = arguments.pages or -(-max(context, 512 * arguments.slots) // arguments.page_size)
    log(f"{arguments.slots} slots, {pages} pages of {arguments.page_size} tokens, {arguments.dtype}")
    return engine.Engine(
        config,
        weights,
        arguments.dtype,
        context=context,
        slots=arguments.slots,
        num_pages=pages,
        page_size=arguments.page_size,
        chunk=arguments.chunk,
        burst=arguments.burst,
        stop_ids=stop_ids,
    )


def bind(host: str, port: int) -> socket.socket:
    """Takes the port. Nobody can connect before the server listens to it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
        return bound
    except OSError as error:
        raise gguf_model.ModelError(f"cannot listen on {host} port {port}: {error.strerror}") from error


class _Server(uvicorn.Server):
    def __init__(self, app, started: str):
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        self._started = started
        self.interrupted = False

    def handle_exit(self, sig, frame):
        # On Python 3.11 asyncio.Runner swallows the SIGINT that Uvicorn raises again once it has shut down.
        self.interrupted = self.interrupted or sig == signal.SIGINT
        super().handle_exit(sig, frame)

    async def startup(self, sockets=None):
        await super().startup(sockets)
        log(self._started)

    def stop(self):
        self.should_exit = True


def main(argv=None):
    arguments = parse_arguments(argv)
    arguments.model = arguments.model or gguf_model.default_path()
    if arguments.bench:
        running, _ = load(arguments)
        serve_bench.run(running, arguments.bench)
        return
    with bind(arguments.host, arguments.port) as bound:
        running, text = load(arguments)
        name = arguments.model.stem
        front = Front(running, text, name, max_tokens=arguments.max_tokens, stop=lambda: server.stop())
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        server = _Server(front.app(), f"serving {name!r} on http://{host}:{bound.getsockname()[1]}/v1")
        server.run(sockets=[bound])
        if server.interrupted:
            raise KeyboardInterrupt
    if front.failed:
        sys.exit("serve.py: the engine failed")


def load(arguments):
    """The engine, compiled, and the tokenizer of the model that the options name."""
    begin = time.perf_counter()
    config, weights, metadata = gguf_model.load(arguments.model, arguments.dtype)
    text = tokenizer.ChatTokenizer(metadata)
    log(f"{arguments.model.name}: loaded in {time.perf_counter() - begin:.1f} s")
    running = create_engine(arguments, config, weights, text.stop_ids)
    begin = time.perf_counter()
    programs = running.compile(lambda runs: tqdm(runs, desc="compiling", unit="program", file=sys.stderr))
    log(f"compiled {programs} programs in {time.perf_counter() - begin:.1f} s")
    return running, text


def log(message):
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except gguf_model.ModelError as error:
        sys.exit(f"serve.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
