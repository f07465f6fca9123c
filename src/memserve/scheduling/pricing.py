"""The default policy, ``cost``: every placement has a price in seconds, and the lowest price wins.

For a request, a prefill worker p and a decode worker d (the same one, or two), the price is

    ttft_weight * (ttft + delayed_p + lost) + handoff + answer * step_d + slow_d
        + others_weight * (rows_p * added_p + rows_d * answer * longer_d / 2) + crowded

``ttft``: the step under way (at p, or that of a neighbour which has all cores while p has no work), the queue
at p (or bringing the prefix, where that takes longer), and the missing tokens next to p's streams. ``step_d``: a step of d's streams with this one. ``slow_d``: prompts
queued at d, which lengthen its first steps.

The other terms are what other requests lose. ``delayed_p``: prompts that come to p while this one is queued
or runs, run_p * rate_p * (queue_p + run_p / 2), by the recent rate at which prompts come to p. It keeps a
long prompt away from the home of sessions that ask often, whose short prompts would wait behind it. ``lost``:
prompts that will no longer match what must be evicted for this one's pages (see
:mod:`memserve.scheduling.losses`). ``added_p``: the streams at p while the prompt runs. ``longer_d``: the
streams at d for as long as this one is there. ``crowded``: what the workers lose that share cores or a GPU
with p, if p has no streams, and with d, for the time by which this stream prolongs d's load.

All times are those next to the neighbours that have work. Locality has no weight of its own: a cached prefix
makes ``ttft`` and what others lose smaller, a queue makes them larger. So a hot prefix is run, or fetched, at
a second place as soon as the queue at the first costs more than a second copy of it.

A second counts the same, whoever loses it: ``others_weight`` is 1. Only first tokens cost more, by
``ttft_weight``. With a lower weight for the others, an overloaded host brings first tokens sooner, and all
answers later.

Three things are in no price (docs/measurements/2026-11-28-prices.md). Drafts make a stream's step up to half longer
and an answer's steps fewer. Tokens that a grammar forces add some percent to a step. Prompts whose log probabilities
are wanted take nearly twice as long with a model of 135M parameters, and hardly longer with one of many billions.

Not all pairs are priced: only the few prefill workers with the shortest queues and those of the shards that
hold the most of the prompt, each with the decode workers that it reaches at the least cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import attrs

from memserve.identity import ActorId
from memserve.messages import Request
from memserve.scheduling.cost_model import LINKS, CostModel, LinkModel
from memserve.scheduling.fleet import SURE_S, Fleet, Worker
from memserve.scheduling.global_tree import PromptPath
from memserve.scheduling.membership import DECODES, PREFILLS
from memserve.scheduling.policies import PLAIN, Placement, Policy, count_placement
from memserve.tokens import count

BY_QUEUE = 3
"""Prefill workers considered for their short queue."""
BY_PREFIX = 2
"""Shards considered for their prefix match."""
DECODES_EACH = 2
"""Decode workers considered for each prefill worker."""
FETCH_MARGINS = 3
"""What a fetch must save, in units of ``margin_s``: during a fetch, other prompts may begin first."""
SHOWN = 3
"""Candidates shown in the log."""


@attrs.frozen
class Weights:
    """The weights of ``[scheduler]``."""

    ttft: float = 3.0
    others: float = 1.0
    margin_s: float = 0.02
    """What a handoff must save; less is within the model's error."""
    fetch: bool = False
    """Whether a prefix may be fetched from another shard, and a stream continued on another shard."""
    path: str = "mapped"
    """How pages move between shards of one host, see :data:`~memserve.scheduling.cost_model.LINKS`."""
    far_path: str = "tcp"
    """How pages move between hosts."""


@attrs.define
class Start:
    """Running the prompt on one worker: the price, and how its prefix gets there."""

    worker: Worker
    price: float
    ttft: float
    cached: int
    """Tokens that need not be computed."""
    expected: int
    """Tokens that the worker's shard holds."""
    source: ActorId = ActorId("")
    source_tokens: int = 0
    bring_s: float = 0.0
    """Seconds until the pages of ``source`` have arrived."""


Candidate = tuple[float, bool, float, ActorId, Start]
"""Price, whether the request is handed over, when the decode worker was last used, its id, and the start."""


@attrs.define
class LinkOccupancy:
    """When each shard's outgoing and incoming link is free again, by the placements so far."""

    _until: dict[tuple[ActorId, str], float] = attrs.field(factory=dict)

    def wait_s(self, source: ActorId, to: ActorId, now: float) -> float:
        """Seconds until the next transfer from ``source`` to ``to`` can begin."""
        until = self._until.get
        return max(0.0, until((source, "out"), 0.0) - now, until((to, "in"), 0.0) - now)

    def take(self, source: ActorId, to: ActorId, seconds: float, now: float) -> None:
        """Occupy both links with a transfer of ``seconds``."""
        until = now + self.wait_s(source, to, now) + seconds
        self._until[source, "out"] = self._until[to, "in"] = until

    def forget(self, shard: ActorId) -> None:
        """Drop a dead shard."""
        self._until.pop((shard, "out"), None)
        self._until.pop((shard, "in"), None)


@attrs.define
class Cost:
    """See the module's docstring."""

    weights: Weights = Weights()
    links: Mapping[str, LinkModel] = attrs.field(factory=lambda: LINKS)
    occupancy: LinkOccupancy = attrs.field(factory=LinkOccupancy, init=False)

    def link(self, fleet: Fleet, source: ActorId, to: ActorId) -> LinkModel:
        """The cost of moving pages from one shard to another."""
        here, there = fleet.shards.get(source), fleet.shards.get(to)
        far = here is not None and there is not None and here.host != there.host
        return self.links[self.weights.far_path if far else self.weights.path]

    def choose(
        self,
        fleet: Fleet,
        request: Request,
        match: PromptPath,
        answer: float,
        now: float,
        only: Collection[ActorId] = (),
    ) -> Placement | None:
        quote = Quote(self, fleet, match, count(request.tokens), answer, now, only)
        priced = quote.candidates()
        if not priced:
            return None
        priced.sort(key=_by_price)
        choice = quote.take(priced)
        start, handed = priced[0][4], priced[0][1]
        sure_s = start.ttft + SURE_S if handed else SURE_S
        count_placement(fleet, choice, request, start.cached, sure_s, now, start.bring_s)
        return choice

    def forget(self, actor: ActorId) -> None:
        """Drop what is remembered of a dead actor."""
        self.occupancy.forget(actor)


@attrs.define
class Quote:
    """The prices of one request. ``answer``: the expected new tokens."""

    policy: Cost
    fleet: Fleet
    match: PromptPath
    tokens: int
    answer: float
    now: float
    only: Collection[ActorId] = ()
    """Workers that may run the prompt; empty: any."""
    weights: Weights = attrs.field(init=False)
    best: int = attrs.field(init=False)
    """Tokens that the shard with the longest match holds."""
    stays: dict[ActorId, float] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self.weights, self.best = self.policy.weights, self.match.tokens

    def candidates(self) -> list[Candidate]:
        """All candidates, unordered."""
        found = []
        for worker in map(self.fleet.workers.__getitem__, self.only) if self.only else self._prefills():
            start = self._start(worker)
            for decode in self._decodes(worker):
                handed = decode is not worker
                price = start.price + self._stay(decode)
                if handed:
                    price += self._handoff(worker, decode)
                found.append((price, handed, decode.used_at, decode.member.id, start))
        return found

    # ---- candidates -----------------------------------------------------------------------------------------

    def _prefills(self) -> Iterator[Worker]:
        sides, workers = self.fleet.prefills, self.fleet.workers
        found = dict.fromkeys(sides.every.first(BY_QUEUE))
        for shard in self.match.best(BY_PREFIX):
            ranking = sides.of_shard.get(shard)
            if ranking is not None:
                found |= dict.fromkeys(ranking.first(2))
        for one in list(found):
            busiest = workers[one].busiest().member
            if busiest.role in PREFILLS:
                found[busiest.id] = None
        for one in found:
            worker = workers[one]
            if worker.member.shard in self.fleet.shards:
                yield worker

    def _decodes(self, prefill: Worker) -> Iterable[Worker]:
        member, sides, workers = prefill.member, self.fleet.decodes, self.fleet.workers
        found = {member.id: None} if member.role == "both" else {}
        ranking = sides.of_shard.get(member.shard)
        if found and not self.weights.fetch and ranking is not None and len(ranking.keys) == 1:
            return (prefill,)  # it is the only decode worker of its shard
        if ranking is not None:
            found |= dict.fromkeys(ranking.first(DECODES_EACH))
        if self.weights.fetch:
            found |= dict.fromkeys(sides.every.first(DECODES_EACH))
        busiest = prefill.busiest().member
        if busiest.role in DECODES and (self.weights.fetch or busiest.shard == member.shard):
            found[busiest.id] = None
        return [workers[one] for one in found if workers[one].member.shard in self.fleet.shards]

    # ---- prices ---------------------------------------------------------------------------------------------

    def _start(self, one: Worker) -> Start:
        """The cheapest start on a worker: with what its own shard holds, or with what another shard holds."""
        shard, model = one.member.shard, one.model
        held = self.match.held(shard)
        swap_s = model.swap_in_s(held.slow_tokens * model.steps.token_bytes) if held.slow_tokens else 0.0
        lost = self._lost(one, self.tokens - held.tokens)
        ttft, harm = self._run(one, held.tokens, swap_s)
        start = Start(one, self.weights.ttft * (ttft + lost) + harm, ttft, held.tokens, held.tokens)
        if self.weights.fetch and self.best > held.tokens:
            source = self.match.best(1)[0]
            fetch_s = self._transfer_s(source, shard, self.best - held.tokens, model)
            ttft, harm = self._run(one, self.best, swap_s + fetch_s)
            price = self.weights.ttft * (ttft + lost) + harm + FETCH_MARGINS * self.weights.margin_s
            if price < start.price:
                start = Start(one, price, ttft, self.best, held.tokens, source, self.best, swap_s + fetch_s)
        return start

    def _run(self, one: Worker, cached: int, bring_s: float) -> tuple[float, float]:
        """Seconds to the first token, and the price that others pay while the prompt is queued or runs."""
        model, queue_s = one.model, one.queue_until - self.now
        run_s = one.prefill_s(self.tokens, cached, self.now)
        if queue_s <= bring_s:
            queue_s = max(0.0, queue_s)
            ttft = one.begins_s(self.now) + bring_s + run_s
        else:
            run_s -= one.shared_s(max(1, self.tokens - cached), one.tokens, self.now)
            ttft = queue_s + run_s
        harm = self.weights.ttft * one.rate(self.now) * run_s * (queue_s + run_s / 2)
        if one.rows:
            steps = -(-max(1, self.tokens - cached) // model.steps.chunk_tokens)
            added = run_s - steps * one.step_s
            if added > 0:
                harm += self.weights.others * one.rows * added
        elif len(one.site) > 1:
            harm += self._crowded(one, run_s)
        return ttft, harm

    def _crowded(self, one: Worker, run_s: float) -> float:
        """What its neighbours lose while a worker without streams runs a prompt."""
        price, weights = 0.0, self.weights
        busy = [other for other in one.neighbours() if other.busy(self.now)]
        neighbours = len(busy) - 1
        for other in busy:
            price += weights.others * other.rows * run_s * other.slowed(neighbours, prompts=False)
            queued_s = other.queue_s(self.now)
            both_s = min(run_s, queued_s - one.queue_s(self.now))
            if both_s > 0:
                delayed_s = both_s * other.slowed(neighbours, prompts=True)
                price += weights.ttft * delayed_s * (1.0 + other.rate(self.now) * queued_s)
        return price

    def _lost(self, one: Worker, tokens: float) -> float:
        """Seconds that later prompts lose, on average, to what the shard evicts for ``tokens`` new tokens."""
        free = self.fleet.free_pages.get(one.member.shard, math.inf)
        short = tokens - max(0.0, free) * self.match.page_tokens
        return self.match.loss_share * short * one.model.token_s if short > 0 else 0.0

    def _stay(self, one: Worker) -> float:
        """The price of decoding there to the end: for the request and for those next to it."""
        known = self.stays.get(one.member.id)
        if known is not None:
            return known
        answer, model = self.answer, one.model
        crowded = one.streams_crowded()
        step_s = crowded * model.decode_s(one.rows + 1, one.context + self.tokens + answer / 2)
        price, slow = answer * step_s, one.queue_until - self.now
        if slow > 0:
            price += max(0.0, slow - step_s * -(-one.tokens // model.steps.chunk_tokens))
        longer_s = step_s - crowded * one.alone_s
        if one.rows and longer_s > 0:
            price += self.weights.others * one.rows * answer * longer_s / 2
        if len(one.site) > 1:
            # Next to m streams, this one prolongs the crowding of neighbours by 1 / (m + 1) of its stay, on
            # average: only while it is the last to end.
            others = [other for other in one.neighbours() if other.rows]
            lost_s = sum(other.rows * other.longer_s(len(others) - 1) for other in others)
            price += self.weights.others * answer * lost_s / (one.rows + 1) / 2
        self.stays[one.member.id] = price
        return price

    def _handoff(self, prefill: Worker, decode: Worker) -> float:
        """The price of decoding on another worker than the one that runs the prompt."""
        model, here, there = prefill.model, prefill.member.shard, decode.member.shard
        price = self.weights.margin_s + model.handoff_s
        if there == here:
            return price
        missing = self._missing_tokens(there)
        moved = self._transfer_s(here, there, missing, model)
        return price + moved + self.weights.ttft * self._lost(decode, missing)

    def _missing_tokens(self, shard: ActorId) -> int:
        """Tokens that a handoff moves to a shard: at least the last page, which no index has."""
        return max(self.match.page_tokens, self.tokens - self.match.held(shard).tokens)

    def _transfer_s(self, source: ActorId, to: ActorId, tokens: int, model: CostModel) -> float:
        wait = self.policy.occupancy.wait_s(source, to, self.now)
        link = self.policy.link(self.fleet, source, to)
        return wait + link.seconds(tokens * model.steps.token_bytes)

    # ---- placement ------------------------------------------------------------------------------------------

    def take(self, priced: list[Candidate]) -> Placement:
        """Place the first candidate, and count what it takes of links and of the shards' room."""
        _, handed, _, decode, start = priced[0]
        member, decode_shard = start.worker.member, self.fleet.workers[decode].member.shard
        far = handed and decode_shard != member.shard
        if start.source:
            self._move(start.source, member.shard, start.cached - start.expected, start.worker.model)
        if far:
            self._move(member.shard, decode_shard, self._missing_tokens(decode_shard), start.worker.model)
            self.fleet.took(
                decode_shard, (self._missing_tokens(decode_shard) + self.answer) / self.match.page_tokens
            )
        new = self.tokens - start.expected + (0.0 if far else self.answer)
        self.fleet.took(member.shard, new / self.match.page_tokens)
        return Placement(
            member.id, decode, member.shard, decode_shard if far else ActorId(""),
            start.source, start.source_tokens, start.expected, start.ttft,
            "; ".join([_shown(*one) for one in priced[:SHOWN]]),
        )  # fmt: skip

    def _move(self, source: ActorId, to: ActorId, tokens: int, model: CostModel) -> None:
        """Occupy both shards' links for a transfer; its fixed time occupies neither."""
        byte_s = self.policy.link(self.fleet, source, to).byte_s
        self.policy.occupancy.take(source, to, tokens * model.steps.token_bytes * byte_s, self.now)


def _by_price(one: Candidate) -> tuple[float, bool, float, ActorId]:
    return one[:4]


def _shown(price: float, handed: bool, used_at: float, decode: ActorId, start: Start) -> str:
    """One candidate as the log shows it."""
    way = f"{start.worker.member.id}>{decode}" if handed else start.worker.member.id
    bring = f", {start.source_tokens} from {start.source}" if start.source else ""
    return f"{way} {price * 1e3:.1f} ms (first token {start.ttft * 1e3:.1f}, cached {start.expected}{bring})"


POLICIES: dict[str, Callable[[], Policy]] = {"cost": Cost, **PLAIN}
"""The values of ``scheduler.policy``."""
