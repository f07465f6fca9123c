"""The CUDA engine on CPU tensors, with FlashInfer's calls computed by torch: all of it but the kernels and the GPU."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from types import FunctionType, SimpleNamespace

import attrs
import numpy as np
import pytest
import torch
import trio
from torch.multiprocessing.reductions import StorageWeakRef

import fake_flashinfer
from adjustments import adjustments, expected, past_of
from backends import SPEC, FlashRunner
from fake_cupy import fake_cupy
from fake_flashinfer import Replays
from families import TINY, VOCAB, save_hf
from memserve.drawing import Sampling
from memserve.engine import cuda
from memserve.engine.calibration import measure
from memserve.engine.cpu_budget import Cores
from memserve.engine.cuda import CudaEngine
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.sampling import ELSEWHERE, draw, draws
from memserve.engine.weights import ModelFiles, map_weights, prepare, random_weights, save_weights
from memserve.identity import ActorId
from memserve.kernels import flashinfer_kit, gpu_memory
from memserve.kernels.arena import serve_packet
from memserve.kernels.flashinfer_kit import (
    FlashInferAttention,
    prefill_backend,
    with_tensor_cores,
)
from memserve.kernels.flashinfer_ops import FlashInferOps
from memserve.kernels.page_tables import Table
from memserve.scheduling.cost_model import CostModel
from memserve.settings.gpu_room import worker_bytes
from memserve.settings.sections import BatchConfig
from memserve.tokens import pack, pages_for
from test_model import GREEDY, Runner, prompt, tiny_spec

PAGES, PAGE_TOKENS = 96, 16
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A function that loads a model of a family in float32."""
    place = tmp_path_factory.mktemp("models")

    @cache
    def loaded(name: str):
        files = prepare(save_hf(name, place / name), "float32", place / "cache")
        return files.spec, map_weights(files.weights)

    return loaded


@pytest.mark.parametrize("name", TINY)
def test_every_family_gives_the_logits_of_the_cpu(load, name):
    """For every model family the engine's logits are those of the torch model on the CPU, within a sliding window."""
    spec, weights = load(name)
    ids = prompt(min(90, spec.full_context), len(name), VOCAB)
    ours, theirs = FlashRunner(spec, weights), Runner(spec, weights)
    ours_pages, their_pages = ours.pages(len(ids)), theirs.pages(len(ids))
    for a, b in pairwise([0, *(cut for cut in (33, 65, *range(66, 90)) if cut < len(ids)), len(ids)]):
        part = pack(ids[a:b])
        found = ours.step(Row(part, a, ours_pages, GREEDY))
        assert float((found - theirs.step(Row(part, a, their_pages, GREEDY))).abs().max()) < 1e-4


def test_bfloat16_stays_near_float32():
    """Logits of the engine in bfloat16 differ from those in float32 by rounding errors only."""
    spec = attrs.evolve(tiny_spec(4, 2, 64), layers=6)
    weights = random_weights(spec, "bfloat16", 2)
    exact = {name: tensor.float() for name, tensor in weights.items()}
    row = pack(prompt(60, 9))
    rough = FlashRunner(spec, weights, torch.bfloat16)
    fine = Runner(spec, exact)
    rough_logits = rough.step(Row(row, 0, rough.pages(60), GREEDY))
    fine_logits = fine.step(Row(row, 0, fine.pages(60), GREEDY))
    assert float((rough_logits - fine_logits).norm() / fine_logits.norm()) < 0.03


# ---- the engine ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """A random model and its weights."""
    spec = tiny_spec(6, 2, 16)
    return spec, random_weights(spec, "float32", 3)


def make_engine(tiny, rows: int = 8, shared: Cores | None = None) -> tuple[CudaEngine, torch.Tensor, Replays]:
    """An engine over an arena that is filled with NaN."""
    spec, weights = tiny
    arena = torch.full((PAGES + 1, *spec.page_shape(PAGE_TOKENS)), float("nan"))
    graphs = Replays()
    engine = CudaEngine(
        spec, weights, arena, fake_flashinfer, graphs, rows=rows, backend="fa3", shared=shared
    )
    return engine, arena, graphs


def test_warming_up_touches_no_page_of_the_pool(tiny):
    """Warming up captures its graphs without writing to a page of the pool, which other requests may hold."""
    engine, arena, graphs = make_engine(tiny)
    engine.warm_up()
    assert bool(arena[:PAGES].isnan().all())
    assert graphs.captured == len([1, 2, 4, 8])
    engine.close()


def reached_from(value: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """The tensors that a closure refers to, directly or through our own objects."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    inner: Iterable[object] = ()
    if isinstance(value, FunctionType):
        inner = [cell.cell_contents for cell in value.__closure__ or ()]
    elif isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, list | tuple):
        inner = value
    elif type(value).__module__.startswith(("memserve", "fake_flashinfer")):
        names = {name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())}
        inner = [
            getattr(value, name) for name in {*names, *getattr(value, "__dict__", ())} if hasattr(value, name)
        ]
    for one in inner:
        yield from reached_from(one, seen)


class Forgetful(Replays):
    """Graphs that keep, like a GPU's, none of the tensors that a capture used."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[StorageWeakRef] = []

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        self.given += [StorageWeakRef(tensor.untyped_storage()) for tensor in reached_from(run, set())]
        return lambda: None


def test_captured_tensors_live_as_long_as_their_graph(tiny):
    """Tensors that a captured graph uses are kept alive: otherwise torch would reuse their memory."""
    spec, weights = tiny
    arena, graphs = torch.zeros(PAGES + 1, *spec.page_shape(PAGE_TOKENS)), Forgetful()
    engine = CudaEngine(spec, weights, arena, fake_flashinfer, graphs, rows=8, backend="fa3")
    engine.warm_up()
    gc.collect()
    assert len(graphs.given) > len(weights) and not any(one.expired() for one in graphs.given)
    engine.close()


def test_calibration_writes_no_page_of_the_pool_and_draws_nothing(tiny):
    """Calibration writes to no page of the pool and does not fail on the NaN of unused pages."""
    engine, arena, _ = make_engine(tiny)
    engine.warm_up()
    arena[: PAGES // 2] = 0.5
    before = arena[:PAGES].clone()
    run = engine.timer(8, 512)
    shapes = [((1, 16),), ((1, 511),) * 8, ((40, 0),), ((16, 240), (1, 100), (1, 100)), ((1, 5),) * 3]
    assert all(run(one)[0] > 0 and run(one)[1] == 1 for one in shapes)
    assert torch.equal(arena[:PAGES].nan_to_num(7.0), before.nan_to_num(7.0))
    costs, _ = measure(run, 64, 8, 512, 1024)
    assert costs.dense[0][0] == 1 and CostModel(costs).step_s(((40, 0), (1, 100))) > 0
    engine.close()


ENDS = (3, 9)
HOWS = [
    Sampling(temperature=0.0, adjust=adjustments(repetition=1.3, frequency=0.4, min_tokens=5)),
    Sampling(temperature=0.9, seed=5, min_p=0.02),
    Sampling(temperature=1.3, top_k=20, seed=6, adjust=adjustments({4: 3.0}, presence=0.6, frequency=-0.1)),
    GREEDY,
    Sampling(temperature=1.1, top_p=0.8, seed=7),
    Sampling(temperature=0.7, top_k=1, adjust=adjustments(presence=1.5)),
]


def drive(engine, spec, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Run sequences that prefill in chunks, decode together, join and leave; their draws, and all of their tokens."""
    chance = random.Random(seed)
    free = list(range(PAGES))
    chance.shuffle(free)
    prompts = [prompt(length, length, spec.vocab) for length in (1, 30, 16, 47, 5, 64)]
    ends = [len(ids) + 14 + 5 * i for i, ids in enumerate(prompts)]
    tables = [tuple(free.pop() for _ in range(pages_for(end + 1, PAGE_TOKENS))) for end in ends]
    sequences, ran = [list(ids) for ids in prompts], [0] * len(prompts)
    step = 0
    while any(len(tokens) < end for tokens, end in zip(sequences, ends, strict=True)):
        turns = [i for i in range(len(prompts)) if len(sequences[i]) < ends[i] and step >= 3 * i]
        rows = []
        for i in turns:
            part = sequences[i][ran[i] : ran[i] + 20]
            ran[i] += len(part)
            used = pages_for(ran[i] + (step % 3 > 0), PAGE_TOKENS)  # sometimes the next page is not there yet
            rows.append(
                Row(
                    pack(part),
                    ran[i] - len(part),
                    tables[i][:used],
                    how := HOWS[i] if ran[i] == len(sequences[i]) else None,
                    past_of(how, sequences[i], len(prompts[i]), ENDS),
                )
            )
        result = engine.run(BatchPlan(tuple(rows)))
        for i, row, token in zip(turns, rows, result.tokens, strict=True):
            assert (token is None) == (row.sample is None)
            if token is not None:
                sequences[i].append(token)
        step += 1
    return [tokens[len(ids) :] for tokens, ids in zip(sequences, prompts, strict=True)], sequences


def check_by_the_torch_model(spec, weights, drawn, sequences) -> None:
    """Check that what ``drive`` returned are the torch model's tokens."""
    for tokens, whole, how in zip(drawn, sequences, HOWS, strict=True):
        runner = Runner(spec, weights)
        pages, first = runner.pages(len(whole)), len(whole) - len(tokens)
        for at in range(first, len(whole)):
            start = 0 if at == first else at - 1
            row = Row(pack(whole[start:at]), start, pages, how, past_of(how, whole[:at], first, ENDS))
            assert expected(runner.step(row)[0], row) == whole[at]


@pytest.mark.parametrize("seed", range(3))
def test_whole_conversations_give_the_tokens_of_the_torch_model(tiny, seed):
    """With captured steps, steps that are planned ahead and batched draws, tokens are those of the torch model."""
    spec, weights = tiny
    engine, _, graphs = make_engine(tiny)
    engine.warm_up()
    drawn, sequences = drive(engine, spec, seed)
    assert graphs.log.count("replay") > 20
    check_by_the_torch_model(spec, weights, drawn, sequences)


def test_workers_of_one_gpu_see_one_another_at_work(tiny, tmp_path):
    """A step reports how many workers share the GPU at the time, so that their share is not taken for drift."""
    ours, (other, _, _) = (
        Cores(tmp_path / "gpu", 1, 1),
        make_engine(tiny, shared=Cores(tmp_path / "gpu", 1, 1)),
    )
    engine, _, _ = make_engine(tiny, shared=ours)
    plan = BatchPlan((Row(pack([5, 6]), 0, (3,), GREEDY),))
    assert engine.run(plan).neighbours == 0
    assert other.run(plan).neighbours == 1
    assert engine.run(plan).neighbours == 1
    other.rest()
    assert engine.run(plan).neighbours == 0


def test_the_next_decode_step_is_planned_while_this_one_runs(tiny, monkeypatch):
    """While a decode step runs the next is planned, with the right tables; another row is planned again."""
    engine, _, _ = make_engine(tiny)
    engine.warm_up()
    loads = []
    real = fake_flashinfer.BatchDecodeWithPagedKVCacheWrapper.plan
    monkeypatch.setattr(
        fake_flashinfer.BatchDecodeWithPagedKVCacheWrapper,
        "plan",
        lambda self, **given: (loads.append(given["last_page_len"].tolist()), real(self, **given))[1],
    )
    row = Row(pack([5]), 0, (3, 4), GREEDY)
    for position in range(20):
        engine.run(BatchPlan((attrs.evolve(row, start=position),)))
    # One plan for the first step, then each ahead of its step.
    assert [one[0] for one in loads] == [i % 16 + 1 for i in range(21)]
    loads.clear()
    engine.run(BatchPlan((Row(pack([5]), 7, (3,), GREEDY),)))  # another row: planned again, and then ahead
    assert [one[0] for one in loads] == [8, 9]


def test_a_step_that_draws_nothing_is_waited_for(tiny):
    """The engine waits for a step that draws nothing: its pages must be written before others read them."""
    engine, _, graphs = make_engine(tiny)
    engine.warm_up()
    for row in (Row(pack([1]), 15, (0,), None), Row(pack([1, 2]), 0, (0,), None)):
        graphs.log.clear()
        engine.run(BatchPlan((row,)))
        assert graphs.log[-1] == "wait"


@pytest.mark.parametrize("heads", [32, 64])
def test_the_workspace_holds_the_parts_of_the_largest_captured_batch(heads):
    """The workspace is large enough for the largest captured batch; with less, FlashInfer fails with "Buffer overflow"."""
    arena = torch.zeros(4, 1, 2, 8, 16, 128, dtype=torch.bfloat16)
    attention = FlashInferAttention(fake_flashinfer, arena, heads, "fa2", 1024)
    table = Table.of((), 16).padded(1024, 3)
    attention.captured(1024, 4096).load(table, np.zeros(1024, np.int32))
    small = FlashInferAttention(fake_flashinfer, arena, heads, "fa2", 8)
    with pytest.raises(AssertionError, match="Buffer overflow"):
        small.captured(1024, 4096).load(table, np.zeros(1024, np.int32))


@pytest.mark.parametrize("bias", [False, True])
def test_tables_of_long_contexts_are_planned_for(bias):
    """If it failed, a worker of a model for a million tokens would take 1.5 GiB that others were promised."""

    def taken(context: int) -> tuple[int, int]:
        spec = attrs.evolve(tiny_spec(4, 2, 64), max_context=context, qkv_bias=bias)
        ops = FlashInferOps(fake_flashinfer, spec, torch.bfloat16, CPU)
        tables = [one for one in vars(ops).values() if isinstance(one, torch.Tensor)]
        return sum(one.nbytes for one in tables), worker_bytes(spec, BatchConfig())

    (short, planned), (long, more) = taken(1024), taken(65536)
    assert 0 < long - short <= more - planned


def test_not_a_number_names_the_row(tiny):
    """Logits that are not a number raise an error that names the row, instead of giving token 0."""
    engine, _, _ = make_engine(tiny)
    engine.warm_up()
    good, bad = Row(pack([1]), 0, (0,), GREEDY), Row(pack([1]), 5, (1,), GREEDY)  # page 1 was never written
    with pytest.raises(FloatingPointError, match="row 1: the largest logit is nan"):
        engine.run(BatchPlan((good, bad)))
    with pytest.raises(FloatingPointError, match="row 0: the largest logit is nan"):
        engine.run(BatchPlan((bad, Row(pack([1, 2]), 0, (2,), GREEDY))))


def test_plans_are_checked_and_the_scratch_page_is_nobodys(tiny):
    """Page numbers beyond the pool are refused, also that of the engine's own scratch page."""
    engine, _, _ = make_engine(tiny)
    with pytest.raises(ValueError, match=f"the arena has 0 to {PAGES - 1}"):
        engine.run(BatchPlan((Row(pack([1]), 0, (PAGES,), GREEDY),)))


def test_draws_together_are_the_draws_one_by_one():
    """Draws of a whole batch equal the draws of the CPU one by one, or are left to the CPU."""
    generator = torch.Generator().manual_seed(4)
    chance = random.Random(9)
    for vocab in (7, 100, 257, 3000):
        for sharpness in (0.05, 1.0, 6.0):
            logits = sharpness * torch.randn(24, vocab, generator=generator)
            logits[::3] = logits[::3].round()  # ties
            settings = [
                Sampling(
                    temperature=chance.choice([0.0, 0.3, 1.0, 2.0]), top_k=chance.choice([0, 0, 1, 2, 40, 300, 5000]),
                    top_p=chance.choice([1.0, 0.05, 0.5, 0.95]), seed=chance.randrange(1 << 63),
                    min_p=chance.choice([0.0, 0.0, 0.05, 0.6]) * (sharpness > 1),
                )
                for _ in range(24)
            ]  # fmt: skip
            positions = [chance.randrange(10**6) for _ in range(24)]
            found, exact = draws(logits, settings, positions).tolist(), draw(logits, settings, positions)
            here = [one for one in zip(found, exact, strict=True) if one[0] != ELSEWHERE]
            assert all(token == drawn for token, drawn in here) and len(here) > (12 if sharpness > 1 else 0)


def test_kernels_are_chosen_by_the_device_and_the_head_groups():
    """fa3 is used on Hopper GPUs only, and tensor cores for decode only from groups of 4 heads."""
    assert [prefill_backend(one) for one in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))] == [
        "fa2",
        "fa2",
        "fa3",
        "fa2",
        "fa2",
    ]
    assert [group for group in range(1, 17) if not with_tensor_cores(group)] == [1, 2, 3]


def test_kernels_count_as_compiled_only_when_each_kind_is_there(tmp_path, monkeypatch):
    """Kernels count as compiled only if every library that the model needs is there: the others must be compiled first."""
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.6.9")
    # Decode by fa2's kernels, or by those of its own beside fa2's for what rows have in common.
    assert len(flashinfer_kit.libraries(tiny_spec(4, 2, 64), "fa3")) == 8
    needed = flashinfer_kit.libraries(tiny_spec(4, 1, 64), "fa3")
    assert len(needed) == 7 and sum(name.endswith("_sm90") for name in needed) == 1
    for name in sorted(needed):
        assert not flashinfer_kit.compiled_ahead(needed)
        folder = tmp_path / "data" / "aot" / name
        folder.mkdir(parents=True)
        (folder / f"{name}.so").touch()
    assert flashinfer_kit.compiled_ahead(needed)
    # The same kinds of another head size: those of prefill and decode are missing.
    assert not flashinfer_kit.compiled_ahead(flashinfer_kit.libraries(tiny_spec(4, 1, 128), "fa3"))
    # 0.7 looks for other names, so it must stay free to compile.
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.7.2")
    assert not flashinfer_kit.compiled_ahead(needed)


# ---- how a worker comes by its engine ---------------------------------------------------------------------------


@pytest.fixture
def played(monkeypatch):
    """A GPU of 4 GB whose memory is the host's; the second value records calls of torch that set something."""
    cupy, settings = fake_cupy(), {}
    monkeypatch.setattr(gpu_memory, "load_runtime", lambda: cupy)
    monkeypatch.setattr(cuda, "CudaGraphs", lambda device: Replays())
    monkeypatch.setattr(cuda, "load_flashinfer", lambda capability, spec: fake_flashinfer)
    properties = SimpleNamespace(total_memory=4 << 30, multi_processor_count=132)
    for name, answer in (("get_device_capability", (9, 0)), ("get_device_properties", properties)):
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    for name in ("init", "set_device", "set_per_process_memory_fraction"):
        monkeypatch.setattr(torch.cuda, name, lambda *given, name=name: settings.update({name: given}))
    return cupy, settings


async def test_a_worker_opens_its_shards_pages_and_weights(played, tmp_path, folder):
    """A worker runs on the pages and weights of its shard, within its share of the GPU's memory."""
    cupy, settings = played
    weights = random_weights(SPEC, "bfloat16", 5)
    save_weights(weights, tmp_path / "w")
    files = ModelFiles(SPEC, tmp_path / "w", tmp_path / "tokenizer.json")
    page_bytes = SPEC.page_bytes(PAGE_TOKENS, "bfloat16")
    shard = gpu_memory.GpuArena.create(ActorId("g0.00000001"), 0, 20, page_bytes, files.weights, cupy)
    resolved = SimpleNamespace(
        gpu_worker_bytes=1 << 30, page_bytes=page_bytes, max_context=320,
        config=SimpleNamespace(
            pool=SimpleNamespace(page_tokens=PAGE_TOKENS), model=SimpleNamespace(dtype="bfloat16"),
            batch=SimpleNamespace(rows=2),
        ),
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_packet, shard.header.encode(), (), folder / "a.sock")
        engine = await trio.to_thread.run_sync(cuda.open_engine, resolved, files, folder / "a.sock", 0)
        nursery.cancel_scope.cancel()
    where = torch.device("cuda", 0)
    assert settings == {"init": (), "set_device": (where,), "set_per_process_memory_fraction": (0.25, where)}
    ids, pages = prompt(40, 3, SPEC.vocab), (4, 7, 1)
    (token,) = engine.run(BatchPlan((Row(pack(ids), 0, pages, GREEDY),))).tokens
    exact = Runner(SPEC, {name: one.float() for name, one in weights.items()})
    (logits,) = exact.step(Row(pack(ids), 0, exact.pages(40), GREEDY))
    assert token is not None and float(logits.max() - logits[token]) < 0.4
    mine = cuda.pages_of(shard, SPEC, PAGE_TOKENS, torch.bfloat16)
    assert [bool(mine[page].isnan().any()) for page in pages[:2]] == [
        False,
        False,
    ]  # written in the shard's memory
    assert bool(mine[5].isnan().all())
    engine.close()
    assert not cupy.cuda.runtime.opened
