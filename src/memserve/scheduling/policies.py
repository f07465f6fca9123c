"""Policies: which workers serve a request. A policy is a name in the configuration and a class here.

These four are easy to understand and serve for comparison. The default, which prices everything, is in
:mod:`memserve.scheduling.pricing`.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Protocol

import attrs

from memserve.identity import ActorId
from memserve.messages import Request
from memserve.scheduling.fleet import SURE_S, Fleet, Placed
from memserve.scheduling.global_tree import PromptPath
from memserve.scheduling.membership import Pair
from memserve.scheduling.membership import pairs as all_pairs
from memserve.tokens import TOKEN_BYTES, count


@attrs.frozen
class Placement:
    """Where a request goes, and why. Fields as in :class:`~memserve.messages.Plan`."""

    prefill: ActorId
    decode: ActorId
    shard: ActorId
    decode_shard: ActorId = ActorId("")
    source: ActorId = ActorId("")
    source_tokens: int = 0
    expected_tokens: int = 0
    seconds: float = 0.0
    """Predicted seconds to the first token; 0 if nothing was predicted."""
    candidates: str = ""
    """The prices of the best few candidates, as text for the log."""

    def explain(self, match: PromptPath) -> dict[str, object]:
        """The reasons, for the log.

        They name the alternatives, and say whether a cached prefix was used, passed over, or did not exist.
        """
        used = max(self.expected_tokens, self.source_tokens)
        if not match.tokens:
            reuse = "nothing cached"
        elif used < match.tokens:
            reuse = "routed away"
        else:
            reuse = "fetched" if self.source else "cached"
        said: dict[str, object] = {
            "prefill": self.prefill,
            "decode": self.decode,
            "reuse": reuse,
            "expected_tokens": self.expected_tokens,
            "best_tokens": match.tokens,
        }
        if self.source:
            said |= {"source": self.source, "source_tokens": self.source_tokens}
        if self.candidates:
            said |= {"predicted_ttft_ms": self.seconds * 1e3, "candidates": self.candidates}
        return said


class Policy(Protocol):
    """Chooses among the workers of a fleet."""

    def choose(
        self,
        fleet: Fleet,
        request: Request,
        match: PromptPath,
        answer: float,
        now: float,
        only: Collection[ActorId] = (),
    ) -> Placement | None:
        """Where ``request`` goes; None if no worker can take it.

        ``answer``: the expected tokens of its answer. ``only``: workers that may run its prompt; empty: any.
        """

    def forget(self, actor: ActorId) -> None:
        """Drop what is remembered of a dead actor."""


@attrs.define
class PairPolicy:
    """Chooses among all pairs. It lists them, which is fine for tens of workers."""

    def choose(
        self,
        fleet: Fleet,
        request: Request,
        match: PromptPath,
        answer: float,
        now: float,
        only: Collection[ActorId] = (),
    ) -> Placement | None:
        pairs = [one for one in all_pairs(fleet.members()) if not only or one.prefill.id in only]
        if not pairs:
            return None
        pair = self.pick(fleet, pairs, request, match)
        shard, other = pair.prefill.shard, pair.decode.shard
        held = match.held(shard).tokens
        choice = Placement(
            pair.prefill.id,
            pair.decode.id,
            shard,
            other if other != shard else ActorId(""),
            expected_tokens=held,
        )
        count_placement(fleet, choice, request, held, SURE_S, now)
        return choice

    def pick(self, fleet: Fleet, pairs: list[Pair], request: Request, match: PromptPath) -> Pair:
        """One of ``pairs``, which has at least one."""
        raise NotImplementedError

    def forget(self, actor: ActorId) -> None:
        """Do nothing: nothing is remembered of actors."""


@attrs.define
class RoundRobin(PairPolicy):
    """Every prefill worker in turn, and every decode worker paired with it in turn."""

    _prefills: int = 0
    _decodes: int = 0

    def pick(self, fleet: Fleet, pairs: list[Pair], request: Request, match: PromptPath) -> Pair:
        prefills = sorted({one.prefill.id for one in pairs})
        prefill = prefills[self._prefills % len(prefills)]
        decodes = sorted((one for one in pairs if one.prefill.id == prefill), key=lambda one: one.decode.id)
        chosen = decodes[self._decodes % len(decodes)]
        self._prefills += 1
        self._decodes += self._prefills % len(prefills) == 0
        return chosen


@attrs.define
class LeastLoad(PairPolicy):
    """The prefill worker with the fewest tokens to run, then the decode worker with the fewest streams."""

    def pick(self, fleet: Fleet, pairs: list[Pair], request: Request, match: PromptPath) -> Pair:
        return min(pairs, key=lambda one: _load(fleet, one))


@attrs.define
class LongestPrefix(PairPolicy):
    """The worker whose shard holds the most of the prompt, whatever its load; then the least loaded."""

    def pick(self, fleet: Fleet, pairs: list[Pair], request: Request, match: PromptPath) -> Pair:
        return min(pairs, key=lambda one: (-match.held(one.prefill.shard).tokens, *_load(fleet, one)))


SESSIONS_MAX = 100_000
"""Sessions remembered, some 30 MB."""
OPENING_TOKENS = 32
"""Number of first tokens by which prompts are looked up."""
ALIKE_MAX = 64
"""Sessions kept that share an opening."""

_Prompt = tuple[int, bytes]
"""A session's last prompt: its length in bytes, and its digest."""


@attrs.define
class StickySession(LeastLoad):
    """A session stays with its worker, whatever the load; a new session goes to the least loaded worker.

    Requests do not name their session, so a request belongs to the session whose last prompt is a prefix of
    its own.
    """

    _sessions: OrderedDict[bytes, OrderedDict[_Prompt, ActorId]] = attrs.field(factory=OrderedDict)
    """By opening, the least recently used first: the last prompts that begin with it, and their prefill workers."""
    _known: int = 0
    """Number of sessions, over all openings."""

    def pick(self, fleet: Fleet, pairs: list[Pair], request: Request, match: PromptPath) -> Pair:
        opening = request.tokens[: OPENING_TOKENS * TOKEN_BYTES]
        key = hashlib.blake2b(opening, digest_size=16, key=request.scope.encode()[:64]).digest()
        alike = self._sessions.setdefault(key, OrderedDict())
        self._sessions.move_to_end(key)
        begins_with, whole = _prefixes(request.tokens, alike)
        home = alike.pop(begins_with) if begins_with else None
        self._known -= begins_with is not None
        chosen = super().pick(
            fleet, [one for one in pairs if one.prefill.id == home] or pairs, request, match
        )
        self._known += whole not in alike
        alike[whole] = chosen.prefill.id
        if len(alike) > ALIKE_MAX:
            alike.popitem(last=False)
            self._known -= 1
        while self._known > SESSIONS_MAX:
            self._known -= len(self._sessions.popitem(last=False)[1])
        return chosen


def _prefixes(tokens: bytes, prompts: Collection[_Prompt]) -> tuple[_Prompt | None, _Prompt]:
    """The longest of ``prompts`` that is a prefix of ``tokens``, and ``tokens`` as a prompt. Hashes each token once."""
    digest, hashed, longest = hashlib.blake2b(digest_size=16), 0, None
    for length in sorted({length for length, _ in prompts if length <= len(tokens)}):
        digest.update(tokens[hashed:length])
        hashed = length
        if (length, digest.digest()) in prompts:
            longest = (length, digest.digest())
    digest.update(tokens[hashed:])
    return longest, (len(tokens), digest.digest())


def count_placement(
    fleet: Fleet,
    choice: Placement,
    request: Request,
    cached: int,
    decode_sure_s: float,
    now: float,
    bring_s: float = 0.0,
) -> None:
    """Count a placement on top of what its workers report.

    ``bring_s``: seconds until its prefix has come from another shard.
    """
    tokens = count(request.tokens)
    missing = max(1, tokens - cached)
    pairs = missing * (tokens - missing / 2)
    if choice.decode == choice.prefill:
        fleet.placed(choice.prefill, Placed(now + SURE_S, missing, pairs, 1, tokens, bring_s), now)
    else:
        fleet.placed(choice.prefill, Placed(now + SURE_S, missing, pairs, bring_s=bring_s), now)
        fleet.placed(choice.decode, Placed(now + decode_sure_s, rows=1, context=tokens), now)


def _load(fleet: Fleet, pair: Pair) -> tuple[float, float, float, float, ActorId, ActorId]:
    """The order by load; among equals, the worker used longest ago comes first."""
    prefill, decode = fleet.workers[pair.prefill.id], fleet.workers[pair.decode.id]
    return prefill.tokens, decode.rows, prefill.rows, prefill.used_at, pair.prefill.id, pair.decode.id


PLAIN: dict[str, Callable[[], Policy]] = {
    "round_robin": RoundRobin,
    "least_load": LeastLoad,
    "session": StickySession,
    "longest_prefix": LongestPrefix,
}
"""The values of ``scheduler.policy``, except ``cost``."""
