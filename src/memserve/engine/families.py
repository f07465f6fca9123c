"""The supported families of models. To add one, add an entry to ``FAMILIES``; no other file names a family.

A family is a table: for each of the engine's weights, the checkpoint's tensors that it is concatenated from,
by their names in a Hugging Face directory and in a GGUF file. What a family adds to Llama's layers follows
from that table: with a ``qkv_bias`` it has biases, with ``q_norm`` and ``k_norm`` it normalises the heads of
q and k, with a ``router`` its MLPs are experts. ``docs/models.md`` describes how to add a family.
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
    """The checkpoint's tensors that one weight is concatenated from, in order.

    A name with ``{}`` stands for one tensor of each expert; all tensors of an expert precede the next one's.
    In GGUF, one tensor holds a matrix of all experts: ``NAME.{}`` stands for the part of one.
    """

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

EXPERTS_GGUF: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "router": ("ffn_gate_inp.weight",),
        "gate_up": ("ffn_gate_exps.weight.{}", "ffn_up_exps.weight.{}"),
        "down": ("ffn_down_exps.weight.{}",),
    }
)
EXPERTS: Mapping[str, Parts] = MappingProxyType(
    {
        "router": Parts(("mlp.gate.weight",), EXPERTS_GGUF["router"]),
        "gate_up": Parts(
            ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"), EXPERTS_GGUF["gate_up"]
        ),
        "down": Parts(("mlp.experts.{}.down_proj.weight",), EXPERTS_GGUF["down"]),
    }
)
MIXTRAL_EXPERTS: Mapping[str, Parts] = MappingProxyType(
    {
        "router": Parts(("block_sparse_moe.gate.weight",), EXPERTS_GGUF["router"]),
        "gate_up": Parts(
            ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
            EXPERTS_GGUF["gate_up"],
        ),
        "down": Parts(("block_sparse_moe.experts.{}.w2.weight",), EXPERTS_GGUF["down"]),
    }
)
FUSED_EXPERTS = "experts.gate_up_proj"
"""End of the name of a tensor in which transformers holds the experts of a layer, but does not store them."""

QWEN_WINDOW: Mapping[str, Any] = MappingProxyType({"sliding_window": 4096})
"""The window of a Qwen whose config.json switches it on by ``use_sliding_window`` and does not say how long it is."""

_LAYER_PREFIX: Mapping[Form, str] = MappingProxyType({"hf": "model.layers.{}.", "gguf": "blk.{}."})


@attrs.frozen
class Family:
    """A family of models."""

    name: str
    """Name of the family: ``model_type`` in config.json, and ``ModelSpec.architecture``."""
    gguf: str | None
    """``general.architecture`` of its GGUF files, or None if these are written as another family's.

    Two families may have the same: one with experts and one without.
    """
    layer: Mapping[str, Parts] = LAYER
    tables: Mapping[str, Parts] = TABLES
    gguf_interleaved: tuple[str, ...] = ()
    """Suffixes of tensors whose rows llama.cpp's converter reorders, so that rope's pairs are adjacent."""
    defaults: Mapping[str, Any] = attrs.field(factory=dict)
    """Values that transformers assumes for keys missing in config.json, where they differ from Llama's."""
    width: str = "intermediate_size"
    """The key of the MLP's width in config.json; of one expert's, if there are experts."""
    window_from: int | None = None
    """The first layer that a sliding window limits if config.json does not say so, or None if it limits all."""
    normed: str | None = None
    """The key of ``ModelSpec.experts_normed`` in config.json, or None if the experts' weights always are."""

    @property
    def experts(self) -> bool:
        """Whether the MLPs are experts, among which a router chooses."""
        return "router" in self.layer

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return "qkv_bias" in self.layer

    @property
    def qk_norm(self) -> bool:
        """Whether each head of q and k is normalised before rope."""
        return "q_norm" in self.layer

    def sources(self, form: Form, layers: int, tied: bool, experts: int = 0) -> dict[str, tuple[str, ...]]:
        """For each weight of a model, the checkpoint's tensors that it is concatenated from."""
        found = {
            name: getattr(parts, form) for name, parts in self.tables.items() if not (tied and name == "head")
        }
        for layer in range(layers):
            prefix = _LAYER_PREFIX[form].format(layer)
            for name, parts in self.layer.items():
                names = _of_each_expert(getattr(parts, form), experts)
                found[f"{layer}.{name}"] = tuple(prefix + part for part in names)
        return found


def _of_each_expert(parts: tuple[str, ...], experts: int) -> tuple[str, ...]:
    if not any("{}" in part for part in parts):
        return parts
    return tuple(part.format(expert) for expert in range(experts) for part in parts)


FAMILIES = (
    Family("llama", gguf="llama", gguf_interleaved=("attn_q.weight", "attn_k.weight")),
    Family(
        "mistral",
        gguf=None,  # converters write Mistral as llama
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "use_sliding_window": True},
    ),
    Family("qwen2", gguf="qwen2", layer={**LAYER, **QKV_BIAS}, defaults=QWEN_WINDOW, window_from=28),
    Family(
        "qwen3",
        gguf="qwen3",
        layer={**LAYER, **QK_NORM},
        defaults={"head_dim": 128, **QWEN_WINDOW},
        window_from=28,
    ),
    Family(
        "qwen3_moe",
        gguf="qwen3moe",
        layer={**LAYER, **QK_NORM, **EXPERTS},
        defaults={"num_key_value_heads": 4, **QWEN_WINDOW},
        width="moe_intermediate_size",
        normed="norm_topk_prob",
    ),
    Family(
        "mixtral",
        gguf="llama",
        layer={**LAYER, **MIXTRAL_EXPERTS},
        gguf_interleaved=("attn_q.weight", "attn_k.weight"),
        defaults={"num_key_value_heads": 8, "rope_theta": 1_000_000.0, "use_sliding_window": True},
    ),
)
"""All supported families."""


def family_named(name: str) -> Family:
    """The family of a spec's ``architecture``."""
    return next(family for family in FAMILIES if family.name == name)


def family_of(form: Form, name: object, source: str, experts: bool = False) -> Family:
    """The family that a checkpoint names. ``source`` names the checkpoint in errors. Raises UserError.

    ``experts``: whether a GGUF file says that the model has experts, in case two families have this name.
    """
    names: dict[str | None, list[Family]] = {}
    for family in FAMILIES:
        names.setdefault(family.gguf if form == "gguf" else family.name, []).append(family)
    if isinstance(name, str) and name in names:
        return next((one for one in names[name] if one.experts == experts), names[name][0])
    key = "architecture" if form == "gguf" else "model_type"
    known = ", ".join(one for one in names if one)
    raise UserError(f"{source}: {key} {name!r} is not supported; supported: {known}")
