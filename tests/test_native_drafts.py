"""Drafts in the native step give the tokens of steps of one token each, and the KV of those that were right."""

from __future__ import annotations

import random

import pytest
import torch

import test_native
from adjustments import adjustments, mask_of, past_of
from memserve.drawing import Adjustments, Sampling
from memserve.engine.plans import BatchPlan, Past, Row
from memserve.kernels.native.pieces import MAX_ROWS
from memserve.tokens import count, pack, unpack
from test_model import GREEDY, prompt
from test_native import Twin, native_spec

ANSWER = 40
DRAWN = Sampling(temperature=1.5, seed=5)
VOCAB = native_spec(4, 2, 32).vocab
ADJUSTED = Sampling(
    0.7, seed=2, adjust=adjustments({3: 2.0}, repetition=1.3, frequency=0.8, presence=0.4, min_tokens=60)
)
LISTED = Sampling(0.7, seed=4, adjust=adjustments(frequency=0.5, allowed=mask_of(range(0, VOCAB, 3), VOCAB)))
ENDS = (4, 5)


@pytest.fixture(params=[False, True], ids=["vectors", "amx"])
def twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Twin:
    """A twin for each instruction set that this machine has."""
    monkeypatch.setattr(test_native, "AMX", request.param)
    twin = Twin(native_spec(4, 2, 32), page_tokens=8, threads=2, pages=900)
    if twin.step.amx != request.param:
        pytest.skip("no AMX here")
    return twin


def said(twin: Twin, ids: list[int], how: Sampling) -> tuple[list[int], tuple[int, ...]]:
    """The tokens of prompt and answer in steps of one token each, and their pages."""
    pages = twin.pages(len(ids) + ANSWER)
    whole, start = list(ids), 0
    while len(whole) < len(ids) + ANSWER:
        past = past_of(how, whole, len(ids), ENDS)
        whole += twin.drawn(Row(pack(whole[start:]), start, pages, how, past))
        start = len(whole) - 1
    return whole, pages


def with_wrong(tokens: list[int], at: int) -> bytes:
    """A draft that is right up to a place."""
    return pack([*tokens[:at], *(token ^ 1 for token in tokens[at:])])


@pytest.mark.parametrize(
    "how", [GREEDY, DRAWN, ADJUSTED, LISTED], ids=["greedy", "drawn", "adjusted", "listed"]
)
@pytest.mark.parametrize("length", [5, 64, 300])
def test_drafts_give_the_tokens_of_single_steps(twin: Twin, how: Sampling, length: int) -> None:
    """Right, partly right and wrong drafts give the tokens and KV of single steps."""
    ids = prompt(length, length)
    whole, pages = said(twin, ids, how)
    assert how is not LISTED or not any(token % 3 for token in whole[length:])
    other, at, step = twin.pages(len(whole) + 8), length, 0
    twin.drawn(Row(pack(ids[:-1]), 0, other, None))
    while at < len(whole) - 8:
        right = (0, 3, 1, 7, 2)[step % 5]
        draft = with_wrong(whole[at : at + 7], right)
        past = past_of(how, whole[:at], length, ENDS)
        row = Row(pack(whole[at - 1 : at]), at - 1, other, how, past, draft=draft)
        drawn = twin.drawn(row)
        assert drawn == whole[at : at + right + 1], (at, right)
        at, step = at + len(drawn), step + 1
    assert step > 7
    for position in range(at - 1):
        page, place = divmod(position, 8)
        found, known = (twin.arena[one[page]][..., place, :] for one in (other, pages))
        assert torch.equal(found, known), position


def test_each_token_of_a_draft_is_followed_by_what_its_grammar_allows(twin: Twin) -> None:
    """After each draft token the draw uses the tokens that the grammar allows there."""
    ids, vocab = prompt(20, 3), twin.spec.vocab
    how = Sampling(0.0, adjust=Adjustments(grammar="any"))
    generator = random.Random(1)
    masks = [bytes(generator.randrange(256) for _ in range(-(-vocab // 8))) for _ in range(9)]
    masks = [mask[:-1] + bytes([mask[-1] & (1 << vocab % 8) - 1]) for mask in masks]
    whole, pages, start = list(ids), twin.pages(40), 0
    for mask in masks:
        past = Past(b"", pack(whole[20:]), allowed=mask)
        whole += twin.drawn(Row(pack(whole[start:]), start, pages, how, past))
        start = len(whole) - 1
    assert all(mask[token // 8] >> token % 8 & 1 for token, mask in zip(whole[20:], masks, strict=True))
    for right in (8, 3, 0):
        past = Past(b"", b"", allowed=masks[0], then=tuple(masks[1:]))
        row = Row(pack(ids[-1:]), 19, pages, how, past, draft=with_wrong(whole[20:28], right))
        assert twin.drawn(row) == whole[20 : 21 + right]


def test_drafts_in_company_change_no_token(twin: Twin) -> None:
    """Drafts of several rows in one step, together with a prompt, give each row its own tokens."""
    hows = [GREEDY, DRAWN, Sampling(0.8, seed=9), GREEDY]
    answers = [said(twin, prompt(20 + i, i), how) for i, how in enumerate(hows)]
    rows, expected = [Row(pack(prompt(30, 9)), 0, twin.pages(30), None)], []
    for i, ((whole, pages), how) in enumerate(zip(answers, hows, strict=True)):
        at = 20 + i
        draft = with_wrong(whole[at : at + 2 * i], i)
        rows.append(Row(pack(whole[at - 1 : at]), at - 1, pages, how, draft=draft))
        expected.append(whole[at : at + 1 + i])
    drawn, reports = twin.step.step(BatchPlan(tuple(rows)), twin.arena_pages, 2)
    assert [list(unpack(one)) for one in drawn] == expected
    assert reports == [None] * 4
    assert len(twin.native(*rows)) == 4  # logits are those of the rows alone


def test_a_draft_beyond_the_buffers_is_cut(twin: Twin) -> None:
    """A draft that does not fit in the step's buffers is cut."""
    whole, pages = said(twin, prompt(30, 1), GREEDY)
    long = Row(pack(prompt(MAX_ROWS - 3, 2)), 0, twin.pages(MAX_ROWS), None)
    short = Row(pack(whole[29:30]), 29, pages, GREEDY, draft=pack(whole[30:38]))
    drawn, _ = twin.step.step(BatchPlan((long, short, short)), twin.arena_pages, 2)
    assert [count(one) for one in drawn] == [3, 9]
    assert [list(unpack(one)) for one in drawn] == [whole[30:33], whole[30:39]]


def test_a_draft_whose_logits_are_not_numbers_names_its_row(twin: Twin) -> None:
    """A draft with NaN logits raises an error that names its row."""
    whole, pages = said(twin, prompt(30, 1), GREEDY)
    fine = Row(pack(whole[29:30]), 29, pages, GREEDY, draft=pack(whole[30:33]))
    broken = Row(pack(whole[29:30]), 29, twin.pages(40), GREEDY, draft=pack(whole[30:33]))
    with pytest.raises(FloatingPointError, match="row 1: the largest logit is not a finite number"):
        twin.drawn(fine, broken)
