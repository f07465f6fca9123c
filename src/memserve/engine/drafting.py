"""Speculative decoding without a draft model: draft tokens that ride along in a stream's next step.

A step reads all weights however few tokens it runs, so a few more tokens cost little. Answers repeat earlier
text: a document's words, code, a name. The draft is what followed the most recent earlier occurrence of the
current suffix (prompt lookup: Saxena 2023; speculative decoding in general: Leviathan et al., arXiv
2211.17192). The engine runs the draft after the latest token and draws a token after each draft token. A draw
is a function of logits, seed and position, and the native step's logits are bit-identical whether a token
runs alone or in a chunk. So a draw that equals its draft token is the very token that the next step would
have drawn.

The longer the matching suffix, the likelier is acceptance; each worker learns these probabilities. Its own
cost figures say how long one more token in a step takes. It drafts as many tokens as raise the expected
tokens per second: many for one stream, hardly any for many streams.
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
from memserve.tokens import TOKEN_BYTES, common_prefix, count, span

ACCEPTANCE = (0.0, 0.17, 0.4, 0.58, 0.72, 0.75, 0.77, 0.85, 0.9)
"""Initial acceptance probability by length of the matching suffix; the last entry covers longer ones.

Measured on answers of the demo model (docs/measurements/2026-11-28-drafts.md).
"""
LEARNED = 0.01
"""Weight of one tested draft token in a learned probability."""
FORGOTTEN = 0.001
"""Share by which a learned probability returns to its initial value each time that a guess is not tried."""
SUFFIX_LENGTHS = (5, 3, 2, 1)
"""Suffix lengths to look up, longest first."""
FEW = 8
"""Streams up to which looking guesses up is cheaper than computing first whether any could pay."""
SEQUEL_TOKENS = 1024
"""Tokens to request, at most, of what followed the same prompt earlier: 4 KiB."""
DRAFTED_MOST = 64
"""Draft tokens per step, at most, over all streams."""


@attrs.frozen
class Guess:
    """Tokens that may come next, and how much of the context before them matched."""

    tokens: bytes
    """Guessed tokens, packed."""
    suffix: int
    """Length of the matching suffix in tokens, capped at the last index of ``ACCEPTANCE``."""


def guess(tokens: bytes, most: int, sequel: bytes = b"") -> Guess | None:
    """The tokens that followed the most recent earlier occurrence of the current suffix: 1 to ``most``.

    For each suffix length, ``sequel`` is searched before ``tokens``. A match so close to the end of
    ``tokens`` that fewer than ``most`` tokens follow it is a repetition, and the guess repeats those tokens.
    """
    for length in SUFFIX_LENGTHS:
        if count(tokens) < length:
            continue
        last = tokens[-length * TOKEN_BYTES :]
        if (place := _last_place(sequel, last)) is not None:
            return Guess(span(sequel, place, place + most), _common_suffix(sequel, place, tokens, length))
        if (place := _last_place(tokens, last)) is not None:
            followed = span(tokens, place, place + most)
            return Guess(span(followed * most, 0, most), _common_suffix(tokens, place, tokens, length))
    return None


def _last_place(text: bytes, tokens: bytes) -> int | None:
    """The last position in ``text``, before its end, that follows an occurrence of ``tokens``."""
    end = len(text) - TOKEN_BYTES
    while (found := text.rfind(tokens, 0, max(end, 0))) >= 0:
        if found % TOKEN_BYTES == 0:
            return (found + len(tokens)) // TOKEN_BYTES
        end = found + len(tokens) - 1
    return None


def _common_suffix(text: bytes, place: int, tokens: bytes, known: int) -> int:
    """Length of the common suffix of ``text`` up to ``place`` and ``tokens``; at least ``known``, capped."""
    end = count(tokens)
    most = min(len(ACCEPTANCE) - 1, place, end)
    while known < most and (
        span(text, place - known - 1, place - known) == span(tokens, end - known - 1, end - known)
    ):
        known += 1
    return known


@attrs.define
class Acceptance:
    """Learned acceptance probability by length of the matching suffix."""

    _known: list[float] = attrs.field(factory=lambda: list(ACCEPTANCE))

    def after(self, suffix: int) -> float:
        """Acceptance probability of a token after ``suffix`` matching tokens."""
        return self._known[min(suffix, len(ACCEPTANCE) - 1)]

    def saw(self, suffix: int, drafted: int, right: int) -> None:
        """Learn from a draft of ``drafted`` tokens after ``suffix`` matching ones, ``right`` of them accepted.

        Nothing is learned about tokens after the first rejected one.
        """
        for place in range(min(right + 1, drafted)):
            at = min(suffix + place, len(ACCEPTANCE) - 1)
            self._known[at] += LEARNED * ((place < right) - self._known[at])

    def forget(self, suffix: int) -> None:
        """A guess was not worth a try: drift back to the initial value, because the text may have changed."""
        at = min(suffix, len(ACCEPTANCE) - 1)
        self._known[at] += FORGOTTEN * (ACCEPTANCE[at] - self._known[at])


@attrs.define
class Drafting:
    """Adds drafts to a worker's batches."""

    most: int
    """Draft tokens per stream and step, at most; 0 disables drafts."""
    page_tokens: int
    max_context: int
    outbox: Outbox
    _acceptance: Acceptance = attrs.field(factory=Acceptance, init=False)
    _model: CostModel | None = attrs.field(default=None, init=False)
    _behind: dict[int, int] = attrs.field(factory=dict, init=False)
    """Suffix match length of each guess of the running step, by row."""

    def added(self, batch: Batch, costs: StepCosts | None) -> Batch:
        """The batch with drafts, as long as they raise the expected tokens per second.

        Without measured costs, drafts are as long as allowed.
        """
        self._behind = {}
        rooms = dict(self._rooms(batch)) if self.most else {}
        if not rooms:
            return batch
        if costs is not None and (self._model is None or self._model.steps is not costs):
            self._model = CostModel(costs)
        found = self._guesses(batch, rooms) if self._may_pay(batch.plan, rooms) else {}
        self._behind.update({number: one.suffix for number, one in found.items()})
        lengths = {number: count(one.tokens) for number, one in found.items()}
        if self._model is not None:
            lengths = worth(batch.plan.rows, self._likeliest(lengths, self._behind), self._model)
        rows = list(batch.plan.rows)
        for number, most in rooms.items():
            draft = span(found[number].tokens, 0, lengths.get(number, 0)) if number in found else b""
            if number in found and not draft:
                self._acceptance.forget(found[number].suffix)
            forced = most if batch.sequences[number].guided else 0
            if draft or forced:
                rows[number] = attrs.evolve(rows[number], draft=draft, draft_most=forced)
        return attrs.evolve(batch, plan=BatchPlan(tuple(rows)))

    def saw(self, batch: Batch, result: BatchResult) -> None:
        """Learn from a finished step. Accepted tokens beyond a row's draft were forced by a grammar."""
        accepted = {number: self._accepted(batch, number, result) for number in self._behind}
        for number, behind in self._behind.items():
            if drafted := count(batch.plan.rows[number].draft):
                self._acceptance.saw(behind, drafted, accepted[number])
                self.outbox.count("drafted_tokens_total", drafted)
                self.outbox.count("accepted_tokens_total", accepted[number])
        if forced := sum(count(more) - accepted.get(number, 0) for number, more in result.more.items()):
            self.outbox.count("forced_tokens_total", forced)

    @staticmethod
    def _accepted(batch: Batch, number: int, result: BatchResult) -> int:
        """Draft tokens of a row that were accepted. A grammar may have replaced the draft by forced tokens."""
        right = common_prefix(batch.plan.rows[number].draft, batch.drawn(number, result))
        return min(right, count(result.more.get(number, b"")))

    def _rooms(self, batch: Batch) -> Iterator[tuple[int, int]]:
        """Rows that may have drafts, each with the longest draft allowed."""
        for number, (row, one) in enumerate(zip(batch.plan.rows, batch.sequences, strict=True)):
            if row.sample is not None and row.sample.logprobs is None and one.decoding:
                room = min(
                    self.most, one.room(self.page_tokens) - 1, one.remaining_alike(self.max_context) - 1
                )
                if room > 0:
                    yield number, room

    def _may_pay(self, plan: BatchPlan, rooms: Mapping[int, int]) -> bool:
        """Whether the likeliest possible guess would pay; taken as true for up to ``FEW`` streams."""
        if self._model is None or len(rooms) <= FEW:
            return True
        surest = (
            self._acceptance.after(len(ACCEPTANCE)),
            min(rooms, key=lambda number: plan.rows[number].start),
        )
        pays = bool(worth(plan.rows, [surest], self._model))
        if not pays:
            self._acceptance.forget(len(ACCEPTANCE))
        return pays

    def _guesses(self, batch: Batch, rooms: Mapping[int, int]) -> dict[int, Guess]:
        sequences = {number: batch.sequences[number] for number in rooms}
        found = {number: guess(one.tokens, rooms[number], one.sequel) for number, one in sequences.items()}
        return {number: one for number, one in found.items() if one is not None}

    def _likeliest(self, lengths: Mapping[int, int], suffixes: Mapping[int, int]) -> list[tuple[float, int]]:
        """(Acceptance probability, row) of each draft token, likeliest first, at most ``DRAFTED_MOST``.

        A token is accepted only if all draft tokens before it in its row are.
        """
        found = []
        for row, length in lengths.items():
            probability = 1.0
            for place in range(length):
                probability *= self._acceptance.after(suffixes[row] + place)
                found.append((probability, row))
        return sorted(found, reverse=True)[:DRAFTED_MOST]


def worth(rows: Values[Row], likeliest: Values[tuple[float, int]], model: CostModel) -> dict[int, int]:
    """Draft tokens to run, by row: as many of the ``likeliest`` as give the most expected tokens per second.

    A draft token is priced like another decode row, except that its row's context is read once for all.
    """
    tokens = sum(count(row.tokens) for row in rows)
    number, context = len(rows), sum(row.start for row in rows)
    pairs = sum(count(row.tokens) * (row.start + count(row.tokens) / 2) for row in rows)
    made = float(sum(row.sample is not None for row in rows))
    best, taken = made / model.batch_s(tokens, number, context, pairs), 0
    for at, (probability, row) in enumerate(likeliest, 1):
        tokens, number, made = tokens + 1, number + 1, made + probability
        pairs += rows[row].start + 0.5
        rate = made / model.batch_s(tokens, number, context, pairs)
        if rate > best:
            best, taken = rate, at
    lengths: dict[int, int] = {}
    for _, row in likeliest[:taken]:
        lengths[row] = lengths.get(row, 0) + 1
    return lengths
