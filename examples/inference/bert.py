"""A BERT encoder in plain JAX, and sentence embeddings from it: a folder as sentence-transformers writes it.

    config, weights = load(folder, dtype)
    embeddings = embed(weights, config, tokens, lengths)

Letters: B batch, T tokens of a sentence with padding, N heads, H head dim, D hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import reprlib
from typing import Any

import jax
import jax.numpy as jnp
from gguf_model import ModelError
from safetensors import SafetensorError, safe_open

import jax_flash

Array = jax.Array
Weights = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """The numbers that define a model; frozen and hashable, so it can be a static argument of jit."""

    layers: int
    hidden: int  # D
    feed_forward: int
    heads: int  # N
    vocabulary: int
    max_tokens: int  # of a sentence
    epsilon: float


@functools.partial(jax.jit, static_argnames="config")
def embed(weights: Weights, config: Config, tokens: Array, lengths: Array) -> Array:
    """Embeddings [B, D] of length 1, float32, of sentences: tokens int32 [B, T], of which lengths [B] count.

    The dot product of two is their cosine similarity.
    """
    hidden = encode(weights, config, tokens, lengths).astype(jnp.float32)
    counts = jnp.arange(tokens.shape[1]) < lengths[:, None]
    mean = jnp.sum(jnp.where(counts[..., None], hidden, 0.0), axis=1) / lengths[:, None]
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def encode(weights: Weights, config: Config, tokens: Array, lengths: Array) -> Array:
    """The last layer's states [B, T, D]. Every token sees the lengths [B] that count; what is behind is padding."""
    x = weights["word"][tokens] + weights["position"][: tokens.shape[1]] + weights["kind"]
    x = _layer_norm(x, *weights["norm"], config)
    for layer in weights["layers"]:
        q, k, v = jnp.split(_linear(x, *layer["qkv"]).reshape(*x.shape[:2], 3 * config.heads, -1), 3, axis=2)
        out = jax_flash.attention(q, k, v, kv_lengths=lengths).reshape(x.shape)
        x = _layer_norm(x + _linear(out, *layer["output"]), *layer["attention_norm"], config)
        wide = jax.nn.gelu(_linear(x, *layer["up"]), approximate=False)
        x = _layer_norm(x + _linear(wide, *layer["down"]), *layer["feed_forward_norm"], config)
    return x


def _linear(x: Array, matrix: Array, bias: Array) -> Array:
    return jnp.einsum("...i,oi->...o", x, matrix) + bias


def _layer_norm(x: Array, scale: Array, bias: Array, config: Config) -> Array:
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.epsilon)
    return wide.astype(x.dtype) * scale + bias


def load(folder: pathlib.Path, dtype: jnp.dtype) -> tuple[Config, Weights]:
    """Read the model in `folder`; its weights come out in `dtype`, on JAX's default device."""
    config = _config(folder)
    path = folder / "model.safetensors"
    try:
        with safe_open(path, framework="numpy") as file:
            return config, _weights(file, config, dtype)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file") from error
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: damaged, or no safetensors file: {error}") from error
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _config(folder: pathlib.Path) -> Config:
    found = _json(folder / "config.json")
    pooling = _json(folder / "1_Pooling" / "config.json")
    sentences = _json(folder / "sentence_bert_config.json")
    # Anything else would quietly give wrong embeddings.
    for name, wanted in (("model_type", "bert"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if found.get(name) != wanted:
            raise ModelError(f"{folder}: {name} must be {wanted!r}; got {reprlib.repr(found.get(name))}")
    modes = [name for name, used in pooling.items() if name.startswith("pooling_mode_") and used]
    if modes != ["pooling_mode_mean_tokens"]:
        raise ModelError(f"{folder}: only the mean of all tokens is supported as pooling; got {', '.join(modes)}")

    def number(values: dict, name: str, kind=int) -> Any:
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < 2**31:
            raise ModelError(f"{folder}: {name} must be a positive number; got {reprlib.repr(value)}")
        return value

    config = Config(
        layers=number(found, "num_hidden_layers"),
        hidden=number(found, "hidden_size"),
        feed_forward=number(found, "intermediate_size"),
        heads=number(found, "num_attention_heads"),
        vocabulary=number(found, "vocab_size"),
        max_tokens=min(number(sentences, "max_seq_length"), number(found, "max_position_embeddings")),
        epsilon=number(found, "layer_norm_eps", (int, float)),
    )
    if config.hidden % config.heads:
        raise ModelError(f"{folder}: hidden_size {config.hidden} is no multiple of {config.heads} heads")
    return config


def _json(path: pathlib.Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: not a JSON object")
    return found


def _weights(file: Any, config: Config, dtype: jnp.dtype) -> Weights:
    names = set(file.keys())

    def take(name: str, *shape: int | None) -> Array:
        if name not in names:
            raise ModelError(f"the file has no tensor {name}")
        tensor = file.get_tensor(name)
        if len(tensor.shape) != len(shape) or any(n not in (None, m) for n, m in zip(shape, tensor.shape, strict=True)):
            raise ModelError(f"{name} has shape {tensor.shape}, expected {shape}")
        return jnp.asarray(tensor, dtype)

    def pair(name: str, *shape: int) -> tuple[Array, Array]:
        """A matrix [out, in] or a scale [out], and a bias [out]."""
        return take(f"{name}.weight", *shape), take(f"{name}.bias", shape[0])

    D, wide = config.hidden, config.feed_forward

    def layer(i: int) -> Weights:
        name = f"encoder.layer.{i}.{{}}".format
        projections = [pair(name(f"attention.self.{each}"), D, D) for each in ("query", "key", "value")]
        return {
            "qkv": tuple(jnp.concatenate(parts) for parts in zip(*projections, strict=True)),
            "output": pair(name("attention.output.dense"), D, D),
            "attention_norm": pair(name("attention.output.LayerNorm"), D),
            "up": pair(name("intermediate.dense"), wide, D),
            "down": pair(name("output.dense"), D, wide),
            "feed_forward_norm": pair(name("output.LayerNorm"), D),
        }

    positions = take("embeddings.position_embeddings.weight", None, D)
    if len(positions) < config.max_tokens:
        raise ModelError(f"{len(positions)} positions are fewer than the {config.max_tokens} tokens of a sentence")
    return {
        "word": take("embeddings.word_embeddings.weight", config.vocabulary, D),
        "position": positions,
        "kind": take("embeddings.token_type_embeddings.weight", None, D)[0],  # all tokens are of the first sentence
        "norm": pair("embeddings.LayerNorm", D),
        "layers": [layer(i) for i in range(config.layers)],
    }
