"""What `make gpu-bench` measures and how it keeps results, tried without a GPU on the stand-in for FlashInfer."""

from __future__ import annotations

import json
import sys
import threading

import attrs
import pytest
import torch
import trio
import zmq

import fake_flashinfer
import gpu
import gpu_compute
import gpu_moving
import gpu_parts
import random_model
from backends import SPEC, Exact
from fake_cupy import fake_cupy
from gpu_parts import Ceilings, Figure
from memserve.drawing import Sampling
from memserve.engine.cuda import CudaEngine
from memserve.engine.plans import Row
from memserve.engine.tokenizer import Tokenizer
from memserve.engine.weights import map_weights, prepare, random_weights
from memserve.kernels import gpu_memory
from memserve.kernels.arena import serve_packet
from memserve.mempool.addresses import Tier, page_of, slot, tier_of
from memserve.tokens import pack, pages_for
from notes import Note
from test_model import Runner, prompt

CONTEXTS = (20, 64, 150)


@pytest.fixture
def engines():
    """Two engines on one arena and one copy of the weights, as two workers of a GPU have them."""
    weights = {name: one.float() for name, one in random_weights(SPEC, "bfloat16", 5).items()}
    arena = torch.full((17, *SPEC.page_shape(16)), float("nan"))

    def make() -> CudaEngine:
        engine = CudaEngine(
            SPEC, weights, arena, fake_flashinfer, fake_flashinfer.Replays(), rows=1, backend="fa2"
        )
        engine.warm_up()
        return engine

    return make(), make()


def test_a_hand_over_is_timed_and_gives_the_same_token(engines, monkeypatch):
    """A handoff is timed, and the worker that takes over draws the same tokens."""
    monkeypatch.setattr(gpu_moving, "HAND_OVERS", 3)
    gives, takes = engines
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://workers")
        other.connect("inproc://workers")
        thread = threading.Thread(target=gpu_moving.take_over, args=(takes, other))
        thread.start()
        figures = list(gpu_moving.hand_over(gives, one, CONTEXTS, SPEC.vocab))
        thread.join(10)
    assert [one.what for one in figures] == [
        f"handoff of {n} tokens, {pages_for(n + 1, 16)} pages" for n in CONTEXTS
    ]
    assert all(
        one.value is not None and 0 < one.value < 1000 and one.goal == 1.0 and one.at_most for one in figures
    )
    assert all("the same as without it in 3 of 3" in one.note for one in figures)


class Store:
    """Copies between two tensors of pages."""

    def __init__(self, pages: torch.Tensor) -> None:
        self.tiers = {Tier.DEVICE: pages, Tier.HOST: torch.full_like(pages, float("nan"))}
        self.copied: list[int] = []

    def copy(self, runs):
        """Copy runs of pages, as a page store does."""
        for source, target, pages in runs:
            (a, i), (b, j) = (place_of(one) for one in (source, target))
            self.tiers[b][j : j + pages] = self.tiers[a][i : i + pages]
            self.copied.append(pages)
        return ()


def place_of(address: int) -> tuple[Tier, int]:
    """The tier and page of a slot."""
    return tier_of(address), page_of(address)


def test_first_tokens_are_timed_by_cached_share(engines, monkeypatch):
    """First tokens are timed for each cached share, with the cached pages copied and the rest computed."""
    monkeypatch.setattr(gpu_moving, "PROMPT", 160)
    monkeypatch.setattr(gpu_moving, "CHUNK", 64)
    engine, ran, begun = engines[0], [], []

    def once(run) -> float:
        ran.clear()
        run()
        begun.append(ran[0].start)
        return 0.5

    monkeypatch.setattr(gpu_moving, "host_s", once)
    store = Store(engine._attention._arena[:10])  # the pool's pages
    real = engine.run
    monkeypatch.setattr(engine, "run", lambda plan: (ran.append(plan.rows[0]), real(plan))[1])
    figures = list(gpu_moving.first_tokens(engine, store, SPEC, 10))
    assert len(figures) == 1 + 2 * len(gpu_moving.SHARES)
    # 10, 25, 50, 75 and 100 % in whole pages; the last token is never cached.
    assert begun == [0, *[16, 32, 80, 112, 144] * 2]
    assert sorted(set(store.copied)) == [1, 2, 5, 7, 9, 10]


def test_swaps_are_of_runs_that_nothing_joins():
    """Swapped runs are placed so that neighbours cannot be copied together."""
    from memserve.kernels.gpu_memory import coalesced

    for up in (True, False):
        for run in (1, 4, 16):
            moves = gpu_moving.swap_runs(64, run, up)
            assert sum(pages for *_, pages in moves) == 64 and coalesced(moves) == moves
    assert gpu_moving.swap_runs(4, 2, True) == [
        (slot(Tier.HOST, 2), slot(Tier.DEVICE, 0), 2), (slot(Tier.HOST, 0), slot(Tier.DEVICE, 2), 2),
    ]  # fmt: skip


def test_goals_are_bounds_on_either_side():
    """A goal is a lower or an upper bound, and a missing value meets none."""
    least, most = Figure("a", 0.8, "", 0.8), Figure("b", 1.2, "ms", 1.0, at_most=True)
    assert least.met is True and most.met is False
    assert Figure("c", None, "", 0.5).met is None and Figure("d", 3.0, "").met is None
    assert (
        gpu.row(most)[3:5] == ["at most 1", "**missed**"]
        and gpu.row(attrs.evolve(least, value=None))[4] == "not measured"
    )


def test_a_section_that_is_cut_short_keeps_its_figures(tmp_path):
    """A section that is stopped or fails keeps the figures it has and says what happened."""
    line = json.dumps(attrs.asdict(Figure("a", 1.0, "ms")))
    path = tmp_path / "swap.jsonl"
    code = f"import time; open({str(path)!r}, 'w').write({line!r} + '\\n' + {line[:9]!r}); time.sleep(60)"
    ran = gpu.run_apart([sys.executable, "-c", code], "swap", tmp_path, 1.5)
    assert ran.figures == (Figure("a", 1.0, "ms"),)
    assert ran.problem == "stopped after 2 s" and ran.took_s < 15
    failed = gpu.run_apart([sys.executable, "-c", "raise SystemExit('no room')"], "shared", tmp_path, 20)
    assert failed.problem == "ended with status 1: no room" and failed.figures == ()
    assert "**Not whole: stopped after 2 s**" in gpu.parts_of(ran)


def test_the_note_is_written_after_every_section(tmp_path, monkeypatch):
    """The note is written after every section, so that a later failure loses nothing."""
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    whole = gpu.Ran("ceilings", (Figure("a copy", 3000.0, "GB/s"),), None, 4.0)
    seen = []

    def run(command, name, folder, limit_s):
        seen.append(limit_s)
        if name == "ceilings":
            return whole
        assert "a copy | 3,000 | GB/s" in note.path.read_text()
        return gpu.Ran(name, (), "ended with status 1: no CUDA", 1.0)

    monkeypatch.setattr(gpu, "run_apart", run)
    note = Note("gpu", folder=tmp_path, date="2026-01-01", commit="abc1234")
    gpu.measure(["ceilings", "swap", "served"], note, "", 100.0)
    text = (tmp_path / "out" / "2026-01-01-gpu.md").read_text()
    assert text == note.path.read_text()
    assert "Commit abc1234. Command: `make gpu-bench`" in text and "GPU: ?, ?, driver ?" in text
    assert text.count("**Not whole: ended with status 1: no CUDA**") == 2
    assert seen[0] == 60 and seen[1] == 60 and 90 < seen[2] <= 100


def test_the_sections_fit_a_command_of_ten_minutes():
    """The time limits of all sections together fit in ten minutes."""
    assert gpu.SECONDS + gpu.STOP_S + 30 < 600
    assert next(iter(gpu.SECTIONS)) == "ceilings" and all(one.limit_s <= 150 for one in gpu.SECTIONS.values())


def test_ceilings_travel_between_sections(tmp_path):
    """Measured ceilings are written to a file and read back equal."""
    roof = Ceilings(3e12, 7e14, 5.5e10, 5.4e10)
    roof.write(tmp_path / "c.json")
    assert Ceilings.read(tmp_path / "c.json") == roof


def test_prompts_run_from_where_the_cache_ends():
    """Prompts are run in chunks from the end of their cached prefix."""
    plans = list(gpu_parts.prompt_rows(list(range(100)), tuple(range(7)), 40, 32))
    assert [(one.rows[0].start, one.rows[0].end) for one in plans] == [(32, 72), (72, 100)]
    assert [one.rows[0].sample is None for one in plans] == [True, False]


# ---- every section, with all that is CUDA's played by the stand-ins -----------------------------------------------


@pytest.fixture
def played(monkeypatch):
    """Sections run on the CPU in this process with tiny models; workers are threads that open the same memory."""
    cupy, cpu, library = fake_cupy(), torch.device("cpu"), fake_flashinfer
    tiny = {"1b": (2, 64, 128, 4, 2, 64, 256), "8b": (2, 128, 256, 4, 1, 128, 256)}
    for module in (gpu_parts, gpu_compute):
        monkeypatch.setattr(module, "DEVICE", cpu)
        monkeypatch.setattr(module, "load_flashinfer", lambda capability, spec: library)
        monkeypatch.setattr(module, "CudaGraphs", lambda device: library.Replays())
    for module in (gpu_compute, gpu_moving):
        monkeypatch.setattr(module, "host_s", lambda run, rounds=1: (run(), 0.5)[1])
    monkeypatch.setattr(gpu_compute, "device_s", lambda run, rounds=1: (run(), 0.5)[1])
    monkeypatch.setattr(gpu_parts, "SHAPES", tiny)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (gpu_parts.KEPT_FREE + 30 * (16 << 10), 1 << 40)
    )
    monkeypatch.setattr(gpu_memory, "load_runtime", lambda: cupy)
    small = {
        gpu_compute: {"LAYERS": 1, "STEPS": 6, "ATTENDED": ((1, 32), (2, 32)), "BATCHES": (1, 3), "CONTEXTS": (20, 200), "PROMPTS": (24, 40),
                      "ALIKE": ((3, 32), (2, 16)), "OWN": 20},
        gpu_moving: {"HANDED": (20, 40), "SHARED": (2, 20), "RUNS": (1, 4), "SWAPPED": 1 << 20, "PROMPT": 64,
                     "HANDED_OVER": gpu_parts.spec_of("1b"), "_with_workers": in_threads},
    }  # fmt: skip
    for module, values in small.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


async def in_threads(arena, folder, roles) -> list[str]:
    """Run the workers of a section as threads; returns what they report."""
    said = [""] * len(roles)

    def work(number: int, role: str) -> None:
        with torch.inference_mode():
            said[number] = gpu_moving.WORKERS[role](folder)

    async with trio.open_nursery() as nursery:
        await nursery.start(serve_packet, arena.header.encode(), (), folder / "arena.sock")
        async with trio.open_nursery() as workers:
            for number, role in enumerate(roles):
                workers.start_soon(trio.to_thread.run_sync, work, number, role)
        nursery.cancel_scope.cancel()
    return said


@pytest.mark.parametrize(
    ("name", "count"),
    [("ceilings", 4), ("attention", 3), ("steps-1b", 6), ("steps-8b", 6), ("alike", 4), ("handoff", 2), ("swap", 8), ("shared", 1),
     ("ttft-1b", 11), ("ttft-8b", 11)],
)  # fmt: skip
def test_every_section_runs_to_its_end(played, name, count):
    """Every section runs to its end and gives its figures, or says which did not fit in memory."""
    with torch.inference_mode():
        figures = list(gpu.SECTIONS[name].run(Ceilings(3e12, 7e14, 5.5e10, 5.4e10)))
    assert len(figures) == count and all(gpu.row(one) for one in figures)
    missing = [one.what for one in figures if one.value is None]
    # 30 pages were free.
    assert missing == ([f"{name[-2:]} decode step, 3 rows of 200 tokens"] if name.startswith("steps") else [])


def test_a_figure_that_fails_costs_no_other(played, tmp_path, monkeypatch):
    """If it failed, a batch that is too large would cost all that is measured after it, prefill among it."""
    real = gpu_compute.decode_s

    def decode_s(engine, batch, context, *more, **how) -> float:
        if batch == 1:
            raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")
        return real(engine, batch, context, *more, **how)

    monkeypatch.setattr(gpu_compute, "decode_s", decode_s)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    Ceilings(3e12, 7e14, 5.5e10, 5.4e10).write(tmp_path / "ceilings.json")
    with torch.inference_mode(), pytest.raises(SystemExit, match="2 figures could not be measured"):
        gpu.run_section("steps-8b", tmp_path)
    found = gpu._figures(tmp_path / "steps-8b.jsonl")
    assert (
        len(found) == 6
        and [one.note for one in found if one.note.startswith("failed")]
        == ["failed: RuntimeError: CUDA error: out of memory"] * 2
    )
    assert all(one.value is not None for one in found if "prefill" in one.what)


def test_sections_are_compared_with_a_data_sheet_if_the_ceilings_failed(played):
    """If it failed, a trouble with the link to the host would leave nothing measured."""
    with torch.inference_mode():
        first, *figures = gpu.figures_of("ttft-1b", None)
    assert "data sheet" in first.what and len(figures) == 11


def test_what_was_handed_over_before_a_failure_is_kept(played, monkeypatch):
    """If it failed, the longest context's trouble would be that of all."""
    real = gpu_moving.hand_over

    def hand_over(*given):
        yield next(real(*given))
        given[1].send(b"")
        raise RuntimeError("no room")

    monkeypatch.setattr(gpu_moving, "hand_over", hand_over)
    found = []
    with torch.inference_mode(), pytest.raises(ExceptionGroup):
        found.extend(gpu.SECTIONS["handoff"].run(gpu_parts.ASSUMED))  # a list keeps what came before
    assert [one.what for one in found] == ["handoff of 20 tokens, 2 pages"]


def test_each_sections_output_comes_back_from_a_lent_machine(tmp_path, monkeypatch):
    """If it failed, all that is known of a section's failure would be its last line."""
    (tmp_path / "swap.err").write_text("a\nwhy\n")
    gpu.keep_output("swap", tmp_path / "swap.err")  # without a place to keep it
    monkeypatch.setenv("OUT", str(tmp_path))
    for name in ("swap", "shared"):
        gpu.keep_output(name, tmp_path / f"{name}.err")
    assert (tmp_path / "gpu-bench.log").read_text() == "==== swap\na\nwhy\n\n"


def test_where_the_demo_model_is_not_there_a_random_one_is_served(tmp_path):
    """If it failed, a GPU machine without a network would have no test and no figure of a served model."""
    folder = random_model.save(tmp_path / "m", layers=2, hidden=192, intermediate=256, vocab=3000)
    files = prepare(folder, "bfloat16", tmp_path / "cache")
    assert (files.spec.heads, files.spec.kv_heads, files.spec.head_dim, files.spec.vocab) == (3, 1, 64, 3000)
    tokenizer = Tokenizer.load(files.tokenizer)
    ids = tokenizer.encode(" time year people", allow_special=False)
    assert len(ids) == 3 and tokenizer.decode(ids) == " time year people"
    exact = Exact.of(folder)
    runner = Runner(files.spec, {key: one.float() for key, one in map_weights(files.weights).items()})
    pages, answer = runner.pages(40), list[int]()
    start = prompt(20, 1, 3000)
    for at in range(20):
        rows = start if not at else answer[-1:]
        (logits,) = runner.step(Row(pack(rows), 20 + at - len(rows) if at else 0, pages, Sampling(0.0)))
        answer.append(int(logits.argmax()))
    exact.check(start, answer)
    assert 2 < float(logits.std()) < 8 and len(set(answer)) > 10
    with pytest.raises(AssertionError):
        exact.check(start, answer[::-1])
