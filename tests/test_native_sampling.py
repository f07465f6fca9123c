"""Draws in the native step give the tokens of ``engine/sampling.py``, whatever the logits and the settings."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adjustments import adjustments, by_definition, expected, past_of, some_adjustments
from memserve.drawing import Sampling
from memserve.engine.adjusting import logprobs_of
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.runner import CpuEngine
from memserve.engine.sampling import draw, uniform
from memserve.engine.weights import random_weights, save_weights
from memserve.kernels.native import NativeAdjustments, sampling_bytes
from memserve.kernels.native.pieces import MAX_ROWS
from memserve.kernels.native_build import SOURCES, target_flags
from memserve.tokens import pack, unpack
from test_model import GREEDY, prompt
from test_native import Twin, native_spec

Draw = Callable[[torch.Tensor, list[Sampling], list[int]], list[int]]
NATIVE = Path(__file__).parent / "native"
INF = float("inf")
VOCABS = (1, 2, 7, 8, 9, 63, 64, 65, 100, 255, 256, 257, 1000, 3001)
TEMPERATURES = (1e-300, 0.01, 0.3, 0.7, 1.0, 2.0, 100.0, 1e4)


@pytest.fixture(scope="module")
def library(native_step: None, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """``sampling.hpp`` compiled alone, so that it takes any logits."""
    built = tmp_path_factory.mktemp("draws") / "draws.so"
    command = [
        os.environ.get("CXX", "g++"),
        "-O2",
        "-shared",
        "-fPIC",
        *target_flags(),
        f"-I{SOURCES[0].parent}",
    ]
    subprocess.run([*command, str(NATIVE / "draws.cpp"), "-o", str(built)], check=True, timeout=120)
    return ctypes.CDLL(str(built))


@pytest.fixture(scope="module")
def native(library: ctypes.CDLL) -> Draw:
    """A function that draws a token for each row."""
    library.draws.restype = None

    def drawn(logits: torch.Tensor, settings: list[Sampling], positions: list[int]) -> list[int]:
        rows, vocab = logits.shape
        tokens = (ctypes.c_int32 * rows)()
        how = b"".join(sampling_bytes(setting) for setting in settings)
        at = (ctypes.c_int64 * rows)(*positions)
        library.draws(ctypes.c_void_p(logits.contiguous().data_ptr()), rows, vocab, how, at, tokens)
        return list(tokens)

    return drawn


def some_logits(generator: random.Random, vocab: int) -> torch.Tensor:
    """(vocab,) float32 of one of many shapes: normal of any width, ties, excluded tokens, one far above the others."""
    noise = torch.randn(vocab, generator=torch.Generator().manual_seed(generator.randrange(2**32)))
    shape = generator.randrange(7)
    if shape == 0:
        return noise * generator.choice((1e-3, 0.1, 1.0, 3.0, 10.0, 100.0)) + generator.choice(
            (0.0, -40.0, 1e4)
        )
    if shape == 1:
        return (noise * generator.choice((1, 2, 5))).round()  # many ties in a few steps
    if shape == 2:
        return torch.where(noise > generator.choice((-1.0, 0.0, 1.0)), noise * 2, -INF)
    if shape == 3:
        noise[generator.randrange(vocab)] += generator.choice((5.0, 20.0, 200.0))
        return noise
    if shape == 4:
        return (noise > 0.5).float() * generator.choice((1e-6, 1.0, 30.0))  # two steps
    if shape == 5:
        return -noise.square() * 50  # thousands of magnitudes
    return torch.where(torch.arange(vocab) % 3 == 1, noise, noise.round())


def some_settings(generator: random.Random, vocab: int) -> Sampling:
    """Random settings, edge cases included."""
    return Sampling(
        temperature=generator.choice((*TEMPERATURES, generator.uniform(0.05, 2))),
        top_k=generator.choice((0, 0, 1, 2, 40, 64, 65, vocab - 1, vocab, vocab + 1, 2**40, 2**70)),
        top_p=generator.choice((1.0, 1.0, 1e-9, 0.1, 0.5, 0.9, 0.99, 1 - 1e-9, generator.random() or 0.5)),
        min_p=generator.choice((0.0, 0.0, 1e-9, 0.02, 0.5, 1.0)),
        seed=generator.choice((0, 1, generator.randrange(2**64), -generator.randrange(2**63))),
    )


def is_at_a_boundary(logits: torch.Tensor, how: Sampling, position: int) -> bool:
    """Whether a sum of weights is so close to a limit that rounding decides on which side it is.

    The native step adds in another order, and the last bit of e^x differs. Where all sums are exact, nothing is
    rounded.
    """
    below = (logits - logits.max()).double()
    weights = (below / how.temperature).exp()
    kept = weights.sort(descending=True, stable=True).values[: int((below >= how.reach).sum())]
    sums = kept[: how.top_k or None].cumsum(0)
    if bool((weights == weights.round()).all()) and how.top_p == 1:
        return False

    def near(limit: float) -> bool:
        return bool(((sums - limit).abs() < 1e-12 * float(sums[-1])).any())

    last = int((sums < how.top_p * sums[-1]).sum()) if how.top_p < 1 else len(sums) - 1
    mass = float(sums[min(last, len(sums) - 1)])
    return (how.top_p < 1 and near(how.top_p * float(sums[-1]))) or near(uniform(how.seed, position) * mass)


@pytest.mark.parametrize("vocab", VOCABS)
def test_tokens_equal_the_reference(native: Draw, vocab: int) -> None:
    """Native draws equal those of the reference: a stream may move between native and torch workers."""
    generator, compared = random.Random(vocab), 0
    for _ in range(400):
        logits, how = some_logits(generator, vocab), some_settings(generator, vocab)
        position = generator.randrange(2**31)
        if not bool(logits.max().isfinite()) or is_at_a_boundary(logits, how, position):
            continue
        compared += 1
        expected = draw(logits[None], [how], [position])
        assert native(logits[None], [how], [position]) == expected, (vocab, how, position)
    assert compared > 200


def test_tokens_of_a_large_vocabulary_equal_the_reference(native: Draw) -> None:
    """The same with a large vocabulary, whose buckets hold thousands of tokens."""
    generator, vocab = random.Random(3), 49_152
    rows = [some_logits(generator, vocab) for _ in range(60)]
    settings = [some_settings(generator, vocab) for _ in rows]
    clear = [not is_at_a_boundary(logits, how, 9) for logits, how in zip(rows, settings, strict=True)]
    found, expected = (
        each(torch.stack(rows), settings, [9] * len(rows)) for each in (native, lambda *case: draw(*case))
    )

    assert sum(clear) > 40
    assert [t for t, ok in zip(found, clear, strict=True) if ok] == [
        t for t, ok in zip(expected, clear, strict=True) if ok
    ]


def test_equal_logits_are_ordered_by_id(native: Draw) -> None:
    """Tokens with equal logits are ordered by id, so that draws do not differ between machines."""
    logits = torch.zeros(1, 4096)
    for position in range(200):
        u = uniform(0, position)
        assert native(logits, [Sampling()], [position]) == [int(u * 4096)]
        assert native(logits, [Sampling(top_k=300)], [position]) == [int(u * 300)]
        assert native(logits, [Sampling(top_p=0.25)], [position]) == [int(u * 1024)]  # 1,024 reach it exactly
        assert native(logits, [Sampling(top_p=0.25, top_k=1000)], [position]) == [int(u * 250)]


@pytest.mark.parametrize("vocab", [*VOCABS, 49_152])
def test_greedy_takes_the_lowest_of_the_largest(native: Draw, vocab: int) -> None:
    """Greedy draws take the lowest id among the largest logits, for every size of vocabulary."""
    generator = random.Random(vocab)
    settings = [
        Sampling(temperature=0.0),
        Sampling(top_k=1),
        Sampling(temperature=-1.0),
        Sampling(temperature=0.0),
    ]
    for turn in range(20):
        logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(turn))
        for row in range(4):
            ties = sorted(generator.randrange(vocab) for _ in range(3))
            logits[row, ties] = generator.choice((9.0, 0.0))
            if generator.random() < 0.3:
                logits[row, : ties[-1]] = logits[row, ties[-1] + 1 :] = -INF
        assert native(logits, settings, [0] * 4) == logits.max(dim=-1).indices.tolist()


@pytest.mark.parametrize("vocab", [1, 8, 100, 3001])
@pytest.mark.parametrize("strange", [float("nan"), INF, -float("nan")])
def test_logits_that_are_not_numbers_give_no_token(native: Draw, vocab: int, strange: float) -> None:
    """A row with NaN or infinite logits gives -1 instead of a token, and the other rows get theirs."""
    generator = random.Random(vocab)
    for how in (Sampling(temperature=0.0), Sampling()):
        logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab))
        logits[1, generator.randrange(vocab)] = strange
        tokens = native(logits, [how] * 3, [0] * 3)
        assert tokens[1] == -1 and tokens[0] >= 0 and tokens[2] >= 0
        with pytest.raises(FloatingPointError, match="row 1"):
            draw(logits, [how] * 3, [0] * 3)
        assert native(torch.full((1, vocab), -INF), [how], [0]) == [-1]


@pytest.mark.parametrize("vocab", [2, 9, 500])
def test_adjusted_logits_are_the_definitions_to_the_bit(library: ctypes.CDLL, vocab: int) -> None:
    """Penalties and biases give the same logits, to the bit, as their definition in torch."""
    generator = random.Random(vocab)
    for _ in range(100):
        logits = some_logits(generator, vocab)
        how, past = some_adjustments(generator, vocab)
        found = torch.empty(vocab)
        native = NativeAdjustments.of(how, past)
        library.adjusted(
            ctypes.c_void_p(logits.data_ptr()), vocab, ctypes.byref(native), ctypes.c_void_p(found.data_ptr())
        )
        assert torch.equal(found, by_definition(logits, how, past)), (how, past)


# ---- in the step --------------------------------------------------------------------------------------------


def rows_of_all_kinds(twin: Twin) -> list[Row]:
    """Chunks longer than the buffers, decode rows and rows that want no token, with many settings."""
    how = [
        GREEDY, Sampling(seed=4), None, Sampling(temperature=1.7, top_p=0.8, seed=2**63), Sampling(top_k=3, seed=-1),
        Sampling(temperature=0.5, top_p=0.95, top_k=50, seed=9), None, GREEDY, Sampling(temperature=2.0),
    ]  # fmt: skip
    lengths = [1, 3, MAX_ROWS + 40, 1, 20, 1, 1, 300, 1]
    return [
        Row(pack(prompt(length, i)), 0, twin.pages(length), setting)
        for i, (length, setting) in enumerate(zip(lengths, how, strict=True))
    ]


@pytest.mark.usefixtures("native")
def test_a_step_draws_from_its_own_logits() -> None:
    """Each row of a step draws with its own logits, settings and position, on any number of threads."""
    twin = Twin(native_spec(4, 2, 32), threads=3)
    rows = rows_of_all_kinds(twin)
    wanted = [row for row in rows if row.sample is not None]
    settings = [row.sample for row in wanted if row.sample is not None]
    expected = draw(twin.native(*rows), settings, [row.end for row in wanted])

    for twin.threads in (1, 2, 3):
        assert twin.drawn(*rows) == expected
        assert [token for row in rows for token in twin.drawn(row)] == expected
    assert twin.drawn(rows[2]) == []


@pytest.mark.usefixtures("native")
def test_a_step_adjusts_its_rows_and_reports_the_logits_as_they_were() -> None:
    """Each row is adjusted by its own past, and log probabilities are those of the logits before that."""
    twin = Twin(native_spec(4, 2, 32), threads=3)
    vocab = twin.spec.vocab
    hows = [
        Sampling(0.0, adjust=adjustments({3: 100.0}), logprobs=5),
        Sampling(2.0, seed=4, adjust=adjustments(repetition=1.8, frequency=1.5, min_tokens=9), logprobs=0),
        Sampling(1.5, min_p=0.05, seed=6),
        Sampling(0.0, adjust=adjustments(presence=2.0), logprobs=20),
    ]
    rows = []
    for i, how in enumerate(hows):
        tokens = [token % vocab for token in prompt(MAX_ROWS // 2 + 9 * i, i)]
        past = past_of(how, tokens, len(tokens) - 7, ends=(5, 6))
        rows.append(Row(pack(tokens), 0, twin.pages(len(tokens)), how, past))
    logits = twin.native(*rows)
    wanted = [expected(one, row) for one, row in zip(logits, rows, strict=True)]

    for threads in (1, 3):
        drawn, reports = twin.step.step(BatchPlan(tuple(rows)), twin.arena_pages, threads)
        assert list(unpack(b"".join(drawn))) == wanted and wanted[0] == 3
        assert reports[2] is None
        for i in (0, 1, 3):
            known = logprobs_of(logits[i], wanted[i], hows[i].logprobs or 0)
            assert reports[i].ids == known.ids
            assert (reports[i].drawn, *reports[i].values) == pytest.approx((known.drawn, *known.values))


@pytest.mark.usefixtures("native")
def test_a_past_with_tokens_that_are_not_there_is_refused() -> None:
    """A past with tokens outside the vocabulary is refused: the step would write to other memory."""
    twin = Twin(native_spec(4, 2, 32))
    how = Sampling(adjust=adjustments(presence=1.0))
    for wrong in (-1, twin.spec.vocab):
        row = Row(pack([5]), 0, twin.pages(1), how, past_of(how, [5, wrong], 1))
        with pytest.raises(ValueError, match="that are not there"):
            twin.drawn(row)


@pytest.mark.usefixtures("native")
def test_a_step_with_logits_that_are_not_numbers_names_its_row() -> None:
    """A step whose row has NaN logits raises an error that names the row."""
    twin = Twin(native_spec(4, 2, 32))
    pages = twin.pages(4)  # where nothing was written, and so all is NaN
    fine = Row(pack([5]), 0, twin.pages(1), GREEDY)
    with pytest.raises(FloatingPointError, match="row 1: the largest logit is not a finite number"):
        twin.drawn(fine, Row(pack([1]), 3, pages, GREEDY), fine)


class Recorder(TorchDispatchMode):
    """Records every operation of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record it and run it."""
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("native")
def test_an_engine_with_a_native_step_leaves_torch_alone(tmp_path: Path) -> None:
    """A step of the native engine calls no torch operation: torch's threads would compete with its own."""
    spec = native_spec(4, 2, 32)
    save_weights(random_weights(spec, "bfloat16", 1), tmp_path / "w")
    arena = mmap.mmap(-1, 8 * spec.page_bytes(16, "bfloat16"))
    engine = CpuEngine(spec, tmp_path / "w", arena, 8, 16, "bfloat16", threads=2)
    rows = (
        Row(pack(prompt(20, 1)), 0, (3, 1), Sampling(seed=4)),
        Row(pack(prompt(9, 2)), 0, (4,), None),
        Row(pack(prompt(5, 3)), 0, (5,), GREEDY),
    )
    with Recorder() as torch_ops:
        together = engine.run(BatchPlan(rows)).tokens
        alone = tuple(engine.run(BatchPlan((row,))).tokens[0] for row in rows)

    assert torch_ops.seen == []
    assert together == alone
    assert [token is None for token in together] == [False, True, False]
    engine.close()
