"""What every attention backend and every step engine must do: one set of tests for all.

transformers' model defines what is right. A GPU computes in bfloat16 and has to agree within its rounding.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch

import backends
from adjustments import adjustments, by_definition, expected, past_of
from backends import BACKENDS, CARDS, ENGINES, SPEC, make_engine, make_runner
from memserve.drawing import Adjustments, Sampling
from memserve.engine.plans import BatchPlan, Past, Row
from memserve.tokens import pack, pages_for
from test_model import GREEDY, load_reference, prompt

LENGTHS = (1, 2, 16, 17, 48, 70, 33, 100)
"""Lengths of the prompts that run together."""
PAGES = 64

weights, made = backends.weights, backends.made


@pytest.fixture(scope="module")
def right(weights):
    """A function: transformers' logits after each token of ``prompt(length, seed)``, (length, vocab)."""

    @cache
    def logits(length: int, seed: int) -> torch.Tensor:
        with torch.inference_mode():
            return load_reference(SPEC, weights)(torch.tensor([prompt(length, seed, SPEC.vocab)])).logits[0]

    return logits


def check(backend: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that logits are the expected ones, within the precision of the backend."""
    error = float((found - expected).norm() / expected.norm())
    assert error < (0.03 if backend in CARDS else 1e-4), error  # NaN fails too


# ---- attention backends, under the whole forward pass ------------------------------------------------------------


@pytest.mark.parametrize("page_tokens", [8, 16, 32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cuts_and_page_sizes_change_nothing(backend, page_tokens, weights, right):
    """Logits do not depend on chunks and page sizes."""
    ids, expected = prompt(90, 7, SPEC.vocab), right(90, 7)
    for cuts in ([0, 90], [0, 33, 64, 65, 66, 90], [0, 1, 2, 87, 88, 89, 90]):
        runner = make_runner(backend, weights, page_tokens)
        pages = runner.pages(90)
        for first, last in pairwise(cuts):
            (logits,) = runner.step(Row(pack(ids[first:last]), first, pages, GREEDY))
            check(backend, logits, expected[last - 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_company_changes_nothing(backend, weights, right):
    """Rows of a step, chunks and decode rows of all lengths, get the logits that each has alone."""
    runner = make_runner(backend, weights)
    tables = [runner.pages(length) for length in LENGTHS]
    ran, step = [0] * len(LENGTHS), 0
    while any(done < length for done, length in zip(ran, LENGTHS, strict=True)):
        turns = [i for i, length in enumerate(LENGTHS) if ran[i] < length and (step + i) % 3]
        rows = []
        for i in turns:
            part = prompt(LENGTHS[i], i, SPEC.vocab)[ran[i] : ran[i] + 1 + 7 * ((step + i) % 4)]
            rows.append(Row(pack(part), ran[i], tables[i], GREEDY))
            ran[i] += len(part)
        if rows:
            for i, logits in zip(turns, runner.step(*rows), strict=True):
                check(backend, logits, right(LENGTHS[i], i)[ran[i] - 1])
        step += 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prefix_is_shared(backend, weights, right):
    """Several rows continue one cached prefix with the right logits."""
    ids = prompt(90, 7, SPEC.vocab)
    runner = make_runner(backend, weights)
    shared = runner.pages(48)
    assert runner.step(Row(pack(ids[:48]), 0, shared, None)).shape == (0, SPEC.vocab)
    rows = [Row(pack(ids[48:end]), 48, shared + runner.pages(end - 48), GREEDY) for end in (49, 70, 90)]
    for row, logits in zip(rows, runner.step(*rows), strict=True):
        check(backend, logits, right(90, 7)[row.end - 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_rows_have_logits_and_a_step_repeats_itself(backend, weights, right):
    """Only rows that want logits have them, and the same step gives the same bits again."""
    found = []
    for _ in range(2):
        runner = make_runner(backend, weights)
        rows = [
            Row(pack(prompt(n, i, SPEC.vocab)), 0, runner.pages(n), GREEDY if i % 2 else None)
            for i, n in enumerate((5, 20, 1, 1, 30, 9))
        ]
        found.append(runner.step(*rows))
    assert torch.equal(*found)
    for i, n, logits in zip((1, 3, 5), (20, 1, 9), found[0], strict=True):
        check(backend, logits, right(n, i)[-1])


# ---- step engines ------------------------------------------------------------------------------------------------


def test_conversations_get_the_tokens_of_the_reference(made, right):
    """Conversations that join and leave, with all kinds of sampling, get the tokens and log probabilities of the
    reference."""
    lengths, free = (40, 1, 17, 64, 33, 20), list(range(PAGES))[::-1]
    hows = [
        GREEDY,
        Sampling(temperature=0.9, seed=5),
        GREEDY,
        Sampling(temperature=1.3, top_k=20, top_p=0.9, seed=6),
        Sampling(temperature=0.0, adjust=adjustments({9: 7.0}, presence=9.0, frequency=2.0), logprobs=3),
        Sampling(temperature=0.8, seed=7, adjust=adjustments(repetition=1.5, frequency=1.0), min_p=0.05),
    ]
    texts = [prompt(length + 30, 50 + i, SPEC.vocab) for i, length in enumerate(lengths)]
    tables = [tuple(free.pop() for _ in range(pages_for(len(text), 16))) for text in texts]
    ran, step = [0] * len(texts), 0
    while turns := [i for i, text in enumerate(texts) if ran[i] < len(text)]:
        turns = [i for i in turns if step >= 2 * i]  # they join and leave
        rows = []
        for i in turns:
            part = texts[i][ran[i] : ran[i] + (25 if ran[i] < lengths[i] else 1)]
            ran[i] += len(part)
            how = hows[i] if step % 5 else None
            past = past_of(how, texts[i][: ran[i]], lengths[i])
            rows.append(Row(pack(part), ran[i] - len(part), tables[i], how, past))
        result = made.engine.run(BatchPlan(tuple(rows)))
        assert result.step_ms > 0
        for i, row, token in zip(turns, rows, result.tokens, strict=True):
            logits = right(len(texts[i]), 50 + i)[row.end - 1]
            if row.sample is None:
                assert token is None
                continue
            if made.exact:
                assert token == expected(logits, row)
            elif row.sample.temperature == 0:  # bfloat16 moves a logit by 0.1 or so; they lie 12 apart
                shaped = logits if row.past is None else by_definition(logits, row.sample.adjust, row.past)
                assert float(shaped.max() - shaped[token]) < 0.4
            if row.sample.logprobs is not None:
                assert result.logprobs[turns.index(i)].drawn == pytest.approx(
                    float(logits.double().log_softmax(-1)[token]), abs=1e-3 if made.exact else 0.5
                )
        assert result.logprobs.keys() == {
            number
            for number, row in enumerate(rows)
            if row.sample is not None and row.sample.logprobs is not None
        }
        step += 1


def test_draws_follow_seed_and_position(made):
    """A draw depends on logits, seed and position only, so that a resumed stream goes on with the same tokens."""
    ids, how = prompt(12, 1, SPEC.vocab), Sampling(temperature=50.0, seed=9)
    rows = [Row(pack(ids), 0, (page,), how) for page in (0, 7)]
    first, again = (made.engine.run(BatchPlan((row,))).tokens for row in rows)
    assert first == again
    if made.exact:  # on a GPU a chunk and a decode step round differently
        (token,) = first
        assert token is not None
        resumed = made.engine.run(BatchPlan((Row(pack([*ids, token]), 0, (3,), how),))).tokens
        assert resumed == made.engine.run(BatchPlan((Row(pack([token]), 12, (0,), how),))).tokens
    others = {
        made.engine.run(BatchPlan((Row(pack(ids), 0, (0,), Sampling(temperature=50.0, seed=seed)),))).tokens
        for seed in range(8)
    }
    assert len(others) > 1


BOUND = Sampling(adjust=Adjustments(grammar="any"))
LISTED = Sampling(adjust=Adjustments(allowed=b"\xff" * 127))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row(b"", 0, (0,), None), "row 1: 0 tokens from position 0"),
        (Row(pack([1]), 2048, (0,) * 129, None), "row 1: 1 tokens from position 2048"),
        (Row(pack([1] * 17), 0, (4,), None), "row 1: 1 pages of 16 do not hold 17 tokens"),
        (Row(pack([1]), 0, (PAGES,), None), rf"row 1: pages \({PAGES},\); the arena has 0 to {PAGES - 1}"),
        (Row(pack([1]), 0, (-1,), None), r"row 1: pages \(-1,\)"),
        (Row(pack([1]), 15, (4,), GREEDY, draft=pack([1])), "row 1: 1 pages of 16 do not hold 17 tokens"),
        (Row(pack([1]), 2046, (4,) * 129, GREEDY, draft=pack([1, 1])), "row 1: 3 tokens from position 2046"),
        (Row(pack([1]), 0, (4,), GREEDY, draft=pack([1024])), "row 1: token ids 1 to 1024"),
        (Row(pack([1]), 0, (4,), None, draft=pack([1])), "row 1: has a draft, but draws no token"),
        (
            Row(pack([1]), 0, (4,), Sampling(logprobs=1), draft=pack([1])),
            "row 1: has a draft, but draws no token or wants",
        ),
        (
            Row(pack([1]), 0, (4,), BOUND, Past(b"", b"", allowed=b"\xff" * 128), draft=pack([1])),
            "row 1: follows a grammar",
        ),
        (
            Row(
                pack([1]), 0, (4,), BOUND, Past(b"", b"", b"", b"\xff" * 128, (bytes(128),)), draft=pack([1])
            ),
            "row 1: follows a grammar",
        ),
        (
            Row(pack([1]), 0, (4,), LISTED, Past(b"", b"", allowed=b"\xff" * 127)),
            "row 1: follows a grammar or a list",
        ),
        (Row(pack([1024]), 0, (4,), None), "row 1: token ids 1024 to 1024; the vocabulary has 1024"),
        (Row(pack([1]), 0, (2,), None), r"row 1: writes to a page that the step writes to already"),
        (Row(pack([1] * 20), 0, (4, 4), None), r"row 1: writes to a page that the step writes to already"),
    ],
)
@pytest.mark.parametrize("name", ENGINES)
def test_a_plan_that_leaves_its_pages_is_refused(name, row, message, weights, tmp_path):
    """Plans with wrong pages, positions, tokens or drafts are refused with the row's number."""
    engine = make_engine(name, weights, tmp_path, PAGES, rows=2).engine
    with pytest.raises(ValueError, match=message):
        engine.run(BatchPlan((Row(pack([1]), 0, (2,), None), row)))
    engine.close()


@pytest.mark.parametrize("pages", [(3, PAGES), (PAGES, 3), (-1,)])
def test_pages_that_a_row_goes_on_with_are_looked_at_when_they_are_new(pages, made):
    """Page numbers that are added to a row's earlier ones are checked too."""
    for start in range(2):
        made.engine.run(BatchPlan((Row(pack([1]), start, (3,), None),)))
    with pytest.raises(ValueError, match="row 0: pages"):
        made.engine.run(BatchPlan((Row(pack([1]), 2, pages, None),)))


def test_starting_and_timing_touch_no_page_of_the_pool(made):
    """Warming up and timing write to no page of the pool."""
    before = made.pages()
    run = made.engine.timer(4, 64)
    for shape in ([(16, 0)], [(1, 63)] * 4, [(30, 30), (1, 40), (1, 17)]):
        seconds, threads = run(shape)
        assert seconds > 0 and threads >= 0  # 0: other programs had the cores
    assert bool(before.isnan().all()) and bool(made.pages().isnan().all())
