"""Which pair serves a request. A policy is a value: a name in the configuration, a class here."""

from __future__ import annotations

from collections import deque
from typing import Protocol

import attrs

from memserve.messages import ActorId, Member, Request
from memserve.scheduling.membership import Pair
from memserve.tokens import count

RECENT_S = 0.25
"""How long a placement counts on top of a worker's own report: about one report's delay."""


class Policy(Protocol):
    """Chooses among at least one pair."""

    def choose(self, candidates: list[Pair], request: Request, now: float) -> Pair:
        """The pair to serve ``request``; the policy remembers its choice as load."""

    def forget(self, actor: ActorId) -> None:
        """Drop what is remembered of an actor that is gone."""


@attrs.define
class RoundRobin:
    """Every prefill worker in turn, and every decode worker of its shard in turn."""

    _prefills: int = 0
    _decodes: int = 0

    def choose(self, candidates: list[Pair], request: Request, now: float) -> Pair:
        prefills = sorted({one.prefill.id for one in candidates})
        prefill = prefills[self._prefills % len(prefills)]
        decodes = sorted(
            (one for one in candidates if one.prefill.id == prefill), key=lambda one: one.decode.id
        )
        chosen = decodes[self._decodes % len(decodes)]
        self._prefills += 1
        self._decodes += self._prefills % len(prefills) == 0
        return chosen

    def forget(self, actor: ActorId) -> None:
        """Turns are counted, not actors."""


@attrs.define
class LeastLoad:
    """The prefill worker with the fewest tokens to run, then the decode worker with the fewest sequences.

    A worker's load is its last report plus what was placed on it since: reports lag by their interval, and
    without the second part a burst would land on one worker.
    """

    _recent: dict[ActorId, deque[tuple[float, int]]] = attrs.field(factory=dict)

    def choose(self, candidates: list[Pair], request: Request, now: float) -> Pair:
        chosen = min(candidates, key=lambda one: self._price(one, now))
        self._place(chosen.prefill.id, now, count(request.tokens))
        if chosen.decode.id != chosen.prefill.id:
            self._place(chosen.decode.id, now, 1)
        return chosen

    def _price(self, pair: Pair, now: float) -> tuple[float, float, float, str, str]:
        prefill, decode = pair.prefill, pair.decode
        tokens = prefill.load.get("waiting_tokens", 0.0) + sum(
            size for _, size in self._since(prefill.id, now)
        )
        placed = len(self._since(decode.id, now)) if decode is not prefill else 0
        return tokens, _sequences(decode) + placed, _sequences(prefill), prefill.id, decode.id

    def _since(self, actor: ActorId, now: float) -> deque[tuple[float, int]]:
        recent = self._recent.setdefault(actor, deque())
        while recent and now - recent[0][0] > RECENT_S:
            recent.popleft()
        return recent

    def _place(self, actor: ActorId, now: float, size: int) -> None:
        self._since(actor, now).append((now, size))

    def forget(self, actor: ActorId) -> None:
        """Drop what is remembered of an actor that is gone."""
        self._recent.pop(actor, None)


def _sequences(worker: Member) -> float:
    return worker.load.get("requests_running", 0.0) + worker.load.get("requests_waiting", 0.0)


POLICIES: dict[str, type[RoundRobin] | type[LeastLoad]] = {"round_robin": RoundRobin, "least_load": LeastLoad}
"""The values of ``scheduler.policy``."""
