"""One request as a worker holds it: its tokens, its pages and its progress.

Prefill and decode are not separate states. A sequence has ``length`` tokens, and the KV of the first
``computed`` of them is in its pages. The next row runs the remaining tokens, or some of them, and draws a
token when it reaches the end. A prompt has many tokens left to run, a decoding sequence has one, and a
resumed or preempted sequence is a prompt again.
"""

from __future__ import annotations

import enum

import attrs
from msgspec import UNSET, UnsetType

from memserve.accounts import Origins, Timings
from memserve.drawing import Adjustments, Logprobs
from memserve.engine.plans import Past, Row, Score
from memserve.messages import Handoff, Plan, Request, TokenUpdate
from memserve.pool_messages import Acquired
from memserve.tokens import TOKEN_BYTES, count, pack, pages_for, span, unpack

BEFORE_SEQUEL = 8
"""Prompt tokens kept in front of a sequel, so that a suffix lookup finds where the sequel begins."""


class Phase(enum.Enum):
    """Life-cycle phase of a sequence; ``TRANSITIONS`` lists every allowed change."""

    WAITING = "waiting"
    """Waits for pages: an Acquire is with the shard, or an earlier prompt computes a shared prefix first."""
    ADOPTING = "adopting"
    """Came by Handoff; an Adopt is with the shard."""
    READY = "ready"
    """Has pages and takes part in batches."""
    LEAVING = "leaving"
    """Handed over; this worker keeps its lease until HandoffTaken."""
    ENDED = "ended"


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.WAITING: frozenset({Phase.READY, Phase.ENDED}),
    Phase.ADOPTING: frozenset({Phase.READY, Phase.ENDED}),
    Phase.READY: frozenset({Phase.WAITING, Phase.LEAVING, Phase.ENDED}),
    Phase.LEAVING: frozenset({Phase.ENDED}),
    Phase.ENDED: frozenset(),
}


@attrs.define(eq=False)
class Flight:
    """A sequence's row in the latest step that was given to the engine and has not ended."""

    step: int
    """Number of the step."""
    row: int
    """Number of the row in it."""
    end: int
    """Tokens whose KV is in the pages once the step has ended."""
    draws: bool
    """Whether the row draws a token."""


@attrs.define(eq=False)
class Sequence:
    """A request, its tokens so far and its lease."""

    request: Request
    plan: Plan
    tokens: bytes
    """The prompt and all generated tokens, packed."""
    phase: Phase
    arrived_at: float
    order: int
    """Arrival number at this worker: the latest arrival is preempted first, the oldest is never starved."""
    lease: int = 0
    pages: tuple[int, ...] = ()
    computed: int = 0
    """Tokens whose KV is in the pages."""
    retired: int = 0
    """Tokens whose pages were given to the index, in whole pages."""
    acknowledged: int = 0
    """Retired tokens whose Insert the shard has answered."""
    cached_tokens: int = 0
    """Prompt tokens that were cached or fetched when its pages were acquired, before its first token."""
    growing: bool = False
    """Whether an AllocMem is with the shard."""
    starved: bool = False
    """Whether the last AllocMem was refused because the pool has no free page."""
    logprobs: Logprobs | UnsetType = UNSET
    """Log probabilities of the latest token, where the request wants them."""
    dropped: bool = False
    """Whether it ended while a step or an Adopt was under way; it is released when that has finished."""
    flight: Flight | None = None
    """Its latest unfinished row; None while the engine has none of it."""
    voided: bool = False
    """Whether its last row was void: the next one is drawn before another is launched."""
    timings: Timings = Timings()
    started_at: float | None = None
    """When its first batch started."""
    token_at: float | None = None
    """When the first token of this attempt was drawn."""
    owned_at: float | None = None
    """When decoding began at this worker."""
    asked_at: float = 0.0
    """When the Handoff was last sent."""
    came_with: int = 0
    """The lease that its Handoff named; 0 where it came by a Prefill."""
    arriving: bool = False
    """Whether it came by Handoff from another shard and its pages are still being fetched from there."""
    origins: Origins = attrs.field(factory=Origins)
    behind: Sequence | None = None
    """An earlier prompt that computes a prefix of this one, which waits without pages until it is indexed."""
    shares: int = 0
    """Length in tokens of the prefix shared with ``behind``."""
    sequel: bytes = b""
    """The prompt's last tokens and what followed them the last time, packed; empty if nothing is known."""
    followers: list[Sequence] = attrs.field(factory=list)
    """Sequences that wait for this one to compute a shared prefix."""

    @classmethod
    def handed_over(cls, message: Handoff, now: float, order: int) -> Sequence:
        """A sequence from a Handoff: with its lease, or without pages where it crosses to another shard."""
        one = cls(
            message.request,
            message.plan,
            message.request.tokens + message.generated,
            Phase.ADOPTING,
            now,
            order,
        )
        one.came_with, one.cached_tokens, one.sequel = message.lease, message.cached_tokens, message.sequel
        one.timings, one.origins, one.started_at = message.timings, message.origins, now
        one.token_at = now - message.first_token_age_s
        if one.crosses:
            one.phase, one.arriving = Phase.WAITING, True
        else:
            one.lease, one.pages = message.lease, message.pages
            one.computed, one.retired = one.length - 1, message.retired_tokens
            one.acknowledged = message.retired_tokens
        return one

    def handoff(self, now: float) -> Handoff:
        """The message that hands this sequence to its decode worker."""
        return Handoff(
            self.request, self.plan, self.lease, self.pages, self.fresh, self.acknowledged, self.cached_tokens,
            self.timings, self.origins, now - (self.token_at or now), self.sequel,
        )  # fmt: skip

    @property
    def key(self) -> tuple[str, int]:
        """Request id and attempt, the key by which handlers are idempotent."""
        return self.request.id, self.request.attempt

    @property
    def length(self) -> int:
        """Number of tokens, generated ones included."""
        return count(self.tokens)

    @property
    def generated(self) -> int:
        """Number of generated tokens over all attempts."""
        return self.length - self.request.prompt_tokens

    @property
    def fresh(self) -> bytes:
        """Tokens generated in this attempt, packed."""
        return self.tokens[len(self.request.tokens) :]

    @property
    def score_count(self) -> int | None:
        """Most probable tokens to report per prompt position; None when nothing is left to report.

        The whole prompt is reported before the attempt's first token. After it, a worker that resumes the
        sequence, or acquires its pages again, may use cached KV.
        """
        return None if len(self.tokens) > len(self.request.tokens) else self.request.sampling.prompt_logprobs

    @property
    def decoding(self) -> bool:
        """Whether only the latest token is missing from the pages, and this attempt generated it."""
        return self.length - self.computed == 1 and len(self.tokens) > len(self.request.tokens)

    @property
    def guided(self) -> bool:
        """Whether a grammar restricts its answer."""
        adjust = self.request.sampling.adjust
        return adjust is not None and bool(adjust.grammar)

    def remaining(self, max_context: int) -> int:
        """Tokens until the next limit: ``max_tokens`` or the context."""
        return min(self.request.prompt_tokens + self.request.max_tokens, max_context) - self.length

    def remaining_alike(self, max_context: int) -> int:
        """Tokens for which the same rules hold: end tokens are forbidden up to ``min_tokens``."""
        adjust, remaining = self.request.sampling.adjust, self.remaining(max_context)
        if adjust is None or self.generated >= adjust.min_tokens:
            return remaining
        return min(remaining, adjust.min_tokens - self.generated)

    def hinted(self, page_tokens: int) -> int:
        """Tokens that the plan expects to be cached or fetched before it runs, in whole pages."""
        hint = max(self.plan.expected_tokens, self.plan.source_tokens)
        return usable(hint, self.length, page_tokens)

    def to_compute(self, page_tokens: int) -> int:
        """Tokens whose KV it has to compute itself; while it waits for pages, an estimate.

        The estimate trusts the plan's hint and the prefix that ``behind`` computes.
        """
        if self.phase is not Phase.WAITING:
            return self.length - self.computed
        return self.length - max(self.hinted(page_tokens), self.shares if self.behind else 0)

    def go(self, phase: Phase) -> None:
        """Enter a phase; assert that the transition is allowed."""
        assert phase in TRANSITIONS[self.phase], f"{self.key}: {self.phase} -> {phase}"
        self.phase = phase

    def granted(self, message: Acquired, page_tokens: int, page_bytes: int) -> None:
        """Accept a lease, become READY, and record where the KV that it holds came from."""
        self.go(Phase.READY)
        self.lease, self.pages = message.lease, message.pages
        self.retired = self.acknowledged = message.cached_tokens
        if message.sequel:
            self.sequel = span(self.tokens, max(self.length - BEFORE_SEQUEL, 0), self.length) + message.sequel
        self.computed = message.cached_tokens + message.fetched_tokens
        device, host, disk = (pages * page_tokens for pages in message.found_pages)
        found, moved = device + host + disk, message.fetched_bytes
        if self.arriving:
            here = {"matched_decode_tokens": found, "bytes_to_decode": moved}
            self._note(bytes_saved=found // page_tokens * page_bytes, **here)
        elif self.token_at is None:
            self.cached_tokens = min(self.computed, self.request.prompt_tokens)
            self._note(matched_device_tokens=device, matched_host_tokens=host, matched_disk_tokens=disk)
            self._note(fetched_tokens=self.computed - found, bytes_fetched=moved)

    def adopted(self, page_tokens: int, page_bytes: int) -> None:
        """Become READY after an Adopt on the same shard; record the bytes saved, as no KV moved."""
        self.go(Phase.READY)
        self._note(bytes_saved=pages_for(self.computed, page_tokens) * page_bytes)

    def begin(self, now: float) -> float:
        """Record the start of its first step; returns the milliseconds since it arrived here."""
        self.started_at = now
        return self._time(queue_ms=(now - self.arrived_at) * 1e3)

    def prefilled(self, now: float) -> float:
        """Record its first token; returns the milliseconds since its first step began."""
        self.token_at = self.owned_at = now
        return self._time(prefill_ms=(now - (self.started_at or now)) * 1e3)

    def decoded(self, now: float) -> float:
        """Record its last token; returns the milliseconds since decoding began here."""
        return self._time(decode_ms=(now - (self.owned_at or now)) * 1e3)

    def _time(self, **took: float) -> float:
        self.timings = attrs.evolve(self.timings, **took)
        return sum(took.values())

    def returns(self, tokens: int, page_tokens: int, page_bytes: int) -> None:
        """Record the bytes to move when its first ``tokens`` tokens are copied back to the prompt's shard."""
        more = tokens // page_tokens - self.request.prompt_tokens // page_tokens
        self._note(bytes_to_prefill=max(more, 0) * page_bytes)

    def _note(self, **origins: int) -> None:
        self.origins = attrs.evolve(self.origins, **origins)

    @property
    def next_start(self) -> int:
        """Position at which its next row begins: behind the row that the engine has, if it has one."""
        return self.computed if self.flight is None else self.flight.end

    @property
    def to_run(self) -> int:
        """Tokens for its next rows: those behind the row that the engine has, and the one that this row draws.

        0 where its last row was void and the engine has the row behind it, which is void too.
        """
        return self.length - self.next_start + (self.flight is not None and self.flight.draws)

    @property
    def decodes_next(self) -> bool:
        """Whether its next row is a decode row: :attr:`decoding`, once the row that the engine has is done."""
        return self.decoding if self.flight is None else self.flight.draws

    def launched(self, step: int, number: int, row: Row) -> None:
        """Record that the engine was given ``row``, number ``number`` of step ``step``."""
        self.flight = Flight(step, number, row.end, row.sample is not None)

    def row(self, limit: int) -> Row:
        """The next row of at most ``limit`` tokens."""
        if self.flight is not None and self.flight.draws:
            return self._row_behind(self.flight)
        start = self.next_start
        stop = min(self.length, start + limit)
        assert start < stop, f"{self.key}: nothing to run"
        sample = self.request.sampling if stop == self.length else None
        return Row(
            tokens=span(self.tokens, start, stop),
            start=start,
            pages=self.pages,
            sample=sample,
            past=None if sample is None or sample.adjust is None else self._past(sample.adjust),
            score=None if (most := self.score_count) is None else self._score(most, start, stop),
        )

    def _row_behind(self, flight: Flight) -> Row:
        """The row behind one that draws its token."""
        how = self.request.sampling
        past = None if how.adjust is None else self._past(how.adjust, 1)
        row = Row(pack([0]), flight.end, self.pages, how, past, follows=flight.row)
        return attrs.evolve(row, ends=pack(self.request.stop_tokens)) if row.late else row

    def _score(self, most: int, start: int, stop: int) -> Score | None:
        """What a row from ``start`` to ``stop`` reports: prompt tokens only, see :attr:`score_count`."""
        follows = span(self.tokens, start + 1, stop + 1)
        return Score(follows, most) if follows else None

    def _past(self, adjust: Adjustments, unknown: int = 0) -> Past:
        """Prompt and output so far, split at ``prompt_tokens``: a resumed request's ``tokens`` hold both.

        ``unknown``: tokens that will have been drawn before the row draws, and are not known yet.
        """
        prompt, ends = self.request.prompt_tokens, self.request.stop_tokens
        early = self.generated + unknown < adjust.min_tokens
        return Past(
            prompt=span(self.tokens, 0, prompt) if adjust.repetition != 1 else b"",
            output=span(self.tokens, prompt, self.length),
            allowed=adjust.allowed,
            forbidden=pack(ends) if early and not adjust.grammar else b"",
        )

    @property
    def crosses(self) -> bool:
        """Whether prefill and decode run on different shards."""
        return self.plan.decode_shard not in ("", self.plan.shard)

    def take(self, end: int, drawn: bytes, max_context: int) -> str | None:
        """Append the tokens that a row ending at ``end`` drew; returns the finish reason, or None.

        The KV of all drawn tokens but the last is in the pages already. Tokens after one that ends the
        sequence are dropped.
        """
        finish, self.voided = None, False
        for token in unpack(drawn):
            self.tokens += pack([token])
            if (finish := self._finish_reason(max_context)) is not None:
                break
        self.computed = min(end + max(count(drawn) - 1, 0), self.length - bool(drawn))
        return finish

    def update(self, since: int, finish: str | None = None) -> TokenUpdate:
        """The Frontend's update: all tokens from position ``since``. ``finish``: why the sequence ended."""
        new = span(self.tokens, since, self.length)
        update = TokenUpdate(*self.key, since, new, self.cached_tokens, finish, logprobs=self.logprobs)
        return attrs.evolve(update, timings=self.timings, origins=self.origins) if finish else update

    def room(self, page_tokens: int) -> int:
        """Tokens that can be run, behind those that the engine has, before another page is needed."""
        return len(self.pages) * page_tokens - self.next_start

    def _finish_reason(self, max_context: int) -> str | None:
        newest = int.from_bytes(self.tokens[-TOKEN_BYTES:], "little")
        if newest in self.request.stop_tokens:
            return "stop"
        if self.generated >= self.request.max_tokens or self.length >= max_context:
            return "length"
        return None

    def pages_wanted(self, page_tokens: int, max_context: int) -> int:
        """1 when the last page is in use and the sequence may outgrow it, otherwise 0.

        This requests the next page up to a page's worth of tokens before it is needed.
        """
        end = min(self.request.prompt_tokens + self.request.max_tokens, max_context)
        full = len(self.pages) * page_tokens
        return int(full < end and self.length > full - page_tokens)

    def headroom(self, page_tokens: int, max_context: int) -> int:
        """Pages to acquire beyond those for the present tokens: one, or none where the end comes first."""
        end = min(self.request.prompt_tokens + self.request.max_tokens, max_context)
        return min(1, pages_for(max(end, self.length), page_tokens) - pages_for(self.length, page_tokens))


def usable(tokens: int, length: int, page_tokens: int) -> int:
    """Cached ``tokens`` that a sequence can use: whole pages, with at least one token left to compute."""
    return min(tokens, length - 1) // page_tokens * page_tokens
