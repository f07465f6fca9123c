"""Drafts: what a stream may say next, run in the step that would have made its next token only.

A step reads all weights however few tokens it has, so that some more cost little; and answers say again what was said before:
a document's words, code, a name. What followed the last time after the same tokens is guessed to follow now (prompt lookup:
Saxena 2023; of any guess: Leviathan et al., arXiv 2211.17192). The engine runs the guess behind the newest token and draws after each
of its tokens. A draw is a function of logits, seed and position, and the native step's logits are the same to the bit in a
chunk and alone: what is drawn as it was guessed is the very token that the next step would have drawn.

The more tokens before it are alike, the likelier is a guess; how likely, each worker learns. Its own figures say what one
more token in a step takes. It guesses as far as that promises more tokens a second, which for one stream is far, and for
many is hardly at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Values

import attrs

from memserve.costs import StepCosts
from memserve.engine.batching import Batch
from memserve.engine.outbox import Outbox
from memserve.engine.plans import BatchPlan, BatchResult, Row
from memserve.scheduling.cost_model import CostModel
from memserve.tokens import TOKEN_BYTES, count, span
from memserve.tokens import alike as in_common

CHANCES = (0.0, 0.17, 0.4, 0.58, 0.72, 0.75, 0.77, 0.85, 0.9)
"""How likely a guess is right behind so many tokens that were alike, or more, before any was tried: of answers of the demo model
(docs/measurements/2026-11-28-drafts.md)."""
LEARNED = 0.01
"""How much each guess changes that."""
FORGOTTEN = 0.001
"""How much of that is lost each time that none is tried."""
LOOKED_FOR = (5, 3, 2, 1)
"""So many alike tokens are looked for, the most first."""
FEW = 8
"""Streams for which guesses are sooner looked for than it is reckoned whether any could pay."""
SEQUEL_TOKENS = 1024
"""What came after the same prompt before is asked for up to so many tokens, 4 KiB."""
DRAFTED_MOST = 64
"""Guessed tokens a step, of all streams."""


@attrs.frozen
class Guess:
    """What may come next."""

    tokens: bytes
    """Packed."""
    alike: int
    """Tokens before it that are those before the place where it was found, at most as many as CHANCES tells apart."""


def guess(tokens: bytes, most: int, sequel: bytes = b"") -> Guess | None:
    """What followed the last tokens where they were the last time before: at most ``most`` tokens, at least 1.

    They are looked for in ``sequel`` first. What reaches the end of ``tokens`` itself is taken to go on as it began: it has been
    said over and over.
    """
    for alike in LOOKED_FOR:
        if count(tokens) < alike:
            continue
        last = tokens[-alike * TOKEN_BYTES :]
        if (place := _last_place(sequel, last)) is not None:
            return Guess(span(sequel, place, place + most), _alike(sequel, place, tokens, alike))
        if (place := _last_place(tokens, last)) is not None:
            followed = span(tokens, place, place + most)
            return Guess(span(followed * most, 0, most), _alike(tokens, place, tokens, alike))
    return None


def _last_place(text: bytes, tokens: bytes) -> int | None:
    """The last position but the end of ``text`` that follows ``tokens``."""
    end = len(text) - TOKEN_BYTES
    while (found := text.rfind(tokens, 0, max(end, 0))) >= 0:
        if found % TOKEN_BYTES == 0:
            return (found + len(tokens)) // TOKEN_BYTES
        end = found + len(tokens) - 1
    return None


def _alike(text: bytes, place: int, tokens: bytes, known: int) -> int:
    """How many tokens before ``place`` of ``text`` are the last of ``tokens``; ``known`` of them are."""
    end = count(tokens)
    most = min(len(CHANCES) - 1, place, end)
    while known < most and (
        span(text, place - known - 1, place - known) == span(tokens, end - known - 1, end - known)
    ):
        known += 1
    return known


@attrs.define
class Chances:
    """How likely a guess is right, by the tokens before it that are alike."""

    _known: list[float] = attrs.field(factory=lambda: list(CHANCES))

    def after(self, alike: int) -> float:
        """Of a token behind so many."""
        return self._known[min(alike, len(CHANCES) - 1)]

    def saw(self, alike: int, drafted: int, right: int) -> None:
        """Of ``drafted`` tokens behind ``alike``, the first ``right`` were; of what came after the first wrong one nothing is known."""
        for place in range(min(right + 1, drafted)):
            at = min(alike + place, len(CHANCES) - 1)
            self._known[at] += LEARNED * ((place < right) - self._known[at])

    def forget(self, alike: int) -> None:
        """A token behind so many was not worth a try: what streams say may have changed."""
        at = min(alike, len(CHANCES) - 1)
        self._known[at] += FORGOTTEN * (CHANCES[at] - self._known[at])


@attrs.define
class Drafting:
    """Gives a worker's batches their drafts."""

    most: int
    """Tokens a stream and step; 0: none."""
    page_tokens: int
    max_context: int
    outbox: Outbox
    _chances: Chances = attrs.field(factory=Chances, init=False)
    _model: CostModel | None = attrs.field(default=None, init=False)
    _behind: dict[int, int] = attrs.field(factory=dict, init=False)
    """How many alike tokens each guess of the step under way is behind, by row."""

    def added(self, batch: Batch, costs: StepCosts | None) -> Batch:
        """The batch, whose streams guess as far as it promises more tokens a second; where nothing was measured, as far as they may."""
        self._behind = {}
        rooms = dict(self._rooms(batch)) if self.most else {}
        if not rooms:
            return batch
        if costs is not None and (self._model is None or self._model.steps is not costs):
            self._model = CostModel(costs)
        found = self._guesses(batch, rooms) if self._may_pay(batch.plan, rooms) else {}
        self._behind.update({number: one.alike for number, one in found.items()})
        lengths = {number: count(one.tokens) for number, one in found.items()}
        if self._model is not None:
            lengths = worth(batch.plan.rows, self._likeliest(lengths, self._behind), self._model)
        rows = list(batch.plan.rows)
        for number, most in rooms.items():
            draft = span(found[number].tokens, 0, lengths.get(number, 0)) if number in found else b""
            if number in found and not draft:
                self._chances.forget(found[number].alike)
            forced = most if batch.sequences[number].guided else 0
            if draft or forced:
                rows[number] = attrs.evolve(rows[number], draft=draft, draft_most=forced)
        return attrs.evolve(batch, plan=BatchPlan(tuple(rows)))

    def saw(self, batch: Batch, result: BatchResult) -> None:
        """What a step has shown of its guesses. What came right beyond them was forced by a grammar."""
        accepted = {number: self._accepted(batch, number, result) for number in self._behind}
        for number, behind in self._behind.items():
            if drafted := count(batch.plan.rows[number].draft):
                self._chances.saw(behind, drafted, accepted[number])
                self.outbox.count("drafted_tokens_total", drafted)
                self.outbox.count("accepted_tokens_total", accepted[number])
        if forced := sum(count(more) - accepted.get(number, 0) for number, more in result.more.items()):
            self.outbox.count("forced_tokens_total", forced)

    @staticmethod
    def _accepted(batch: Batch, number: int, result: BatchResult) -> int:
        """How many tokens of a row's guess came, and came by it: a grammar may have put others in its place."""
        right = in_common(batch.plan.rows[number].draft, batch.drawn(number, result))
        return min(right, count(result.more.get(number, b"")))

    def _rooms(self, batch: Batch) -> Iterator[tuple[int, int]]:
        """Rows that may have drafts, and how long."""
        for number, (row, one) in enumerate(zip(batch.plan.rows, batch.sequences, strict=True)):
            if row.sample is not None and row.sample.logprobs is None and one.decoding:
                room = min(self.most, one.room(self.page_tokens) - 1, one.unsaid(self.max_context) - 1)
                if room > 0:
                    yield number, room

    def _may_pay(self, plan: BatchPlan, rooms: Mapping[int, int]) -> bool:
        """Whether a guess as likely right as any would pay, where so many would have to be looked for that it is worth asking."""
        if self._model is None or len(rooms) <= FEW:
            return True
        surest = self._chances.after(len(CHANCES)), min(rooms, key=lambda number: plan.rows[number].start)
        pays = bool(worth(plan.rows, [surest], self._model))
        if not pays:
            self._chances.forget(len(CHANCES))
        return pays

    def _guesses(self, batch: Batch, rooms: Mapping[int, int]) -> dict[int, Guess]:
        sequences = {number: batch.sequences[number] for number in rooms}
        found = {number: guess(one.tokens, rooms[number], one.sequel) for number, one in sequences.items()}
        return {number: one for number, one in found.items() if one is not None}

    def _likeliest(self, lengths: Mapping[int, int], alike: Mapping[int, int]) -> list[tuple[float, int]]:
        """How likely each guessed token is right, and its row, the likeliest first: all before it in its row must be right too."""
        found = []
        for row, length in lengths.items():
            chance = 1.0
            for place in range(length):
                chance *= self._chances.after(alike[row] + place)
                found.append((chance, row))
        return sorted(found, reverse=True)[:DRAFTED_MOST]


def worth(rows: Values[Row], likeliest: Values[tuple[float, int]], model: CostModel) -> dict[int, int]:
    """How many guessed tokens of each row are to run: of the ``likeliest``, as many as make the most tokens a second.

    A guessed token costs what a stream of its length would cost.
    """
    tokens = sum(count(row.tokens) for row in rows)
    number, context = len(rows), sum(row.start for row in rows)
    pairs = sum(count(row.tokens) * (row.start + count(row.tokens) / 2) for row in rows)
    made = float(sum(row.sample is not None for row in rows))
    best, taken = made / model.batch_s(tokens, number, context, pairs), 0
    for at, (chance, row) in enumerate(likeliest, 1):
        tokens, number, made = tokens + 1, number + 1, made + chance
        context, pairs = context + rows[row].start, pairs + rows[row].start + 0.5
        rate = made / model.batch_s(tokens, number, context, pairs)
        if rate > best:
            best, taken = rate, at
    lengths: dict[int, int] = {}
    for _, row in likeliest[:taken]:
        lengths[row] = lengths.get(row, 0) + 1
    return lengths
