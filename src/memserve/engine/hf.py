"""Reads a Hugging Face directory: its files, and the spec in its JSON.

    config.json                                             the shape
    model.safetensors, or shards and model.safetensors.index.json
    tokenizer.json                                          for the ``tokenizers`` library
    tokenizer_config.json, chat_template.jinja              the chat template; BOS and EOS as text
    generation_config.json                                  the ids that end a stream

The files of the last two lines are optional. Key names are those of transformers, versions 4 and 5.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memserve.engine.families import FUSED_EXPERTS, Family, family_of
from memserve.engine.rope_scaling import Scaling, hf_yarn, linear, llama3_factors
from memserve.engine.safetensors import Safetensors
from memserve.engine.spec import Keys, ModelSpec, check_spec
from memserve.errors import UserError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Supported values of ``rope_type``."""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_JSON_BYTES_MAX = 64 << 20


def model_files(folder: Path) -> list[Path]:
    """The model's files, weights last. Raises UserError naming every file that is missing."""
    missing = []
    if not (folder / "config.json").is_file():
        missing.append("config.json" + _gguf_remedy(folder))
    if not (folder / "tokenizer.json").is_file():
        missing.append("tokenizer.json" + _tokenizer_remedy(folder))
    shards = [folder / name for name in _shards(folder)]
    if not shards:
        missing.append(f"{_SINGLE} (or {_INDEX} with its shards)" + _weights_remedy(folder))
    missing += [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(
            f"{folder}: not a model directory that can be served: missing {'; missing '.join(missing)}"
        )
    optional = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    present = [folder / name for name in optional if (folder / name).is_file()]
    return [folder / "config.json", folder / "tokenizer.json", *present, *shards]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the directory. Raises UserError as ``model_files`` does."""
    return [path for path in model_files(folder) if path.suffix == ".safetensors"]


def _shards(folder: Path) -> list[str]:
    if not (folder / _INDEX).is_file():
        return [_SINGLE] if (folder / _SINGLE).is_file() else []
    files = _read(folder / _INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(
            f"{folder / _INDEX}: weight_map must name the file of each tensor, got {str(files)[:60]}"
        )
    names = sorted({str(name) for name in files.values()})
    # Names must be files next to the index: a name with a path in it could be any file of this machine.
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{folder / _INDEX}: weight_map names {outside[0]!r}, which is not a plain file name")
    return names


def _gguf_remedy(folder: Path) -> str:
    found = sorted(folder.glob("*.gguf"))
    return f" (to serve a GGUF file in it, name the file: {found[0]})" if found else ""


def _tokenizer_remedy(folder: Path) -> str:
    if not (folder / "tokenizer.model").is_file():
        return ""
    return (
        " (a SentencePiece tokenizer.model alone is not read; write one with transformers: "
        "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR))"
    )


def _weights_remedy(folder: Path) -> str:
    if not any(folder.glob("*.bin")):
        return ""
    return (
        " (.bin files are pickles and not read; convert them with transformers: "
        "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR))"
    )


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError if the file does not hold one."""
    try:
        if path.stat().st_size > _JSON_BYTES_MAX:
            raise ValueError(f"larger than {_JSON_BYTES_MAX} bytes")
        value = json.loads(path.read_text("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("expected an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    return value


def _read_if_there(path: Path) -> dict[str, Any]:
    return _read(path) if path.is_file() else {}


# ---- config.json ---------------------------------------------------------------------------------------------


def hf_spec(folder: Path, weights: Safetensors) -> ModelSpec:
    """The spec of a directory. Raises UserError for a variant that would run but give wrong tokens."""
    source = str(folder / "config.json")
    written = _read(folder / "config.json")
    family = family_of("hf", written.get("model_type"), source)
    # transformers writes null for values that are to be derived.
    config = {**family.defaults, **{key: value for key, value in written.items() if value is not None}}
    if "sliding_window" in written and written["sliding_window"] is None:
        config.pop("sliding_window", None)
    keys = Keys(config, source)
    _refuse_variants(keys)
    hidden, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    head_dim = keys.count("head_dim", hidden // heads)
    context = keys.count("max_position_embeddings")
    theta, scaling, context = _rope(keys, head_dim, context)
    bos, eos, template = _texts(folder, config)
    spec = ModelSpec(
        name=folder.name,
        architecture=family.name,
        layers=keys.count("num_hidden_layers"),
        hidden=hidden,
        intermediate=keys.count(family.width),
        heads=heads,
        kv_heads=keys.count("num_key_value_heads", heads),
        head_dim=head_dim,
        vocab=keys.count("vocab_size"),
        rope_theta=theta,
        rms_eps=keys.number("rms_norm_eps", 1e-6),
        max_context=context,
        tied_embeddings=_tied(family, config, weights),
        bos=bos,
        eos=eos,
        chat_template=template,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_factors=scaling.factors,
        rope_scale=scaling.scale,
        **_windows(family, keys, context),
        **_experts(family, keys, weights),
    )
    return check_spec(spec, source)


def _windows(family: Family, keys: Keys, context: int) -> dict[str, Any]:
    """The fields of the spec that only a model with local layers has. ``context``: the longest."""
    if "sliding_window" not in keys.metadata or not keys.flag("use_sliding_window", default=False):
        return {}
    layers = keys.count("num_hidden_layers")
    local = tuple(range(layers))
    if family.window_from is not None:
        first = keys.metadata.get("max_window_layers", family.window_from)
        if type(first) is not int:
            raise UserError(f"{keys.source}: max_window_layers must be an integer, got {first!r}")
        local = tuple(
            _listed_local(keys, layers) if "layer_types" in keys.metadata else local[max(first, 0) :]
        )
    window = keys.count("sliding_window")
    return {"sliding_window": window, "local_layers": local} if local and window < context else {}


def _listed_local(keys: Keys, layers: int) -> Iterator[int]:
    """The numbers of the local layers in ``layer_types``, which has the kind of each layer."""
    kinds = keys.metadata["layer_types"]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise UserError(f"{keys.source}: layer_types must list the kinds of {layers} layers, got {kinds!r}")
    for number, kind in enumerate(kinds):
        if kind not in ("full_attention", "sliding_attention"):
            raise UserError(
                f"{keys.source}: layer_types has {kind!r}, expected full_attention or sliding_attention"
            )
        if kind == "sliding_attention":
            yield number


def _refuse_variants(keys: Keys) -> None:
    for name in keys.metadata.get("architectures", ()):
        if not str(name).endswith("ForCausalLM"):
            raise UserError(
                f"{keys.source}: architectures names {name!r}; only ...ForCausalLM generates text"
            )
    keys.must_be("hidden_act", "silu", "other activations are not supported")
    keys.must_be("attention_bias", False, "a family has its own biases, others are not supported")
    keys.must_be("mlp_bias", False, "biases of the MLP are not supported")
    keys.must_be("mlp_only_layers", [], "layers without experts beside others are not supported")
    keys.must_be("decoder_sparse_step", 1, "layers without experts beside others are not supported")
    keys.must_be("n_shared_experts", 0, "shared experts are not supported")
    keys.must_be("scoring_func", "softmax", "other functions of the router's logits are not supported")
    keys.must_be("routed_scaling_factor", 1.0, "scaled weights of experts are not supported")
    if "quantization_config" in keys.metadata:
        raise UserError(
            f"{keys.source}: quantization_config: quantised safetensors are not supported; take the model in "
            "BF16, F16 or F32, or a GGUF file"
        )


def _experts(family: Family, keys: Keys, weights: Safetensors) -> dict[str, Any]:
    """The fields of the spec that only a family with experts has."""
    if not family.experts:
        return {}
    if fused := [name for name in weights.tensors if name.endswith(FUSED_EXPERTS)]:
        raise UserError(
            f"{keys.source}: {fused[0]!r} holds all experts of a layer, which is not supported; save the model "
            "with transformers' save_pretrained, which writes one tensor for each expert"
        )
    return {
        # transformers 5 writes num_local_experts for every family, earlier versions what the family calls it.
        "experts": keys.count("num_local_experts", keys.metadata.get("num_experts")),
        "experts_used": keys.count("num_experts_per_tok"),
        "experts_normed": family.normed is None or keys.flag(family.normed, default=False),
    }


def _tied(family: Family, config: dict[str, Any], weights: Safetensors) -> bool:
    (head,) = family.tables["head"].hf
    tied = config.get("tie_word_embeddings", head not in weights.tensors)
    return bool(tied)


# ---- rope ----------------------------------------------------------------------------------------------------


def _rope(keys: Keys, head_dim: int, context: int) -> tuple[float, Scaling, int]:
    """Theta, the scaling, and the longest context with it; ``context``: the one without."""
    # transformers 5 has rope_parameters; earlier versions have rope_theta and, for scaled rope, rope_scaling.
    given = keys.metadata.get("rope_parameters", keys.metadata.get("rope_scaling", {}))
    if not isinstance(given, dict):
        raise UserError(f"{keys.source}: rope_parameters must be an object, got {given!r}")
    rope = Keys({key: value for key, value in given.items() if value is not None}, keys.source)
    theta = rope.number("rope_theta", keys.number("rope_theta", 10000.0))
    rope.must_be("partial_rotary_factor", 1.0, "rope over part of a head is not supported")
    keys.must_be("partial_rotary_factor", 1.0, "rope over part of a head is not supported")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UserError(
            f"{keys.source}: rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    if kind == "default":
        return theta, Scaling(), context
    if kind == "yarn":
        return theta, *hf_yarn(rope, theta, head_dim, context)
    factor = rope.number("factor")
    if kind == "linear":
        return theta, linear(factor, head_dim), context
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if not low < high:
        raise UserError(f"{keys.source}: low_freq_factor {low} must be below high_freq_factor {high}")
    trained = rope.number("original_max_position_embeddings", context)
    return theta, Scaling(llama3_factors(theta, head_dim, factor, low, high, trained)), context


# ---- tokens and texts ----------------------------------------------------------------------------------------


def _texts(folder: Path, config: dict[str, Any]) -> tuple[int | None, tuple[int, ...], str | None]:
    """BOS, the ids that end a stream, and the chat template."""
    generation = _read_if_there(folder / "generation_config.json")
    tokenizer = _read_if_there(folder / "tokenizer_config.json")
    ids = _added_tokens(folder, tokenizer)
    # The tokenizer's EOS comes first: it is the token that chat templates call eos_token.
    ends = [ids.get(_content(tokenizer.get("eos_token")))]
    for place in (generation, config):
        value = place.get("eos_token_id")
        ends += value if isinstance(value, list) else [value]
    eos = tuple(dict.fromkeys(one for one in ends if isinstance(one, int)))
    bos = ids.get(_content(tokenizer.get("bos_token")), config.get("bos_token_id"))
    text = _written_template(folder / "chat_template.jinja") or _template(tokenizer.get("chat_template"))
    return bos if isinstance(bos, int) else None, eos, text


def _added_tokens(folder: Path, tokenizer: dict[str, Any]) -> dict[str, int]:
    """Ids of the added tokens by their text.

    tokenizer.json is large, so it is read only if there is a token to look up.
    """
    if not (_content(tokenizer.get("eos_token")) or _content(tokenizer.get("bos_token"))):
        return {}
    if isinstance(decoder := tokenizer.get("added_tokens_decoder"), dict):
        return {_content(token): int(id) for id, token in decoder.items() if id.isdecimal()}
    added = _read(folder / "tokenizer.json").get("added_tokens")
    tokens = [one for one in added if isinstance(one, dict)] if isinstance(added, list) else []
    return {_content(token): token["id"] for token in tokens if isinstance(token.get("id"), int)}


def _content(token: Any) -> str:
    """A token's text, which tokenizer_config.json has as a plain string or in an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _written_template(path: Path) -> str | None:
    try:
        return path.read_text("utf-8") if path.is_file() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as text: {error}") from error


def _template(value: Any) -> str | None:
    """The template in tokenizer_config.json: a string, or the default of a list of named templates."""
    if isinstance(value, list):
        named = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
