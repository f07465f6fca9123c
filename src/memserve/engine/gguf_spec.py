"""Reads the spec of a GGUF file; metadata keys are ``<architecture>.<key>``, alike for every architecture."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import attrs

from memserve.engine.families import Family, family_of
from memserve.engine.gguf import Gguf
from memserve.engine.rope_scaling import Scaling, gguf_yarn, linear
from memserve.engine.spec import Keys, ModelSpec, check_spec, name_of
from memserve.errors import UserError

_SOFTMAX = 1
"""llama.cpp's number of the function that makes weights of the router's logits."""
ROPE_FACTORS = "rope_freqs.weight"
"""The tensor in which converters of Llama 3.1 and later store the divisors of rope's inverse frequencies."""

_ENDS = tuple(f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom"))
_TYPES: Mapping[str, type] = MappingProxyType(
    {**dict.fromkeys((*_ENDS, "tokenizer.ggml.bos_token_id"), int), "tokenizer.chat_template": str}
)
"""Types of values that are used as they are, here or by the tokenizer."""
_LISTED_TYPES: Mapping[str, type] = MappingProxyType(
    {
        "tokenizer.ggml.tokens": str,
        "tokenizer.ggml.merges": str,
        "tokenizer.ggml.token_type": int,
        "tokenizer.ggml.scores": float,
    }
)
"""The same for lists: the type of their members, which is one for all of a list."""


def gguf_spec(file: Gguf) -> ModelSpec:
    """The spec of an open file. Raises UserError for a variant that would run but give wrong tokens."""
    metadata, source = file.metadata, str(file.path)
    _check_types(metadata, source)
    architecture = metadata.get("general.architecture")
    has_experts = metadata.get(f"{architecture}.expert_count", 0) != 0
    family = family_of("gguf", architecture, source, has_experts)
    a, keys = family.gguf, Keys(metadata, source)
    hidden, heads = keys.count(f"{a}.embedding_length"), keys.count(f"{a}.attention.head_count")
    head_dim = keys.count(f"{a}.attention.key_length", hidden // heads)
    context = keys.count(f"{a}.context_length")
    theta, scaling, context = _rope(file, keys, f"{a}.rope.", head_dim, context)
    spec = ModelSpec(
        name=name_of(file.path),
        architecture=family.name,
        layers=keys.count(f"{a}.block_count"),
        hidden=hidden,
        intermediate=keys.count(f"{a}.feed_forward_length"),
        heads=heads,
        kv_heads=keys.count(f"{a}.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab=keys.count(f"{a}.vocab_size", len(metadata.get("tokenizer.ggml.tokens", ()))),
        rope_theta=theta,
        rms_eps=keys.number(f"{a}.attention.layer_norm_rms_epsilon", 1e-5),
        max_context=context,
        tied_embeddings=not set(family.tables["head"].gguf) <= file.tensors.keys(),
        bos=metadata.get("tokenizer.ggml.bos_token_id"),
        eos=_ends(metadata),
        chat_template=metadata.get("tokenizer.chat_template"),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_factors=scaling.factors,
        rope_scale=scaling.scale,
    )
    spec = attrs.evolve(spec, **_windows(family, keys, f"{a}.", context))
    if family.experts:
        spec = _with_experts(spec, keys, f"{a}.expert_")
    else:
        keys.must_be(f"{a}.expert_count", 0, "mixtures of experts of this family are not supported")
    keys.must_be(f"{a}.rope.dimension_count", head_dim, "rope over part of a head is not supported")
    keys.must_be(f"{a}.attention.value_length", head_dim, "keys and values of unequal size are not supported")
    return check_spec(spec, source)


def _windows(family: Family, keys: Keys, prefix: str, context: int) -> dict[str, Any]:
    """The fields of the spec that a sliding window changes. ``context``: the longest.

    Where the window may limit some layers only, the file does not say which: then the context is the window,
    up to which all attention is alike.
    """
    window = keys.count(prefix + "attention.sliding_window", context)
    if window >= context:
        return {}
    if family.window_from is not None or prefix + "attention.sliding_window_pattern" in keys.metadata:
        return {"max_context": window}
    return {"sliding_window": window, "local_layers": tuple(range(keys.count(prefix + "block_count")))}


def _with_experts(spec: ModelSpec, keys: Keys, prefix: str) -> ModelSpec:
    """``spec`` with what the file says of experts; their weights are normed, as llama.cpp does it."""
    keys.must_be(prefix + "gating_func", _SOFTMAX, "other functions of the router's logits are not supported")
    keys.must_be(prefix + "weights_norm", True, "weights of experts that are not normed are not supported")
    keys.must_be(prefix + "weights_scale", 1.0, "scaled weights of experts are not supported")
    keys.must_be(prefix + "shared_count", 0, "shared experts are not supported")
    keys.must_be(prefix + "shared_feed_forward_length", 0, "shared experts are not supported")
    keys.must_be(prefix + "group_count", 1, "groups of experts are not supported")
    return attrs.evolve(
        spec,
        experts=keys.count(prefix + "count"),
        experts_used=keys.count(prefix + "used_count"),
        intermediate=keys.count(prefix + "feed_forward_length", spec.intermediate),
    )


def _check_types(metadata: dict[str, Any], source: str) -> None:
    """Raise UserError if a value that the spec or the tokenizer uses is of another type."""
    for key, kind in _TYPES.items():
        if key in metadata and type(metadata[key]) is not kind:
            raise UserError(f"{source}: {key} must be of type {kind.__name__}: the file is damaged")
    for key, kind in _LISTED_TYPES.items():
        value = metadata.get(key, [])
        if not isinstance(value, list) or (value and type(value[0]) is not kind):
            raise UserError(f"{source}: {key} must be a list of {kind.__name__}: the file is damaged")


def _ends(metadata: dict[str, Any]) -> tuple[int, ...]:
    """The ids that end an answer: of the text, of a turn, and of a message that waits for a tool."""
    return tuple(dict.fromkeys(metadata[key] for key in _ENDS if key in metadata))


def _rope(file: Gguf, keys: Keys, prefix: str, head_dim: int, context: int) -> tuple[float, Scaling, int]:
    """Theta, the scaling, and the longest context with it; ``context``: the one without."""
    theta = keys.number(prefix + "freq_base", 10000.0)
    # A factor without a type is linear, as in llama.cpp. Some converters write a factor of 1 for no scaling.
    kind = file.metadata.get(prefix + "scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UserError(
            f"{keys.source}: {prefix}scaling.type {kind!r} is not supported; supported: none, linear, yarn, "
            f"and Llama 3's, which is a tensor {ROPE_FACTORS}"
        )
    scaling = Scaling()
    if kind == "yarn":
        scaling, context = gguf_yarn(keys, prefix, theta, head_dim, context)
    elif kind == "linear":
        factor = keys.number(prefix + "scaling.factor", keys.number(prefix + "scale_linear", 1.0))
        scaling = scaling if factor == 1.0 else linear(factor, head_dim)
    if (divisors := _divisors(file, keys.source)) is not None:
        if len(divisors) != head_dim // 2:
            text = f"{ROPE_FACTORS} holds {len(divisors)} values; heads of {head_dim} need {head_dim // 2}"
            raise UserError(f"{keys.source}: {text}")
        factors = scaling.factors or (1.0,) * len(divisors)
        together = tuple(one * other for one, other in zip(factors, divisors, strict=True))
        scaling = attrs.evolve(scaling, factors=together)
    return theta, scaling, context


def _divisors(file: Gguf, source: str) -> tuple[float, ...] | None:
    """The values of the tensor ``ROPE_FACTORS``, or None if there is none."""
    if (tensor := file.tensors.get(ROPE_FACTORS)) is None:
        return None
    if tensor.type != "F32":
        raise UserError(f"{source}: {ROPE_FACTORS} has type {tensor.type}, expected F32")
    values = array("f", bytes(file.data(tensor)))
    if sys.byteorder == "big":
        values.byteswap()
    if not all(value > 0 for value in values):
        raise UserError(f"{source}: {ROPE_FACTORS} holds values that are not positive: it is damaged")
    return tuple(values)
