"""The core of the GlobalScheduler: tracks the members, places requests, announces deaths.

A plan leaves with its request, so a scheduler that restarts has forgotten nothing that others need. It keeps
the plans already made, to give a repeated Submit the same answer, and the requests for which no worker has
room yet (:mod:`~memserve.scheduling.admission`). The Frontends keep those too, and submit them again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import attrs
from msgspec import UNSET, UnsetType

from memserve.actions import Action, Died, Log, Send
from memserve.identity import ActorId, actor_name
from memserve.messages import (
    Cancel,
    Cluster,
    Ended,
    Finished,
    Gone,
    Inquire,
    Inquired,
    Load,
    Member,
    Message,
    Plan,
    Planned,
    Prefill,
    Refused,
    Rejected,
    Request,
    Submit,
)
from memserve.pool_messages import IndexDelta, IndexSnapshot, Prefetch
from memserve.presence import HEARTBEAT_S, Wakefulness
from memserve.scheduling.admission import Admission, IncomingRequest, Refusal
from memserve.scheduling.fleet import Fleet
from memserve.scheduling.global_tree import PromptPath
from memserve.scheduling.index_feed import IndexFeed
from memserve.scheduling.membership import Membership
from memserve.scheduling.outlook import Prospect, forecasts, is_open, prospect, room, run_s
from memserve.scheduling.outputs import OutputLengths
from memserve.scheduling.policies import Policy
from memserve.scheduling.roles import Roles
from memserve.scheduling.terms import Terms, disagreement, name_taken
from memserve.scheduling.ttl_index import TtlIndex
from memserve.tokens import count, span

PLANS_REMEMBERED = 50_000
"""Plans kept to answer repeated Submits and inquiries: ten seconds' worth at 5,000 requests a second."""
REPUBLISH_S = 5.0
"""How often every member is sent the view again, in case a change was lost; less often in a large cluster."""
REPUBLISH_S_MAX = 20.0
SMALL_CLUSTER = 100
"""Cluster size up to which every change is announced at once. Larger clusters batch changes."""
CHANGES_MEMBERS_A_SECOND = 10_000
"""Upper limit of members times announcements a second in a large cluster, because each view lists every
member and goes to every member."""
MEMBERS_A_SECOND = 20
"""Members to which a large cluster's view is sent again each second, on average."""


@attrs.define
class SchedulerCore:
    """See the module's docstring. ``me`` is this scheduler as it lists itself in the cluster."""

    me: Member
    policy_name: str
    policy: Policy
    index: IndexFeed | TtlIndex = attrs.field(factory=IndexFeed)
    admission: Admission = attrs.field(factory=Admission)
    hold_back_s: float = float("inf")
    """Requests wait here while every worker's prompts take longer than this to run; see ``[scheduler]``."""
    membership: Membership = attrs.field(factory=Membership, init=False)
    fleet: Fleet = attrs.field(factory=Fleet, init=False)
    roles: Roles = attrs.field(factory=Roles)
    terms: Terms | UnsetType = UNSET
    """Settings that all hosts must share, in a cluster of several hosts."""
    counters: dict[str, float] = attrs.field(factory=dict, init=False)
    _plans: OrderedDict[tuple[str, int], Planned] = attrs.field(factory=OrderedDict, init=False)
    _lengths: OutputLengths = attrs.field(factory=OutputLengths, init=False)
    _room_at: float = attrs.field(default=float("inf"), init=False)
    """When a worker will have room for the waiting requests."""
    _served: bool = attrs.field(default=False, init=False)
    """Whether some worker was ready when the waiting requests were last looked at."""
    _actions: list[Action] = attrs.field(factory=list, init=False)
    _told_at: float = attrs.field(default=float("-inf"), init=False)
    """When every member was last sent a view."""
    _publish_at: float = attrs.field(default=0.0, init=False)
    _wakefulness: Wakefulness = attrs.field(factory=Wakefulness, init=False)
    _republish_at: float = attrs.field(default=0.0, init=False)

    # ---- the five verbs -------------------------------------------------------------------------------------

    def receive(self, sender: ActorId, message: Message | Died, now: float) -> None:
        """Process one message. Kinds that no scheduler handles are ignored."""
        handler = _HANDLERS.get(type(message))
        if handler is not None:
            handler(self, sender, message, now)

    def advance(self, now: float) -> None:
        """Declare silent members dead, place or refuse waiting requests, publish the view."""
        if self._wakefulness.overslept(now):
            self.membership.excuse(now)
            self.admission.excuse(now)
        self._bury(self.membership.silent(now), "silent", now)
        if len(self.admission):
            self._place_held(now)
            for refusal in self.admission.advance(self._served, now):
                self._refuse(refusal)
        self._actions += self.roles.advance(self.fleet, now)
        if now >= self._publish_at:
            self._publish_at = now + HEARTBEAT_S
            self._publish(self._listeners(now), now)

    def take(self) -> list[Action]:
        """The pending actions; each is returned once."""
        actions, self._actions = self._actions, []
        return actions

    @property
    def deadline(self) -> float:
        """When ``advance`` must be called next."""
        held = min(self.admission.deadline, self._room_at) if len(self.admission) else float("inf")
        publish = self._publish_at if self.membership.members else float("inf")
        return min(held, publish, self.membership.deadline, self.roles.deadline)

    def check(self) -> None:
        """Assert every invariant."""
        assert not any(self.membership.is_gone(one) for one in self.membership.members), (
            "a dead member is listed"
        )
        self.admission.check()
        assert not any(one.key in self._plans for one in self.admission.queue), (
            "a request both planned and held"
        )

    def gauges(self) -> dict[str, float]:
        """Load and counters for the published view."""
        index = self.index
        return {
            "index_events_total": float(index.events),
            "index_gaps_total": float(index.gaps),
            "index_pages": float(sum(index.tree.pages.values())),
            **self.admission.gauges(),
            **self.counters,
        }

    # ---- requests -------------------------------------------------------------------------------------------

    def _on_submit(self, sender: ActorId, message: Submit, now: float) -> None:
        key = (message.request.id, message.request.attempt)
        planned = self._plans.get(key)
        if planned is not None:
            self._actions += [
                Send(sender, planned),
                Send(planned.plan.prefill, Prefill(message.request, planned.plan)),
            ]
        elif self.admission.wanted(key, now):
            self._actions.append(Send(sender, Inquired(*key, held=True)))
        else:
            self._admit(message, now)

    def _on_inquire(self, sender: ActorId, message: Inquire, now: float) -> None:
        """Answer a Frontend that was told its request waits and has heard nothing since."""
        key = (message.request, message.attempt)
        planned = self._plans.get(key)
        waits = Inquired(*key, held=self.admission.wanted(key, now))
        self._actions.append(Send(sender, planned or waits))

    def _admit(self, submit: Submit, now: float) -> None:
        """Place a request at once, let it wait, or refuse it.

        It is placed at once if a worker has room and no other request waits; an attempt after the first needs
        neither.
        """
        request, again = submit.request, submit.request.attempt > 0
        match = self.index.match(request.scope, request.findable, now)
        at_once = again or (not len(self.admission) and is_open(self.fleet, self.hold_back_s, now))
        only: Mapping[ActorId, float] = {}
        if at_once and not again and request.ttft_s is not None:
            found = self._prospect(request, match, request.ttft_s - submit.age_s, now)
            if submit.age_s + found.soonest_s > request.ttft_s:
                self._refuse(self.admission.late(submit, found.soonest_s, found.margin_s))
                return
            at_once, only = bool(found.timely), found.timely
        if not (at_once and self._place(request, match, now, only)):
            self._hold(submit, match, now)

    def _prospect(self, request: Request, match: PromptPath, within_s: float, now: float) -> Prospect:
        found = forecasts(self.fleet, match, count(request.tokens), self._lengths.expect(request), now)
        return prospect(found, within_s, self.hold_back_s, now)

    def _hold(self, submit: Submit, match: PromptPath, now: float) -> None:
        request, tokens = submit.request, count(submit.request.tokens)
        found = self._prospect(request, match, float("inf"), now)
        wish = IncomingRequest(
            submit,
            tokens + self._lengths.expect(request),
            run_s(self.fleet, match, tokens),
            found.soonest_s,
            found.margin_s,
        )
        refusal = self.admission.ask(wish, len(self.fleet.prefills.every.keys), now)
        if refusal is not None:
            self._refuse(refusal)
            return
        self._actions.append(Send(request.frontend, Inquired(request.id, request.attempt, held=True)))
        waiting = len(self.admission)
        self._log("info", "request held", request=request.id, attempt=request.attempt, waiting=waiting)
        self._bring_in(request, match)

    def _bring_in(self, request: Request, match: PromptPath) -> None:
        """On the shard that holds most of a waiting prompt, prefetch what is in slower tiers."""
        for shard in match.best(1):
            held = match.held(shard)
            if held.slow_tokens:
                self._actions.append(
                    Send(shard, Prefetch(request.scope, span(request.tokens, 0, held.tokens)))
                )

    def _place_held(self, now: float) -> None:
        """Place waiting requests, in queue order, while a worker has room."""
        self._room_at = float("inf")
        while len(self.admission):
            here = room(self.fleet, self.hold_back_s, now)
            self._served = here.served
            if not here.open:
                self._room_at = here.at
                return
            one = self.admission.queue.first()
            request = one.submit.request
            match = self.index.match(request.scope, request.findable, now)
            only: Mapping[ActorId, float] = {}
            if one.by < float("inf"):
                found = self._prospect(request, match, one.by - now, now)
                if now + found.soonest_s > one.by:
                    self._refuse(self.admission.refuse_first(one, found.soonest_s, found.margin_s, now))
                    continue
                only, self._room_at = found.timely, found.room_at
                if not only:
                    return
            if self._place(request, match, now, only, held_ms=(now - one.since) * 1e3):
                self.admission.served(one, now)
            else:
                self._served = False
                return

    def _place(
        self, request: Request, match: PromptPath, now: float, only: Mapping[ActorId, float], **said: object
    ) -> bool:
        answer = self._lengths.expect(request)
        choice = self.policy.choose(self.fleet, request, match, answer, now, only)
        if choice is None:
            return False
        plan = Plan(
            choice.prefill, choice.decode, choice.shard, self.me.id,
            choice.decode_shard, choice.source, choice.source_tokens, choice.expected_tokens,
            only.get(choice.prefill, 0.0),
        )  # fmt: skip
        for shard in filter(None, (choice.shard, choice.decode_shard)):
            self.index.placed(shard, request.scope, request.tokens, now)
        planned = Planned(request.id, request.attempt, plan)
        self._plans[request.id, request.attempt] = planned
        while len(self._plans) > PLANS_REMEMBERED:
            self._plans.popitem(last=False)
        self._actions += [Send(plan.prefill, Prefill(request, plan)), Send(request.frontend, planned)]
        self._count("requests_placed_total")
        data = {"request": request.id, "attempt": request.attempt, "policy": self.policy_name, **said}
        self._log("info", "request placed", **data, **choice.explain(match))
        return True

    def _refuse(self, refusal: Refusal) -> None:
        answer = Rejected(
            refusal.submit.request.id,
            refusal.submit.request.attempt,
            refusal.code,
            refusal.message,
            refusal.status,
            refusal.retry_after_s,
        )
        self._actions.append(Send(refusal.submit.request.frontend, answer))
        self._log("warning", "request refused", **self.admission.explain(refusal))

    def _on_finished(self, sender: ActorId, message: Finished, now: float) -> None:
        self._lengths.learn(message.tenant, message.output_tokens)
        self.roles.prices.learn(message.output_tokens)

    def _on_cancel(self, sender: ActorId, message: Cancel, now: float) -> None:
        """Drop a request whose Frontend knows of no plan; pass the Cancel on if a plan was made since."""
        self.admission.withdraw(message.request, message.attempt, now)
        planned = self._plans.get((message.request, message.attempt))
        if planned is not None:
            workers = dict.fromkeys((planned.plan.prefill, planned.plan.decode))
            self._actions += [Send(one, message) for one in workers]

    # ---- members --------------------------------------------------------------------------------------------

    def _on_load(self, sender: ActorId, message: Load, now: float) -> None:
        member = message.member
        if self.membership.is_gone(member.id):
            # A Frontend owns no pages: once told that its requests were dropped, it submits them again.
            back = member.kind == "Frontend" and not self.membership.named(actor_name(member.id))
            self._actions.append(Send(member.id, Gone((member.id,)), last=not back))
            if not back:
                return
            self.membership.revive(member.id)
        joined = member.id not in self.membership.members
        if joined and self.terms is not UNSET and self._refuse_member(message):
            return
        changed, replaced = self.membership.hear(member, now)
        self.fleet.heard(member, now)
        if member.role:
            self._actions += self.roles.heard(member, now)
        self._bury(replaced, "replaced", now)
        if joined:
            self._log(
                "info", "member joined", member=member.id, member_kind=member.kind, member_pid=member.pid
            )
        if missed := tuple(one for one in member.needs if self.membership.is_gone(one)):
            self._actions.append(Send(member.id, Gone(missed)))
        if member.kind == "MemPoolShard":
            published = int(member.load.get("index_published_total", 0))
            self._actions += self.index.reported(member.id, published, now)
        if changed:
            self._tell_all(now)
        if len(self.admission):
            self._place_held(now)

    def _refuse_member(self, message: Load) -> bool:
        """Refuse a newcomer that may not be part of this cluster; whether that was done."""
        member = message.member
        reason = disagreement(self.terms, message.terms) or name_taken(
            self.membership.members.values(), member
        )
        if reason:
            self._log("warning", "member refused", member=member.id, host=member.host, reason=reason)
            self._actions.append(Send(member.id, Refused(reason), last=True))
        return bool(reason)

    def _on_index_delta(self, sender: ActorId, message: IndexDelta, now: float) -> None:
        if not self.membership.is_gone(sender):  # its events may arrive after the news of its death
            self._actions += self.index.delta(sender, message, now)

    def _on_index_snapshot(self, sender: ActorId, message: IndexSnapshot, now: float) -> None:
        if not self.membership.is_gone(sender):
            self._actions += self.index.snapshot(sender, message, now)

    def _on_died(self, sender: ActorId, message: Died, now: float) -> None:
        self._bury((message.actor,), "died", now)

    def _on_ended(self, sender: ActorId, message: Ended, now: float) -> None:
        self._bury(message.actors, "died", now)

    def _bury(self, actors: tuple[ActorId, ...], reason: str, now: float) -> None:
        known = [self.membership.members.get(one) for one in actors]
        gone = self.membership.bury(actors, now)
        if not gone:
            return
        for one in gone:
            self._log("warning", "member gone", member=one, reason=reason)
            self.policy.forget(one)
            self.fleet.forget(one)
            self.index.forget(one)
        frontends = {one.id for one in known if one is not None and one.kind == "Frontend"}
        self.admission.forget_frontends(frontends, now)
        self._count("members_gone_total", len(gone))
        for member in self.membership.members:
            self._actions.append(Send(member, Gone(gone)))
        for one in gone:  # an actor that was only stopped learns this way that it is fenced off
            self._actions.append(Send(one, Gone((one,)), last=True))
        self._publish(list(self.membership.members), now)

    def _listeners(self, now: float) -> list[ActorId]:
        """The receivers of the view each second: Frontends and starting actors, periodically every member."""
        members = self.membership.members
        if now >= self._republish_at:
            self._republish_at = now + min(REPUBLISH_S_MAX, max(REPUBLISH_S, len(members) / MEMBERS_A_SECOND))
            return list(members)
        return [one.id for one in members.values() if one.kind == "Frontend" or one.state == "starting"]

    def _tell_all(self, now: float) -> None:
        """Send the view to every member after a change, at once or soon."""
        number = len(self.membership.members)
        next_at = self._told_at + number / CHANGES_MEMBERS_A_SECOND
        if number <= SMALL_CLUSTER or now >= next_at:
            self._told_at = now
            self._publish(list(self.membership.members), now)
        else:
            self._publish_at, self._republish_at = min(self._publish_at, next_at), now

    def _publish(self, to: list[ActorId], now: float) -> None:
        me = attrs.evolve(self.me, load=self.gauges())
        members = map(self.roles.seen, self.membership.members.values())
        view = Cluster(self.me.id, (me, *members), self.membership.recently_gone(now))
        self._actions += [Send(one, view) for one in to]

    def undeliverable(self, to: ActorId, message: Message, now: float) -> None:
        """Count a message that could not be sent: Frontends repeat Submits, and heartbeats recur anyway."""
        self._count("undeliverable_total")
        if not isinstance(message, Gone):
            self._log("warning", "message undeliverable", to=to, kind=type(message).__name__)

    def _count(self, name: str, amount: float = 1.0) -> None:
        self.counters[name] = self.counters.get(name, 0.0) + amount

    def _log(self, level: str, event: str, **data: object) -> None:
        self._actions.append(Log(level, event, data))


_HANDLERS: dict[type[Any], Callable[[SchedulerCore, ActorId, Any, float], None]] = {
    Submit: SchedulerCore._on_submit,
    Inquire: SchedulerCore._on_inquire,
    Cancel: SchedulerCore._on_cancel,
    Finished: SchedulerCore._on_finished,
    Load: SchedulerCore._on_load,
    Died: SchedulerCore._on_died,
    Ended: SchedulerCore._on_ended,
    IndexDelta: SchedulerCore._on_index_delta,
    IndexSnapshot: SchedulerCore._on_index_snapshot,
}
