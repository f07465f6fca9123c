"""How a request wants its tokens drawn, and what is told about a draw. Words only: ``engine/sampling.py`` draws."""

from __future__ import annotations

import attrs

BIASES_MAX = 300
"""Tokens that one request's ``logit_bias`` may name."""
LOGPROBS_MAX = 20
"""Most probable tokens of a position that can be told."""
_VALUE_BYTES = 8


@attrs.frozen
class Adjustments:
    """What is done to a row's logits before its draw. ``engine/adjusting.py`` has the order and the arithmetic."""

    biased: bytes = b""
    """Token ids, packed, each once."""
    bias: bytes = b""
    """What is added to their logits: a little-endian float32 for each."""
    repetition: float = 1.0
    """Divides positive logits, and multiplies others, of every token of prompt and answer; 1 does nothing."""
    frequency: float = 0.0
    """Taken off a token's logit for each time that the answer has it."""
    presence: float = 0.0
    """Taken off the logit of every token that the answer has."""
    min_tokens: int = 0
    """So many tokens of the answer come before one that ends it can be drawn; not with a grammar, which knows where it ends."""
    grammar: str = ""
    """What the answer has to follow, as llguidance writes grammars; empty: nothing. See :mod:`memserve.engine.grammars`."""


@attrs.frozen
class Sampling:
    """How the next token is drawn.

    The draw is a function of (seed, position), the logits and the sequence itself, so a resumed stream continues alike.
    """

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 is no limit."""
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    """Tokens less probable than this share of the most probable one's probability are not drawn."""
    adjust: Adjustments | None = None
    """None: logits are taken as they are."""
    logprobs: int | None = None
    """How many of the most probable tokens are told beside the drawn one; None: nothing is told."""
    prompt_logprobs: int | None = None
    """The same of the prompt's own tokens, from the second on; then its KV is computed, whatever is cached."""

    @property
    def greedy(self) -> bool:
        """Whether the largest logit wins, whatever the seed."""
        return self.temperature <= 0 or self.top_k == 1


@attrs.frozen
class Logprobs:
    """The model's own log probabilities at one position: of its logits as they are, at temperature 1."""

    drawn: float
    """Of the token that was drawn."""
    ids: bytes
    """The most probable tokens, packed: by falling probability, then rising id."""
    values: tuple[float, ...]
    """Theirs, one for each."""


@attrs.frozen
class PromptLogprobs:
    """Log probabilities of tokens of a prompt that follow one another, each after all that come before it. Arrays, little-endian."""

    values: bytes
    """(tokens,) float64: theirs."""
    ranks: bytes
    """(tokens,) int32: 1 for the most probable one, by the order of ``ids``."""
    ids: bytes
    """(tokens, count) int32: the most probable tokens, by falling probability, then rising id."""
    likeliest: bytes
    """(tokens, count) float64: theirs."""

    def __len__(self) -> int:
        """Tokens."""
        return len(self.values) // _VALUE_BYTES

    def after(self, tokens: int) -> PromptLogprobs:
        """Without the first so many tokens."""
        whole = len(self)
        parts = (self.values, self.ranks, self.ids, self.likeliest)
        return PromptLogprobs(*(part[len(part) // whole * tokens :] for part in parts)) if tokens else self
