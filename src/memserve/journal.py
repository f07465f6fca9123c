"""The core of a Frontend: the journal of its requests.

An entry holds the prompt, every token already sent to the client, and the attempt under way. That is all it
takes to continue after any worker's death: the request is submitted again as prompt plus tokens sent. A draw
depends on (seed, position) alone, so the stream continues with the tokens it would have had.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import attrs
from msgspec import UNSET

from memserve.actions import Action, Deliver, Log, Send
from memserve.errors import RequestFailed
from memserve.identity import ActorId
from memserve.journal_entry import JournalEntry
from memserve.messages import (
    Cancel,
    Change,
    Cluster,
    Failed,
    Finished,
    Gone,
    Inquire,
    Inquired,
    Member,
    Message,
    Planned,
    PromptScores,
    Rejected,
    Request,
    Submit,
    Tokens,
    TokenUpdate,
)
from memserve.presence import Presence
from memserve.scheduling.changes import in_force, incarnations
from memserve.scheduling.view import ClusterView, Health
from memserve.tokens import count, unpack

LOST_S = 8.0
"""Silence after which an attempt is planned again, or a waiting request is submitted elsewhere."""
CANCEL_REPEAT_S = 1.0
"""How long a worker may keep sending tokens of a cancelled attempt before it is sent another Cancel."""
ATTEMPTS_MAX = 8
"""Attempts before a request fails, so that one that kills its workers does not do so forever."""


@attrs.define
class FrontendCore:
    """See the module's docstring."""

    presence: Presence
    requests_max: int
    """Requests open at once; beyond it ``open`` refuses."""
    _entries: dict[str, JournalEntry] = attrs.field(factory=dict, init=False)
    _view: ClusterView = attrs.field(factory=ClusterView, init=False)
    _actions: list[Action] = attrs.field(factory=list, init=False)
    _look_at: float = attrs.field(default=float("inf"), init=False)
    """No entry is due before this time."""
    _called_off: OrderedDict[tuple[ActorId, str], float] = attrs.field(factory=OrderedDict, init=False)
    """Workers and requests for which a Cancel was repeated, and when; the oldest first."""
    counters: dict[str, float] = attrs.field(factory=dict, init=False)

    # ---- the HTTP side --------------------------------------------------------------------------------------

    def open(self, request: Request, now: float) -> None:
        """Accept a request and submit it. Raises RequestFailed (429) at ``requests_max``."""
        if len(self._entries) >= self.requests_max:
            text = f"this server has {self.requests_max} requests open, its limit (frontend.max_requests)"
            raise self._refused(request, "overloaded", text, 429)
        entry = self._entries[request.id] = JournalEntry(request, now)
        self._count("requests_total")
        self._count("prompt_tokens_total", request.prompt_tokens)
        limits = {"prompt_tokens": request.prompt_tokens, "max_tokens": request.max_tokens}
        self._log("info", "request received", entry, **limits)
        self._submit(entry, now)
        self.presence.changed()

    def _refused(self, request: Request, code: str, text: str, status: int) -> RequestFailed:
        failure = RequestFailed(code, text, status, retry_after_s=1.0)
        said = {"request": request.id, "attempt": request.attempt, "priority": request.priority}
        said |= {"code": code, "reason": text, "status": status, "prompt_tokens": request.prompt_tokens}
        self._actions.append(Log("warning", "request refused", said | {"retry_after_s": 1.0}))
        self._count(f"requests_refused_{code}_total")
        return failure

    def close(self, request: str, outcome: str, now: float) -> None:
        """End a request for its client. Late calls do nothing.

        ``outcome``: ``stop`` (a stop string was found) or ``cancelled`` (the client left).
        """
        entry = self._entries.get(request)
        if entry is not None:
            self._tell_attempt(entry, Cancel(request, entry.attempt))
            self._finish(entry, outcome, now)

    def members(self, now: float) -> list[Member]:
        """Every live actor, by the latest view of each scheduler."""
        return self._view.everyone(now)

    def health(self, now: float, down: Mapping[str, str] = MappingProxyType({})) -> Health:
        """Whether a request submitted now could be served.

        ``down``: what a supervisor says of actors that are not alive.
        """
        return self._view.health(self.presence.member, down, now)

    def order(self, worker: str, change: Change, now: float) -> None:
        """Pass an operator's change on to a worker, by name; the caller repeats it until it is in force."""
        self._actions += [Send(one.id, change) for one in incarnations(worker, self.members(now))]

    def obeyed(self, worker: str, change: Change, now: float) -> bool:
        """Whether an operator's change of a worker is in force."""
        return in_force(worker, change, self.members(now), self._view.expects(worker, now))

    # ---- verbs ----------------------------------------------------------------------------------------------

    def receive(self, sender: ActorId, message: Message, now: float) -> None:
        """Process one message. Kinds that a Frontend does not handle are ignored."""
        handler = _HANDLERS.get(type(message))
        if handler is not None:
            handler(self, sender, message, now)

    def advance(self, now: float) -> None:
        """Repeat unanswered Submits and inquire after silent attempts."""
        if now < self._look_at:
            return
        for entry in [one for one in self._entries.values() if now >= one.due]:
            lost = now >= entry.heard_at + LOST_S
            if now >= entry.given_up_at:
                self._tell_attempt(entry, Cancel(entry.request.id, entry.attempt))
                text = "its deadline has passed, and no GlobalScheduler has planned it"
                self._fail(entry, self._refused(entry.request, "deadline_missed", text, 503), now)
            elif entry.early and now >= entry.gap_ends:
                self._resubmit(entry, f"{entry.missing(entry.early[0][1].position)} never arrived", now)
            elif entry.plan is None and entry.holder is not None and not lost:
                self._inquire(entry, entry.holder, now)
            elif entry.plan is None:
                self._rotate_schedulers()
                self._submit(entry, now)
            elif lost:
                self._resubmit(entry, f"not heard of for {now - entry.heard_at:.1f} s", now)
            else:
                whom = entry.plan.decode if entry.fed_by_decode else entry.plan.prefill
                self._inquire(entry, whom, now)
        self._look_at = min((one.due for one in self._entries.values()), default=float("inf"))

    def take(self) -> list[Action]:
        """The pending actions; each is returned once."""
        actions, self._actions = self._actions, []
        return actions

    @property
    def deadline(self) -> float:
        """When ``advance`` must be called next."""
        return self._look_at if self._entries else float("inf")

    @property
    def idle(self) -> bool:
        """No request is open."""
        return not self._entries

    def check(self) -> None:
        """Assert every invariant."""
        assert len(self._entries) <= self.requests_max, "more requests open than allowed"
        for entry in self._entries.values():
            assert entry.attempt < ATTEMPTS_MAX, entry.request.id
            assert count(entry.sent) <= entry.request.max_tokens, (
                f"{entry.request.id}: more tokens than asked for"
            )

    def gauges(self) -> dict[str, float]:
        """Load and counters for the heartbeat."""
        return {"requests_open": float(len(self._entries)), **self.counters}

    # ---- plans ----------------------------------------------------------------------------------------------

    def _submit(self, entry: JournalEntry, now: float) -> None:
        entry.plan, entry.holder, entry.fed_by_decode, entry.asked_at = None, None, False, now
        entry.early.clear()
        self._look_at = min(self._look_at, entry.due)
        submit = Submit(entry.current(), now - entry.received_at, entry.held)
        self._actions.append(Send(self.presence.schedulers[0], submit))

    def _rotate_schedulers(self) -> None:
        first, *others = self.presence.schedulers
        self.presence.schedulers = (*others, first)

    def _on_planned(self, sender: ActorId, message: Planned, now: float) -> None:
        entry = self._current(message.request, message.attempt)
        if entry is None:  # planned by a scheduler that did not hear of the request's end
            workers = dict.fromkeys((message.plan.prefill, message.plan.decode))
            self._actions += [Send(one, Cancel(message.request, message.attempt)) for one in workers]
        elif entry.plan is None:
            entry.plan, entry.holder, entry.heard_at = message.plan, None, now
            entry.planned_at = now if entry.planned_at is None else entry.planned_at
            self._log(
                "info", "request planned", entry, prefill=message.plan.prefill, decode=message.plan.decode
            )

    def _on_rejected(self, sender: ActorId, message: Rejected, now: float) -> None:
        """Fail the request, unless another scheduler has planned or holds it: then the refusal is ignored."""
        entry = self._current(message.request, message.attempt)
        if entry is None or entry.plan is not None or entry.holder not in (None, sender):
            return
        if entry.sent and not entry.attempt:  # its tokens overtook the plan, which was lost
            self._resubmit(entry, f"refused with {message.code} after it had begun", now)
        else:
            failure = RequestFailed(message.code, message.message, message.status, message.retry_after_s)
            self._fail(entry, failure, now)

    def _resubmit(self, entry: JournalEntry, reason: str, now: float) -> None:
        """Plan the rest of a request again. The higher attempt fences off whatever still runs of the old."""
        self._tell_attempt(entry, Cancel(entry.request.id, entry.attempt))
        if entry.attempt + 1 >= ATTEMPTS_MAX:
            text = f"gave up after {ATTEMPTS_MAX} attempts, the last ended with: {reason}"
            self._fail(entry, RequestFailed("attempts_exhausted", text, 503, retry_after_s=5.0), now)
            return
        entry.attempt += 1
        self._count("resubmissions_total")
        self._log("warning", "request resubmitted", entry, reason=reason, sent_tokens=count(entry.sent))
        self._submit(entry, now)

    def _inquire(self, entry: JournalEntry, whom: ActorId, now: float) -> None:
        entry.asked_at = now
        self._actions.append(Send(whom, Inquire(entry.request.id, entry.attempt)))

    def _on_inquired(self, sender: ActorId, message: Inquired, now: float) -> None:
        """Ask the next worker if the sender does not hold the attempt, and plan it again if none does.

        The prefill worker is asked before the decode worker, because it holds a request until the decode
        worker took it.
        """
        entry = self._current(message.request, message.attempt)
        if entry is None:
            return
        if entry.plan is None:
            self._on_holder(entry, sender, message.held, now)
        elif message.held:
            entry.heard_at = now
        elif sender != entry.plan.decode:
            self._inquire(entry, entry.plan.decode, now)
        else:
            self._resubmit(entry, "no worker holds it", now)

    def _on_holder(self, entry: JournalEntry, scheduler: ActorId, held: bool, now: float) -> None:
        """Note whether a request waits at a scheduler; submit it again if its holder has forgotten it."""
        if held and entry.holder in (None, scheduler):
            entry.holder, entry.held, entry.heard_at = scheduler, True, now
        elif not held and entry.holder == scheduler:
            self._submit(entry, now)

    def _submit_held_by(self, gone: Collection[ActorId], now: float) -> None:
        """Submit the requests again that waited at schedulers which are gone."""
        for entry in self._entries.values():
            if entry.holder in gone:
                self._submit(entry, now)

    # ---- tokens ---------------------------------------------------------------------------------------------

    def _on_tokens(self, sender: ActorId, message: Tokens, now: float) -> None:
        for update in message.updates:
            entry = self._current(update.request, update.attempt)
            if entry is None:
                self._call_off(sender, update, now)
                continue
            entry.heard_at = now
            entry.fed_by_decode |= entry.plan is not None and sender == entry.plan.decode
            self._take_tokens(entry, update, now)
            self._take_early(entry)

    def _call_off(self, worker: ActorId, update: TokenUpdate, now: float) -> None:
        """Send a worker another Cancel for tokens of an ended attempt: the first was lost, or is still under way."""
        known = self._entries.get(update.request)
        if update.finish is not None or (known is not None and known.attempt < update.attempt):
            return
        if now >= self._called_off.get((worker, update.request), float("-inf")) + CANCEL_REPEAT_S:
            self._called_off[worker, update.request] = now
            self._called_off.move_to_end((worker, update.request))
            self._actions.append(Send(worker, Cancel(update.request, update.attempt)))
        if len(self._called_off) > self.requests_max:
            self._called_off.popitem(last=False)

    def _on_prompt_scores(self, sender: ActorId, message: PromptScores, now: float) -> None:
        """Deliver new log probabilities, by the rule of :meth:`_take_tokens`."""
        entry = self._current(message.request, message.attempt)
        if entry is None:
            return
        entry.heard_at = now
        if message.position > entry.scored:
            self._resubmit(entry, f"{entry.missing(message.position)} never arrived", now)
        elif (known := entry.scored - message.position) < len(message.scores):
            new = message.scores.after(known)
            entry.scored += len(new)
            self._actions.append(Deliver(entry.request.id, (), None, entry.cached_tokens, prompt=(new,)))
            self._take_early(entry)

    def _take_early(self, entry: JournalEntry) -> None:
        """Take the tokens that arrived behind a gap again, in order of arrival: the gap may have closed."""
        early, entry.early = entry.early, []
        for heard_at, update in early:
            if self._entries.get(entry.request.id) is entry:
                self._take_tokens(entry, update, heard_at)

    def _take_tokens(self, entry: JournalEntry, update: TokenUpdate, now: float) -> None:
        """Deliver new tokens. By position, a repeat is dropped, and tokens behind a gap wait for it to close."""
        have = entry.request.prompt_tokens + count(entry.sent)
        if entry.unscored or update.position > have:
            entry.early.append((now, update))
            self._look_at = min(self._look_at, entry.due)
            return
        fresh = update.tokens[(have - update.position) * 4 :]
        if not fresh:
            return
        self._note_first_token(entry, update, count(fresh), now)
        entry.last_token_at = now
        entry.sent += fresh
        entry.timings = update.timings or entry.timings
        entry.origins = update.origins or entry.origins
        self._count("output_tokens_total", count(fresh))
        logprobs = () if update.logprobs is UNSET else (update.logprobs,)
        new = tuple(unpack(fresh)), update.finish, entry.cached_tokens
        self._actions.append(Deliver(entry.request.id, *new, logprobs=logprobs))
        if update.finish is not None:
            self._finish(entry, update.finish, now)

    def _note_first_token(self, entry: JournalEntry, update: TokenUpdate, tokens: int, now: float) -> None:
        """Note the first time at which tokens come, and how many ``tokens`` do."""
        if entry.first_token_at is None:
            entry.first_token_at, entry.first_tokens = now, tokens
            entry.cached_tokens = update.cached_tokens
            self._count("cached_tokens_total", update.cached_tokens)
            self._log("info", "first token", entry, ttft_ms=(now - entry.received_at) * 1e3)

    # ---- ends -----------------------------------------------------------------------------------------------

    def _on_failed(self, sender: ActorId, message: Failed, now: float) -> None:
        entry = self._current(message.request, message.attempt)
        if entry is None:
            return
        if message.retry:
            self._resubmit(entry, f"{message.code}: {message.message}", now)
        else:
            failure = RequestFailed(message.code, message.message, message.status, message.retry_after_s)
            self._fail(entry, failure, now)

    def _on_cluster(self, sender: ActorId, message: Cluster, now: float) -> None:
        self._submit_held_by(self._view.heard(message, now), now)

    def _on_gone(self, sender: ActorId, message: Gone, now: float) -> None:
        gone = set(message.actors)
        self._view.gone(gone, now)
        self._submit_held_by(gone, now)
        if self.presence.member.id in gone:  # presumed dead while it was stopped; the workers let go
            self._submit_held_by({one.holder for one in self._entries.values() if one.holder}, now)
            gone = {one for entry in self._entries.values() for one in entry.needed()}
        for entry in list(self._entries.values()):
            dead = sorted(gone & entry.needed())
            if dead:
                self._resubmit(entry, f"{', '.join(dead)} gone", now)

    def _fail(self, entry: JournalEntry, failure: RequestFailed, now: float) -> None:
        self._actions.append(Deliver(entry.request.id, (), None, entry.cached_tokens, failure))
        self._finish(entry, "error", now, code=failure.code)

    def _finish(self, entry: JournalEntry, outcome: str, now: float, **extra: object) -> None:
        del self._entries[entry.request.id]
        self._count(f"requests_{outcome}_total")
        if outcome in ("stop", "length"):
            ended = Finished(entry.request.id, entry.request.tenant, count(entry.sent))
            self._actions += [Send(one, ended) for one in self.presence.schedulers]
        self._log("info", "request finished", entry, outcome=outcome, **extra, **entry.canonical(now))
        self.presence.changed()

    def undeliverable(self, to: ActorId, message: Message, now: float) -> None:
        """Count a message that could not be sent; an unanswered Submit is repeated anyway."""
        self._count("undeliverable_total")

    # ---- small helpers --------------------------------------------------------------------------------------

    def _current(self, request: str, attempt: int) -> JournalEntry | None:
        entry = self._entries.get(request)
        return entry if entry is not None and entry.attempt == attempt else None

    def _tell_attempt(self, entry: JournalEntry, message: Cancel) -> None:
        if entry.plan is None:
            self._actions += [Send(one, message) for one in self.presence.schedulers]
        else:
            self._actions += [
                Send(one, message) for one in dict.fromkeys((entry.plan.prefill, entry.plan.decode))
            ]

    def _count(self, name: str, amount: float = 1.0) -> None:
        self.counters[name] = self.counters.get(name, 0.0) + amount

    def _log(self, level: str, event: str, entry: JournalEntry, **data: object) -> None:
        self._actions.append(
            Log(level, event, {"request": entry.request.id, "attempt": entry.attempt, **data})
        )


_HANDLERS: dict[type[Any], Callable[[FrontendCore, ActorId, Any, float], None]] = {
    Planned: FrontendCore._on_planned,
    Rejected: FrontendCore._on_rejected,
    PromptScores: FrontendCore._on_prompt_scores,
    Tokens: FrontendCore._on_tokens,
    Inquired: FrontendCore._on_inquired,
    Failed: FrontendCore._on_failed,
    Cluster: FrontendCore._on_cluster,
    Gone: FrontendCore._on_gone,
}
