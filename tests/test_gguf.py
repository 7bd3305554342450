"""Model files that are damaged or strange: each is refused with a ModelError, or it loads and runs."""

from __future__ import annotations

import pathlib
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples" / "inference"))

import generate
import gguf
import gguf_model
import llama
import tokenizer
from gguf_model import ModelError
from tiny_gguf import FEED_FORWARD, HIDDEN, TOKENS, tiny_settings, tiny_tensors, write_gguf

CHAT = {"tokenizer.chat_template": "{{ messages[0].content }}{{ eos_token }}"}
# SentencePiece's kind of tokenizer with the same number of tokens.
PIECES = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ab"][: len(TOKENS)]
SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.token_type": [2] + [6] * 256 + [1] * (len(PIECES) - 257),
    "tokenizer.ggml.scores": [-float(i) for i in range(len(PIECES))],
}


@pytest.fixture(autouse=True)
def user_settings():
    """The examples are written for JAX's default settings."""
    with jax.numpy_rank_promotion("allow"):
        yield


def load_and_run(path, dtype):
    config, weights, metadata = gguf_model.load(path, dtype)
    text = tokenizer.ChatTokenizer(metadata)
    # Of one length, so that few programs are compiled.
    prompt = np.resize(text.encode_chat("see the 12") or [0], min(4, config.context_length))
    options = dict(config=config, attention="jax_flash", sampling=(0.0, 0, 1.0))
    cache = llama.init_cache(config, 1, 64, dtype)
    arrays = jnp.asarray(prompt[None], jnp.int32), cache, jnp.int32(0), jax.random.key(0)
    token, _ = generate.step(weights, *arrays, **options)
    assert isinstance(text.stream()(int(token[0, 0])), str)


class Survivors:
    """Runs files, and counts those that ran and those that were refused. Anything else is the caller's failure."""

    def __init__(self, folder, dtype):
        self.folder, self.dtype = folder, jnp.dtype(dtype)
        self.ran = self.refused = 0

    def run(self, write):
        # A name of its own: the weights of an earlier file may still be mapped from it.
        path = self.folder / f"{self.ran + self.refused}.gguf"
        write(path)
        try:
            load_and_run(path, self.dtype)
        except ModelError as error:
            assert str(error) and "\n" not in str(error) and len(str(error)) < 500
            self.refused += 1
        else:
            self.ran += 1
        path.unlink()


@pytest.fixture
def survivors(tmp_path, dtype):
    return Survivors(tmp_path, dtype)


def write(path, settings=(), tensors=(), *, drop=(), raw=None):
    kept = {key: each for key, each in (tiny_settings() | CHAT | dict(settings)).items() if key not in drop}
    weights = {name: each for name, each in (tiny_tensors() | dict(tensors)).items() if name not in drop}
    return write_gguf(path, kept, weights, raw)


# --- anything may stand in a file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes(seed, survivors, tmp_path):
    """A hundred files a seed, with bytes changed, left out, put in, or cut off, most of them before the weights."""
    rng = np.random.default_rng(seed)
    quantised = "blk.0.ffn_up.weight"
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quantize(tiny_tensors()[quantised], kind)
    original = write(tmp_path / "original.gguf", tensors={quantised: packed}, raw={quantised: kind}).read_bytes()
    header = original.index(b"output_norm.weight") + 700  # there are the names, types and places of the tensors
    patterns = [bytes(n) for n in (1, 4, 8)] + [b"\xff" * n for n in (1, 4, 8)] + [b"\0\0\0\x80", b"\xff\xff\xff\x7f"]

    def damaged():
        data, at = bytearray(original), int(rng.integers([500, 800, header, len(original)][rng.integers(4)]))
        noise = rng.bytes(int(rng.integers(1, 20)))
        change = rng.integers(5)
        if change == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif change == 1:
            pattern = patterns[rng.integers(len(patterns))]
            data[at : at + len(pattern)] = pattern
        elif change == 2:
            del data[at : at + len(noise)]
        elif change == 3:
            data[at:at] = noise
        else:
            del data[at:]
        return bytes(data)

    for _ in range(100):
        data = damaged()
        survivors.run(lambda path, data=data: path.write_bytes(data))
    assert survivors.ran > 5 and survivors.refused > 50


VALUES = [
    0,
    1,
    3,
    -1,
    64,
    2**31,
    2**63,
    0.0,
    1.5,
    -1.5,
    1e30,
    float("nan"),
    float("inf"),
    True,
    False,
    "",
    "x",
    "linear",
]
VALUES += [[0], [2, 2], [0.5], ["x"], [True]]
LLAMA_KEYS = [key for key in tiny_settings() if key.startswith("llama.")]
LLAMA_KEYS += [
    f"llama.{key}"
    for key in (
        "attention.causal",
        "attention.key_length",
        "attention.value_length",
        "expert_count",
        "rope.freq_base",
        "rope.scaling.factor",
        "rope.scaling.type",
        "vocab_size",
        "unheard_of",
    )
]
TOKENIZER_KEYS = [key for key in tiny_settings() | CHAT | SENTENCEPIECE if key.startswith("tokenizer.")]
TOKENIZER_KEYS += [f"tokenizer.ggml.{key}" for key in ("bos_token_id", "eot_token_id", "unknown_token_id")]
TOKENIZER_KEYS += [f"tokenizer.ggml.{key}" for key in ("add_bos_token", "add_space_prefix")]


@pytest.mark.parametrize("key", LLAMA_KEYS)
def test_any_value_of_a_setting(key, survivors):
    scaled = {"llama.rope.scaling.type": "linear"} if key == "llama.rope.scaling.factor" else {}
    for each in VALUES:
        survivors.run(lambda path, each=each: write(path, scaled | {key: each}))
    survivors.run(lambda path: write(path, drop=[key]))
    # These two say again what the tensors' shapes say.
    assert survivors.refused > 3 or key in ("llama.attention.value_length", "llama.vocab_size")


@pytest.mark.parametrize("kind", [{}, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
@pytest.mark.parametrize("key", TOKENIZER_KEYS)
def test_any_value_of_the_tokenizer(key, kind):
    """Nothing but the metadata matters to it."""
    settings = tiny_settings() | CHAT | kind
    for each in [
        *VALUES,
        [],
        *([settings[key][:-1], settings[key] * 2] if isinstance(settings.get(key), list) else []),
    ]:
        try:
            text = tokenizer.ChatTokenizer(settings | {key: each})
            ids = text.encode_chat("see the 12")
            assert all(0 <= i < len(TOKENS) for i in ids)
            text.decode(ids)
        except ModelError as error:
            assert len(str(error)) < 500, each


TENSORS = {
    "transposed": lambda x: np.ascontiguousarray(x.T),
    "flat": lambda x: x.reshape(-1),
    "deep": lambda x: x[None],
    "row-less": lambda x: x[:-1],
    "nothing": lambda x: x[:0],
    "float16": lambda x: x.astype(np.float16),
    "float64": lambda x: x.astype(np.float64),
    "int32": lambda x: x.astype(np.int32),
    "nan": lambda x: np.full_like(x, np.nan),
}


@pytest.mark.parametrize("change", TENSORS)
def test_any_tensor(change, survivors):
    for name, tensor in tiny_tensors().items():
        if ".1." not in name:
            changed = {name: TENSORS[change](tensor)}
            survivors.run(lambda path, changed=changed: write(path, tensors=changed))
    assert survivors.ran + survivors.refused == 11
    assert survivors.ran >= 9 if change in ("float16", "nan") else survivors.refused >= 6


# --- and each mistake is named ----------------------------------------------------------------------------------------

MISTAKES = {
    "string": ({"llama.block_count": "2"}, r"llama.block_count must be an integer from 1 to .*; got '2'"),
    "list": ({"llama.attention.head_count_kv": [2, 2]}, r"head_count_kv must be an integer .*; got \[2, 2\]"),
    "zero": ({"llama.attention.head_count": 0}, "head_count must be an integer from 1 .*; got 0"),
    "true": ({"llama.embedding_length": True}, "embedding_length must be an integer .*; got True"),
    "fraction": ({"llama.feed_forward_length": 128.0}, "feed_forward_length must be an integer .*; got 128.0"),
    "epsilon": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "must be a finite number .*; got nan"),
    "base": ({"llama.rope.freq_base": -1.0}, "freq_base must be a finite number from .*; got -1.0"),
    "many-heads": ({"llama.attention.head_count": 1000}, "a head of 0 is not supported"),
    "groups": ({"llama.attention.head_count_kv": 3}, "4 heads are no multiple of 3 KV heads"),
    "causal": ({"llama.attention.causal": False}, "later tokens"),
    "tokens": ({"tokenizer.ggml.tokens": [*TOKENS, "x"]}, r"a row for each of 261 tokens; got shape \(260, 64\)"),
    "token": (
        {"tokenizer.ggml.tokens": [1] * 260},
        r"tokens must be a list of some values, each a string; got 260, \[1, 1",
    ),
    "types": (
        {"tokenizer.ggml.token_type": [1]},
        r"token_type must be a list of 260 values, each an integer; got 1, \[1\]",
    ),
    "merge": ({"tokenizer.ggml.merges": ["he"]}, "merges must each make a token of two; got 'he'"),
    "merge-part": ({"tokenizer.ggml.merges": ["he xx"]}, "got 'he xx'"),
    "merged": ({"tokenizer.ggml.merges": ["a b"]}, "got 'a b'"),
    "end": ({"tokenizer.ggml.eos_token_id": 260}, "eos_token_id must be an integer from 0 to 259; got 260"),
    "words": ({"tokenizer.ggml.pre": ["gpt-2"]}, r"pre must be a string; got \['gpt-2'\]"),
    "template": ({"tokenizer.chat_template": 1}, "chat_template must be a string; got 1"),
    "template-zero": ({"tokenizer.chat_template": "{{ 1 / 0 }}"}, r"chat template fails \(ZeroDivisionError: .*--raw"),
    "template-type": ({"tokenizer.chat_template": "{{ 1 + 'x' }}"}, r"chat template fails \(TypeError"),
    "template-syntax": ({"tokenizer.chat_template": "{{"}, r"chat template fails \(TemplateSyntaxError"),
    "template-endless": (
        {"tokenizer.chat_template": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"},
        r"chat template fails \(RecursionError",
    ),
    "template-surrogate": ({"tokenizer.chat_template": r"{{ '\ud800' }}"}, "not Unicode"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named(case, tmp_path, dtype):
    settings, message = MISTAKES[case]
    with pytest.raises(ModelError, match=message):
        load_and_run(write(tmp_path / "model.gguf", settings), jnp.dtype(dtype))


def test_stacked_matrices_are_checked_one_by_one(tmp_path):
    """The rows of gate and up are as many together as they should be."""
    tensors = {"blk.0.ffn_gate.weight": np.zeros((FEED_FORWARD + 8, HIDDEN), np.float32)}
    tensors["blk.0.ffn_up.weight"] = np.zeros((FEED_FORWARD - 8, HIDDEN), np.float32)
    with pytest.raises(ModelError, match=r"ffn_gate.weight has shape \(136, 64\), expected \(128, 64\)"):
        gguf_model.load(write(tmp_path / "model.gguf", tensors=tensors), jnp.float32)


def test_an_absurd_context_is_refused_before_its_table_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_model, "rotary_table", lambda *_: pytest.fail("the table was made"))
    path = write(tmp_path / "model.gguf", {"llama.context_length": 2**31})
    with pytest.raises(ModelError, match="context_length must be an integer from 1 to 1048576; got 2147483648"):
        gguf_model.load(path, jnp.float32)


def test_a_count_that_the_file_cannot_hold_is_not_counted_to(tmp_path):
    """2^60 tokens, and arrays in arrays without end."""
    data = write(tmp_path / "model.gguf").read_bytes()
    at = data.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8  # the kind, the items' kind
    nested = struct.pack("<IQ", gguf.GGUFValueType.ARRAY, 1) * 5000
    changes = {
        "long": data[:at] + struct.pack("<Q", 2**60) + data[at + 8 :],
        "nested": data[: at - 4] + nested + data[at - 4 :],
    }
    for name, changed in changes.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(changed)
        with pytest.raises(ModelError, match="damaged"):
            gguf_model.load(path, jnp.float32)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ModelError, match="a folder, not a file"):
        gguf_model.load(tmp_path, jnp.float32)
    big = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    big.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    for write_part in (big.write_header_to_file, big.write_kv_data_to_file, big.write_tensors_to_file, big.close):
        write_part()
    with pytest.raises(ModelError, match="other byte order"):
        gguf_model.load(tmp_path / "big.gguf", jnp.float32)


def test_a_template_that_says_nothing_is_refused(tmp_path):
    path = write(tmp_path / "model.gguf", {"tokenizer.chat_template": "{{ '' }}"})
    with pytest.raises(ModelError, match="the prompt is empty"):
        generate.main(["--model", str(path)])


def test_a_prompt_of_broken_bytes_is_refused():
    text = tokenizer.ChatTokenizer(tiny_settings())
    with pytest.raises(ModelError, match="not Unicode"):
        text.encode(b"caf\xe9".decode("utf-8", "surrogateescape"))
