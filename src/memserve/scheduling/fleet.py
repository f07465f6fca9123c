"""What a scheduler believes of each worker: its last report plus later placements, as queues and prices.

Reports lag. If placements since the report did not count, a burst would land on one worker. So a placement
counts on top of a worker's reports until a report has come that surely includes it.

Workers of one site crowd one another (:class:`~memserve.costs.Site`): while others have work of any kind, a
step takes as long as on fewer cores. A worker with a site of its own is treated as if it had none.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from itertools import chain

import attrs

from memserve.costs import GIVE_AFTER_S, StepCosts
from memserve.engine.batching import ALONE
from memserve.identity import ActorId
from memserve.messages import Member
from memserve.scheduling.cost_model import CostModel
from memserve.scheduling.membership import DECODES, PREFILLS

SURE_S = 0.1
"""Time after which a report includes a placement: workers report a change within 50 ms."""
RATE_S = 5.0
"""Time constant of the rate of prompts placed on a worker."""
FREE_PAGES = ("pages_free", "host_pages_free", "disk_pages_free")
"""A shard's gauges of free pages, by tier. While any is free, eviction from a faster tier loses nothing."""
UNKNOWN = StepCosts(((1.0, 0.02), (32.0, 0.03), (256.0, 0.15)), row_s=1e-4, read_s=5e-7, pair_s=2e-7)
"""Costs assumed for a worker that has measured none: those of a small machine. Its measured scale corrects
most of the error."""


@attrs.define
class Placed:
    """What one placement adds to a worker until its reports include it."""

    sure_at: float
    tokens: float = 0.0
    """Prompt tokens to run."""
    pairs: float = 0.0
    """See :class:`~memserve.costs.StepCosts`."""
    rows: int = 0
    context: float = 0.0
    bring_s: float = 0.0
    """Seconds until its prefix has come from another shard, before which the prompt does not run."""


@attrs.define(eq=False)
class Worker:
    """One worker, by its last report and the placements since."""

    member: Member
    model: CostModel
    tokens: float = 0.0
    begun: float = 0.0
    """The part of ``tokens`` in the step under way, which no further prompt can share."""
    pairs: float = 0.0
    """Pairs of the tokens not in the step under way."""
    rows: float = 0.0
    context: float = 0.0
    queue_until: float = 0.0
    """When the prompts it has will have run."""
    step_s: float = 0.0
    """Seconds of a step of its streams, without a prompt."""
    alone_s: float = 0.0
    """Seconds of a step of its streams while no neighbour has work."""
    used_at: float = 0.0
    """Time of the last placement; among equal workers, the one placed on longest ago is next."""
    since: list[Placed] = attrs.field(factory=list)
    taken: float = 0.0
    """Prompts it has taken in, by its last report."""
    fetched_until: float = 0.0
    """When the last prompt whose prefix is fetched from another shard will have arrived and run."""
    late_share: float = 0.0
    """How much later than predicted its first tokens come, see :mod:`memserve.scheduling.punctuality`."""
    _rate: float = 0.0
    _rate_at: float = -math.inf
    """Time of the last placed prompt."""
    site: list[Worker] = attrs.field(factory=list, repr=False)
    """All workers of its site, itself included."""

    def heard(self, member: Member, now: float) -> None:
        """Take a report in."""
        load = member.load
        if member.costs is not None and member.costs != self.member.costs:
            self.model = CostModel(member.costs)
        self.model.scale = load.get("step_cost_scale", 1.0)
        self.model.prompt_scale = load.get("prompt_cost_scale")
        self.late_share = load.get("first_tokens_late_share", 0.0)
        self.member = member
        self._confirm(load.get("prompts_taken_total", 0.0), now)
        self.tokens = load.get("waiting_tokens", 0.0) + sum(one.tokens for one in self.since)
        self.begun = load.get("step_tokens", 0.0)
        self.pairs = load.get("waiting_pairs", 0.0) + sum(one.pairs for one in self.since)
        self.rows = load.get("decode_rows", 0.0) + sum(one.rows for one in self.since)
        self.context = load.get("context_tokens", 0.0) + sum(one.context for one in self.since)
        self._settle(now)

    def _confirm(self, taken: float, now: float) -> None:
        """Drop the placements that the report includes: as many as prompts taken since, and all old ones."""
        more, left = taken - self.taken, []
        for one in self.since:
            if one.tokens and more > 0:
                more -= 1
            elif one.sure_at > now:
                left.append(one)
        self.since, self.taken = left, taken

    def placed(self, one: Placed, now: float) -> None:
        """Count a placement on top of the report."""
        if one.tokens:
            self._rate, self._rate_at = self.rate(now) + 1.0 / RATE_S, now
        self.since.append(one)
        self.used_at = now
        self.tokens += one.tokens
        self.pairs += one.pairs
        self.rows += one.rows
        self.context += one.context
        self._settle(now, added=one)

    def queue_s(self, now: float) -> float:
        """Seconds until a prompt placed now would begin to run."""
        return max(0.0, self.queue_until - now)

    def rate(self, now: float) -> float:
        """Prompts placed here a second, lately."""
        return self._rate * math.exp((self._rate_at - now) / RATE_S)

    def wait_s(self, now: float) -> float:
        """Seconds until a prompt placed now begins, counting the step under way.

        A queue ends when a step does.
        """
        queue_s = self.queue_until - now
        return queue_s if queue_s > 0 else self.begins_s(now)

    def begins_s(self, now: float) -> float:
        """Seconds until a prompt begins that is placed now without a queue.

        Half a step of streams is left on average. A worker without work has no core as long as a neighbour's
        step has all of them (:mod:`memserve.engine.cpu_budget`).
        """
        return self.step_s / 2 if self.rows or len(self.site) <= 1 else self._cores_s(now)

    def _cores_s(self, now: float) -> float:
        """Seconds until it has a core, if it has no work. Several busy neighbours leave cores to one another."""
        busy = [one for one in self.neighbours() if one.busy(now)]
        if self.queue_until > now or len(busy) != 1:
            return 0.0
        site = busy[0].member.site
        if site is None or not site.threads >= site.cores > 1:
            return 0.0  # a GPU is shared in time
        return min(GIVE_AFTER_S, busy[0].step_left_s(now))

    def step_left_s(self, now: float) -> float:
        """Seconds until its step under way ends: on average half of a whole one, or the end of a short queue."""
        queue_s = self.queue_s(now)
        if not queue_s:
            return self.step_s / 2
        chunk = self.model.steps.chunk_tokens * (1 if self.rows else ALONE)
        whole_s = self.model.queue_s(chunk, chunk * chunk / 2, self.rows, self.context)
        return queue_s if queue_s < whole_s else whole_s / 2

    def row_s(self, answer: float) -> float:
        """Seconds until its batch has a free row for one more prompt; 0 if it has one now.

        Answers are assumed to have ``answer`` tokens and to have begun at random times. A prompt without a
        row waits for a stream to end, however short the queue is.
        """
        rows_max = self.member.load.get("rows_max", 0.0)
        beyond = self.rows + 1 - rows_max
        return beyond * answer / rows_max * self.step_s if rows_max and beyond > 0 else 0.0

    def prefill_s(self, tokens: int, cached: int, now: float) -> float:
        """Seconds to run a prompt placed now, next to its streams and neighbours, without the queue."""
        return self.prompts_crowded(now) * self.model.prefill_s(tokens, cached, self.rows, self.context)

    def _settle(self, now: float, added: Placed | None = None) -> None:
        self.settle_step()
        if added is None:
            queue_s = self.model.queue_s(self.tokens - self.begun, self.pairs, self.rows, self.context)
            left_s = self.member.load.get("step_left_s", self.step_s / 2 if queue_s else 0.0)
            queue_s = left_s + self.prompts_crowded(now) * queue_s
            self.queue_until = max(now + queue_s, self.fetched_until if self.tokens else 0.0)
        elif added.tokens:
            seconds = self.model.queue_s(added.tokens, added.pairs, self.rows, self.context)
            seconds *= self.prompts_crowded(now)
            seconds -= self.shared_s(added.tokens, self.tokens - added.tokens, now)
            if added.bring_s > self.wait_s(now):
                self.queue_until = self.fetched_until = now + added.bring_s + seconds
            else:
                self.queue_until = now + self.wait_s(now) + seconds

    def settle_step(self) -> None:
        """Update the seconds of a step of its streams, by the neighbours that have streams."""
        self.step_s = self.alone_s = self.model.decode_s(self.rows, self.context)
        if len(self.site) > 1:
            self.step_s *= self.crowded(sum(one.rows > 0 for one in self.neighbours()), prompts=False)

    def shared_s(self, tokens: float, queued: float, now: float) -> float:
        """Seconds that a prompt saves because the queue's last step has room for it."""
        left_s = self.queue_until - now
        if left_s <= 0:
            return 0.0
        crowded = self.prompts_crowded(now)
        return crowded * self.model.shared_s(queued - self.begun, left_s / crowded, tokens, self.rows)

    # ---- its site -------------------------------------------------------------------------------------------

    def neighbours(self) -> Iterator[Worker]:
        """The other workers of its site."""
        return (one for one in self.site if one is not self)

    def shares_with(self, other: Worker) -> bool:
        """Whether it shares cores or a GPU with ``other``."""
        return self.member.site is not None and self.site is other.site and self is not other

    def crowded(self, others: float, *, prompts: bool) -> float:
        """The factor on its steps while ``others`` other workers of its site have work."""
        site = self.member.site
        return 1.0 if site is None else self.model.steps.crowded(site.slices(others), prompts)

    def prompts_crowded(self, now: float) -> float:
        """The factor on steps with prompts, by the neighbours that have work now.

        A prompt has usually run before they run out of work.
        """
        if len(self.site) <= 1:
            return 1.0
        return self.crowded(sum(one.busy(now) for one in self.neighbours()), prompts=True)

    def streams_crowded(self) -> float:
        """The factor on a stream's steps, averaged over its stay.

        Of a neighbour's m streams, which end at random times, the last ends after m / (m + 1) of that stay,
        on average.
        """
        if len(self.site) <= 1:
            return 1.0
        return self.crowded(sum(one.rows / (one.rows + 1.0) for one in self.neighbours()), prompts=False)

    def slowed(self, others: float, *, prompts: bool) -> float:
        """The share of its time lost when one more worker of its site has work next to ``others``."""
        return 1.0 - self.crowded(others, prompts=prompts) / self.crowded(others + 1, prompts=prompts)

    def longer_s(self, others: float) -> float:
        """How much longer its steps are when one more worker of its site has streams next to ``others``."""
        return self.alone_s * (self.crowded(others + 1, prompts=False) - self.crowded(others, prompts=False))

    def busy(self, now: float) -> bool:
        """Whether it has work."""
        return self.rows > 0 or self.queue_until > now

    def busiest(self) -> Worker:
        """The worker of its site with the most streams.

        Where the streams of a host are on one worker, the weights are read once a step.
        """
        return max(self.site, key=_rows) if len(self.site) > 1 else self


@attrs.define
class Ranking:
    """Workers in order of a figure that changes."""

    keys: list[tuple[float, float, ActorId]] = attrs.field(factory=list)
    _key: dict[ActorId, tuple[float, float, ActorId]] = attrs.field(factory=dict)

    def put(self, worker: ActorId, figure: float, used_at: float) -> None:
        """Put ``worker`` in its place; among equal figures, the one used longest ago is first."""
        key = (figure, used_at, worker)
        if len(self.keys) == 1 and worker in self._key:
            self.keys[0] = self._key[worker] = key
        elif self._key.get(worker) != key:
            self.drop(worker)
            self._key[worker] = key
            insort(self.keys, key)

    def drop(self, worker: ActorId) -> None:
        """Remove ``worker``."""
        key = self._key.pop(worker, None)
        if key is not None:
            del self.keys[bisect_left(self.keys, key)]

    def first(self, limit: int) -> list[ActorId]:
        """The best ``limit`` workers."""
        return [worker for _, _, worker in self.keys[:limit]]


@attrs.define
class Side:
    """The workers that may prefill, or those that may decode: all of them, and by shard."""

    roles: tuple[str, ...]
    every: Ranking = attrs.field(factory=Ranking)
    of_shard: dict[ActorId, Ranking] = attrs.field(factory=dict)

    def put(self, member: Member, figure: float, used_at: float) -> None:
        """Rank a worker, if its role is on this side."""
        if member.role in self.roles:
            self.every.put(member.id, figure, used_at)
            shard = self.of_shard.get(member.shard)
            if shard is None:
                shard = self.of_shard[member.shard] = Ranking()
            shard.put(member.id, figure, used_at)

    def drop(self, member: Member) -> None:
        """Remove a worker."""
        self.every.drop(member.id)
        shard = self.of_shard.get(member.shard)
        if shard is not None:
            shard.drop(member.id)
            if not shard.keys:
                del self.of_shard[member.shard]


@attrs.define
class Fleet:
    """All workers that can take requests now, ranked by how long a request would wait."""

    workers: dict[ActorId, Worker] = attrs.field(factory=dict)
    prefills: Side = attrs.field(factory=lambda: Side(PREFILLS))
    decodes: Side = attrs.field(factory=lambda: Side(DECODES))
    shards: dict[ActorId, Member] = attrs.field(factory=dict)
    """The ready shards."""
    sites: dict[str, list[Worker]] = attrs.field(factory=dict)
    """The workers of each site, by key."""
    free_pages: dict[ActorId, float] = attrs.field(factory=dict)
    """Free pages of each ready shard in all tiers: by its last report, less later placements. Below 0: pages
    that placements evict."""

    def members(self) -> Iterable[Member]:
        """The last reports of all workers and shards."""
        return chain(self.shards.values(), (one.member for one in self.workers.values()))

    def heard(self, member: Member, now: float) -> None:
        """Take a heartbeat in.

        A worker counts while it is ready. Whether its shard is ready is checked when a pair is chosen.
        """
        if member.kind == "MemPoolShard":
            if member.state == "ready":
                self.shards[member.id] = member
                free = [member.load[name] for name in FREE_PAGES if name in member.load]
                self.free_pages[member.id] = sum(free) if free else math.inf
            else:
                self.shards.pop(member.id, None)
                self.free_pages.pop(member.id, None)
        elif member.role:
            known = self.workers.get(member.id)
            if known is not None and (known.member.role, known.member.shard) != (member.role, member.shard):
                self._unrank(known.member)
            if member.state != "ready":
                self.forget(member.id)
                return
            if known is None:
                known = self.workers[member.id] = Worker(member, _costs(member))
                self._settle_in(known)
            before = known.rows
            known.heard(member, now)
            self._rank(known, now)
            self._tell_neighbours(known, before, now)

    def placed(self, worker: ActorId, one: Placed, now: float) -> None:
        """Count a placement on a worker."""
        known = self.workers.get(worker)
        if known is not None:
            before = known.rows
            known.placed(one, now)
            self._rank(known, now)
            self._tell_neighbours(known, before, now)

    def took(self, shard: ActorId, pages: float) -> None:
        """Count ``pages`` of a shard as needed by a placement."""
        if shard in self.free_pages:
            self.free_pages[shard] -= pages

    def forget(self, actor: ActorId) -> None:
        """Remove a dead actor."""
        self.shards.pop(actor, None)
        self.free_pages.pop(actor, None)
        known = self.workers.pop(actor, None)
        if known is not None:
            self._unrank(known.member)
            self._move_out(known)

    # ---- sites ----------------------------------------------------------------------------------------------

    def _settle_in(self, one: Worker) -> None:
        if one.member.site is not None:
            one.site = self.sites.setdefault(one.member.site.key, [])
            one.site.append(one)

    def _move_out(self, one: Worker) -> None:
        if one.member.site is not None:
            one.site[:] = list(one.neighbours())
            if not one.site:
                del self.sites[one.member.site.key]

    def _tell_neighbours(self, one: Worker, rows: float, now: float) -> None:
        """Update the neighbours' step times when its first stream begins or its last one ends."""
        if len(one.site) > 1 and (rows > 0) != (one.rows > 0):
            for other in one.neighbours():
                other.settle_step()
                self._rank(other, now)

    def _rank(self, one: Worker, now: float) -> None:
        queue = one.queue_s(now)
        self.prefills.put(one.member, round(queue + one.step_s, 3), one.used_at)
        self.decodes.put(one.member, round(one.step_s + queue / 8, 3), one.used_at)

    def _unrank(self, member: Member) -> None:
        self.prefills.drop(member)
        self.decodes.drop(member)


def _rows(one: Worker) -> float:
    return one.rows


def _costs(member: Member) -> CostModel:
    """The worker's own costs. Invalid figures are priced like missing ones, not refused."""
    try:
        return CostModel(member.costs or UNKNOWN)
    except ValueError:
        return CostModel(UNKNOWN)
