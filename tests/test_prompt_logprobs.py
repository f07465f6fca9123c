"""Log probabilities of prompts: what step engines report, however a prompt is cut and whatever else is in the step."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

import backends
from backends import SPEC
from fake_service import MODEL_PATH, demo_tokenizer
from memserve.drawing import LOGPROBS_MAX, PromptLogprobs, Sampling
from memserve.engine.adjusting import logprobs_of
from memserve.engine.plans import BatchPlan, Row, Score
from memserve.engine.prompt_logprobs import scores_of
from memserve.engine.runner import CpuEngine
from memserve.engine.spec import find_model
from memserve.engine.weights import map_weights, prepare
from memserve.kernels.native.pieces import MAX_ROWS
from memserve.kernels.native.prompt_logprobs import SCORED_AT_ONCE
from memserve.tokens import pack, pages_for, unpack
from test_model import load_reference, prompt

PAGES = 96
GREEDY = Sampling(temperature=0.0, logprobs=3)

weights, made = backends.weights, backends.made


def right(weights, ids: list[int], spec=SPEC) -> torch.Tensor:
    """The log probabilities of transformers' model after each token, (tokens, vocab) float64."""
    with torch.inference_mode():
        return load_reference(spec, weights)(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def chunk(ids: list[int], start: int, stop: int, pages: tuple[int, ...], count: int, how=None) -> Row:
    """A row of a prompt that scores the token after each of its own."""
    follows = pack(ids[start + 1 : stop + 1])
    return Row(pack(ids[start:stop]), start, pages, how, score=Score(follows, count) if follows else None)


def opened(scores: PromptLogprobs) -> tuple[list[float], list[int], list[list[int]], list[list[float]]]:
    """Values, ranks, most probable ids and their values, as lists."""
    tokens = len(scores)
    ids = np.frombuffer(scores.ids, "<i4").reshape(tokens, -1).tolist()
    likeliest = np.frombuffer(scores.likeliest, "<f8").reshape(tokens, -1).tolist()
    return np.frombuffer(scores.values, "<f8").tolist(), list(unpack(scores.ranks)), ids, likeliest


def scores_in(made, ids: list[int], pages: tuple[int, ...], count: int, cuts: list[int]) -> list[tuple]:
    """The scores of a prompt that runs alone, in chunks up to ``cuts``: a tuple for each token but the first."""
    found, start = [], 0
    for stop in cuts:
        result = made.engine.run(BatchPlan((chunk(ids, start, stop, pages, count),)))
        found += [line for one in result.prompts.values() for line in zip(*opened(one), strict=True)]
        start = stop
    return found


def test_a_prompt_is_scored_as_the_reference_does(made, weights):
    """The log probabilities, ranks and most probable tokens of a prompt are those of transformers."""
    ids, pages = prompt(150, 3, SPEC.vocab), tuple(range(pages_for(150, 16)))
    expected = right(weights, ids)
    near = {"abs": 1e-3} if made.exact else {"abs": 0.5, "rel": 0.01}  # logits in bfloat16
    found = scores_in(made, ids, pages, 4, [1, 2, 70, 71, 149, 150])

    assert len(found) == len(ids) - 1
    for at, (value, rank, best, values) in enumerate(found):
        assert value == pytest.approx(float(expected[at, ids[at + 1]]), **near)
        assert values == pytest.approx(expected[at, best].tolist(), **near)
        assert values == sorted(values, reverse=True)
        assert (value in values) == (rank <= 4) and (rank > 4 or best[rank - 1] == ids[at + 1])
        if made.exact:
            more = expected[at] - expected[at, ids[at + 1]]
            assert int((more > 1e-3).sum()) < rank <= int((more > -1e-3).sum())
            assert best == expected[at].topk(4).indices.tolist()


def test_cuts_and_company_change_no_scores(made):
    """The scores of a prompt do not depend on its chunks or on other rows of the step."""
    ids, others = prompt(90, 7, SPEC.vocab), prompt(60, 8, SPEC.vocab)
    pages, free = tuple(range(6)), tuple(range(6, 30))
    alone = scores_in(made, ids, pages, 2, [90])

    rows = (
        Row(pack([5]), 0, free[:1], GREEDY),
        chunk(others, 0, 50, free[4:8], 20),
        chunk(ids, 0, 64, pages, 2),
        Row(pack(others[:33]), 0, free[8:11], None),
    )
    first = made.engine.run(BatchPlan(rows))
    assert first.prompts.keys() == {1, 2} and first.logprobs.keys() == {0}
    assert [len(first.prompts[i]) for i in (1, 2)] == [50, 64]
    assert len(first.prompts[1].ids) == 50 * 20 * 4
    second = made.engine.run(BatchPlan((chunk(ids, 64, 65, pages, 2), Row(pack([6]), 1, free[:1], GREEDY))))
    third = made.engine.run(
        BatchPlan((Row(pack([7]), 2, free[:1], GREEDY), chunk(ids, 65, 90, pages, 2, GREEDY)))
    )
    parts = [first.prompts[2], second.prompts[0], third.prompts[1]]
    found = [line for part in parts for line in zip(*opened(part), strict=True)]
    assert len(found) == len(alone) == 89
    if sums_in_one_order(made):
        assert found == alone
    else:
        expected = [line[0] for line in alone]
        assert [line[0] for line in found] == pytest.approx(expected, abs=1e-4 if made.exact else 0.5)


def test_a_draft_beside_it_changes_no_scores(made):
    """The scores of a prompt do not depend on a draft in the same step."""
    if not sums_in_one_order(made):
        pytest.skip("only the native step runs drafts")
    length = MAX_ROWS + 40
    ids, pages = prompt(length, 7, SPEC.vocab), tuple(range(pages_for(length, 16)))
    alone = scores_in(made, ids, pages, 2, [length])
    stream = Row(pack([5]), 0, (90,), Sampling(0.0), draft=pack([6, 7, 8, 9, 10]))
    result = made.engine.run(BatchPlan((stream, chunk(ids, 0, length, pages, 2))))
    assert list(zip(*opened(result.prompts[1]), strict=True)) == alone


def sums_in_one_order(made) -> bool:
    """Whether the engine adds in one order whatever else a step does, so that results are equal to the bit."""
    return bool(getattr(made.engine, "native", False))


def test_a_draw_is_reported_like_the_same_token_of_a_prompt(made):
    """A generated token has the same log probability when it is scored as part of a prompt later."""
    ids, pages = prompt(40, 9, SPEC.vocab), tuple(range(5))
    text, drawn = list(ids), []
    start = 0
    while len(text) < 70:
        result = made.engine.run(BatchPlan((Row(pack(text[start:]), start, pages, GREEDY),)))
        start = len(text)
        drawn.append(result.logprobs[0])
        text.append(result.tokens[0])
    found = scores_in(made, text, tuple(range(5, 10)), 3, [70])[39:]
    assert len(found) == len(drawn) == 30
    for (value, rank, best, values), known in zip(found, drawn, strict=True):
        if sums_in_one_order(made):
            assert (value, values) == (known.drawn, list(known.values))
        assert value == pytest.approx(known.drawn, abs=1e-4 if made.exact else 0.5)
        if made.exact or sums_in_one_order(made):
            assert (rank, best) == (1, list(unpack(known.ids)))


def test_a_prompt_of_several_pieces_is_scored_whole(made, weights):
    """A long chunk, which runs in pieces, has every token scored in its own place."""
    length = MAX_ROWS + 3 * SCORED_AT_ONCE + 7
    ids, pages = prompt(length, 4, SPEC.vocab), tuple(range(pages_for(length, 16)))
    before = Row(pack([9] * 20), 0, (90, 91), None)
    result = made.engine.run(BatchPlan((before, chunk(ids, 0, length, pages, 1, GREEDY))))
    values, *_ = opened(result.prompts[1])
    expected = right(weights, ids)[range(length - 1), ids[1:]]
    assert values == pytest.approx(expected.tolist(), abs=1e-3 if made.exact else 0.5)
    assert result.tokens[0] is None and result.tokens[1] is not None


def test_the_demo_model_scores_text_as_a_plain_forward_does():
    """The demo model scores a text as transformers does, within the rounding of bfloat16."""
    files = prepare(find_model(MODEL_PATH), "bfloat16")
    text = "Virtual memory lets a program use more memory than a machine has. 日本 too, it is said, 3.14159 times."
    ids = demo_tokenizer().encode(text, False)
    arena = mmap.mmap(-1, 4 * files.spec.page_bytes(16, "bfloat16"))
    engine = CpuEngine(files.spec, files.weights, arena, 4, 16, "bfloat16", threads=2)
    result = engine.run(BatchPlan((chunk(ids, 0, len(ids), (0, 1, 2, 3), 1),)))
    engine.close()
    exact = prepare(find_model(MODEL_PATH), "float32")
    expected = right(map_weights(exact.weights), ids, exact.spec)[range(len(ids) - 1), ids[1:]]
    found = torch.tensor(opened(result.prompts[0])[0], dtype=torch.float64)
    assert 30 < len(found) < 64
    assert float((found - expected).abs().max()) < 0.25  # a logit in bfloat16 is this near
    assert float((found - expected).abs().mean()) < 0.05


def test_rows_without_scores_pay_nothing(made):
    """A row that wants no scores gets none."""
    result = made.engine.run(BatchPlan((Row(pack([1, 2, 3]), 0, (0,), GREEDY),)))
    assert not result.prompts


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (Score(b"", 1), "row 0: scores 0 prompt tokens"),
        (Score(pack([1, 2, 3]), 1), "row 0: scores 3 prompt tokens"),
        (
            Score(pack([1]), LOGPROBS_MAX + 1),
            "row 0: scores 1 prompt tokens with 21 top tokens each; expected 1 to 2 tokens with 0 to 20",
        ),
        (Score(pack([SPEC.vocab]), 1), "row 0: scores token ids 1024 to 1024"),
        (Score(pack([-1]), 1), "row 0: scores token ids -1 to -1"),
    ],
)
def test_what_is_not_there_cannot_be_scored(made, score, message):
    """Scores of impossible numbers of tokens, or of tokens outside the vocabulary, are refused."""
    with pytest.raises(ValueError, match=message):
        made.engine.run(BatchPlan((Row(pack([1, 2]), 0, (0,), None, score=score),)))


def test_logits_that_are_not_numbers_name_their_row(made):
    """Scoring with NaN logits raises an error that names the row."""
    made.engine.run(BatchPlan((Row(pack([1]), 0, (1,), None),)))
    with pytest.raises(
        FloatingPointError, match="row"
    ):  # position 16 attends to a page that was never written
        made.engine.run(BatchPlan((Row(pack([1, 2]), 16, (50, 51), None, score=Score(pack([3]), 1)),)))


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_many_at_once_are_scored_as_one_is(count):
    """Scores of many tokens at once are those of one by one, also where logits are equal."""
    generator = torch.Generator().manual_seed(count)
    logits = (
        torch.randn(7, 300, generator=generator).mul(3).round().div(2)
    )  # many equal ones, zeros of both signs
    logits[3, 40:60] = -0.0
    tokens = torch.randint(0, 300, (7,), generator=generator)
    lines = scores_of(logits, tokens, count)
    assert lines.shape == (7, 2 + 2 * count)
    for row, token, line in zip(logits, tokens.tolist(), lines.tolist(), strict=True):
        known = logprobs_of(row, token, count)
        assert line[0] == pytest.approx(known.drawn, rel=1e-14)
        assert line[2 : 2 + count] == list(unpack(known.ids))
        assert line[2 + count :] == pytest.approx(known.values, rel=1e-14)
        order = sorted(range(300), key=lambda one: (-float(row[one]), one))
        assert line[1] == 1 + order.index(token)


def test_a_small_vocabulary_has_no_more_to_report():
    """No more tokens are reported than the vocabulary has."""
    lines = scores_of(torch.tensor([[0.5, 1.5, 1.0]]), torch.tensor([0]), 20)
    assert lines[0, 1:5].tolist() == [3, 1, 2, 0] and lines.shape == (1, 8)


def test_pieces_are_cut_where_some_is_known():
    """The part of the scores after the first n tokens has their values, ranks and ids."""
    whole = PromptLogprobs(
        np.arange(4.0).tobytes(), pack([1, 2, 3, 4]), pack(range(8)), np.arange(8.0).tobytes()
    )
    rest = whole.after(3)
    assert (len(whole), len(rest), whole.after(0)) == (4, 1, whole)
    assert opened(rest) == ([3.0], [4], [[6, 7]], [[6.0, 7.0]])
    bare = PromptLogprobs(np.arange(4.0).tobytes(), pack([1, 2, 3, 4]), b"", b"")
    assert bare.after(1).ids == b"" and len(bare.after(1)) == 3
