"""One request as a worker holds it: its tokens, its pages, and how far it has come.

There is no separate prefill and decode state. A sequence has ``length`` tokens of which ``computed`` have their
KV in its pages; the next row runs the rest, or a part of it, and draws a token when it reaches the end. A prompt
is a sequence far behind its end, a decoding one is one token behind, and a resumed or preempted one is a prompt again.
"""

from __future__ import annotations

import enum

import attrs
from msgspec import UNSET, UnsetType

from memserve.accounts import Origins, Timings
from memserve.drawing import Adjustments, Logprobs
from memserve.engine.plans import Past, Row, Tell
from memserve.messages import Handoff, Plan, Request, TokenUpdate
from memserve.pool_messages import Acquired
from memserve.tokens import TOKEN_BYTES, count, pack, pages_for, span, unpack

BEFORE_SEQUEL = 8
"""Tokens before a sequel that are kept with it: where it begins is found by them."""


class Phase(enum.Enum):
    """Where a sequence stands. ``TRANSITIONS`` is the whole life."""

    WAITING = "waiting"
    """An Acquire is with the shard."""
    ADOPTING = "adopting"
    """It came by Handoff; an Adopt is with the shard."""
    READY = "ready"
    """It has pages and takes part in batches."""
    LEAVING = "leaving"
    """Handed over; the lease is still ours until HandoffTaken."""
    ENDED = "ended"


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.WAITING: frozenset({Phase.READY, Phase.ENDED}),
    Phase.ADOPTING: frozenset({Phase.READY, Phase.ENDED}),
    Phase.READY: frozenset({Phase.WAITING, Phase.LEAVING, Phase.ENDED}),
    Phase.LEAVING: frozenset({Phase.ENDED}),
    Phase.ENDED: frozenset(),
}


@attrs.define(eq=False)
class Sequence:
    """A request, its tokens so far and its lease."""

    request: Request
    plan: Plan
    tokens: bytes
    """Prompt and everything generated, packed."""
    phase: Phase
    arrived_at: float
    order: int
    """Arrival number at this worker: the youngest is preempted first, the oldest is never starved."""
    lease: int = 0
    pages: tuple[int, ...] = ()
    computed: int = 0
    """Tokens whose KV is in the pages."""
    retired: int = 0
    """Tokens whose pages were given to the index; whole pages."""
    acknowledged: int = 0
    """Those of them that the shard has answered for."""
    cached_tokens: int = 0
    """Prompt tokens that the first acquire found in the index."""
    growing: bool = False
    """An AllocMem is with the shard."""
    starved: bool = False
    """The last AllocMem was refused: the pool has no page to give."""
    logprobs: Logprobs | UnsetType = UNSET
    """Of the newest token, where they are wanted."""
    dropped: bool = False
    """Ended while a batch or an Adopt was under way; let go of it when that is over."""
    timings: Timings = Timings()
    started_at: float | None = None
    """First batch."""
    token_at: float | None = None
    """First token of this attempt."""
    owned_at: float | None = None
    """Decode began here."""
    asked_at: float = 0.0
    """When the Handoff was last sent."""
    came_with: int = 0
    """The lease that its Handoff named; 0: it came by a Prefill."""
    arriving: bool = False
    """It came by Handoff from another shard, and its pages are still fetched from there."""
    origins: Origins = attrs.field(factory=Origins)
    behind: Sequence | None = None
    """An earlier prompt that computes tokens of this one, which waits without pages until they are in the index."""
    shares: int = 0
    """So many tokens."""
    sequel: bytes = b""
    """What came after its prompt the last time, packed, behind the prompt's own last tokens; empty: nothing is known."""
    followers: list[Sequence] = attrs.field(factory=list)
    """Those that wait behind it."""

    @classmethod
    def handed_over(cls, message: Handoff, now: float, order: int) -> Sequence:
        """What comes by a :meth:`handoff`: with its lease, or with pages still to come where it crosses to another shard."""
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
        """Itself, for its decode worker."""
        return Handoff(
            self.request, self.plan, self.lease, self.pages, self.fresh, self.acknowledged, self.cached_tokens,
            self.timings, self.origins, now - (self.token_at or now), self.sequel,
        )  # fmt: skip

    @property
    def key(self) -> tuple[str, int]:
        """Request and attempt: what every handler is idempotent by."""
        return self.request.id, self.request.attempt

    @property
    def length(self) -> int:
        """Tokens, generated ones included."""
        return count(self.tokens)

    @property
    def generated(self) -> int:
        """New tokens over all attempts."""
        return self.length - self.request.prompt_tokens

    @property
    def fresh(self) -> bytes:
        """Tokens generated in this attempt."""
        return self.tokens[len(self.request.tokens) :]

    @property
    def tells(self) -> int | None:
        """How many of the likeliest tokens it still has to tell at each position of its prompt; None: nothing is told.

        All is told by the first token of the attempt: who continues it, or gets its pages anew, need not compute it again.
        """
        return None if len(self.tokens) > len(self.request.tokens) else self.request.sampling.prompt_logprobs

    @property
    def decoding(self) -> bool:
        """Only the newest token is missing from the pages, and it was generated by this attempt."""
        return self.length - self.computed == 1 and len(self.tokens) > len(self.request.tokens)

    @property
    def guided(self) -> bool:
        """Whether a grammar says what it may say."""
        adjust = self.request.sampling.adjust
        return adjust is not None and bool(adjust.grammar)

    def unsaid(self, max_context: int) -> int:
        """Tokens that may still come, all by the same rules: those that end the answer too early are forbidden up to a place."""
        adjust, early = self.request.sampling.adjust, self.request.max_tokens
        if adjust is not None and self.generated < adjust.min_tokens:
            early = adjust.min_tokens
        return (
            min(self.request.prompt_tokens + min(early, self.request.max_tokens), max_context) - self.length
        )

    def hinted(self, page_tokens: int) -> int:
        """How many of its tokens its plan says will be there before it runs, fetched ones included."""
        hint = max(self.plan.expected_tokens, self.plan.source_tokens)
        return usable(hint, self.length, page_tokens)

    def to_compute(self, page_tokens: int) -> int:
        """Tokens whose KV it will have to compute itself; until it has pages, as far as its plan and its leader tell."""
        if self.phase is not Phase.WAITING:
            return self.length - self.computed
        return self.length - max(self.hinted(page_tokens), self.shares if self.behind else 0)

    def go(self, phase: Phase) -> None:
        """Enter a phase."""
        assert phase in TRANSITIONS[self.phase], f"{self.key}: {self.phase} -> {phase}"
        self.phase = phase

    def granted(self, message: Acquired, page_tokens: int, page_bytes: int) -> None:
        """Take a lease, and note where what it holds came from."""
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
        """It was handed over on one shard: nothing had to be moved."""
        self.go(Phase.READY)
        self._note(bytes_saved=pages_for(self.computed, page_tokens) * page_bytes)

    def begin(self, now: float) -> float:
        """Its first step begins, after so many milliseconds here."""
        self.started_at = now
        return self._time(queue_ms=(now - self.arrived_at) * 1e3)

    def prefilled(self, now: float) -> float:
        """Its first token is there, so many milliseconds later."""
        self.token_at = self.owned_at = now
        return self._time(prefill_ms=(now - (self.started_at or now)) * 1e3)

    def decoded(self, now: float) -> float:
        """And its last one, so many milliseconds after decoding began here."""
        return self._time(decode_ms=(now - (self.owned_at or now)) * 1e3)

    def _time(self, **took: float) -> float:
        self.timings = attrs.evolve(self.timings, **took)
        return sum(took.values())

    def returns(self, tokens: int, page_tokens: int, page_bytes: int) -> None:
        """Its first ``tokens`` tokens are to be where its prompt is."""
        more = tokens // page_tokens - self.request.prompt_tokens // page_tokens
        self._note(bytes_to_prefill=max(more, 0) * page_bytes)

    def _note(self, **origins: int) -> None:
        self.origins = attrs.evolve(self.origins, **origins)

    def row(self, limit: int) -> Row:
        """The next row of at most ``limit`` tokens."""
        stop = min(self.length, self.computed + limit)
        assert self.computed < stop, f"{self.key}: nothing to run"
        sample = self.request.sampling if stop == self.length else None
        return Row(
            tokens=span(self.tokens, self.computed, stop),
            start=self.computed,
            pages=self.pages,
            sample=sample,
            past=None if sample is None or sample.adjust is None else self._past(sample.adjust),
            tell=None if (told := self.tells) is None else self._tell(told, stop),
        )

    def _tell(self, told: int, stop: int) -> Tell | None:
        """What a row up to ``stop`` tells. Nothing of an answer is behind a prompt that is told of; see :attr:`tells`."""
        follows = span(self.tokens, self.computed + 1, stop + 1)
        return Tell(follows, told) if follows else None

    def _past(self, adjust: Adjustments) -> Past:
        """Of the request's own prompt: a resumed one carries its answer so far behind it."""
        prompt, ends = self.request.prompt_tokens, self.request.stop_tokens
        return Past(
            prompt=span(self.tokens, 0, prompt) if adjust.repetition != 1 else b"",
            output=span(self.tokens, prompt, self.length),
            forbidden=pack(ends) if self.generated < adjust.min_tokens and not adjust.grammar else b"",
        )

    @property
    def crosses(self) -> bool:
        """Whether its prefill and its decode are on different shards."""
        return self.plan.decode_shard not in ("", self.plan.shard)

    def take(self, end: int, drawn: bytes, max_context: int) -> str | None:
        """Its row ended at ``end`` and drew these tokens, all but the last of which are in the pages too.

        They are taken up to the one that ends the sequence; why it is over, or None.
        """
        finish = None
        for token in unpack(drawn):
            self.tokens += pack([token])
            if (finish := self._finish_reason(max_context)) is not None:
                break
        self.computed = min(end + max(count(drawn) - 1, 0), self.length - bool(drawn))
        return finish

    def update(self, since: int, finish: str | None = None) -> TokenUpdate:
        """What its Frontend is told of its tokens ``since`` a position. ``finish``: why the last is the last."""
        new = span(self.tokens, since, self.length)
        update = TokenUpdate(*self.key, since, new, self.cached_tokens, finish, logprobs=self.logprobs)
        return attrs.evolve(update, timings=self.timings, origins=self.origins) if finish else update

    def room(self, page_tokens: int) -> int:
        """Tokens that can be run before another page is needed."""
        return len(self.pages) * page_tokens - self.computed

    def _finish_reason(self, max_context: int) -> str | None:
        newest = int.from_bytes(self.tokens[-TOKEN_BYTES:], "little")
        if newest in self.request.stop_tokens:
            return "stop"
        if self.generated >= self.request.max_tokens or self.length >= max_context:
            return "length"
        return None

    def pages_wanted(self, page_tokens: int, max_context: int) -> int:
        """1 when the last page is in use and the sequence may outgrow it, else 0: asked for a page's worth of steps ahead."""
        end = min(self.request.prompt_tokens + self.request.max_tokens, max_context)
        full = len(self.pages) * page_tokens
        return int(full < end and self.length > full - page_tokens)

    def headroom(self, page_tokens: int, max_context: int) -> int:
        """Pages beyond the present tokens to acquire at once: one, unless the end is nearer."""
        end = min(self.request.prompt_tokens + self.request.max_tokens, max_context)
        return min(1, pages_for(max(end, self.length), page_tokens) - pages_for(self.length, page_tokens))


def usable(tokens: int, length: int, page_tokens: int) -> int:
    """Of so many cached tokens of a sequence, those in whole pages that leave one to compute."""
    return min(tokens, length - 1) // page_tokens * page_tokens
