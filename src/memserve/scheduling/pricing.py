"""The default policy, ``cost``: every placement has a price in seconds, and the least is taken.

For a request, a prefill worker p and a decode worker d (the same one, or two), the price is

    ttft_weight * ttft + handoff + answer * step_d + slow_d + others_weight * (rows_p * added_p + rows_d * answer * longer_d / 2)

``ttft``: the step under way, what is queued at p (or bringing the prefix, where that takes longer), the missing tokens
beside p's streams. ``step_d``: a step of d's streams with this one. ``slow_d``: prompts queued at d, which lengthen its
first steps. The last terms are what others lose: the streams at p while the prompt runs, those at d for as long as this
one is there. Locality has no weight of its own: a cached prefix makes ``ttft`` and ``added_p`` smaller, a queue makes them
larger, so a hot prefix is run, or fetched, at a second place as soon as the queue at the first costs more.

Not all pairs are priced: the few prefill workers with the shortest queues and those of the shards that hold the most of
the prompt, each with the decode workers that it reaches at the least cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs

from memserve.identity import ActorId
from memserve.messages import Request
from memserve.scheduling.fleet import SURE_S, Fleet, Worker
from memserve.scheduling.global_tree import Match
from memserve.scheduling.outputs import OutputLengths
from memserve.scheduling.policies import PLAIN, Choice, Policy, note
from memserve.tokens import count

BY_QUEUE = 3
"""Prefill workers looked at for their short queue."""
BY_PREFIX = 2
"""Shards looked at for what they hold."""
DECODES_EACH = 2
"""Decode workers looked at for each prefill worker."""
SHOWN = 3
"""Candidates in the log."""


@attrs.frozen
class Weights:
    """``[scheduler]``'s figures."""

    ttft: float = 3.0
    others: float = 0.3
    margin_s: float = 0.02
    """A hand-over must save so much: less than that is the model's error."""
    fetch: bool = False
    """Whether a prefix may be fetched from another shard, and a stream continued on one."""


@attrs.define
class Start:
    """Running the prompt on one worker: what it costs, and how its prefix comes there."""

    worker: Worker
    ttft: float
    harm: float
    cached: int
    """Tokens that need not be computed."""
    expected: int
    """Tokens that its shard holds."""
    source: ActorId = ActorId("")
    source_tokens: int = 0
    fetched_s: float = 0.0
    """For how long the source's link is taken."""


@attrs.define
class Cost:
    """See the module's text."""

    weights: Weights = Weights()
    outputs: OutputLengths = attrs.field(factory=OutputLengths)
    _link_until: dict[ActorId, float] = attrs.field(factory=dict, init=False)
    """Until when each shard's link is taken by what was fetched from it."""

    def choose(self, fleet: Fleet, request: Request, match: Match, now: float) -> Choice | None:
        tokens, answer = count(request.tokens), self.outputs.expect(request)
        steps: dict[ActorId, float] = {}
        priced = []
        for worker in self._prefills(fleet, match):
            start = self._start(worker, match, tokens, now)
            for decode in self._decodes(fleet, worker):
                if decode.member.id not in steps:
                    steps[decode.member.id] = self._stay(decode, tokens, answer, now)
                handoff = self._handoff(worker, decode, match, tokens)
                price = self.weights.ttft * start.ttft + start.harm + handoff + steps[decode.member.id]
                priced.append((price, decode is not worker, decode.used_at, decode.member.id, start))
        if not priced:
            return None
        priced.sort(key=lambda one: one[:4])
        return self._take(fleet, priced, request, now)

    def learn(self, scope: str, tokens: int) -> None:
        """An answer of a tenant had so many tokens."""
        self.outputs.learn(scope, tokens)

    def forget(self, actor: ActorId) -> None:
        """Drop what is remembered of an actor that is gone."""
        self._link_until.pop(actor, None)

    # ---- who is looked at -----------------------------------------------------------------------------------

    def _prefills(self, fleet: Fleet, match: Match) -> Iterator[Worker]:
        found = dict.fromkeys(fleet.prefills.every.first(BY_QUEUE))
        for shard in match.best(BY_PREFIX):
            ranking = fleet.prefills.of_shard.get(shard)
            if ranking is not None:
                found |= dict.fromkeys(ranking.first(2))
        for one in found:
            worker = fleet.workers[one]
            if worker.member.shard in fleet.shards:
                yield worker

    def _decodes(self, fleet: Fleet, prefill: Worker) -> Iterator[Worker]:
        member = prefill.member
        found = {member.id: None} if member.role == "both" else {}
        ranking = fleet.decodes.of_shard.get(member.shard)
        if found and not self.weights.fetch and ranking is not None and len(ranking.keys) == 1:
            yield prefill  # alone on its shard
            return
        if ranking is not None:
            found |= dict.fromkeys(ranking.first(DECODES_EACH))
        if self.weights.fetch:
            found |= dict.fromkeys(fleet.decodes.every.first(DECODES_EACH))
        for one in found:
            worker = fleet.workers[one]
            if worker.member.shard in fleet.shards:
                yield worker

    # ---- what it costs --------------------------------------------------------------------------------------

    def _start(self, one: Worker, match: Match, tokens: int, now: float) -> Start:
        held, model = match.held(one.member.shard), one.model
        swap_s = model.swap_in_s(held.slow_tokens * model.steps.token_bytes)
        local = self._run(one, tokens, held.tokens, swap_s, now)
        start = Start(one, *local, held.tokens, held.tokens)
        if self.weights.fetch and match.tokens > held.tokens:
            source = match.best(1)[0]
            size = (match.tokens - held.tokens) * model.steps.token_bytes
            wait = max(0.0, self._link_until.get(source, 0.0) - now)
            fetch_s = model.transfer_s(size, "mapped")
            ttft, harm = self._run(one, tokens, match.tokens, swap_s + wait + fetch_s, now)
            if self.weights.ttft * ttft + harm < self.weights.ttft * start.ttft + start.harm:
                start = Start(one, ttft, harm, match.tokens, held.tokens, source, match.tokens, fetch_s)
        return start

    def _run(self, one: Worker, tokens: int, cached: int, bring_s: float, now: float) -> tuple[float, float]:
        """Seconds to the first token, and the price of what the streams beside it lose."""
        run_s = one.model.prefill_s(tokens, cached, one.rows, one.context)
        ttft = one.step_s / 2 + max(one.queue_s(now), bring_s) + run_s
        if not one.rows:
            return ttft, 0.0
        steps = -(-max(1, tokens - cached) // one.model.steps.chunk_tokens)
        added = max(0.0, run_s - steps * one.step_s)
        return ttft, self.weights.others * one.rows * added

    def _stay(self, one: Worker, tokens: int, answer: float, now: float) -> float:
        """The price of being continued there to the end: for the request and for those beside it."""
        step_s = one.model.decode_s(one.rows + 1, one.context + tokens + answer / 2)
        slow = one.queue_s(now)
        if slow:
            slow = max(0.0, slow - step_s * -(-one.tokens // one.model.steps.chunk_tokens))
        longer = max(0.0, step_s - one.step_s) if one.rows else 0.0
        return answer * step_s + slow + self.weights.others * one.rows * answer * longer / 2

    def _handoff(self, prefill: Worker, decode: Worker, match: Match, tokens: int) -> float:
        if decode is prefill:
            return 0.0
        model = prefill.model
        if decode.member.shard == prefill.member.shard:
            return self.weights.margin_s + model.handoff_s(0)
        lacking = tokens - match.held(decode.member.shard).tokens
        return self.weights.margin_s + model.handoff_s(lacking * model.steps.token_bytes, "mapped")

    # ---- what is done ---------------------------------------------------------------------------------------

    def _take(
        self,
        fleet: Fleet,
        priced: list[tuple[float, bool, float, ActorId, Start]],
        request: Request,
        now: float,
    ) -> Choice:
        _, handed, _, decode, start = priced[0]
        member = start.worker.member
        decode_shard = fleet.workers[decode].member.shard
        choice = Choice(
            member.id,
            decode,
            member.shard,
            decode_shard if decode_shard != member.shard else ActorId(""),
            start.source,
            start.source_tokens,
            start.expected,
            start.ttft,
            "; ".join(_shown(*one) for one in priced[:SHOWN]),
        )
        if start.source:
            self._link_until[start.source] = (
                max(now, self._link_until.get(start.source, now)) + start.fetched_s
            )
        note(fleet, choice, request, start.cached, start.ttft + SURE_S if handed else SURE_S, now)
        return choice


def _shown(price: float, handed: bool, used_at: float, decode: ActorId, start: Start) -> str:
    """One candidate as the log shows it."""
    way = f"{start.worker.member.id}>{decode}" if handed else start.worker.member.id
    bring = f", {start.source_tokens} from {start.source}" if start.source else ""
    return f"{way} {price * 1e3:.1f} ms (first token {start.ttft * 1e3:.1f}, cached {start.expected}{bring})"


POLICIES: dict[str, Callable[[], Policy]] = {"cost": Cost, **PLAIN}
"""The values of ``scheduler.policy``."""
