"""Tiny models of every family with random weights, as transformers and as llama.cpp's converter save them."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from memserve.engine.families import family_named
from memserve.engine.spec import ModelSpec
from test_gguf import write_gguf

VOCAB = 132
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0}
YARN_ROPE = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 8.0,
    "beta_slow": 2.0,
}
SCALED = {"llama3": "llama", "linear": "llama", "yarn": "qwen2", "windows": "qwen3"}
"""The families of the models that are named after their rope or their attention."""
IN_GGUF = ("llama", "llama3", "linear", "yarn", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral")
"""The models that a GGUF file can hold: it cannot say that a window limits some of a Qwen's layers."""

TINY = {
    "llama": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama3": {"num_attention_heads": 3, "num_key_value_heads": 1, "rope_parameters": LLAMA3_ROPE},
    "linear": {"num_attention_heads": 3, "num_key_value_heads": 3, "rope_parameters": LINEAR_ROPE},
    "yarn": {"num_attention_heads": 3, "num_key_value_heads": 1, "rope_parameters": YARN_ROPE},
    "mistral": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "sliding_window": 37},
    "qwen2": {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 256},
    "windows": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
    },
    "qwen3_moe": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 12,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "mixtral": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
"""Each model's differences from ``_COMMON``; the key is its family, or one of ``SCALED``."""

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}


@cache
def reference(name: str, seed: int = 0) -> Any:
    """transformers' model for a name in ``TINY``, in float32.

    Its random weights are scaled so that logits are of order 1.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    changes = dict(TINY[name])
    rope = {"rope_type": "default", "rope_theta": 10_000.0, **changes.pop("rope_parameters", {})}
    config = AutoConfig.for_model(SCALED.get(name, name), **_COMMON | changes, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            values = torch.randn(tensor.shape, generator=generator)
            if key.endswith("norm.weight"):
                tensor.copy_(1 + 0.2 * values)
            elif key.endswith("bias"):
                tensor.copy_(values)
            else:
                tensor.copy_(values * (1.0 if "embed" in key else tensor.shape[-1] ** -0.5))
    return model


@cache
def tokenizer_json() -> str:
    """A byte-level tokenizer with ``VOCAB`` tokens that covers ASCII."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    texts = ["<|bos|>", "<|eos|>", *(chr(code) for code in range(0x21, 0x7F)), "Ġ", "Ċ"]
    texts += [f"<|extra{number}|>" for number in range(VOCAB - len(texts))]
    built = Tokenizer(models.BPE({text: id for id, text in enumerate(texts)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in texts if len(text) > 1]
    )
    return str(built.to_str())


def save_hf(name: str, folder: Path, **options: Any) -> Path:
    """A Hugging Face directory of a model in ``TINY``, as transformers writes it."""
    reference(name).save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    return folder


def save_gguf(name: str, spec: ModelSpec, path: Path) -> Path:
    """A model in ``TINY`` as a GGUF file. ``spec`` is read from the model's Hugging Face directory."""
    with TemporaryDirectory() as folder:
        reference(name).save_pretrained(folder)
        state = load_file(Path(folder, "model.safetensors"))
    family = family_named("llama" if spec.architecture == "mistral" else spec.architecture)
    hf = family.sources("hf", spec.layers, spec.tied_embeddings, spec.experts)
    gguf = family.sources("gguf", spec.layers, spec.tied_embeddings, spec.experts)
    matrices: dict[str, np.ndarray] = {}
    for ours, names in gguf.items():
        for source, target in zip(hf[ours], names, strict=True):
            values = state[source]
            if family.gguf == "llama" and target.endswith(("attn_q.weight", "attn_k.weight")):
                values = _permuted(values, spec.head_dim)
            matrices[target] = values
    tensors = {
        key: ("F32", values.shape, np.ascontiguousarray(values).tobytes())
        for key, values in _stacked(matrices).items()
    }
    if name == "llama3":
        factors = np.array(spec.rope_factors, np.float32)
        tensors["rope_freqs.weight"] = ("F32", factors.shape, factors.tobytes())
    return write_gguf(path, _metadata(name, spec, str(family.gguf)), tensors)


def _stacked(matrices: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The matrices, those of a layer's experts in one tensor as llama.cpp's converter stores them."""
    found: dict[str, Any] = {}
    for key, values in matrices.items():
        name, _, number = key.rpartition(".")
        if number.isdecimal():
            found.setdefault(name, []).append(values)
        else:
            found[key] = values
    return {key: np.stack(one) if isinstance(one, list) else one for key, one in found.items()}


def _permuted(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Permute rows as llama.cpp's converter does.

    Within a head, row 2 i is row i of the first half, and row 2 i + 1 is row i of the second.
    """
    heads = weight.reshape(-1, head_dim, weight.shape[1])
    first, second = np.split(heads, 2, axis=1)
    return np.stack([first, second], axis=2).reshape(weight.shape)


def _metadata(name: str, spec: ModelSpec, a: str) -> dict[str, Any]:
    texts = ["<|bos|>", "<|eos|>", "a", "b", "ab", *("c" * number for number in range(1, VOCAB - 4))]
    scaling = f"{a}.rope.scaling."
    scaled = {
        "linear": {scaling + "type": "linear", scaling + "factor": LINEAR_ROPE["factor"]},
        "yarn": {
            scaling + "type": "yarn",
            scaling + "factor": YARN_ROPE["factor"],
            scaling + "original_context_length": YARN_ROPE["original_max_position_embeddings"],
            scaling + "yarn_beta_fast": YARN_ROPE["beta_fast"],
            scaling + "yarn_beta_slow": YARN_ROPE["beta_slow"],
        },
    }
    if spec.architecture == "mistral":
        scaled[name] = {f"{a}.attention.sliding_window": spec.sliding_window}
    if spec.experts:
        experts = {f"{a}.expert_count": spec.experts, f"{a}.expert_used_count": spec.experts_used}
        if a == "qwen3moe":
            experts[f"{a}.expert_feed_forward_length"] = spec.intermediate
        scaled[name] = experts
    return {
        "general.architecture": a,
        f"{a}.block_count": spec.layers,
        f"{a}.embedding_length": spec.hidden,
        f"{a}.feed_forward_length": spec.intermediate,
        f"{a}.attention.head_count": spec.heads,
        f"{a}.attention.head_count_kv": spec.kv_heads,
        f"{a}.attention.key_length": spec.head_dim,
        f"{a}.attention.value_length": spec.head_dim,
        f"{a}.attention.layer_norm_rms_epsilon": spec.rms_eps,
        f"{a}.rope.freq_base": spec.rope_theta,
        f"{a}.context_length": spec.max_context,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (VOCAB - 2)],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 1,
    } | scaled.get(name, {})
