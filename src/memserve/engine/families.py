"""The supported families of models. To add one, add an entry to ``FAMILIES``; no other file names a family.

A family is a table: for each of the engine's weights, the checkpoint's tensors that it is concatenated from,
by their names in a Hugging Face directory and in a GGUF file. What a family adds to Llama's layers follows
from that table: with a ``qkv_bias`` it has biases, with ``q_norm`` and ``k_norm`` it normalises the heads of
q and k. ``docs/models.md`` describes how to add a family.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import attrs

from memserve.errors import UserError

Form = Literal["hf", "gguf"]
"""Form of a checkpoint: a Hugging Face directory or a GGUF file."""


@attrs.frozen
class Parts:
    """The checkpoint's tensors that one weight is concatenated from, in order."""

    hf: tuple[str, ...]
    gguf: tuple[str, ...]


TABLES: Mapping[str, Parts] = MappingProxyType(
    {
        "embed": Parts(("model.embed_tokens.weight",), ("token_embd.weight",)),
        "norm": Parts(("model.norm.weight",), ("output_norm.weight",)),
        "head": Parts(("lm_head.weight",), ("output.weight",)),
    }
)
"""The weights outside the layers. ``head`` is absent if the embedding table is the head."""

LAYER: Mapping[str, Parts] = MappingProxyType(
    {
        "attn_norm": Parts(("input_layernorm.weight",), ("attn_norm.weight",)),
        "qkv": Parts(
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
            ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
        ),
        "o": Parts(("self_attn.o_proj.weight",), ("attn_output.weight",)),
        "mlp_norm": Parts(("post_attention_layernorm.weight",), ("ffn_norm.weight",)),
        "gate_up": Parts(
            ("mlp.gate_proj.weight", "mlp.up_proj.weight"), ("ffn_gate.weight", "ffn_up.weight")
        ),
        "down": Parts(("mlp.down_proj.weight",), ("ffn_down.weight",)),
    }
)
"""The weights of one of Llama's layers; names are relative to the layer."""

QKV_BIAS: Mapping[str, Parts] = MappingProxyType(
    {
        "qkv_bias": Parts(
            ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
            ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
        )
    }
)
QK_NORM: Mapping[str, Parts] = MappingProxyType(
    {
        "q_norm": Parts(("self_attn.q_norm.weight",), ("attn_q_norm.weight",)),
        "k_norm": Parts(("self_attn.k_norm.weight",), ("attn_k_norm.weight",)),
    }
)

_LAYER_PREFIX: Mapping[Form, str] = MappingProxyType({"hf": "model.layers.{}.", "gguf": "blk.{}."})


@attrs.frozen
class Family:
    """A family of models."""

    name: str
    """Name of the family: ``model_type`` in config.json, and ``ModelSpec.architecture``."""
    gguf: str | None
    """``general.architecture`` of its GGUF files, or None if these are written as another family's."""
    layer: Mapping[str, Parts] = LAYER
    tables: Mapping[str, Parts] = TABLES
    gguf_interleaved: tuple[str, ...] = ()
    """Suffixes of tensors whose rows llama.cpp's converter reorders, so that rope's pairs are adjacent."""
    defaults: Mapping[str, Any] = attrs.field(factory=dict)
    """Values that transformers assumes for keys missing in config.json, where they differ from Llama's."""

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return "qkv_bias" in self.layer

    @property
    def qk_norm(self) -> bool:
        """Whether each head of q and k is normalised before rope."""
        return "q_norm" in self.layer

    def sources(self, form: Form, layers: int, tied: bool) -> dict[str, tuple[str, ...]]:
        """For each weight of a model, the checkpoint's tensors that it is concatenated from."""
        found = {
            name: getattr(parts, form) for name, parts in self.tables.items() if not (tied and name == "head")
        }
        for layer in range(layers):
            prefix = _LAYER_PREFIX[form].format(layer)
            for name, parts in self.layer.items():
                found[f"{layer}.{name}"] = tuple(prefix + part for part in getattr(parts, form))
        return found


FAMILIES = (
    Family("llama", gguf="llama", gguf_interleaved=("attn_q.weight", "attn_k.weight")),
    Family(
        "mistral",
        gguf=None,  # converters write Mistral as llama
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "use_sliding_window": True},
    ),
    Family("qwen2", gguf="qwen2", layer={**LAYER, **QKV_BIAS}),
    Family("qwen3", gguf="qwen3", layer={**LAYER, **QK_NORM}, defaults={"head_dim": 128}),
)
"""All supported families."""


def family_named(name: str) -> Family:
    """The family of a spec's ``architecture``."""
    return next(family for family in FAMILIES if family.name == name)


def family_of(form: Form, name: object, source: str) -> Family:
    """The family that a checkpoint names. ``source`` names the checkpoint in errors. Raises UserError."""
    names = {family.gguf if form == "gguf" else family.name: family for family in FAMILIES}
    if isinstance(name, str) and name in names:
        return names[name]
    key = "architecture" if form == "gguf" else "model_type"
    known = ", ".join(one for one in names if one)
    raise UserError(f"{source}: {key} {name!r} is not supported; supported: {known}")
