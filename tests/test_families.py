"""Every model family compared with transformers, from a Hugging Face directory and from GGUF, and in every kind of batch."""

from __future__ import annotations

import math
import mmap
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from families import IN_GGUF, TINY, VOCAB, reference, save_gguf, save_hf
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.runner import CpuEngine
from memserve.engine.spec import ModelSpec
from memserve.engine.weights import map_weights, prepare, save_weights
from memserve.tokens import pack
from test_model import GREEDY, Runner, prompt

PREFILL, DECODED = 70, 64

Loaded = tuple[ModelSpec, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory):
    """A function that loads a model in ``TINY`` through its Hugging Face directory, in float32."""
    place = tmp_path_factory.mktemp("models")

    @cache
    def loaded(name: str) -> Loaded:
        files = prepare(save_hf(name, place / name), "float32", place / "cache")
        return files.spec, map_weights(files.weights)

    return loaded


@cache
def expected(name: str) -> tuple[list[int], torch.Tensor]:
    """Token ids, and transformers' logits for each of them."""
    ids = prompt(PREFILL + DECODED, len(name), VOCAB)
    with torch.inference_mode():
        return ids, reference(name)(torch.tensor([ids])).logits[0]


def distance(loaded: Loaded, name: str, cuts: list[int]) -> float:
    """The largest difference of our logits from transformers' at the ends of the pieces."""
    ids, logits = expected(name)
    runner = Runner(*loaded)
    pages = runner.pages(len(ids))
    return max(
        float((runner.step(Row(pack(ids[a:b]), a, pages, GREEDY))[0] - logits[b - 1]).abs().max())
        for a, b in pairwise(cuts)
    )


@pytest.mark.parametrize("name", TINY)
def test_prefill_and_cached_decode_equal_transformers(load, name: str) -> None:
    """Logits of prefill, chunks and cached decode equal transformers' for every family."""
    assert distance(load(name), name, [0, PREFILL, *range(PREFILL + 1, PREFILL + DECODED + 1)]) < 1e-4
    assert distance(load(name), name, [0, 33, 65, PREFILL + DECODED]) < 1e-4


def test_the_tiny_models_differ_as_they_should(load) -> None:
    """The tiny models together have every feature that the families differ in."""
    specs = {name: load(name)[0] for name in TINY}

    assert {spec.head_dim for spec in specs.values()} >= {32, 64, 128, 256}
    assert {spec.heads // spec.kv_heads for spec in specs.values()} == {1, 2, 3, 4}
    assert specs["qwen2"].qkv_bias and specs["qwen2"].tied_embeddings
    assert specs["qwen3"].qk_norm and specs["qwen3"].head_dim * specs["qwen3"].heads != specs["qwen3"].hidden
    assert specs["linear"].rope_factors == (4.0,) * 16
    yarn = specs["yarn"].rope_factors
    assert yarn is not None and specs["yarn"].rope_scale == pytest.approx(1 + 0.1 * math.log(4))
    assert yarn[0] == 1.0 and yarn[-1] == pytest.approx(4.0) and any(1 < factor < 4 for factor in yarn)
    factors = specs["llama3"].rope_factors
    assert factors is not None
    assert factors[0] == 1.0 and factors[-1] == 8.0 and any(1 < factor < 8 for factor in factors)
    mistral, windows = specs["mistral"], specs["windows"]
    assert mistral.max_context == 512 and mistral.sliding_window == 37 and mistral.local_layers == (0, 1)
    assert windows.sliding_window == 20 and windows.local_layers == (1,)
    assert specs["qwen3"].sliding_window is None and not specs["qwen3"].local_layers


@pytest.mark.parametrize("name", IN_GGUF)
def test_gguf_is_the_same_model(load, tmp_path: Path, name: str) -> None:
    """A model has the same weights and logits from GGUF as from its Hugging Face directory."""
    spec, weights = load(name)
    files = prepare(save_gguf(name, spec, tmp_path / f"{name}.gguf"), "float32", tmp_path / "cache")
    found = map_weights(files.weights)

    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in weights)
    assert files.spec.local_layers == spec.local_layers
    assert distance((files.spec, found), name, [0, 40, 41]) < 1e-4


@pytest.mark.parametrize("name", TINY)
def test_chunks_pages_and_company_change_no_token(load, name: str) -> None:
    """Tokens do not depend on chunks, page sizes or other rows of the batch."""
    model, new = load(name), 6
    prompts = [prompt(length, length, VOCAB) for length in (3, 17, 64, 41)]
    alone = [Runner(*model).generate(ids, new) for ids in prompts]
    with torch.inference_mode():
        whole = reference(name).generate(
            torch.tensor(prompts[2:3]), attention_mask=torch.ones(1, 64), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    assert whole[0, 64:].tolist() == alone[2]
    for page_tokens, chunk in ((8, 5), (16, 16), (32, 50)):
        runner = Runner(*model, page_tokens=page_tokens, seed=chunk)
        assert runner.generate(prompts[2], new, chunk) == alone[2]
        assert in_company(Runner(*model, page_tokens=page_tokens), prompts, new, chunk) == alone


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", TINY)
def test_every_family_serves_in_bfloat16(load, tmp_path: Path, name: str, native: bool) -> None:
    """Every family serves in bfloat16, with the native step and with torch, and draws nearly the best token."""
    spec, weights = load(name)
    rounded = {key: one.bfloat16() if one.ndim > 1 else one for key, one in weights.items()}
    save_weights(rounded, tmp_path / "w")
    ids, logits = expected(name)
    arena = mmap.mmap(-1, 16 * spec.page_bytes(16, "bfloat16"))
    engine = CpuEngine(spec, tmp_path / "w", arena, 16, 16, "bfloat16", native=native)
    for length in (1, 40, PREFILL + DECODED):
        row = Row(pack(ids[:length]), 0, tuple(range(9)), GREEDY)
        (token,) = engine.run(BatchPlan((row,))).tokens
        assert token is not None
        assert float(logits[length - 1].max() - logits[length - 1, token]) < 0.2
    engine.close()


def in_company(runner: Runner, prompts: list[list[int]], new: int, chunk: int) -> list[list[int]]:
    """Greedy tokens of all prompts, run in the same steps: chunks first, then token by token."""
    tables = [runner.pages(len(ids) + new) for ids in prompts]
    texts, ran = [list(ids) for ids in prompts], [0] * len(prompts)
    while busy := [i for i, ids in enumerate(prompts) if len(texts[i]) < len(ids) + new]:
        rows = []
        for i in busy:
            part = texts[i][ran[i] : ran[i] + chunk]
            whole = ran[i] + len(part) == len(texts[i])
            rows.append(Row(pack(part), ran[i], tables[i], GREEDY if whole else None))
            ran[i] += len(part)
        logits = iter(runner.step(*rows))
        for i, row in zip(busy, rows, strict=True):
            if row.sample is not None:
                texts[i].append(int(next(logits).argmax()))
    return [text[len(ids) :] for text, ids in zip(texts, prompts, strict=True)]
