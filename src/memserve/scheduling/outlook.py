"""What a request that arrives now can expect: whether a worker has room, and when its first token would come.

A prefill worker has room while its queued prompts will have run within ``hold_back_s``; a decode worker has
room while its batch is not full. That is enough to keep it busy: more would only be decided too early. Only
the few best-ranked workers are considered, see :class:`~memserve.scheduling.fleet.Ranking`.

A request with a deadline needs more: a worker that is in time, by prediction plus a margin, and that has a
free row for it now. When a queue ends is predictable; when a stream ends is not predictable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import attrs

from memserve.identity import ActorId
from memserve.scheduling.fleet import UNKNOWN, Fleet, Side, Worker
from memserve.scheduling.global_tree import PromptPath
from memserve.scheduling.punctuality import margin_s

LOOKED_AT = 3
"""Workers considered on each side."""
SKIPPED_MAX = 16
"""Best-ranked workers considered at most, those whose shard is not ready included."""
ROWS_AHEAD = 1.25
"""Streams that a decode worker may have, relative to its batch rows: as one ends, the next must be there."""


@attrs.frozen
class Occupancy:
    """How full the cluster is."""

    served: bool
    """A worker can prefill and a worker can decode."""
    open: bool
    """A worker has room for another prompt now."""
    at: float = float("inf")
    """When a worker will have room, unless a report changes it; infinity if that is unknown."""


def is_open(fleet: Fleet, hold_back_s: float, now: float) -> bool:
    """Whether a worker has room for another prompt now.

    This runs for each request, so the first worker of each side is tried before the others.
    """
    prefills, decodes = fleet.prefills.every.keys, fleet.decodes.every.keys
    if prefills and decodes:
        prefill, decode = fleet.workers[prefills[0][2]], fleet.workers[decodes[0][2]]
        ready = prefill.member.shard in fleet.shards and decode.member.shard in fleet.shards
        if ready and prefill.queue_until - hold_back_s <= now and _takes_streams(decode):
            return True
    return room(fleet, hold_back_s, now).open


def room(fleet: Fleet, hold_back_s: float, now: float) -> Occupancy:
    """Whether the cluster has room for a prompt, and when it will."""
    prefills, decodes = list(_best(fleet, fleet.prefills)), list(_best(fleet, fleet.decodes))
    if not prefills or not decodes:
        return Occupancy(served=False, open=False)
    if not any(_takes_streams(one) for one in decodes):
        return Occupancy(served=True, open=False)
    at = min(one.queue_until for one in prefills) - hold_back_s
    return Occupancy(served=True, open=at <= now, at=at)


@attrs.frozen
class Forecast:
    """When the first token of a prompt would come if it were placed on a worker now."""

    worker: Worker
    row_s: float
    """See :meth:`~memserve.scheduling.fleet.Worker.row_s`."""
    seconds: float
    """Predicted seconds to the first token."""

    @property
    def margin_s(self) -> float:
        """How much later it may come, see :mod:`memserve.scheduling.punctuality`."""
        return margin_s(self.worker.late_share, self.seconds)

    @property
    def sure_s(self) -> float:
        """Seconds within which the first token comes almost surely."""
        return self.seconds + self.margin_s


@attrs.frozen
class Prospect:
    """What a request that may have a deadline can expect."""

    soonest_s: float = float("inf")
    """Seconds within which its first token comes almost surely; infinity if no worker can take it."""
    margin_s: float = 0.0
    """The part of ``soonest_s`` beyond the prediction."""
    timely: Mapping[ActorId, float] = attrs.field(factory=dict)
    """Workers that have room and bring the first token in time, with the predicted seconds to it.

    Room includes a free row. A row comes free when a stream ends, which is hard to predict, and the next row
    to come free may be another worker's.
    """
    room_at: float = float("inf")
    """When another timely worker will have room, unless a report changes it; infinity if that is unknown."""


def prospect(found: Sequence[Forecast], within_s: float, hold_back_s: float, now: float) -> Prospect:
    """The prospect of a request whose first token is wanted ``within_s``."""
    if not found:
        return Prospect()
    best = min(found, key=lambda one: one.sure_s)
    able = [one for one in found if not one.row_s and one.sure_s <= within_s]
    opens = {one.worker.member.id: one.worker.queue_until - hold_back_s for one in able}
    timely = {one.worker.member.id: one.seconds for one in able if opens[one.worker.member.id] <= now}
    room_at = min((at for at in opens.values() if at > now), default=float("inf"))
    return Prospect(best.sure_s, best.margin_s, timely, room_at)


def forecasts(fleet: Fleet, match: PromptPath, tokens: int, answer: float, now: float) -> list[Forecast]:
    """Forecasts for the workers considered; empty if no worker can take a prompt.

    ``answer``: expected tokens of an answer. The workers considered are the best-ranked ones and the first
    worker of the shard that holds most of the prompt.
    """
    candidates = {one.member.id: one for one in _best(fleet, fleet.prefills)}
    for shard in match.best(1):
        ranking = fleet.prefills.of_shard.get(shard)
        if ranking is not None and shard in fleet.shards:
            candidates |= {id: fleet.workers[id] for id in ranking.first(1)}
    return [_forecast(one, match, tokens, answer, now) for one in candidates.values()]


def _forecast(one: Worker, match: PromptPath, tokens: int, answer: float, now: float) -> Forecast:
    row_s = one.row_s(answer)
    run_s = one.prefill_s(tokens, match.held(one.member.shard).tokens, now)
    return Forecast(one, row_s, max(one.wait_s(now), row_s) + run_s)


def run_s(fleet: Fleet, match: PromptPath, tokens: int) -> float:
    """Seconds to run a prompt where most of it is cached, without a queue.

    Without any worker, those of a small machine.
    """
    for shard in match.best(1):
        ranking = fleet.prefills.of_shard.get(shard)
        if ranking is not None:
            return _run_s(fleet.workers[ranking.first(1)[0]], match, tokens)
    for one in _best(fleet, fleet.prefills):
        return _run_s(one, match, tokens)
    return UNKNOWN.dense[-1][1] / UNKNOWN.dense[-1][0] * tokens


def _run_s(one: Worker, match: PromptPath, tokens: int) -> float:
    return one.model.prefill_s(tokens, match.held(one.member.shard).tokens)


def _best(fleet: Fleet, side: Side) -> Iterator[Worker]:
    """The first few workers of a side's ranking whose shards are ready."""
    found = 0
    for one in side.every.first(SKIPPED_MAX):
        worker = fleet.workers[one]
        if worker.member.shard in fleet.shards:
            yield worker
            found += 1
            if found == LOOKED_AT:
                return


def _takes_streams(one: Worker) -> bool:
    rows = one.member.load.get("rows_max", 0.0)
    return not rows or one.rows < ROWS_AHEAD * rows
