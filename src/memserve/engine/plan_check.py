"""Validation of a batch plan against model and arena, before any step engine runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from memserve.drawing import LOGPROBS_MAX
from memserve.engine.plans import BatchPlan, Row, Score
from memserve.engine.spec import ModelSpec
from memserve.tokens import count, pages_for, unpack


def check_plan(
    plan: BatchPlan,
    spec: ModelSpec,
    pages: int,
    page_tokens: int,
    before: Sequence[Row] = (),
    overlaps: bool = False,
) -> None:
    """Raise ValueError, naming the row, for a malformed plan or one that would access memory not its own.

    A wrong page id would silently corrupt another request's tokens. ``pages``: how many the arena has.
    ``before``: rows of the plan checked last. A row that continues from there has hundreds of pages and few
    new ones, and only the new ones are compared with the arena's size. ``overlaps``: whether the engine lets
    rows follow rows of that plan.
    """
    if not plan.rows:
        raise ValueError("a step needs at least one row")
    written: set[int] = set()
    for number, row in enumerate(plan.rows):
        reach = row.reach
        _check_row(number, row, reach, spec, page_tokens)
        if row.follows is not None:
            _check_follows(number, row, row.follows, before if overlaps else ())
        unseen = _unseen(row.pages, before[number].pages) if number < len(before) else row.pages
        if unseen and not 0 <= min(unseen) <= max(unseen) < pages:
            raise ValueError(f"row {number}: pages {row.pages}; the arena has 0 to {pages - 1}")
        own = row.pages[row.start // page_tokens : pages_for(reach, page_tokens)]
        expected = len(written) + len(own)
        written.update(own)
        if len(written) < expected:
            raise ValueError(f"row {number}: writes to a page that the step writes to already: {own}")


def _unseen(pages: tuple[int, ...], seen: tuple[int, ...]) -> tuple[int, ...]:
    if pages is seen:
        return ()
    return pages[len(seen) :] if pages[: len(seen)] == seen else pages


def _check_row(number: int, row: Row, reach: int, spec: ModelSpec, page_tokens: int) -> None:
    if not row.tokens or row.start < 0 or reach > spec.max_context:
        raise ValueError(
            f"row {number}: {reach - row.start} tokens from position {row.start}; "
            f"expected at least one, within {spec.max_context} positions"
        )
    if len(row.pages) < pages_for(reach, page_tokens):
        raise ValueError(f"row {number}: {len(row.pages)} pages of {page_tokens} do not hold {reach} tokens")
    ids = unpack(row.tokens + row.draft if row.draft else row.tokens)
    least, most = (ids[0], ids[0]) if len(ids) == 1 else (min(ids), max(ids))
    if least < 0 or most >= spec.vocab:
        raise ValueError(f"row {number}: token ids {least} to {most}; the vocabulary has {spec.vocab}")
    if row.draft and (row.sample is None or row.sample.logprobs is not None or row.score):
        raise ValueError(
            f"row {number}: has a draft, but draws no token or wants log probabilities; leave the draft out"
        )
    if row.score is not None:
        _check_score(number, row, row.score, spec)
    if row.sample is not None and row.sample.adjust is not None:
        _check_adjustments(number, row, spec.vocab)


def _check_follows(number: int, row: Row, follows: int, before: Sequence[Row]) -> None:
    drawing = 0 <= follows < len(before) and before[follows].sample is not None
    if not drawing or before[follows].end != row.start or count(row.tokens) != 1:
        raise ValueError(f"row {number}: does not follow row {follows} of the step before by one token")


def _check_score(number: int, row: Row, score: Score, spec: ModelSpec) -> None:
    ids = unpack(score.follows)
    if not 0 < len(ids) <= count(row.tokens) or not 0 <= score.count <= LOGPROBS_MAX:
        raise ValueError(
            f"row {number}: scores {len(ids)} prompt tokens with {score.count} top tokens each; "
            f"expected 1 to {count(row.tokens)} tokens with 0 to {LOGPROBS_MAX}"
        )
    if not 0 <= min(ids) <= max(ids) < spec.vocab:
        raise ValueError(
            f"row {number}: scores token ids {min(ids)} to {max(ids)}; the vocabulary has {spec.vocab}"
        )


def check_late(rows: Mapping[int, Row], vocab: int) -> None:
    """Raise ValueError, naming the row, if a row that draws late, known now, adjusts what is not in its logits."""
    for number, row in rows.items():
        _check_adjustments(number, row, vocab)


def _check_adjustments(number: int, row: Row, vocab: int) -> None:
    """Check the token ids and masks that index logits: on a device, nothing else would catch a bad index."""
    assert row.sample is not None and row.sample.adjust is not None
    adjust, past = row.sample.adjust, row.past
    if past is None or len(adjust.bias) != len(adjust.biased):
        raise ValueError(f"row {number}: adjusts its logits without its past, or some without a bias")
    masks = (past.allowed, *past.then)
    if (adjust.grammar or past.allowed) and not row.late:
        known = len(masks) == 1 + (count(row.draft) if adjust.grammar else 0)
        if not known or not all(len(mask) * 8 >= vocab and any(mask) for mask in masks):
            raise ValueError(f"row {number}: follows a grammar or a list, and what it allows is not known")
    ids = np.frombuffer(past.prompt + past.output + past.forbidden + adjust.biased, np.int32)
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab:
        raise ValueError(
            f"row {number}: adjusts logits of {ids.min()} to {ids.max()}; the vocabulary has {vocab}"
        )
