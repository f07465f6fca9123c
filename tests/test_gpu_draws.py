"""A step's draws on a GPU, on the CPU: which tokens, and in how many launches and waits."""

from __future__ import annotations

import random
from typing import Any

import attrs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adjustments import some_adjustments
from memserve.drawing import Adjustments, Logprobs, Sampling
from memserve.engine import gpu_draws, sampling
from memserve.engine.adjusting import adjusted, logprobs_of
from memserve.engine.gpu_draws import best_of, launch_draws
from memserve.engine.plans import Past, Row
from memserve.engine.sampling import draw
from memserve.tokens import pack

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero"}
"""Operations whose result or shape the host must know: on a GPU, each waits for all that was launched."""


class Launches(TorchDispatchMode):
    """The operations that were called, and those of them that wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names.append(name)
        # A number that is assigned to places is copied from memory that is not pinned. It has no dimension, as
        # what is assigned to one place never has.
        assigned = name == "index_put_" and args[2].dim() == 0 and args[1][0].numel() > 1
        masked = name in ("index", "index_put_") and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        )
        if name in WAITS or assigned or masked:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def rows_of(hows: list[Sampling], pasts: list[Any] | None = None) -> dict[int, Row]:
    """One row for each of ``hows``."""
    given = pasts or [None] * len(hows)
    return {
        i: Row(pack([1]), 7 + i, (0,), how, past)
        for i, (how, past) in enumerate(zip(hows, given, strict=True))
    }


def drawn_alone(logits: torch.Tensor, rows: dict[int, Row]) -> dict[int, int]:
    """The definition of right: each row's draw by itself."""
    return {
        i: draw(adjusted(logits[i : i + 1], [row]), [row.sample], [row.end])[0]
        for i, row in rows.items()
        if row.sample is not None
    }


def draw_rows(
    rows: dict[int, Row], places: dict[int, int], logits: torch.Tensor
) -> tuple[dict[int, int], dict[int, Logprobs]]:
    """The tokens and log probabilities of rows whose logits are kept until they are read."""
    drawn, logprobs, void = launch_draws(rows, places, logits, best_of(logits)).read()
    assert not void
    return drawn, logprobs


def test_all_draws_are_launched_before_the_first_wait():
    """If it failed, the GPU would be idle while the host launches the draws, in each step that samples."""
    chance = random.Random(3)
    asked = [some_adjustments(chance, 1000) for _ in range(30)]
    assert any(past.forbidden for _, past in asked)
    hows = [
        Sampling(0.4 * (i % 4), top_p=0.9 if i % 3 else 1.0, min_p=0.1 * (i % 2), seed=i, adjust=how)
        for i, (how, _) in enumerate(asked)
    ]
    rows = rows_of(hows, [past for _, past in asked])
    logits = 4 * torch.randn(len(rows), 1000, generator=torch.Generator().manual_seed(1))
    with Launches() as seen:
        launch_draws(rows, {i: i for i in rows}, logits, best_of(logits))
    assert seen.names and not seen.waits
    found, _ = draw_rows(rows, {i: i for i in rows}, logits)
    assert found == drawn_alone(logits, rows)


@pytest.mark.parametrize("vocab", [3000, 9000])
def test_draws_from_flat_distributions_are_found_together(vocab, monkeypatch):
    """If it failed, rows at temperature 1 would be drawn one by one now and then, a millisecond each."""
    logits = 0.05 * torch.randn(40, vocab, generator=torch.Generator().manual_seed(2))
    rows = rows_of([Sampling(1.0, seed=i) for i in range(40)])
    exact, alone = drawn_alone(logits, rows), []
    monkeypatch.setattr(
        gpu_draws, "_draw_alone", lambda line, row: alone.append(row) or drawn_alone(line[None], {0: row})[0]
    )
    found, _ = draw_rows(rows, {i: i for i in rows}, logits)
    assert found == exact
    assert not alone if vocab <= sampling.WIDE else 5 < len(alone) < 35


def test_draws_that_need_logits_which_are_gone_are_void():
    """When the next step has overwritten the logits, rows whose tokens were not found are void, and the others exact."""
    logits = 0.05 * torch.randn(40, 3000, generator=torch.Generator().manual_seed(2))
    rows = rows_of([Sampling(float(i % 3), top_k=0 if i % 2 else 30, seed=i) for i in range(40)])
    draws, exact = (
        launch_draws(rows, {i: i for i in rows}, logits, best_of(logits)),
        drawn_alone(logits, rows),
    )
    draws.give_up_logits()
    logits.fill_(float("nan"))
    drawn, _, void = draws.read()
    assert 5 < len(void) < 20
    assert drawn == {i: token for i, token in exact.items() if i not in void}
    assert draws.tokens.tolist() == [sampling.ELSEWHERE if i in void else exact[i] for i in rows]


def test_draws_of_a_followed_step_are_made_in_time():
    """If it failed, streams at temperature 1 in a large batch would come back void step by step, and nothing would overlap."""
    logits = 0.05 * torch.randn(40, 3000, generator=torch.Generator().manual_seed(2))
    rows = rows_of([Sampling(float(i % 3), top_k=0 if i % 2 else 30, seed=i) for i in range(40)])
    draws = launch_draws(rows, {i: i for i in rows}, logits, best_of(logits), followed=True)
    draws.give_up_logits()
    drawn, _, void = draws.read()
    assert not void and drawn == drawn_alone(logits, rows)


def test_draws_from_few_tokens_sort_few(monkeypatch):
    """Rows with a small top_k are drawn from few tokens, also in a step that is followed."""
    logits, heads = torch.randn(8, 3000), []
    made = sampling.draws
    monkeypatch.setattr(sampling, "draws", lambda *given: heads.append(given[3]) or made(*given))
    for top_k in (20, 0):
        rows = rows_of([Sampling(1.0, top_k=top_k, seed=i) for i in range(8)])
        launch_draws(rows, {i: i for i in rows}, logits, best_of(logits), followed=True)
    assert heads == [sampling.HEAD, sampling.WIDE]


def late(row: Row) -> Row:
    """The row as it is before its answer's last token is known."""
    how = attrs.evolve(row.sample.adjust, presence=row.sample.adjust.presence or 0.5)
    sample = attrs.evolve(row.sample, adjust=how)
    return attrs.evolve(row, sample=sample, past=attrs.evolve(row.past, output=b""), follows=0)


@pytest.mark.parametrize("which", ["all", "some"])
def test_late_draws_are_those_of_rows_that_are_known(which):
    """Rows that draw late draw what their adjustments ask for, in any order of the step's rows, without a wait."""
    chance = random.Random(5)
    asked = [some_adjustments(chance, 700) for _ in range(24)]
    hows = [
        Sampling(0.4 * (i % 3), seed=i, logprobs=(None, 0, 3)[i % 3], adjust=how)
        for i, (how, _) in enumerate(asked)
    ]
    rows = rows_of(hows, [past for _, past in asked])
    order = chance.sample(list(rows), len(rows))  # a step that is launched kernel by kernel sorts its rows
    waiting = {i: late(rows[i]) for i in rows if which == "all" or i % 2}
    known = {i: attrs.evolve(row, past=rows[i].past, follows=None) for i, row in waiting.items()}
    logits = 3 * torch.randn(len(rows), 700, generator=torch.Generator().manual_seed(6))
    exact = drawn_alone(logits, rows | known)
    draws = launch_draws(
        {i: (rows | waiting)[i] for i in order}, {i: i for i in order}, logits, best_of(logits)
    )
    with Launches() as seen:
        draws.draw_late(known)
    assert seen.names and not seen.waits
    assert draws.drawn_by(list(rows)).tolist() == list(exact.values())
    drawn, reports, void = draws.read()
    assert drawn == exact and not void
    for i, one in reports.items():
        assert one.drawn == pytest.approx(logprobs_of(logits[i], drawn[i], 0).drawn, abs=1e-12)
    assert reports.keys() == {i for i in rows if i % 3}


def test_rows_that_are_left_out_of_late_draws_are_void():
    """A row that would have drawn late and was left out is void, whether the logits are kept or not, and without a report."""
    how = Sampling(0.0, logprobs=1, adjust=Adjustments(presence=0.5))
    rows = {i: Row(pack([0]), 7, (0,), how, Past(b"", b""), follows=i) for i in range(3)}
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(6))
    for kept in (True, False):
        draws = launch_draws(rows, {i: i for i in rows}, logits, best_of(logits))
        known = {1: rows[1].known(int(logits[1].argmax()))}
        draws.draw_late(known)
        if not kept:
            draws.give_up_logits()
        drawn, reports, void = draws.read()
        assert drawn == drawn_alone(logits, known)
        assert reports.keys() == {1} and void == {0, 2}


def test_late_draws_that_are_far_are_found_or_void():
    """Late draws that are not among the most probable tokens are made once more if the logits are kept, or are void."""
    how = Sampling(1.0, adjust=Adjustments(presence=0.5))
    rows = {
        i: Row(pack([0]), 7, (0,), attrs.evolve(how, seed=i), Past(b"", b""), follows=i) for i in range(40)
    }
    known = {i: row.known(i) for i, row in rows.items()}
    logits = 0.05 * torch.randn(40, 9000, generator=torch.Generator().manual_seed(2))
    exact = drawn_alone(logits, known)
    for followed in (False, True):
        draws = launch_draws(rows, {i: i for i in rows}, logits, best_of(logits), followed)
        draws.draw_late(known)
        if followed:
            draws.give_up_logits()
        drawn, _, void = draws.read()
        assert 5 < len(void) < 35 if followed else not void
        assert drawn == {i: token for i, token in exact.items() if i not in void}


def test_late_draws_are_checked():
    """Adjustments beyond the vocabulary, and masks that are not there, are refused with the row's number, before a launch."""
    logits = torch.randn(2, 500, generator=torch.Generator().manual_seed(6))
    hows = [Sampling(0.0, adjust=Adjustments(**one)) for one in ({"presence": 0.5}, {"grammar": "x"})]
    rows = {i: Row(pack([0]), 7, (0,), how, Past(b"", b""), follows=i) for i, how in enumerate(hows)}
    draws = launch_draws(rows, {i: i for i in rows}, logits, best_of(logits))
    for number, token, said in ((0, 500, "row 0: adjusts logits"), (1, 5, "row 1: follows a grammar")):
        with pytest.raises(ValueError, match=said):
            draws.draw_late({number: rows[number].known(token)})


def test_broken_logits_of_a_late_draw_name_the_row():
    """Logits that are not numbers are an error that names the row, also if the row draws late."""
    logits = torch.randn(2, 500, generator=torch.Generator().manual_seed(6))
    logits[1] = torch.nan
    how = Sampling(0.0, adjust=Adjustments(presence=0.5))
    rows = {i: Row(pack([0]), 7, (0,), how, Past(b"", b""), follows=i) for i in range(2)}
    draws = launch_draws(rows, {i: i for i in rows}, logits, best_of(logits))
    draws.draw_late({i: row.known(3) for i, row in rows.items()})
    with pytest.raises(FloatingPointError, match="row 1: the largest logit is nan"):
        draws.read()


def test_log_probabilities_of_many_draws_are_those_of_each():
    """If it failed, a client would get other log probabilities from a GPU, or another row's."""
    logits = (3 * torch.randn(50, 700, generator=torch.Generator().manual_seed(4))).round()  # ties
    hows = [Sampling(1.0 * (i % 2), seed=i, logprobs=(None, 0, 1, 20)[i % 4]) for i in range(24)]
    rows = rows_of(hows)
    places = {i: 49 - 2 * i for i in rows}
    drawn, found = draw_rows(rows, places, logits)
    assert found.keys() == {i for i in rows if i % 4}
    for i, one in found.items():
        exact = logprobs_of(logits[places[i]], drawn[i], hows[i].logprobs or 0)
        assert one.drawn == pytest.approx(exact.drawn, abs=1e-12) and one.ids == exact.ids
        assert one.values == pytest.approx(exact.values, abs=1e-12)


def test_the_number_of_launches_does_not_depend_on_the_number_of_rows():
    """If it failed, a batch that asks for log probabilities would take the host longer than the GPU."""
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(5))
    counts = []
    for many in (8, 64):
        rows = rows_of([Sampling(0.8, top_p=0.9, seed=i, logprobs=5) for i in range(many)])
        with Launches() as seen:
            draw_rows(rows, {i: i for i in rows}, logits)
        counts.append(len(seen.names))
    assert counts[0] == counts[1] < 220
