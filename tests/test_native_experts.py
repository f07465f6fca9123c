"""Mixtures of experts in the native step: near the reference in torch, and the same bits however a token is computed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import attrs
import pytest
import torch

import test_native
from memserve.engine.convert import SCALE
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.spec import ModelSpec
from memserve.tokens import pack
from test_model import GREEDY, Runner, prompt
from test_native import Twin, in_chunks, native_spec, native_step

SHAPES = [(12, 3), (4, 2), (40, 1), (128, 8), (4, 3)]
"""Experts, and how many of them a token runs through."""


@pytest.fixture(params=[False, True], ids=["vectors", "amx"], autouse=True)
def _instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run every test with vector instructions and with AMX, as far as this machine has them."""
    monkeypatch.setattr(test_native, "AMX", request.param)
    if Twin(native_spec(4, 2, 32), pages=1).step.amx != request.param:
        pytest.skip("no AMX here")
    return


def with_experts(experts: int, used: int, normed: bool = True, **changes: int) -> ModelSpec:
    """A tiny model of two layers with experts, in widths that the native step supports."""
    spec = attrs.evolve(native_spec(6, 2, 64), intermediate=64, qk_norm=True, **changes)
    return attrs.evolve(spec, experts=experts, experts_used=used, experts_normed=normed)


def errors(twin: Twin, ids: list[int], cuts: list[int]) -> torch.Tensor:
    """Relative errors of the native step's logits at the ends of chunks, compared with the reference."""
    pages, found, expected = twin.pages(len(ids)), [], []
    for start, end in pairwise(cuts):
        row = Row(pack(ids[start:end]), start, pages, GREEDY)
        found.append(twin.native(row)[0])
        expected.append(twin.exact(row)[0])
    exact = torch.stack(expected)
    return (torch.stack(found) - exact).norm(dim=1) / exact.norm(dim=1)


CUTS = [0, 100, *range(118, 250, 22), *range(250, 265)]


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
@pytest.mark.parametrize("normed", [True, False])
def test_experts_are_near_the_reference(stored: str, normed: bool) -> None:
    """Where all experts are used, so that rounding changes no choice, every logit is near the reference."""
    twin = Twin(with_experts(7, 7, normed), stored=stored)
    assert float(errors(twin, prompt(264, 5), CUTS).max()) < 0.03


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_chosen_experts_are_the_references(shape: tuple[int, int], normed: bool) -> None:
    """Logits are near the reference but for the few tokens for which two experts are all but equally good."""
    found = errors(Twin(with_experts(*shape, normed)), prompt(264, 5), CUTS)
    assert float(found.median()) < 0.03, found
    assert float((found < 0.05).float().mean()) > 0.6, found


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_and_threads_change_no_bit(shape: tuple[int, int], stored: str) -> None:
    """Logits depend neither on how a prompt was cut, and so on how many rows an expert has, nor on the threads."""
    twin = Twin(with_experts(*shape), stored=stored, threads=3, pages=400)
    ids = prompt(500, shape[0])
    alone = in_chunks(twin, ids, range(1, 501), twin.pages(500))
    random_cuts = sorted({*random.Random(shape[0]).sample(range(1, 500), 9), 500})
    for cuts in [*(range(size, 501, size) for size in (500, 250, 100, 40, 17, 16, 12, 3)), random_cuts]:
        twin.threads = 1 + len(cuts) % 3
        pages = twin.pages(500)
        for end, logits in in_chunks(twin, ids, cuts, pages).items():
            assert torch.equal(logits, alone[end]), (cuts, end)
        twin.free += pages


@pytest.mark.parametrize("shape", SHAPES)
def test_company_changes_no_bit(shape: tuple[int, int]) -> None:
    """A row has the logits that it has alone in batches of every size, beside chunks, and on any number of threads."""
    twin = Twin(with_experts(*shape), threads=3, pages=400)
    prompts = [prompt(20 + i, i) for i in range(40)]
    tables = [twin.pages(60) for _ in prompts]
    for ids, table in zip(prompts, tables, strict=True):
        twin.native(Row(pack(ids), 0, table, None))
    rows = [Row(pack([i]), len(prompts[i]), table, GREEDY) for i, table in enumerate(tables)]
    rows[3] = Row(pack(prompt(19, 3)), rows[3].start, tables[3], GREEDY)
    alone = [twin.native(row)[0] for row in rows]
    for count in (2, 3, 8, 15, 17, 40):
        for twin.threads in (1, 2, 3):
            order = random.Random(count).sample(range(len(rows)), count)
            together = twin.native(*(rows[i] for i in order))
            assert all(torch.equal(found, alone[i]) for found, i in zip(together, order, strict=True)), count


def test_threads_may_come_and_go_within_a_step() -> None:
    """Threads may leave and join between two layers of experts; tokens stay the same."""
    twin = Twin(attrs.evolve(with_experts(12, 3), layers=6), threads=4)
    row = Row(pack(prompt(90, 1)), 0, twin.pages(90), GREEDY)
    expected = twin.step.step(BatchPlan((row,)), twin.arena_pages, 4)
    had: list[int] = []

    def crew(threads: int) -> int:
        had.append(threads)
        return 1 + len(had) * 7 % 4

    for start in range(200):
        assert twin.step.step(BatchPlan((row,)), twin.arena_pages, 1 + start % 4, crew) == expected, start
    twin.step.close()


@pytest.mark.parametrize("rows", [1, 10, 60])
def test_of_equal_experts_those_with_lower_numbers_are_chosen(rows: int) -> None:
    """A router without preference chooses the first experts, in torch too; the others are not even read."""
    twin = Twin(with_experts(12, 3))
    for layer in range(twin.spec.layers):
        twin.weights[f"{layer}.router"].zero_()
        for name in ("gate_up", "down"):
            stacked = twin.weights[f"{layer}.{name}"].view(12, -1, twin.weights[f"{layer}.{name}"].shape[1])
            stacked[3:] = float("nan")
    assert not [name for name in twin.weights if name.endswith(SCALE)]
    step = native_step(twin.spec, twin.weights, 16, 2)
    row = Row(pack(prompt(rows, 2)), 0, twin.pages(rows), GREEDY)
    found = torch.from_numpy(step.forward(BatchPlan((row,)), twin.arena_pages, 2))
    torch_runner = Runner(twin.spec, {name: one.float() for name, one in twin.weights.items()})
    expected = torch_runner.step(Row(row.tokens, 0, torch_runner.pages(rows), GREEDY))
    assert found.isfinite().all()
    assert float((found - expected).norm() / expected.norm()) < 0.03
    step.close()


def test_logits_that_are_not_numbers_are_refused() -> None:
    """A router whose weights are not finite ends the step with an error, and reads no memory of others."""
    twin = Twin(with_experts(12, 3))
    twin.weights["1.router"][5] = float("nan")
    twin.weights["0.router"][:4] = float("inf")
    step = native_step(twin.spec, twin.weights, 16, 2)
    for rows in (1, 60):
        plan = BatchPlan((Row(pack(prompt(rows, 2)), 0, twin.pages(rows), GREEDY),))
        with pytest.raises(FloatingPointError):
            step.step(plan, twin.arena_pages, 2)
    step.close()
