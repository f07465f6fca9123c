"""How a request wants its tokens drawn, and what is reported about a draw.

Data only: ``engine/sampling.py`` draws.
"""

from __future__ import annotations

import math

import attrs

BIASES_MAX = 300
"""Most tokens that one request's ``logit_bias`` may name."""
LOGPROBS_MAX = 20
"""The largest number of most probable tokens that can be reported for a position."""
_VALUE_BYTES = 8


@attrs.frozen
class Adjustments:
    """Changes to a row's logits before its draw. ``engine/adjusting.py`` has the order and the arithmetic."""

    biased: bytes = b""
    """Packed ids of the biased tokens, each once."""
    bias: bytes = b""
    """What is added to the biased tokens' logits: one little-endian float32 each."""
    repetition: float = 1.0
    """Penalty on every token of prompt and answer: divides a positive logit, multiplies others; 1: none."""
    frequency: float = 0.0
    """Subtracted from a token's logit for each time it occurs in the answer."""
    presence: float = 0.0
    """Subtracted from the logit of every token that occurs in the answer."""
    min_tokens: int = 0
    """Tokens of the answer before an end token can be drawn; a grammar overrides this."""
    allowed: bytes = b""
    """Bit mask of the tokens that may be drawn, lowest bit of the first byte first; empty: all. Never together
    with a grammar."""
    grammar: str = ""
    """Grammar of the answer, in llguidance's notation; empty: none. See :mod:`memserve.engine.grammars`."""

    @property
    def by_answer(self) -> bool:
        """Whether they depend on which tokens the answer has so far, and not only on how many."""
        return bool(self.grammar or self.frequency or self.presence) or self.repetition != 1


@attrs.frozen
class Sampling:
    """How the next token is drawn.

    The draw is a function of (seed, position), the logits and the sequence itself, so a resumed stream
    continues with the same tokens.
    """

    temperature: float = 1.0
    """0 draws greedily."""
    top_k: int = 0
    """0 means no limit."""
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    """Tokens whose probability is below this share of the highest probability are not drawn."""
    adjust: Adjustments | None = None
    """Changes to the logits before the draw; None: none."""
    logprobs: int | None = None
    """How many of the most probable tokens are reported next to the drawn one; None: nothing is reported."""
    prompt_logprobs: int | None = None
    """How many of the most probable tokens are reported for each prompt token from the second on; None:
    nothing is reported. If set, the prompt's KV is computed, whatever is cached."""

    @property
    def reach(self) -> float:
        """Least ``d = l - max`` at which a token with logit ``l`` may be drawn under ``min_p``; not positive.

        This is ``exp(d / temperature) >= min_p`` solved for ``d``, the float32 difference, which all kernels
        know exactly.
        """
        return self.temperature * math.log(self.min_p) if self.min_p > 0 else -math.inf

    @property
    def greedy(self) -> bool:
        """Whether the largest logit wins, whatever the seed."""
        return self.temperature <= 0 or self.top_k == 1


@attrs.frozen
class Logprobs:
    """The model's own log probabilities at one position, from its unadjusted logits at temperature 1."""

    drawn: float
    """Log probability of the drawn token."""
    ids: bytes
    """The most probable tokens, packed, by falling probability, then rising id."""
    values: tuple[float, ...]
    """Log probabilities of ``ids``, one each."""


@attrs.frozen
class PromptLogprobs:
    """Log probabilities of consecutive tokens of a prompt, each given all tokens before it.

    The arrays are little-endian.
    """

    values: bytes
    """(tokens,) float64: log probabilities of the tokens."""
    ranks: bytes
    """(tokens,) int32: ranks of the tokens, 1 for the most probable, in the order of ``ids``."""
    ids: bytes
    """(tokens, count) int32: the most probable tokens, by falling probability, then rising id."""
    likeliest: bytes
    """(tokens, count) float64: log probabilities of ``ids``."""

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.values) // _VALUE_BYTES

    def after(self, tokens: int) -> PromptLogprobs:
        """The log probabilities without those of the first ``tokens`` tokens."""
        whole = len(self)
        parts = (self.values, self.ranks, self.ids, self.likeliest)
        return PromptLogprobs(*(part[len(part) // whole * tokens :] for part in parts)) if tokens else self
