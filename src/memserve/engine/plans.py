"""What a worker's core asks of its step engine: one value in, one value out, no arrays."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import attrs

from memserve.drawing import Logprobs, PromptLogprobs, Sampling
from memserve.tokens import count, span


@attrs.frozen
class Past:
    """What the adjustments of a row's logits need to know of its sequence; all packed."""

    prompt: bytes
    """The prompt, where ``repetition`` counts it; else empty."""
    output: bytes
    """The answer so far, over every attempt and every worker."""
    forbidden: bytes = b""
    """Tokens that cannot be drawn yet: what would end the answer before ``min_tokens``."""
    allowed: bytes = b""
    """A bit for each token that can be drawn, the lowest of the first byte first; empty: all. Filled in where a grammar is followed."""
    then: tuple[bytes, ...] = ()
    """The same after each token of the row's draft."""


@attrs.frozen
class Tell:
    """What is to be told of a prompt's tokens, by the logits of the row that runs those before them."""

    follows: bytes
    """The tokens, packed: one behind each of the row's first tokens, and as many as the prompt still has."""
    count: int
    """How many of the most probable tokens are told beside each."""

    def part(self, start: int, stop: int) -> Tell | None:
        """Of the row's tokens from ``start`` to ``stop``; None where nothing is told of any."""
        follows = span(self.follows, start, stop)
        return Tell(follows, self.count) if follows else None


@attrs.frozen
class Row:
    """One sequence's part of a step: a prefill chunk (many tokens) or a decode row (one)."""

    tokens: bytes
    """Tokens to run, packed."""
    start: int
    """Position of the first of them; the KV of all earlier ones is in ``pages`` already."""
    pages: tuple[int, ...]
    """Page table; ``pages[i]`` holds positions ``i * page_tokens`` onwards. Covers all up to ``reach``."""
    sample: Sampling | None
    """How to draw the token after the last one, or None when nobody wants it (not the prompt's last chunk)."""
    past: Past | None = None
    """Set where ``sample`` adjusts the logits."""
    tell: Tell | None = None
    """Set where log probabilities of the prompt are wanted."""
    draft: bytes = b""
    """A guess at the tokens that come after ``tokens``, packed. An engine may run them too, and draw after each of them for as
    long as the draws are what was guessed. Never set beside ``tell`` or log probabilities of the draw."""
    draft_most: int = 0
    """So long a draft may become, where the row follows a grammar: it forces tokens, and forbids what was guessed."""

    @property
    def end(self) -> int:
        """Position of the token that a draw would produce; with the seed it decides the draw."""
        return self.start + count(self.tokens)

    def past_at(self, place: int) -> Past | None:
        """The past of the draw behind ``place`` tokens of the draft."""
        if self.past is None or not place:
            return self.past
        allowed = self.past.then[place - 1] if self.past.then else self.past.allowed
        output = self.past.output + span(self.draft, 0, place)
        return attrs.evolve(self.past, output=output, allowed=allowed)

    @property
    def reach(self) -> int:
        """The first position behind all that an engine may write."""
        return self.end + count(self.draft)


@attrs.frozen
class BatchPlan:
    """One step: any mix of prefill chunks and decode rows."""

    rows: tuple[Row, ...]


@attrs.frozen
class BatchResult:
    """What a step produced."""

    tokens: tuple[int | None, ...]
    """One per row, in order; None where ``sample`` was None."""
    step_ms: float
    threads: int
    """Cores the step began on."""
    beside: float = 0.0
    """Other workers of the same site (see :class:`~memserve.costs.Site`) that had work meanwhile, on average over its layers."""
    logprobs: Mapping[int, Logprobs] = MappingProxyType({})
    """By the numbers of the rows that asked for them."""
    prompts: Mapping[int, PromptLogprobs] = MappingProxyType({})
    """By the numbers of the rows that have a ``tell``: of each of its tokens."""
    more: Mapping[int, bytes] = MappingProxyType({})
    """By the numbers of the rows whose ``draft`` began rightly: the tokens drawn behind the row's first one, packed. As many of
    the draft's tokens were right, and their KV is in the pages."""


class StepEngine(Protocol):
    """Runs steps on the pages of one arena. Called from one thread at a time, never the event loop's."""

    def run(self, plan: BatchPlan) -> BatchResult:
        """Append the KV of every row to its pages and draw the wanted tokens. Blocks for the whole step."""

    def rest(self) -> None:
        """No step is wanted at present: give this engine's share of the cores to others."""

    def close(self) -> None:
        """Let go of the arena and the weights."""
