"""The role each worker should have: an operator's choice, or by load with ``scheduler.roles = "auto"``.

A role is a wish. It is repeated until the worker reports it, and again to the worker's successor, which
starts with its configured role. Wishes are soft state: a scheduler that restarts learns from the workers what
they were given. Only where both die together does a worker fall back to its configured role.

Under ``auto``, each side (prefill, decode) has a price of being crowded, in the same seconds as policy
``cost``. A prompt waits ``ttft_weight`` times the shortest queue among the prefill workers. An answer takes
longer by its tokens times the step time that the least crowded decode worker needs beyond a stream alone on a
helper. Where workers share cores or a GPU, only what a helper really takes off counts: next to its
neighbours' work, and, if it would be a neighbour of the workers it helps, with the slowdown that it causes.

Where one side is expensive and the other is not, a worker of the other side does both. A worker that shares
no cores with those it helps is preferred. When all workers of one side do both, prompts disturb all streams,
so the workers of the other side may as well do both, and the policy decides request by request. A worker
never has to take the opposite role. When both sides have been calm for long, every worker goes back to its
own role, in which prompts do not disturb streams.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import attrs

from memserve.actions import Action, Log, Send
from memserve.identity import ActorId, actor_name
from memserve.messages import Change, Member
from memserve.scheduling.changes import HAND, SCHEDULER
from memserve.scheduling.fleet import Fleet, Side, Worker
from memserve.scheduling.membership import pairs

ASK_AGAIN_S = 1.0
"""How long a worker may take to report the role it was asked for."""
TICK_S = 0.5
"""How often prices are updated."""
SMOOTH_S = 2.0
"""Time constant of the moving average of prices: one burst does not change the load mix."""
DEAR_S = 0.25
"""Price of a side from which the other side helps."""
RATIO = 2.0
"""A side gets help only at this multiple of the other side's price, because helping crowds the other side."""
EMPTY_SIDE_S = 3.0
"""How long a side may be empty: workers that start, or report to a new scheduler, come one by one."""
WIDEN_S = 1.0
"""Shortest time between two workers that begin to help."""
CALM_SHARE = 0.2
"""A side is calm below this share of DEAR_S."""
CALM_S = 30.0
"""How long both sides must be calm before helpers go back to their own roles, and between such returns."""
CALM_S_MAX = 960.0
"""Upper limit of the calm period, which doubles whenever help was needed again soon after."""
ANSWER_TOKENS = 128.0
"""Assumed answer length until answers were seen."""
ANSWER_WEIGHT = 0.02
"""Weight of the latest answer in the mean."""


@attrs.define
class WantedRole:
    """The role that a worker should have."""

    role: str
    by: str
    """HAND or SCHEDULER."""
    configured: str
    """The role it started with. A worker of the same name that starts with another role is a new worker."""
    taken_by: ActorId | None = None
    """The incarnation that reported the role."""
    asked_at: float = float("-inf")


@attrs.define
class Prices:
    """What a request loses on each side because others are there, in weighted seconds, smoothed."""

    ttft_weight: float
    prefill: float = 0.0
    decode: float = 0.0
    answer: float = ANSWER_TOKENS
    """Mean tokens of an answer."""
    _seen_at: float = float("-inf")

    def learn(self, tokens: int) -> None:
        """Take in an answer of ``tokens`` tokens."""
        self.answer += ANSWER_WEIGHT * (tokens - self.answer)

    def see(self, fleet: Fleet, helpers: tuple[Worker | None, Worker | None], now: float) -> None:
        """Update the prices. ``helpers``: the workers that would help the prefill and the decode side."""
        weight = -math.expm1((self._seen_at - now) / SMOOTH_S)
        self._seen_at = now
        self.prefill += weight * (
            self._prefill(_first(fleet, fleet.prefills), helpers[0], now) - self.prefill
        )
        self.decode += weight * (self._decode(_first(fleet, fleet.decodes), helpers[1], now) - self.decode)

    def _prefill(self, one: Worker | None, helper: Worker | None, now: float) -> float:
        """The price of the shortest queue.

        A helper takes half of a queue. On shared cores both then take longer, unless the helper was at work
        before.
        """
        if one is None:
            return 0.0
        price = self.ttft_weight * one.queue_s(now)
        if helper is not None and one.shares_with(helper) and not helper.busy(now):
            neighbours = sum(other.busy(now) for other in one.neighbours())
            price *= 2.0 - one.crowded(neighbours + 1, prompts=True) / one.crowded(neighbours, prompts=True)
        return max(0.0, price)

    def _decode(self, one: Worker | None, helper: Worker | None, now: float) -> float:
        """The price of the next stream's step here, beyond a step that it would have alone on the helper."""
        if one is None:
            return 0.0
        each = one.context / one.rows if one.rows else 0.0
        neighbours = sum(other.busy(now) for other in one.neighbours())
        here = one.crowded(neighbours, prompts=False) * one.model.decode_s(one.rows + 1, one.context + each)
        there = one.model.decode_s(1, each)
        if helper is not None:
            there *= helper.crowded(sum(other.busy(now) for other in helper.neighbours()), prompts=False)
        return self.answer * max(0.0, here - there)


def _first(fleet: Fleet, side: Side) -> Worker | None:
    """The best-ranked worker of a side, if it has any."""
    return next((fleet.workers[one] for one in side.every.first(1)), None)


@attrs.define
class Roles:
    """See the module's docstring. Wishes are remembered by worker name."""

    auto: bool = False
    """Whether this scheduler decides roles from the load; of several schedulers, only one may."""
    prices: Prices = attrs.field(factory=lambda: Prices(3.0))
    deadline: float = attrs.field(init=False)
    """When ``advance`` must be called next."""
    _wishes: dict[str, WantedRole] = attrs.field(factory=dict, init=False)
    _complete_at: float | None = attrs.field(default=None, init=False)
    """When both sides last had a worker, or when this scheduler began."""
    _widened_at: float = attrs.field(default=float("-inf"), init=False)
    _narrowed_at: float = attrs.field(default=float("-inf"), init=False)
    _calm_since: float = attrs.field(default=float("inf"), init=False)
    _calm_s: float = attrs.field(default=CALM_S, init=False)

    def __attrs_post_init__(self) -> None:
        self.deadline = 0.0 if self.auto else float("inf")

    # ---- wishes ---------------------------------------------------------------------------------------------

    def heard(self, member: Member, now: float) -> list[Action]:
        """Take a worker's heartbeat in; send a Change if it does not have its wanted role."""
        name, wish = actor_name(member.id), self._wishes.get(actor_name(member.id))
        if member.state == "draining":
            self._wishes.pop(name, None)  # it leaves for good
        elif _is_news(member, wish):
            self._wishes[name] = WantedRole(member.role, member.role_by, member.role_configured, member.id)
        elif wish is None:
            pass
        elif (member.role, member.role_by) == (wish.role, wish.by):
            wish.taken_by = member.id
        elif wish.taken_by == member.id or wish.configured != member.role_configured:
            del self._wishes[name]  # given back by an operator, or another worker took the name
        elif member.state == "ready" and now >= wish.asked_at + ASK_AGAIN_S:
            wish.asked_at = now
            return [Send(member.id, Change(wish.role, by=wish.by))]
        return []

    def seen(self, member: Member) -> Member:
        """The member as a view shows it: with the role that it has yet to take."""
        wish = self._wishes.get(actor_name(member.id)) if member.role else None
        if wish is None or wish.role == member.role:
            return member
        return attrs.evolve(member, role_wanted=wish.role)

    # ---- roles from the load --------------------------------------------------------------------------------

    def advance(self, fleet: Fleet, now: float) -> list[Action]:
        """Let time pass: at most one worker is asked to help."""
        if now < self.deadline:
            return []
        self.deadline = now + TICK_S
        self.prices.see(fleet, (self._helper(fleet, fleet.prefills), self._helper(fleet, fleet.decodes)), now)
        if self._complete_at is None or (fleet.prefills.every.keys and fleet.decodes.every.keys):
            self._complete_at = now
        return self._widen(fleet, now) or self._narrow(fleet, now)

    def _widen(self, fleet: Fleet, now: float) -> list[Action]:
        """Have a worker of the other side do both if a side is expensive or has no workers."""
        if now < self._widened_at + WIDEN_S:
            return []
        for side, because in self._needs(fleet, now):
            helper = self._helper(fleet, side)
            if helper is not None:
                if self._widened_at <= self._narrowed_at:
                    soon = now < self._narrowed_at + self._calm_s
                    self._calm_s = min(CALM_S_MAX, 2 * self._calm_s) if soon else CALM_S
                self._widened_at = now
                return self._wish(helper.member, "both", because, now)
        return []

    def _helper(self, fleet: Fleet, side: Side) -> Worker | None:
        """The worker of the other side that would help this one.

        The least busy comes first, but workers that share cores with this side's best worker come last.
        """
        helpers = fleet.decodes if side is fleet.prefills else fleet.prefills
        best, near = _first(fleet, side), None
        for id in helpers.every.first(len(helpers.every.keys)):
            one = fleet.workers[id]
            if self._role(one.member) == "both" or self._by_hand(one.member):
                continue
            if best is None or not best.shares_with(one):
                return one
            near = near or one
        return near

    def _needs(self, fleet: Fleet, now: float) -> Iterator[tuple[Side, str]]:
        """The sides that need help and why, the most urgent first."""
        prices = self.prices
        if self._complete_at is not None and now >= self._complete_at + EMPTY_SIDE_S:
            no_prefill = not fleet.prefills.every.keys
            yield (
                (fleet.prefills, "no worker prefills") if no_prefill else (fleet.decodes, "no worker decodes")
            )
        if prices.prefill > max(DEAR_S, RATIO * prices.decode):
            yield fleet.prefills, "prompts are waiting"
        if prices.decode > max(DEAR_S, RATIO * prices.prefill):
            yield fleet.decodes, "streams are crowded"
        helped = {one.role_configured for one in self._helping(fleet)}
        left = {self._role(one.member) for one in fleet.workers.values()} if helped else set()
        if "decode" in helped and "decode" not in left:
            yield fleet.decodes, "all decode workers also prefill"
        if "prefill" in helped and "prefill" not in left:
            yield fleet.prefills, "all prefill workers also decode"

    def _narrow(self, fleet: Fleet, now: float) -> list[Action]:
        """Give helpers their own roles back once both sides have been calm for long."""
        if max(self.prices.prefill, self.prices.decode) > CALM_SHARE * DEAR_S:
            self._calm_since = float("inf")
            return []
        self._calm_since = min(self._calm_since, now)
        if now < max(self._calm_since, self._narrowed_at, self._widened_at) + self._calm_s:
            return []
        own = {one.id: attrs.evolve(one, role=one.role_configured) for one in self._helping(fleet)}
        if not own or not pairs(own.get(one.id, one) for one in fleet.members()):
            return []
        self._narrowed_at = now
        return [act for one in own.values() for act in self._wish(one, one.role, "calm", now)]

    def _helping(self, fleet: Fleet) -> list[Member]:
        """The workers that do both because of the load."""
        members = (fleet.workers[id].member for id in sorted(fleet.workers))
        return [
            one
            for one in members
            if one.role_by == SCHEDULER
            and self._role(one) == "both" != one.role_configured
            and not self._by_hand(one)
        ]

    def _by_hand(self, member: Member) -> bool:
        """Whether an operator chose its role, even if its successor does not know yet."""
        wish = self._wishes.get(actor_name(member.id))
        return HAND in (member.role_by, wish.by if wish is not None else "")

    def _role(self, member: Member) -> str:
        """The role that it has, or was asked to take."""
        wish = self._wishes.get(actor_name(member.id))
        return member.role if wish is None else wish.role

    def _wish(self, member: Member, role: str, because: str, now: float) -> list[Action]:
        self._wishes[actor_name(member.id)] = WantedRole(
            role, SCHEDULER, member.role_configured, asked_at=now
        )
        said = {
            "worker": member.id,
            "role": role,
            "reason": because,
            "prefill_price_ms": self.prices.prefill * 1e3,
            "decode_price_ms": self.prices.decode * 1e3,
        }
        return [Send(member.id, Change(role, by=SCHEDULER)), Log("info", "role wanted", said)]


def _is_news(member: Member, wish: WantedRole | None) -> bool:
    """Whether it reports a given role that is unknown here, or that takes precedence over the known one."""
    if wish is None:
        return member.role_by in (HAND, SCHEDULER)
    return member.role_by == HAND and (member.role, HAND) != (wish.role, wish.by)
