"""Scaled rope: how models stretch it over more positions than they were trained on at first.

A scaling divides the inverse frequencies of rope, each by a number of its own, and may multiply the cosines
and sines.
"""

from __future__ import annotations

import math

import attrs

from memserve.engine.spec import Keys
from memserve.errors import UserError


@attrs.frozen
class Scaling:
    """A scaling as ``ModelSpec`` holds it."""

    factors: tuple[float, ...] | None = None
    """Divisors of the inverse frequencies, head_dim / 2 of them, or None for none."""
    scale: float = 1.0
    """Multiplies cosines and sines."""


def linear(factor: float, head_dim: int) -> Scaling:
    """Every frequency divided by ``factor``."""
    return Scaling((factor,) * (head_dim // 2))


def llama3_factors(
    theta: float, head_dim: int, factor: float, low: float, high: float, trained: float
) -> tuple[float, ...]:
    """Llama 3.1's rule: divide slow frequencies by ``factor``, keep fast ones, interpolate smoothly between.

    Fast means a wavelength below ``trained / high`` positions, slow one above ``trained / low``; ``trained``
    is the context before the scaling. Equal to transformers' rope type ``llama3``.
    """
    factors = []
    for index in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * index / head_dim)
        smooth = min(max((trained / wavelength - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)


@attrs.frozen(kw_only=True)
class Yarn:
    """YaRN (arXiv 2309.00071) as transformers and llama.cpp compute it."""

    factor: float
    trained: float
    """The context before the scaling, in positions."""
    fast: float
    """Frequencies that turn at least this often within ``trained`` positions stay as they are."""
    slow: float
    """Frequencies that turn at most this often are divided by ``factor``; those between, by less."""
    whole: bool = True
    """Whether the indices of these two frequencies are rounded outwards to whole numbers."""

    def context(self, written: int, source: str) -> int:
        """The longest context: the checkpoint's own number, or what the scaling was made for if that is more.

        Checkpoints whose users switch YaRN on, as Qwen2.5's page describes, keep the number of the unscaled
        model. Raises UserError if there are too many positions.
        """
        longest = max(written, round(self.trained * self.factor))
        if longest >= 2**31:
            raise UserError(f"{source}: YaRN over {longest} positions is not supported")
        return longest

    def factors(self, theta: float, head_dim: int, source: str) -> tuple[float, ...]:
        """The divisors of the inverse frequencies. Raises UserError if the numbers fit no frequencies."""
        if theta <= 1 or self.fast < self.slow:
            raise UserError(
                f"{source}: YaRN needs a rope_theta above 1 and a beta_fast not below beta_slow, "
                f"got {theta}, {self.fast} and {self.slow}"
            )
        first, last = (self._index(turns, theta, head_dim) for turns in (self.fast, self.slow))
        if self.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        if last < first:  # transformers and llama.cpp do different things then
            raise UserError(f"{source}: YaRN from {self.trained:g} positions fits no frequency of this model")
        ramp = [(at - first) / max(last - first, 0.001) for at in range(head_dim // 2)]
        parts = [min(max(part, 0.0), 1.0) for part in ramp]
        return tuple(1 / (part / self.factor + (1 - part)) for part in parts)

    def _index(self, turns: float, theta: float, head_dim: int) -> float:
        """The index, not rounded, of the frequency that turns so often within ``trained`` positions."""
        return head_dim * math.log(self.trained / (turns * 2 * math.pi)) / (2 * math.log(theta))


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """What YaRN multiplies cosines and sines by; ``weight`` is DeepSeek's ``mscale``."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1


def hf_yarn(rope: Keys, theta: float, head_dim: int, context: int) -> tuple[Scaling, int]:
    """The scaling of ``rope_type`` yarn in config.json, and the longest context with it.

    ``context``: ``max_position_embeddings``. Raises UserError.
    """
    for key in ("attn_factor", "extrapolation_factor"):
        rope.must_be(key, 1.0, "transformers does not know it")
    trained = rope.number("original_max_position_embeddings", context)
    factor = rope.number("factor", context / trained)
    truncate = rope.metadata.get("truncate", True)
    if not isinstance(truncate, bool):
        raise UserError(f"{rope.source}: truncate must be true or false, got {truncate!r}")
    yarn = Yarn(
        factor=factor,
        trained=trained,
        fast=rope.number("beta_fast", 32),
        slow=rope.number("beta_slow", 1),
        whole=truncate,
    )
    scale = yarn_scale(factor)
    if rope.metadata.get("mscale") and rope.metadata.get("mscale_all_dim"):
        scale = yarn_scale(factor, rope.number("mscale")) / yarn_scale(factor, rope.number("mscale_all_dim"))
    scaling = Scaling(yarn.factors(theta, head_dim, rope.source), rope.number("attention_factor", scale))
    return scaling, yarn.context(context, rope.source) if "factor" in rope.metadata else context


def gguf_yarn(keys: Keys, prefix: str, theta: float, head_dim: int, context: int) -> tuple[Scaling, int]:
    """The scaling of ``rope.scaling.type`` yarn in a GGUF file, and the longest context with it.

    ``prefix`` is that of rope's keys, ``context`` is ``context_length``. Raises UserError.
    """
    scaling = prefix + "scaling."
    for key, expected in (("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        keys.must_be(scaling + key, expected, "other values are not supported for this architecture")
    factor = keys.number(scaling + "factor")
    yarn = Yarn(
        factor=factor,
        trained=keys.number(scaling + "original_context_length", context),
        fast=keys.number(scaling + "yarn_beta_fast", 32),
        slow=keys.number(scaling + "yarn_beta_slow", 1),
    )
    scale = yarn_scale(factor) * keys.number(scaling + "attn_factor", 1.0)
    found = Scaling(yarn.factors(theta, head_dim, keys.source), scale)
    return found, yarn.context(context, keys.source)
