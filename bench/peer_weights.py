"""Write memserve's weights as a Hugging Face directory, so that other servers run exactly the same values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from memserve.engine.families import family_named
from memserve.engine.spec import ModelSpec
from memserve.engine.tokenizer import Tokenizer
from memserve.engine.weights import ModelFiles, map_weights


def write_hf_directory(files: ModelFiles, folder: Path) -> Path:
    """Write ``files`` into ``folder`` and return it: configuration, tokenizer and the weights in bfloat16."""
    spec = files.spec
    folder.mkdir(parents=True, exist_ok=True)
    tensors = hf_tensors(spec, map_weights(files.weights))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_bytes(files.tokenizer.read_bytes())
    documents = {
        "config.json": hf_config(spec),
        "generation_config.json": {"eos_token_id": list(spec.eos), "bos_token_id": spec.bos},
        "tokenizer_config.json": _tokenizer_config(spec, Tokenizer.load(files.tokenizer)),
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=1) + "\n")
    return folder


def hf_tensors(spec: ModelSpec, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The engine's weights under their Hugging Face names: fused matrices split, everything bfloat16."""
    sources = family_named(spec.architecture).sources("hf", spec.layers, spec.tied_embeddings)
    tensors: dict[str, torch.Tensor] = {}
    for name, parts in sources.items():
        rows = torch.split(weights[name], _rows_of_parts(spec, name, weights[name]))
        tensors |= {part: one.to(torch.bfloat16).contiguous() for part, one in zip(parts, rows, strict=True)}
    return tensors


def _rows_of_parts(spec: ModelSpec, name: str, weight: torch.Tensor) -> list[int]:
    kind = name.rpartition(".")[2]
    if kind in ("qkv", "qkv_bias"):
        kv = spec.kv_heads * spec.head_dim
        return [spec.heads * spec.head_dim, kv, kv]
    if kind == "gate_up":
        return [spec.intermediate, spec.intermediate]
    return [weight.shape[0]]


def hf_config(spec: ModelSpec) -> dict[str, Any]:
    """config.json of a Llama. Raises ValueError for other families and rope scaling, which are untested."""
    if spec.architecture != "llama" or spec.rope_factors is not None:
        raise ValueError(f"only Llama models without rope scaling are written, not {spec.architecture}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab,
        "rms_norm_eps": spec.rms_eps,
        "rope_theta": spec.rope_theta,
        "max_position_embeddings": spec.max_context,
        "tie_word_embeddings": spec.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": spec.bos,
        "eos_token_id": spec.eos[0] if len(spec.eos) == 1 else list(spec.eos),
    }


def _tokenizer_config(spec: ModelSpec, tokenizer: Tokenizer) -> dict[str, Any]:
    def text(token: int | None) -> str | None:
        return None if token is None else tokenizer.piece(token, skip_special=False).decode()

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text(spec.bos),
        "eos_token": text(spec.eos[0] if spec.eos else None),
        "clean_up_tokenization_spaces": False,
        "model_max_length": spec.max_context,
        "chat_template": spec.chat_template,
    }
