"""The core of a prefill or decode worker: accepts requests, keeps a running batch, hands sequences over.

Both kinds of worker are this one state machine. A worker that receives a Prefill runs the prompt; when the
plan names another worker for decoding, it hands the sequence over with its lease. A worker that receives a
Handoff adopts the lease and continues. Handlers are idempotent by (request, attempt): a repeated or outdated
message changes nothing.

A lease belongs to the worker that acquired it until the shard has answered the next worker's Adopt. The owner
frees it when the sequence ends; the shard frees it when the owner is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from msgspec import UNSET

from memserve.actions import Action, BatchDone, Log, RunBatch, Stop
from memserve.engine.batching import WorkerSettings
from memserve.engine.drafting import SEQUEL_TOKENS, Drafting
from memserve.engine.ended import EndedAttempts
from memserve.engine.following import Following
from memserve.engine.load import StepWatch, load_of, swap_least
from memserve.engine.outbox import Outbox
from memserve.engine.paging import Paging
from memserve.engine.sequence import Phase, Sequence
from memserve.engine.steps import Steps
from memserve.errors import PoolError
from memserve.identity import ActorId
from memserve.messages import (
    Cancel,
    Change,
    Failed,
    Gone,
    Handoff,
    HandoffTaken,
    Inquire,
    Inquired,
    Message,
    Prefill,
)
from memserve.pool_messages import Acquired, Adopted, Allocated, Freed, Inserted, PoolRefused
from memserve.presence import Presence
from memserve.tokens import count

HANDOFF_REPEAT_S = 2.0
"""How long a Handoff may stay unanswered before it is sent again."""


@attrs.define
class WorkerCore:
    """See the module docstring. ``shard`` is the only shard whose pages this worker's engine can reach."""

    presence: Presence
    shard: ActorId
    settings: WorkerSettings
    _outbox: Outbox = attrs.field(factory=Outbox, init=False)
    _paging: Paging = attrs.field(init=False)
    _following: Following = attrs.field(init=False)
    _steps: Steps = attrs.field(init=False)
    _live: dict[tuple[str, int], Sequence] = attrs.field(factory=dict, init=False)
    _ended: EndedAttempts = attrs.field(factory=EndedAttempts, init=False)
    _watch: StepWatch = attrs.field(factory=StepWatch, init=False)
    _arrivals: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        settings, least = self.settings, swap_least(self.presence.member.costs, self.settings.max_context)
        self._paging = Paging(
            self.shard, settings.page_tokens, settings.max_context, settings.retire,
            self._outbox, settings.fetch_s, settings.ahead, least, SEQUEL_TOKENS if settings.draft else 0,
        )  # fmt: skip
        self._following = Following(self._paging, settings.retire)
        drafting = Drafting(settings.draft, settings.page_tokens, settings.max_context, self._outbox)
        self._steps = Steps(self.presence.member.id, settings, drafting, self._watch)

    # ---- the five verbs ------------------------------------------------------------------------------------

    def receive(self, sender: ActorId, message: Message | BatchDone, now: float) -> None:
        """Handle one message. Kinds that no worker handles are ignored."""
        self._paging.now = now
        handler = _HANDLERS.get(type(message))
        if handler is not None:
            handler(self, sender, message, now)

    def advance(self, now: float) -> None:
        """Act on expired deadlines, and give the engine the steps that it takes."""
        self._paging.now = now
        self._paging.repeat()
        self._repeat_handoffs(now)
        if self._steps.idle:
            self._paging.relieve_shortage(self._in_phase(Phase.READY), now)
        while self._start_step(now):
            pass

    def take(self) -> list[Action]:
        """All pending actions. New tokens leave as one message per Frontend."""
        return self._outbox.take()

    @property
    def deadline(self) -> float:
        """When ``advance`` must be called next."""
        repeats = [one.asked_at + HANDOFF_REPEAT_S for one in self._in_phase(Phase.LEAVING)]
        shortage = self._paging.deadline if self._steps.idle else float("inf")
        return min([self._paging.repeat_at, shortage, *repeats])

    @property
    def idle(self) -> bool:
        """Whether no sequence is held and no step is running."""
        return not self._live and self._steps.idle

    def check(self) -> None:
        """Assert every invariant."""
        for one in self._live.values():
            assert one.phase is not Phase.ENDED, one.key
            assert 0 <= one.acknowledged <= one.retired <= one.computed <= one.length, one.key
            assert one.computed <= len(one.pages) * self.settings.page_tokens, one.key
            assert (one.lease == 0) == (one.phase is Phase.WAITING), one.key
            assert one.behind is None or one.behind.key in self._live, one.key
        self._steps.check()

    def gauges(self) -> dict[str, float]:
        """Load gauges and counters for the heartbeat."""
        load = load_of(self._live.values(), self.presence.member.id, self.settings.page_tokens)
        load = self._watch.under_way(load, self._paging.now)
        load["rows_max"] = float(self.settings.limits.rows)
        seen = self._watch.gauges(self.presence.member.costs, self._paging.now)
        return {**load, **seen, **self._outbox.counters}

    def needs(self) -> tuple[ActorId, ...]:
        """Decode workers with an unanswered Handoff: only their answer or their death ends the wait."""
        return tuple(dict.fromkeys(one.plan.decode for one in self._in_phase(Phase.LEAVING)))

    # ---- incoming requests ---------------------------------------------------------------------------------

    def _on_prefill(self, sender: ActorId, message: Prefill, now: float) -> None:
        request = message.request
        if self._outdated(request.id, request.attempt):
            return
        if len(self._live) >= self.settings.requests_max and not request.attempt:
            self._outbox.send(request.frontend, _overloaded(request.id, request.attempt))
            return
        one = self._admit(
            Sequence(request, message.plan, request.tokens, Phase.WAITING, now, self._next_order())
        )
        self._outbox.count("prompts_taken_total")
        self._following.acquire(one, self._live.values())

    def _on_handoff(self, sender: ActorId, message: Handoff, now: float) -> None:
        request = message.request
        known = self._live.get((request.id, request.attempt))
        if known is not None:
            # With another lease: two schedulers planned this attempt, and the message's lease is redundant.
            mine = known.came_with == message.lease
            if not (mine and (known.phase is Phase.ADOPTING or known.arriving)):
                self._outbox.send(sender, HandoffTaken(*known.key, adopted=mine))
            return
        if self._outdated(request.id, request.attempt):
            self._outbox.send(sender, HandoffTaken(request.id, request.attempt, adopted=False))
            return
        one = self._admit(Sequence.handed_over(message, now, self._next_order()))
        if one.arriving:
            self._paging.move(one, message.lease, sender)
        else:
            self._paging.adopt(one, sender)

    def _admit(self, one: Sequence) -> Sequence:
        for older in self._attempts(one.request.id):
            self._end(older)
        self._live[one.key] = one
        self.presence.changed()
        return one

    def _outdated(self, request: str, attempt: int) -> bool:
        newest = max((one.request.attempt for one in self._attempts(request)), default=-1)
        return attempt <= max(newest, self._ended.attempt(request))

    def _attempts(self, request: str) -> list[Sequence]:
        return [one for one in self._live.values() if one.request.id == request]

    def _next_order(self) -> int:
        self._arrivals += 1
        return self._arrivals

    # ---- the shard's answers -------------------------------------------------------------------------------

    def _on_acquired(self, sender: ActorId, message: Acquired, now: float) -> None:
        one = self._paging.answered(message.call)
        if one is None:
            return  # the call was withdrawn before this answer arrived: the withdrawal ends the lease
        one.granted(message, self.settings.page_tokens, self.settings.page_bytes)
        if one.arriving:
            one.arriving = False
            self._taken(one, now)
            return
        self._outbox.count("requested_tokens_total", one.length)
        self._outbox.count("cached_tokens_total", one.computed)
        expected = one.hinted(self.settings.page_tokens)
        if one.computed < expected and one.token_at is None:
            self._outbox.log("hint was stale", one, expected_tokens=expected, found_tokens=one.computed)
            self._outbox.count("stale_hints_total")
        self._following.lead_on(one, self._live.values())

    def _on_allocated(self, sender: ActorId, message: Allocated, now: float) -> None:
        one = self._paging.answered(message.call)
        if one is not None:
            one.growing = one.starved = False
            one.pages += message.pages

    def _on_inserted(self, sender: ActorId, message: Inserted, now: float) -> None:
        one = self._paging.inserted(message.call)
        if one is not None:
            self._following.lead_on(one, self._live.values())

    def _on_freed(self, sender: ActorId, message: Freed, now: float) -> None:
        self._paging.freed(message.call)

    def _on_adopted(self, sender: ActorId, message: Adopted, now: float) -> None:
        one = self._paging.answered(message.call)
        if one is not None:
            one.adopted(self.settings.page_tokens, self.settings.page_bytes)
            self._taken(one, now)

    def _taken(self, one: Sequence, now: float) -> None:
        """The sequence is this worker's now: its lease was adopted, or its pages arrived in a new lease."""
        self._outbox.send(one.plan.prefill, HandoffTaken(*one.key, adopted=True))
        one.owned_at = now
        if one.dropped:
            self._let_go(one)
            return
        one.timings = attrs.evolve(one.timings, handoff_ms=(now - (one.token_at or now)) * 1e3)
        took = one.timings.handoff_ms
        self._outbox.log("decode started", one, handoff_ms=took, moved_bytes=one.origins.bytes_to_decode)
        self._outbox.count("handoffs_taken_total", 1)
        self._outbox.count("handoff_bytes_saved_total", one.origins.bytes_saved)
        self._paging.grow(one)

    def _on_refused(self, sender: ActorId, message: PoolRefused, now: float) -> None:
        one = self._paging.answered(message.call)
        if one is None or one.phase is Phase.LEAVING:
            return  # the next owner adopted the lease before our last Insert arrived, and repeats that Insert
        if one.phase is Phase.WAITING:
            if one.arriving:
                self._outbox.send(one.plan.prefill, HandoffTaken(*one.key, adopted=False))
            hopeless = message.code == PoolError.TOO_LARGE
            # A client that has begun to read its answer is not refused for lack of room.
            begun = bool(one.fresh) or one.request.attempt > 0
            status = 400 if hopeless else 503
            self._fail(one, message.code, message.message, status=status, retry=begun and not hopeless)
        elif message.code == PoolError.NO_PAGES:
            one.growing, one.starved = False, True
        else:  # the lease is not ours, or no longer ours
            if one.phase is Phase.ADOPTING:
                self._outbox.send(one.plan.prefill, HandoffTaken(*one.key, adopted=False))
                one.go(Phase.READY)
            self._fail(one, "lease_lost", message.message, status=503, retry=True)

    # ---- steps ---------------------------------------------------------------------------------------------

    def _start_step(self, now: float) -> bool:
        """Give the engine one more step; whether there was one to give."""
        batch = self._steps.next(self._in_phase(Phase.READY), self.presence.member.costs, now)
        if batch is None:
            return False
        for one in batch.sequences:
            if one.started_at is None:
                queued = one.begin(now)
                self._outbox.log("prefill started", one, cached_tokens=one.cached_tokens, queue_ms=queued)
            self._live[one.key] = self._live.pop(one.key)  # moves behind those that got no row
        self._outbox.first(RunBatch(batch.plan))
        return True

    def _on_batch_done(self, sender: ActorId, message: BatchDone, now: float) -> None:
        member = self.presence.member
        batch = self._steps.ended(message.result, member.site, member.costs, now)
        self._outbox.count("steps_total", 1)
        self._outbox.count("step_ms_total", message.result.step_ms)
        self._outbox.count("step_threads_total", message.result.threads)
        self._outbox.report_scores(batch.sequences, message.result.prompts)
        for row, (one, end) in enumerate(zip(batch.sequences, batch.ends, strict=True)):
            ran = batch.plan.rows[row]
            if not one.decoding and ran.follows is None:
                self._outbox.count("prefill_tokens_total", count(ran.tokens))
            if one.dropped:
                if one.flight is None:
                    self._let_go(one)
            elif row in message.result.void:
                one.voided = True
            else:
                one.logprobs = message.result.logprobs.get(row, UNSET)
                self._take(one, end, batch.drawn(row, message.result), now)

    def _take(self, one: Sequence, end: int, drawn: bytes, now: float) -> None:
        """Apply a row that ended at ``end``. It drew no token, one, or more where a draft was accepted."""
        if drawn and one.token_at is None:
            self._first_token(one, now)
        since = one.length
        finish = one.take(end, drawn, self.settings.max_context)
        self._paging.retire(one)
        if not drawn:
            return
        self._outbox.count("generated_tokens_total", one.length - since)
        if finish is not None:
            self._finish(one, since, finish, now)
            return
        self._outbox.update(one.request.frontend, one.update(since))
        if one.plan.decode != self.presence.member.id:
            self._hand_over(one, now)
        else:
            self._paging.grow(one)

    def _first_token(self, one: Sequence, now: float) -> None:
        # Predictions do not include prompt log probabilities.
        if one.plan.first_token_s and one.score_count is None:
            self._watch.punctuality.saw(one.plan.first_token_s, now - one.arrived_at, now)
        self._outbox.log("prefill finished", one, prefill_ms=one.prefilled(now))

    def _finish(self, one: Sequence, since: int, finish: str, now: float) -> None:
        decode_ms = one.decoded(now)
        if count(one.fresh) > 1:
            self._outbox.log("decode finished", one, output_tokens=one.generated, decode_ms=decode_ms)
        if self.settings.returns and one.crosses and one.came_with:
            self._paging.give_back(one, self.settings.page_bytes)
        self._outbox.update(one.request.frontend, one.update(since, finish))
        self._end(one)

    # ---- handoff -----------------------------------------------------------------------------------------

    def _hand_over(self, one: Sequence, now: float) -> None:
        one.go(Phase.LEAVING)
        self._outbox.log("handed over", one, to=one.plan.decode, pages=len(one.pages))
        self._outbox.count("handoffs_total", 1)
        self._send_handoff(one, now)

    def _send_handoff(self, one: Sequence, now: float) -> None:
        one.asked_at = now
        self._outbox.send(one.plan.decode, one.handoff(now))

    def _repeat_handoffs(self, now: float) -> None:
        for one in self._in_phase(Phase.LEAVING):
            if now >= one.asked_at + HANDOFF_REPEAT_S:
                self._send_handoff(one, now)

    def _on_handoff_taken(self, sender: ActorId, message: HandoffTaken, now: float) -> None:
        one = self._live.get((message.request, message.attempt))
        if one is not None and one.phase is Phase.LEAVING:
            self._remove(one, free=one.crosses or not message.adopted)

    # ---- changes of role and state -------------------------------------------------------------------------

    def _on_change(self, sender: ActorId, message: Change, now: float) -> None:
        if self.presence.change(message):
            member = self.presence.member
            self._outbox.add(Log("info", "worker changed", {"role": member.role, "state": member.state}))

    # ---- cancellation, failures, the end of a sequence -----------------------------------------------------

    def _on_inquire(self, sender: ActorId, message: Inquire, now: float) -> None:
        held = (message.request, message.attempt) in self._live
        self._outbox.send(sender, Inquired(message.request, message.attempt, held))

    def _on_cancel(self, sender: ActorId, message: Cancel, now: float) -> None:
        for one in self._attempts(message.request):
            if one.request.attempt <= message.attempt:
                self._outbox.log("request cancelled", one, output_tokens=one.generated)
                self._end(one)
        self._ended.remember(message.request, message.attempt)

    def _on_gone(self, sender: ActorId, message: Gone, now: float) -> None:
        """End the sequences that depend on a dead actor; their Frontends, if alive, submit them again."""
        gone = set(message.actors)
        if self.presence.member.id in gone:
            self._outbox.add(Stop("fenced off: the cluster presumes this worker dead"))
        elif self.shard in gone:
            self._outbox.add(Stop(f"the shard {self.shard} is gone"))
        else:
            for one in list(self._live.values()):
                leaving_to_dead = one.phase is Phase.LEAVING and one.plan.decode in gone
                if leaving_to_dead or one.request.frontend in gone or self._will_need(one, gone):
                    self._end(one)

    def _will_need(self, one: Sequence, gone: set[ActorId]) -> bool:
        return one.plan.decode in gone and one.phase in (Phase.WAITING, Phase.READY)

    def undeliverable(self, to: ActorId, message: Message, now: float) -> None:
        """Record that the shell could not send ``message``.

        The Frontend notices a lost Tokens as a gap; a lost Handoff is repeated.
        """
        self._outbox.add(Log("warning", "message undeliverable", {"to": to, "kind": type(message).__name__}))
        self._outbox.count("undeliverable_total", 1)

    def _fail(self, one: Sequence, code: str, text: str, *, status: int, retry: bool = False) -> None:
        if not one.dropped:
            self._outbox.log("request failed", one, level="warning", code=code, reason=text)
            self._outbox.send(one.request.frontend, Failed(*one.key, code, text, status, retry))
        self._end(one)

    def _end(self, one: Sequence) -> None:
        """End a sequence and free what it holds, as soon as no step and no Adopt of it is under way."""
        if one.flight is not None or one.phase is Phase.ADOPTING:
            one.dropped = True
        else:
            self._let_go(one)

    def _let_go(self, one: Sequence) -> None:
        self._remove(one, free=True)

    def _remove(self, one: Sequence, *, free: bool) -> None:
        if free:
            self._paging.release(one)
        else:
            self._paging.forget(one)
        one.go(Phase.ENDED)
        del self._live[one.key]
        self._ended.remember(*one.key)
        self.presence.changed()
        self._following.lead_on(one, self._live.values())

    # ---- small helpers -------------------------------------------------------------------------------------

    def _in_phase(self, phase: Phase) -> list[Sequence]:
        return [one for one in self._live.values() if one.phase is phase]


def _overloaded(request: str, attempt: int) -> Failed:
    text = "the worker holds as many requests as it may; try again shortly"
    return Failed(request, attempt, "overloaded", text, 429, retry_after_s=1.0)


_HANDLERS: dict[type[Any], Callable[[WorkerCore, ActorId, Any, float], None]] = {
    Prefill: WorkerCore._on_prefill,
    Handoff: WorkerCore._on_handoff,
    HandoffTaken: WorkerCore._on_handoff_taken,
    Cancel: WorkerCore._on_cancel,
    Change: WorkerCore._on_change,
    Inquire: WorkerCore._on_inquire,
    Acquired: WorkerCore._on_acquired,
    Allocated: WorkerCore._on_allocated,
    Inserted: WorkerCore._on_inserted,
    Freed: WorkerCore._on_freed,
    Adopted: WorkerCore._on_adopted,
    PoolRefused: WorkerCore._on_refused,
    BatchDone: WorkerCore._on_batch_done,
    Gone: WorkerCore._on_gone,
}
