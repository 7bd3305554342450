"""The tokenizer and chat template that a GGUF file describes in its metadata, as a `tokenizers.Tokenizer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.sandbox
from gguf_model import Metadata, ModelError, value, values
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

# GGUF's token types that this file needs to tell apart.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

# How models that share the byte-level BPE cut text into words before merging; `tokenizer.ggml.pre` names one.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


class ChatTokenizer:
    """Text to token ids and back, with the model's own chat format."""

    def __init__(self, metadata: Metadata):
        kinds = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
        kind = value(metadata, "tokenizer.ggml.model", str)
        if kind not in kinds:
            raise ModelError(f"tokenizer {kind!r} is not supported, only {', '.join(kinds)} are")
        self._tokens: list[str] = values(metadata, "tokenizer.ggml.tokens", str)
        types = values(metadata, "tokenizer.ggml.token_type", int, len(self._tokens))
        self._tokenizer: Tokenizer = kinds[kind](metadata, self._tokens, types)
        self._tokenizer.add_special_tokens(_added_tokens(self._tokens, types, _CONTROL, special=True))
        self._tokenizer.add_tokens(_added_tokens(self._tokens, types, _USER_DEFINED, special=False))
        self._template: str | None = value(metadata, "tokenizer.chat_template", str, None)
        self._bos, self._eos, end_of_turn = (_token_id(metadata, name, self._tokens) for name in ("bos", "eos", "eot"))
        # These two families expect BOS before plain text unless the file says otherwise.
        expects_bos = kind == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
        adds_bos = value(metadata, "tokenizer.ggml.add_bos_token", bool, expects_bos) and self._bos is not None
        self._prefix = [self._bos] if adds_bos else []
        # Files name one end token; chat models may also end a turn, or a document, by another.
        ends = {self._eos, end_of_turn}
        ends |= {self._tokenizer.token_to_id(text) for text in ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")}
        self.stop_ids = frozenset(ends - {None})

    def encode(self, text: str) -> list[int]:
        """Plain text, to be continued."""
        return self._prefix + self._ids(text)

    def encode_chat(self, message: str) -> list[int]:
        """A user's message, to be answered. A model without a chat template gets the plain text."""
        return self.encode_messages([{"role": "user", "content": message}])

    def encode_messages(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation, each message with its role, to be answered. Without a chat template: its text, in lines."""
        if self._template is None:
            return self.encode("\n".join(message["content"] for message in messages))
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_template_error
        try:
            text = environment.from_string(self._template).render(
                messages=messages,
                add_generation_prompt=True,
                bos_token="" if self._bos is None else self._tokens[self._bos],
                eos_token="" if self._eos is None else self._tokens[self._eos],
            )
        except Exception as error:  # the template is a program, and may do anything
            reason = f"{type(error).__name__}: {error}"
            raise ModelError(f"the model's chat template fails ({reason}); --raw goes without it") from error
        return self._ids(text)

    def check(self, ids: list[int]) -> list[int]:
        """The same ids, all of them known."""
        unknown = [i for i in ids if not 0 <= i < len(self._tokens)]
        if unknown:
            raise ModelError(f"token ids must be from 0 to {len(self._tokens) - 1}; got {unknown[0]}")
        return ids

    def _ids(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of a command line that are no UTF-8
            raise ModelError(f"the prompt is not Unicode text: {error}") from error
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of a whole sequence, without control tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def stream(self) -> Callable[[int], str]:
        """A function from each next id to the text that it completes, "" inside a multi-byte character."""
        decoder = decoders.DecodeStream(skip_special_tokens=True)
        return lambda token: decoder.step(self._tokenizer, token) or ""


def _token_id(metadata: Metadata, name: str, tokens: list[str], default: int | None = None) -> int | None:
    return value(metadata, f"tokenizer.ggml.{name}_token_id", int, default, between=(0, len(tokens) - 1))


def _added_tokens(tokens: list[str], types: list[int], wanted: int, *, special: bool) -> list[AddedToken]:
    pairs = zip(tokens, types, strict=True)
    return [AddedToken(text, special=special, normalized=False) for text, kind in pairs if kind == wanted]


def _byte_level_bpe(metadata: Metadata, tokens: list[str], _: list[int]) -> Tokenizer:
    """GPT-2's kind: bytes shown as printable characters, merged in the order of a list."""
    words = value(metadata, "tokenizer.ggml.pre", str, "gpt-2")
    if words not in _WORDS:
        raise ModelError(f"pre-tokenizer {words!r} is not supported, only {', '.join(_WORDS)} are")
    vocabulary = {text: i for i, text in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in values(metadata, "tokenizer.ggml.merges", str)]
    for merge in merges:
        if len(merge) != 2 or not all(text in vocabulary for text in (*merge, "".join(merge))):
            raise ModelError(f"tokenizer.ggml.merges must each make a token of two; got {' '.join(merge)!r}")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=words == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_WORDS[words])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(metadata: Metadata, pieces: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece's kind: a score for each piece instead of a list of merges, and bytes for unknown characters.

    SentencePiece merges the neighbours that make the piece of highest score, so the merges are all ways to cut a
    piece in two, in the order of the pieces' scores.
    """
    scores = values(metadata, "tokenizer.ggml.scores", float, len(pieces))
    vocabulary = {text: i for i, text in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for _, piece, kind in sorted(zip(scores, pieces, types, strict=True), key=lambda entry: -entry[0])
        if kind == _NORMAL
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    unknown = pieces[_token_id(metadata, "unknown", pieces, 0)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    leading_space = value(metadata, "tokenizer.ggml.add_space_prefix", bool, True)
    tokenizer.normalizer = normalizers.Sequence(
        ([normalizers.Prepend("▁")] if leading_space else []) + [normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if leading_space else [])
    )
    return tokenizer


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)
