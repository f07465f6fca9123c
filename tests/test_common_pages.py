"""Decode rows that begin with the same pages attend to those together: on a stand-in for FlashInfer, and on a GPU."""

from __future__ import annotations

import attrs
import pytest
import torch

import backends
import fake_flashinfer
from backends import CARDS, ON_CARDS, SPEC, FlashRunner, card_of, make_engine, make_runner
from fake_flashinfer import Replays
from memserve.drawing import Sampling
from memserve.engine.cuda import CudaEngine
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.sampling import draw
from memserve.engine.weights import random_weights
from memserve.kernels import flashinfer_kit
from memserve.kernels.flashinfer_kit import FlashInferAttention, can_merge, libraries
from memserve.kernels.page_tables import Sharing, StepTables
from memserve.tokens import count, pack, pages_for
from test_model import GREEDY, Runner, prompt, tiny_spec

PLACES = ["stand-in", *ON_CARDS]
WHEREVER, NEVER = Sharing(1, 1), Sharing(None, None)
PAGES, SIZE = 400, 16
weights = backends.weights

LAYOUTS = {
    "one document": ([("a", 7, 5), ("a", 7, 16), ("a", 7, 1), ("a", 7, 40)], []),
    "two documents, two rows alone": ([("a", 3, 9), ("", 0, 33), ("b", 5, 17), ("a", 3, 1), ("b", 5, 2), ("", 0, 1)], []),
    "documents after one system prompt": ([("s", 2, 1), ("sd", 9, 20), ("sd", 9, 4), ("se", 6, 8), ("se", 6, 8), ("s", 2, 30)], []),
    "a context that splits": ([("a", 100, 3), ("a", 100, 50), ("", 0, 900)], []),
    "beside chunks": ([("a", 4, 3), ("a", 4, 30), ("", 0, 20)], [("a", 4, 3, 20), ("", 0, 0, 40)]),
}  # fmt: skip
"""Decode rows (document, its pages, further tokens) and chunks (the same, then tokens of the chunk)."""


def rows_of(decodes, chunks) -> list[Row]:
    """The rows of a layout. Chunks come before the other rows, so that the step's order differs from the plan's."""
    free, begun = iter(torch.randperm(PAGES, generator=torch.Generator().manual_seed(3)).tolist()), {}

    def table(document: str, shared: int, own: int) -> tuple[int, ...]:
        begin: tuple[int, ...] = ()
        for i in range(len(document)):  # each letter's part is the same after the same letters
            size = shared if i + 1 == len(document) else 2
            more = begun.setdefault(document[: i + 1], [next(free) for _ in range(size - len(begin))])
            begin += tuple(more)
        return begin + tuple(next(free) for _ in range(pages_for(own, SIZE)))

    rows = [
        Row(pack([1]), shared * SIZE + own - 1, table(name, shared, own), GREEDY)
        for name, shared, own in decodes
    ]
    for name, shared, own, new in chunks:
        rows.insert(0, Row(pack([1] * new), shared * SIZE + own, table(name, shared, own + new), GREEDY))
    return rows


def attend(attention: FlashInferAttention, plan: BatchPlan, least: int | None, q, k, v) -> torch.Tensor:
    """The attention of each token of the plan, in the order of the plan, as q, k and v are."""
    tables = StepTables.of(plan, SIZE, least)
    assert (tables.common is None) == (least is None)
    begins, at = [], 0
    for row in plan.rows:
        begins.append(at)
        at += count(row.tokens)
    order = torch.tensor([begins[i] + j for i in tables.order for j in range(count(plan.rows[i].tokens))])
    out = torch.full_like(q, float("nan"))
    found = torch.empty_like(q)
    attention.run(attention.plan_tables(tables), 1, q[order], k[order], v[order], out)
    found[order] = out
    return found


@pytest.mark.parametrize(
    "heads", [(4, 2), (8, 2), (10, 2)], ids=lambda heads: f"{heads[0] // heads[1]} heads a kv head"
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", PLACES)
def test_rows_find_together_what_each_finds_alone(place, layout, heads):
    """Rows that attend to shared pages together get the values that each gets alone."""
    device, dtype, library = torch.device("cpu"), torch.float32, fake_flashinfer
    if place in CARDS:
        card = card_of(place, attrs.evolve(SPEC, heads=heads[0], kv_heads=heads[1]))
        device, dtype, library = card.device, torch.bfloat16, card.library
    generator = torch.Generator().manual_seed(7)
    pages = torch.randn(PAGES, 2, 2, heads[1], SIZE, 64, generator=generator).to(device, dtype)
    plan = BatchPlan(tuple(rows_of(*LAYOUTS[layout])))
    tokens = sum(count(row.tokens) for row in plan.rows)
    q = torch.randn(tokens, heads[0], 64, generator=generator).to(device, dtype)
    k, v = (torch.randn(tokens, heads[1], 64, generator=generator).to(device, dtype) for _ in range(2))
    attention = FlashInferAttention(library, pages, heads[0], "fa2")
    alone, together = (attend(attention, plan, least, q, k, v).float() for least in (None, 1))
    error = float((together - alone).norm() / alone.norm())
    assert error < (0.02 if place in CARDS else 1e-5), error  # NaN fails too
    again = attend(attention, plan, 1, q, k, v).float()
    assert torch.equal(again, together)


@pytest.mark.parametrize("place", PLACES)
def test_logits_are_those_of_each_row_alone(place, weights, monkeypatch):
    """The logits of rows that share a document are those of each row alone."""
    monkeypatch.setattr(FlashRunner, "least", 1)
    runner, exact = (
        make_runner(place, weights),
        Runner(SPEC, {name: one.float() for name, one in weights.items()}),
    )
    ids, asked = prompt(64, 7, SPEC.vocab), [prompt(9, seed, SPEC.vocab) for seed in range(5)]
    found = {}
    for one in (runner, exact):
        shared = one.pages(64)
        one.step(Row(pack(ids), 0, shared, None))
        tables = [shared + one.pages(9) for _ in asked]
        steps = []
        for at in range(9):
            rows = [
                Row(pack(own[at : at + 1]), 64 + at, table, GREEDY)
                for own, table in zip(asked, tables, strict=True)
            ]
            steps.append(one.step(*rows) if one is runner else torch.cat([one.step(row) for row in rows]))
        found[one] = torch.cat(steps)
    error = float((found[runner] - found[exact]).norm() / found[exact].norm())
    assert error < (0.03 if place in CARDS else 1e-4), error


# ---- the engine ---------------------------------------------------------------------------------------------------


def drive(engine, vocab: int) -> list[tuple[list[int], int, Sampling]]:
    """Compute two documents, then run five conversations about each, which join and leave.

    Returns whole texts, prompt lengths and settings.
    """
    free = iter(torch.randperm(60, generator=torch.Generator().manual_seed(2)).tolist())
    documents = [
        (prompt(length, length, vocab), [next(free) for _ in range(length // SIZE)]) for length in (48, 80)
    ]
    for ids, pages in documents:
        engine.run(BatchPlan((Row(pack(ids), 0, tuple(pages), None),)))
    texts, tables, ran, hows, ends = [], [], [], [], []
    for i in range(10):
        ids, pages = documents[i % 2]
        texts.append(ids + prompt(1 + 5 * (i % 3), 100 + i, vocab))
        ends.append(len(texts[i]) + 6 + i)
        tables.append(tuple(pages) + tuple(next(free) for _ in range(pages_for(ends[i] - len(ids), SIZE))))
        ran.append(len(ids))
        hows.append(GREEDY if i % 3 else Sampling(temperature=0.9, seed=i))
    begun, step = [len(text) for text in texts], 0
    while any(len(text) < end for text, end in zip(texts, ends, strict=True)):
        turns = [i for i, text in enumerate(texts) if len(text) < ends[i] and step >= 2 * i][:8]
        rows = [Row(pack(texts[i][ran[i] :]), ran[i], tables[i], hows[i]) for i in turns]
        for i, row, token in zip(turns, rows, engine.run(BatchPlan(tuple(rows))).tokens, strict=True):
            assert token is not None
            ran[i] = row.end
            texts[i].append(token)
        step += 1
    return list(zip(texts, begun, hows, strict=True))


@pytest.mark.parametrize("place", PLACES)
def test_conversations_about_one_document_get_the_tokens_of_each_alone(place, weights, tmp_path):
    """Conversations about one document get the tokens of each alone, in captured and launched steps and with chunks
    among them."""
    made = make_engine(place, weights, tmp_path, 60)
    made.engine.warm_up()
    exact = {name: one.float() for name, one in weights.items()}
    for sharing in (WHEREVER, Sharing(captured=None, launched=1), Sharing(captured=1, launched=None)):
        made.engine.sharing = sharing
        for text, begun, how in drive(made.engine, SPEC.vocab):
            runner = Runner(SPEC, exact)
            pages = runner.pages(len(text))
            for at in range(begun, len(text)):
                start = 0 if at == begun else at - 1
                logits = runner.step(Row(pack(text[start:at]), start, pages, GREEDY))
                if made.exact:
                    assert draw(logits, [how], [at]) == [text[at]]
                elif how is GREEDY:  # bfloat16 moves a logit by 0.1 or so; they lie 12 apart
                    assert float(logits.max() - logits[0, text[at]]) < 0.4
    made.engine.close()


@pytest.fixture
def merges(monkeypatch) -> list[int]:
    """The number of rows in each merge of the stand-in."""
    found: list[int] = []
    real = fake_flashinfer.merge_state_in_place
    monkeypatch.setattr(
        fake_flashinfer,
        "merge_state_in_place",
        lambda v, s, v_other, s_other: (found.append(len(v)), real(v, s, v_other, s_other))[1],
    )
    return found


def tiny_engine() -> tuple[CudaEngine, Replays]:
    """An engine on the stand-in, warmed up, whose first eight pages are filled."""
    spec, graphs = tiny_spec(6, 2, 16), Replays()
    arena = torch.full((33, *spec.page_shape(SIZE)), float("nan"))
    engine = CudaEngine(
        spec, random_weights(spec, "float32", 3), arena, fake_flashinfer, graphs, rows=4, backend="fa3"
    )
    engine.warm_up()
    arena[:8] = 0.5
    return engine, graphs


def alike(rows: int, at: int = 0) -> BatchPlan:
    """Decode rows which share pages 0 and 1 and have one more page each."""
    return BatchPlan(tuple(Row(pack([5]), 32 + at, (0, 1, 2 + i), GREEDY) for i in range(rows)))


def test_a_start_has_run_what_rows_that_begin_alike_need(merges):
    """Warming up also runs the kernels for shared pages, so that no request waits for their compilation."""
    engine, _ = tiny_engine()
    assert set(merges) == {2}
    engine.close()


def test_a_graph_is_given_up_only_for_more_than_it_saves(merges):
    """Shared pages are attended to together only if that saves more than the launches that a graph avoids."""
    engine, graphs = tiny_engine()
    layers, page = 2, 2 * 2 * SIZE * 16 * 4
    spared = 2 * 2 * page  # three rows, two pages
    for sharing, together in (
        (Sharing(spared, None), True),
        (Sharing(spared + 1, 1), False),
        (Sharing(), False),
        (NEVER, False),
    ):
        engine.sharing = sharing
        merges.clear()
        graphs.log.clear()
        engine.run(alike(3))
        assert (merges == [3] * layers, graphs.log.count("replay")) == (together, 0 if together else 1)
    chunk = Row(pack([1, 2]), 0, (9,), GREEDY)
    for launched, together in ((spared, True), (spared + 1, False), (None, False)):
        engine.sharing = Sharing(1, launched)
        merges.clear()
        engine.run(BatchPlan((chunk, *alike(3).rows)))
        assert (merges == [3] * layers) == together
    engine.close()


def test_a_step_planned_ahead_is_dropped_when_another_joins(merges):
    """When a row joins, the step planned ahead is dropped, and the next one is planned for the new rows."""
    engine, graphs = tiny_engine()
    engine.sharing = Sharing(2 * 2 * 2 * 2 * SIZE * 16 * 4, 1)  # worth it from three rows on
    merges.clear()
    graphs.log.clear()
    for at, rows in enumerate((2, 2, 3, 3, 2, 2)):
        engine.run(alike(rows, at))
    assert merges == [3] * 4 and graphs.log.count("replay") == 4
    engine.close()


def test_calibration_times_rows_that_share_nothing(merges):
    """Calibration times rows that share nothing, even where the pool has fewer pages than they would need."""
    engine, _ = tiny_engine()
    engine.sharing = WHEREVER
    merges.clear()
    run = engine.timer(4, 512)
    for shapes in (((1, 256),) * 4, ((40, 0), *((1, 256),) * 3)):  # of 16 pages each, where there are 32
        run(shapes)
    assert merges == []
    engine.run(alike(2))
    assert merges == [2, 2]
    engine.close()


def test_more_heads_than_a_merge_takes_are_attended_to_alone(merges, monkeypatch):
    """Models with more heads than the merge kernel supports attend to each row alone."""
    assert can_merge(64, 128) and not can_merge(128, 128) and can_merge(128, 64)
    assert "cascade" in libraries(tiny_spec(), "fa3") and "cascade" not in libraries(
        tiny_spec(65, 5, 128), "fa3"
    )
    monkeypatch.setattr(flashinfer_kit, "MERGED_VALUES", 6 * 16 - 1)
    engine, graphs = tiny_engine()
    engine.sharing = WHEREVER
    engine.run(alike(2))
    assert merges == [] and graphs.log.count("replay") == 1
    engine.close()
