"""The interface between a worker's core and its step engine: one value in, one value out, no arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import attrs

from memserve.drawing import Logprobs, PromptLogprobs, Sampling
from memserve.tokens import count, pack, span, unpack


@attrs.frozen
class Past:
    """Tokens of a row's sequence that logit adjustments depend on, packed, and masks of allowed tokens."""

    prompt: bytes
    """The prompt, where ``repetition`` counts it; otherwise empty."""
    output: bytes
    """The answer so far, over all attempts and workers; without the token of the row that this one follows."""
    forbidden: bytes = b""
    """Tokens that must not be drawn yet, because they would end the answer before ``min_tokens``."""
    allowed: bytes = b""
    """Bit mask of tokens that may be drawn, lowest bit of the first byte first; empty allows all.

    The request's own, or filled in where a grammar is followed.
    """
    then: tuple[bytes, ...] = ()
    """Masks like ``allowed`` after each token of the row's draft."""


@attrs.frozen
class Score:
    """Which prompt log probabilities a row reports, from the logits after its tokens."""

    follows: bytes
    """Prompt tokens to report, packed: the successor of each of the row's tokens, if the prompt has one."""
    count: int
    """Most probable tokens to report in addition at each position."""

    def part(self, start: int, stop: int) -> Score | None:
        """The part for the row's tokens from ``start`` to ``stop``; None where there is nothing to report."""
        follows = span(self.follows, start, stop)
        return Score(follows, self.count) if follows else None


@attrs.frozen
class Row:
    """One sequence's part of a step: a prefill chunk (many tokens) or a decode row (one)."""

    tokens: bytes
    """Tokens to run, packed."""
    start: int
    """Position of the first token; the KV of all earlier ones is in ``pages`` already."""
    pages: tuple[int, ...]
    """Page table: ``pages[i]`` holds positions from ``i * page_tokens`` on. Covers all before ``reach``."""
    sample: Sampling | None
    """How to draw the token after the last one; None when no draw is wanted (not the prompt's last chunk)."""
    past: Past | None = None
    """Set where ``sample`` adjusts the logits."""
    score: Score | None = None
    """Set where log probabilities of the prompt are wanted."""
    draft: bytes = b""
    """Draft tokens expected after ``tokens``, packed.

    An engine may run them too, and draw after each of them as long as each draw equals its draft token. Never
    set together with ``score`` or with log probabilities of the draw.
    """
    draft_most: int = 0
    """Length to which a grammar may extend the draft; set where the row follows a grammar.

    The grammar adds tokens that it forces, and removes draft tokens that it forbids.
    """
    follows: int | None = None
    """Row of the step before whose draw is this row's only token; ``tokens`` has a zero in its place.

    Set where that step was still running when this one was planned; see :mod:`memserve.engine.steps`.
    """
    ends: bytes = b""
    """Tokens that end the answer, packed; set where the row draws late. Behind one of them it draws nothing."""

    @property
    def late(self) -> bool:
        """Whether it draws late: its adjustments depend on the token that it follows, which is not known yet."""
        adjust = None if self.sample is None else self.sample.adjust
        return self.follows is not None and adjust is not None and adjust.by_answer

    def known(self, token: int) -> Row:
        """The row once the token that it follows is known: that of a step planned then."""
        assert self.past is not None, "a row that adjusts nothing may draw before the token is known"
        past = attrs.evolve(self.past, output=self.past.output + pack([token]))
        return attrs.evolve(self, tokens=pack([token]), past=past, follows=None, ends=b"")

    @property
    def end(self) -> int:
        """Position of the token that the row draws. The draw is a function of it and the seed."""
        return self.start + count(self.tokens)

    def past_at(self, place: int) -> Past | None:
        """``past`` for the draw after the first ``place`` draft tokens."""
        if self.past is None or not place:
            return self.past
        allowed = self.past.then[place - 1] if self.past.then else self.past.allowed
        output = self.past.output + span(self.draft, 0, place)
        return attrs.evolve(self.past, output=output, allowed=allowed)

    @property
    def reach(self) -> int:
        """Position after the last one that an engine may write, drafts included."""
        return self.end + count(self.draft)


@attrs.frozen
class BatchPlan:
    """One step: any mix of prefill chunks and decode rows."""

    rows: tuple[Row, ...]
    followed: bool = False
    """Whether the engine may be given the next step before this one has ended."""

    @property
    def late(self) -> bool:
        """Whether any row draws late."""
        return any(row.late for row in self.rows)

    def late_rows(self, before: Sequence[int | None]) -> dict[int, Row]:
        """The rows that draw late, by number, now that the tokens of the step ``before`` are known.

        Rows that have nothing to draw are left out: what they follow was void, or has ended their stream.
        """
        found = {}
        for number, row in enumerate(self.rows):
            token = before[row.follows] if row.late and row.follows is not None else None
            if token is not None and token not in unpack(row.ends):
                found[number] = row.known(token)
        return found


@attrs.frozen
class BatchResult:
    """The outcome of a step."""

    tokens: tuple[int | None, ...]
    """The drawn token of each row, in order; None where ``sample`` was None."""
    step_ms: float
    threads: int
    """Cores that the step began on."""
    neighbours: float = 0.0
    """Other workers of the site that had work during the step, averaged over its layers.

    See :class:`~memserve.costs.Site`.
    """
    logprobs: Mapping[int, Logprobs] = MappingProxyType({})
    """Log probabilities of draws, by row number, for the rows that asked for them."""
    prompts: Mapping[int, PromptLogprobs] = MappingProxyType({})
    """Prompt log probabilities, by row number, for the rows with a ``score``."""
    more: Mapping[int, bytes] = MappingProxyType({})
    """Tokens drawn after the row's first one, packed, by row number, for rows with accepted draft tokens.

    As many draft tokens were accepted, and their KV is in the pages.
    """
    void: frozenset[int] = frozenset()
    """Rows that count as not run, by row number.

    Their draw was not found before the next step was launched, or they follow such a row, or they would have
    drawn late and were left out.
    """
    waited_s: float = 0.0
    """Seconds before the step, not part of ``step_ms``, in which other workers of the host had all cores."""


class RunningStep(Protocol):
    """A step that was launched on a device."""

    def done(self) -> bool:
        """Whether the device has run it."""

    def draw_late(self, rows: Mapping[int, Row]) -> None:
        """Launch the draws of the rows that draw late: ``rows`` are those of them that draw, once known.

        Called once for a step with such rows, when the result of the step before was read, and before another
        step is launched or this one's result is read. Raises ValueError, naming the row, as ``launch`` does.
        """

    def result(self) -> BatchResult:
        """Wait for the step; its outcome. Called once, and of two steps of the one launched first."""


class StepEngine(Protocol):
    """Runs steps on the pages of one arena. Called from one thread at a time, never from the event loop's."""

    def run(self, plan: BatchPlan) -> BatchResult:
        """Write the KV of every row to its pages and draw the wanted tokens. Blocks for the whole step."""

    def rest(self) -> None:
        """No step is wanted for now: release this engine's share of the cores to other workers."""

    def close(self) -> None:
        """Release the arena and the weights."""


@runtime_checkable
class OverlappingEngine(StepEngine, Protocol):
    """A StepEngine that takes a step while one is running."""

    def launch(self, plan: BatchPlan) -> RunningStep:
        """Start a step behind the running one, if there is one. At most two may be unfinished.

        Rows that draw late run, and have their draws launched by :meth:`RunningStep.draw_late`.
        """
