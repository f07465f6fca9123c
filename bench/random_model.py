"""A model of random weights in the shape of the demo model, for machines to which the demo model does not travel.

It is written as a Hugging Face directory. Its answers mean nothing, but its steps take the same time, and any engine
must draw the same tokens from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from loadgen.content import WORDS

VOCAB = 49_152
LOGITS = 4.0
"""Standard deviation of the logits: of so many tokens, the best ones are then as far apart as bfloat16 can tell."""


def save(
    folder: Path, layers: int = 30, hidden: int = 576, intermediate: int = 1536, vocab: int = VOCAB
) -> Path:
    """Write the model to ``folder``; by default in the shape of SmolLM2 135M. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    heads, kv_heads = hidden // 64, hidden // 192
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": 64, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0, "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": None,
        "eos_token_id": 1, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tokenizer(vocab).to_str())
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, *shape in _shapes(layers, hidden, intermediate, 64 * heads, 64 * kv_heads, vocab):
        if len(shape) == 1:
            weights[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            scale = LOGITS if name == HEAD else 1.0
            values = torch.randn(shape, generator=generator) * shape[1] ** -0.5
            weights[name] = (scale * values).bfloat16()
    save_file(weights, folder / "model.safetensors")
    return folder


HEAD = "lm_head.weight"
"""Not the embeddings: from those, a random model would draw the same token again and again."""


def _shapes(
    layers: int, hidden: int, intermediate: int, q: int, kv: int, vocab: int
) -> Iterator[tuple[str, *tuple[int, ...]]]:
    yield HEAD, vocab, hidden
    yield "model.embed_tokens.weight", vocab, hidden
    for layer in (f"model.layers.{number}" for number in range(layers)):
        for name, out in (("q", q), ("k", kv), ("v", kv)):
            yield f"{layer}.self_attn.{name}_proj.weight", out, hidden
        yield f"{layer}.self_attn.o_proj.weight", hidden, q
        for name in ("gate", "up"):
            yield f"{layer}.mlp.{name}_proj.weight", intermediate, hidden
        yield f"{layer}.mlp.down_proj.weight", hidden, intermediate
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{name}.weight", hidden
    yield "model.norm.weight", hidden


def tokenizer(vocab: int) -> Tokenizer:
    """A byte-level tokenizer with ``vocab`` tokens, in which the load generator's words are one token each."""
    texts = [
        "<|bos|>",
        "<|eos|>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(f"Ġ{word}" for word in WORDS),
    ]
    texts += [f"Ġ{number}" for number in range(vocab - len(texts))]
    # A text that is a token is taken whole, so no merges are needed.
    built = Tokenizer(models.BPE({text: id for id, text in enumerate(texts)}, [], ignore_merges=True))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts[:2]])
    return built
