"""The clients of a simulated cluster: they play sessions, check every token, and record what they saw."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import attrs

from memserve.actions import Deliver, Log
from memserve.drawing import Sampling
from memserve.errors import RequestFailed
from memserve.journal import FrontendCore
from memserve.messages import Request
from memserve.scheduling.admission import ADMISSION_CODES
from memserve.sim.cluster import SimCluster
from memserve.sim.engines import drawn_token, next_token
from memserve.sim.pages import content_of
from memserve.sim.workloads import Session, Turn
from memserve.sim.world import Actor, Violation
from memserve.tokens import TOKEN_BYTES, count, pack

RETRY_S = 0.25
"""How long a client waits when it finds no ready Frontend."""


@attrs.define(eq=False)
class Call:
    """One request, as its client sees it."""

    id: str
    session: Session
    number: int
    """Index of its turn, from 0."""
    prompt: bytes
    seed: int
    asked_at: float
    """When the client first tried to ask."""
    frontend: Actor | None = None
    answer: bytes = b""
    content: bytes = b""
    """What pages must hold for the prompt and the answer so far; kept only where pages are checked."""
    first_at: float = 0.0
    last_at: float = 0.0
    cached_tokens: int = 0
    outcome: str = ""
    """Empty while the call is open; then stop, length, cancelled, disconnected, or an error's code."""
    attempts: int = 1
    prefill: str = ""
    decode: str = ""

    @property
    def turn(self) -> Turn:
        """The session's turn that this call asks."""
        return self.session.turns[self.number]

    @property
    def complete(self) -> bool:
        """Whether all tokens have come."""
        return self.outcome == "length"


@attrs.define(eq=False)
class Clients:
    """Plays all sessions of a run."""

    cluster: SimCluster
    sessions: list[Session]
    seed: int
    patience: Callable[[Call], float | None] = lambda call: None
    """Seconds that a client waits before it leaves; None: it never leaves."""
    serial: bool = False
    """Play sessions one after another, each when the previous one has ended, whatever their times say."""
    calls: list[Call] = attrs.field(factory=list)
    """All calls, in the order in which they were asked."""
    open_calls: dict[str, Call] = attrs.field(factory=dict)
    waiting: int = 0
    """Number of turns that are scheduled but not yet asked."""
    _turns: int = 0
    _known: dict[str, Call] = attrs.field(factory=dict)
    _following: Iterator[Session] = attrs.field(factory=lambda: iter(()))

    def __attrs_post_init__(self) -> None:
        self.cluster.deliver = self._delivered
        self.cluster.lost = self._lost
        self.cluster.world.logged = self._logged
        self._following = iter(self.sessions if self.serial else ())
        for session in self.sessions[:1] if self.serial else self.sessions:
            self.waiting += 1
            self.cluster.world.at(session.at_s, self._ask, session, 0, b"")
        next(self._following, None)

    @property
    def done(self) -> bool:
        """Whether every session has ended."""
        return not self.open_calls and not self.waiting

    # ---- asking --------------------------------------------------------------------------------------------

    def _ask(self, session: Session, number: int, before: bytes) -> None:
        id = f"{session.id}/{number}"
        turn = session.turns[number]
        asked = b"".join(piece.make(self.seed) for piece in turn.pieces)
        prompt = asked if turn.fresh else before + asked
        call = Call(id, session, number, prompt, zlib.crc32(id.encode()), self.cluster.world.now)
        self.waiting -= 1
        self.calls.append(call)
        self.open_calls[id] = self._known[id] = call
        self._submit(call)

    def _submit(self, call: Call) -> None:
        """Open a stream on the next ready Frontend; try again later if there is none."""
        world = self.cluster.world
        ready = [one for one in self._frontends() if one[1].presence.member.state == "ready"]
        if not ready:
            world.after(RETRY_S, self._submit, call)
            return
        actor, core = ready[self._turns % len(ready)]
        self._turns += 1
        call.frontend = actor
        request = Request(
            call.id, 0, actor.id, call.session.scope, call.prompt, count(call.prompt), call.turn.output, (),
            Sampling(0.0, seed=call.seed), call.session.priority, call.session.ttft_s,
        )  # fmt: skip
        world.note("ask", call.id, actor.id)
        try:
            core.open(request, world.now)
        except RequestFailed as refused:
            self._end(call, refused.code)
            return
        world.turn(actor)
        patience = self.patience(call)
        if patience is not None:
            world.after(patience, self._leave, call)

    def _frontends(self) -> list[tuple[Actor, FrontendCore]]:
        cluster = self.cluster
        found = []
        for name in cluster.layout.frontend_names:
            actor, core = cluster.world.actors.get(name), cluster.cores.get(name)
            if actor is not None and isinstance(core, FrontendCore) and not actor.paused:
                found.append((actor, core))
        return found

    def _leave(self, call: Call) -> None:
        actor = call.frontend
        if call.outcome or actor is None or not actor.alive or actor.paused:
            return
        core = self.cluster.cores[actor.name]
        assert isinstance(core, FrontendCore), f"{actor.name} is not a Frontend"
        core.close(call.id, "cancelled", self.cluster.world.now)
        self._end(call, "cancelled")
        self.cluster.world.turn(actor)

    # ---- answers -------------------------------------------------------------------------------------------

    def _delivered(self, frontend: Actor, delivery: Deliver) -> None:
        call = self.open_calls.get(delivery.request)
        if call is None or call.frontend is not frontend:
            raise Violation(f"{delivery.request} was given tokens or an end after it had ended")
        now = self.cluster.world.now
        if delivery.tokens:
            self._check(call, delivery.tokens)
            if not call.first_at:
                call.first_at = now
            call.last_at = now
            call.answer += pack(delivery.tokens)
            call.cached_tokens = delivery.cached_tokens
        if delivery.failure is not None:
            if call.answer and delivery.failure.code in ADMISSION_CODES:
                raise Violation(f"{call.id} was refused with {delivery.failure.code} after it had begun")
            self._end(call, delivery.failure.code)
        elif delivery.finish is not None:
            if count(call.answer) != call.turn.output:
                raise Violation(f"{call.id} ended with {count(call.answer)} of {call.turn.output} tokens")
            self._end(call, delivery.finish)

    def _check(self, call: Call, tokens: tuple[int, ...]) -> None:
        """Check that every token is that of an undisturbed run. Raises Violation."""
        sequence = call.prompt + call.answer
        for token in tokens:
            if self.cluster.pages_checked:
                call.content += content_of(sequence[len(call.content) :], call.content)
                expected = next_token(call.content, call.seed)
            else:
                expected = drawn_token(sequence[-TOKEN_BYTES:], count(sequence), call.seed)
            if token != expected:
                at = count(sequence) - count(call.prompt)
                raise Violation(f"{call.id}: token {at} is {token}, an undisturbed run has {expected}")
            sequence += pack([token])

    def _end(self, call: Call, outcome: str) -> None:
        world, session = self.cluster.world, call.session
        call.outcome = outcome
        del self.open_calls[call.id]
        world.note("end of request", call.id, outcome, call.answer)
        following = call.number + 1
        if call.complete and following < len(session.turns):
            self.waiting += 1
            wait = session.turns[following].wait_s
            world.after(wait, self._ask, session, following, call.prompt + call.answer)
        elif (after := next(self._following, None)) is not None:
            self.waiting += 1
            world.after(0.0, self._ask, after, 0, b"")

    def _lost(self, actor: Actor) -> None:
        """A Frontend died: its clients' connections end."""
        for call in [one for one in self.open_calls.values() if one.frontend is actor]:
            self._end(call, "disconnected")

    def _logged(self, actor: Actor, line: Log) -> None:
        if line.event == "request finished":
            call = self._known.get(str(line.data["request"]))
            if call is not None:
                call.attempts = int(str(line.data["attempts"]))
                call.prefill, call.decode = (str(line.data[key] or "") for key in ("prefill", "decode"))
