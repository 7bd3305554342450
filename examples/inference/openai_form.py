"""OpenAI's form of requests and answers: what a body may say, and the objects that go back. No HTTP, and no model."""

from __future__ import annotations

import dataclasses
import math
import random
import reprlib
import time
import uuid
from typing import Any


class BadRequest(Exception):
    """What the client did wrong; `param` names the field, `code` the mistake where OpenAI has a name for it."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a valid body asks for."""

    messages: list[dict[str, str]] | None  # of a chat
    prompt: str | list[int] | None  # of a completion: text or tokens
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


# Fields that change nothing about the text.
_HARMLESS = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Fields that this server cannot follow, with the values that ask for nothing.
_NEUTRAL = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_ROLES = ("developer", "system", "user", "assistant")


def read_chat(body: Any, model: str) -> Wanted:
    fields = _Fields(body, model)
    messages = fields.take("messages", list, None)
    if not messages:
        raise BadRequest("messages must be a list of at least one message", "messages")
    return _common(fields, messages=[_message(i, each) for i, each in enumerate(messages)], prompt=None)


def read_completion(body: Any, model: str) -> Wanted:
    fields = _Fields(body, model)
    prompt = fields.take("prompt", (str, list), None)
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        (prompt,) = prompt
    is_tokens = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not prompt or not (isinstance(prompt, str) or is_tokens):
        raise BadRequest("prompt must be one text, or one list of token ids, and not be empty", "prompt")
    return _common(fields, messages=None, prompt=prompt)


class _Fields:
    """A body's fields; each is taken once, and what is never taken is reported by `finish`."""

    def __init__(self, body: Any, model: str):
        if not isinstance(body, dict):
            raise BadRequest("the body must be a JSON object")
        self._left = dict(body)
        wanted = self.take("model", str, None)
        if wanted is None:
            raise BadRequest("you must provide a model parameter", "model")
        if wanted != model:
            raise BadRequest(f"the model {wanted!r} does not exist; this server has {model!r}", "model", _NO_MODEL, 404)

    def take(self, name: str, kind, default: Any) -> Any:
        found = self._left.pop(name, None)
        if found is None:
            return default
        right = isinstance(found, kind) and (kind is bool or not isinstance(found, bool))
        if not right:
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise BadRequest(f"{name} must be {' or '.join(_KINDS[k] for k in kinds)}; got {_show(found)}", name)
        return found

    def number(self, name: str, default: float | None, least: float, most: float = math.inf, kind=(int, float)) -> Any:
        found = self.take(name, kind, default)
        if found is not default and not least <= found <= most:
            limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise BadRequest(f"{name} must be {limits}; got {_show(found)}", name)
        return found

    def finish(self) -> None:
        for name, found in self._left.items():
            if name in _NEUTRAL:
                if found is not None and found not in _NEUTRAL[name]:
                    raise BadRequest(f"this server does not support {name}; got {_show(found)}", name)
            elif name not in _HARMLESS:
                raise BadRequest(f"unrecognized request argument: {_show(name)}", name)


_NO_MODEL = "model_not_found"
_KINDS = {
    str: "a string",
    list: "a list",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    dict: "an object",
}


def _common(fields: _Fields, **prompt: Any) -> Wanted:
    limits = {name: fields.number(name, None, 1, kind=int) for name in ("max_tokens", "max_completion_tokens")}
    stop = fields.take("stop", (str, list), [])
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > 4 or not all(isinstance(each, str) and each for each in stop):
        raise BadRequest(f"stop must be up to four strings, none of them empty; got {_show(stop)}", "stop")
    stream = fields.take("stream", bool, False)
    stream_options = fields.take("stream_options", dict, {})
    if stream_options and not stream:
        raise BadRequest("stream_options are for stream = true alone", "stream_options")
    seed = fields.take("seed", int, None)
    wanted = Wanted(
        **prompt,
        max_tokens=min((limit for limit in limits.values() if limit is not None), default=None),
        temperature=float(fields.number("temperature", 1, 0, 2)),
        top_p=float(fields.number("top_p", 1, 0, 1)),
        seed=random.getrandbits(64) if seed is None else seed % 2**64,
        stop=tuple(stop),
        stream=stream,
        include_usage=stream_options.get("include_usage") is True,
    )
    fields.finish()
    return wanted


def _message(index: int, message: Any) -> dict[str, str]:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise BadRequest(f"{where} must be an object with role and content; got {_show(message)}", where)
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise BadRequest(f"{where}.role must be one of {', '.join(_ROLES)}; got {_show(role)}", f"{where}.role")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        content = "".join(parts) if parts and all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str):
        raise BadRequest(f"{where}.content must be a string, or a list of text parts", f"{where}.content")
    if message.get("tool_calls"):
        raise BadRequest("this server does not support tool_calls", f"{where}.tool_calls")
    # Chat templates know the older name.
    return {"role": "system" if role == "developer" else role, "content": content}


def _show(found: Any) -> str:
    return reprlib.repr(found)  # short, however long or deep it is


class Text:
    """Makes an answer's tokens into text, and ends it before the first of the stop strings.

    Text that may turn out to be the beginning of a stop string is held back until it is known.
    """

    def __init__(self, to_text, stop: tuple[str, ...]):
        self._to_text, self._stop = to_text, stop
        self._held = ""
        self.stopped = False

    def add(self, tokens: list[int], last: bool) -> str:
        """The text that is certain now; with the last tokens, all of it."""
        self._held += "".join(map(self._to_text, tokens))
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.stopped, certain = True, min(found)
        else:
            certain = len(self._held) - (0 if last else self._possible_stop())
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def _possible_stop(self) -> int:
        """How many characters at the end are the beginning of a stop string."""
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        return max(lengths, default=0)


class Reply:
    """The objects that answer one request."""

    def __init__(self, model: str, chat: bool):
        self._chat = chat
        prefix, self._object = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, reason: str, usage: dict) -> dict:
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": self._object, "choices": [choice], "usage": usage}

    def first(self) -> dict | None:
        return self._chunk({"delta": {"role": "assistant", "content": ""}}) if self._chat else None

    def part(self, text: str, reason: str | None) -> dict:
        said = {"delta": {"content": text} if text else {}} if self._chat else {"text": text}
        return self._chunk(said, reason)

    def usage(self, usage: dict) -> dict:
        return {**self._chunk({}), "choices": [], "usage": usage}

    def _chunk(self, said: dict, reason: str | None = None) -> dict:
        kind = f"{self._object}.chunk" if self._chat else self._object
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": kind, "choices": [choice]}


def usage(prompt: int, answer: int, shared: int) -> dict:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": shared},
    }


def error(message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None) -> dict:
    message = message.encode(errors="replace").decode()  # what the client sent may be no Unicode
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def model(name: str, created: int) -> dict:
    return {"id": name, "object": "model", "created": created, "owned_by": "jax_flash"}
