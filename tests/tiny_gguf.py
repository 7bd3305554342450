"""A Llama-architecture GGUF file of a few kilobytes, with random weights, for the tests of examples/inference."""

from __future__ import annotations

import gguf
import numpy as np
from tokenizers import pre_tokenizers

LAYERS, HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM = 2, 64, 128, 4, 2, 16


# GPT-2's printable stand-ins for the 256 bytes, and two merges.
TOKENS = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he", "Ġthe"]


def tiny_settings():
    """What a file says, by key; a test changes some of it."""
    return {
        "general.architecture": "llama",
        "llama.context_length": 256,
        "llama.embedding_length": HIDDEN,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": FEED_FORWARD,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] + [1] * (len(TOKENS) - 1),
        "tokenizer.ggml.merges": ["Ġ t", "h e", "Ġt he"],
        "tokenizer.ggml.eos_token_id": 0,
    }


def tiny_tensors():
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(TOKENS), HIDDEN),
        "output_norm": (HIDDEN,),
        "attn_norm": (HIDDEN,),
        "attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (FEED_FORWARD, HIDDEN),
        "ffn_up": (FEED_FORWARD, HIDDEN),
        "ffn_down": (HIDDEN, FEED_FORWARD),
    }
    tensors = {}
    for name, shape in shapes.items():
        outside = name in ("token_embd", "output_norm")
        for prefix in [""] if outside else [f"blk.{i}." for i in range(LAYERS)]:
            tensor = random.standard_normal(shape, np.float32)
            tensors[f"{prefix}{name}.weight"] = 1 + 0.1 * tensor if name.endswith("norm") else 0.3 * tensor
    return tensors


def write_gguf(path, settings, tensors, raw_types=None):
    """A GGUF file; `raw_types` names tensors whose bytes are stored as a quantisation's, as they are."""
    writer = gguf.GGUFWriter(path, settings["general.architecture"])
    for key, value in settings.items():
        if key == "general.architecture":
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if type(value) is int and not 0 <= value < 2**32:
            add[int] = writer.add_int64 if value < 0 else writer.add_uint64
        add.get(type(value), writer.add_array)(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=(raw_types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
