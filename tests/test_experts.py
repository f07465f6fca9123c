"""Mixtures of experts: what their files say, their conversion, and the engines in torch. See ``test_native_experts.py``, too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import fake_flashinfer
import gpu_rehearsal
from fake_flashinfer import Replays
from families import VOCAB, save_gguf, save_hf
from memserve.engine.checkpoint import open_checkpoint, read_spec
from memserve.engine.convert import SCALE, conversion, weight_shapes
from memserve.engine.cuda import CudaEngine
from memserve.engine.gguf import read_gguf
from memserve.engine.model import Layer
from memserve.engine.ops import Ops, TorchOps, chosen_experts
from memserve.engine.plans import Row
from memserve.engine.spec import ModelSpec
from memserve.engine.weights import in_rows, in_tiles, map_bits, map_weights, prepare, random_weights
from memserve.errors import UserError
from memserve.kernels.flashinfer_ops import FlashInferOps
from memserve.settings.gpu_room import worker_bytes
from memserve.settings.sections import BatchConfig
from memserve.tokens import pack
from test_cuda_engine import PAGE_TOKENS, PAGES, check_by_the_torch_model, drive
from test_gguf import LLAMA, write_gguf
from test_hf import change
from test_model import GREEDY, Runner, prompt, tiny_spec, widened

MIXTURES = ("qwen3_moe", "mixtral")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model of each family with experts, as a Hugging Face directory."""
    place = tmp_path_factory.mktemp("mixtures")
    return {name: save_hf(name, place / name) for name in MIXTURES}


@pytest.fixture
def folder(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny Qwen3-MoE that a test may change."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in saved["qwen3_moe"].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


# ---- files ----------------------------------------------------------------------------------------------------


def test_what_the_files_say_is_the_spec(saved: dict[str, Path], folder: Path) -> None:
    """Experts are counted and their weights normed as the family does it, by old and new names of the keys."""
    qwen, mixtral = (read_spec(saved[name]) for name in MIXTURES)
    assert (qwen.experts, qwen.experts_used, qwen.intermediate, qwen.experts_normed) == (12, 3, 64, True)
    assert (mixtral.experts, mixtral.experts_used, mixtral.intermediate) == (4, 2, 160)
    assert mixtral.experts_normed and mixtral.architecture == "mixtral" and not mixtral.qk_norm
    config = folder / "config.json"
    assert read_spec(change(config, num_local_experts=..., num_experts=12)) == attrs.evolve(qwen, name="copy")
    assert not read_spec(change(config, norm_topk_prob=False)).experts_normed
    assert not read_spec(change(config, norm_topk_prob=...)).experts_normed  # as transformers assumes


def test_weights_that_are_not_normed_are_transformers(folder: Path, tmp_path: Path) -> None:
    """A model whose experts' weights are not divided by their sum has the logits that transformers computes."""
    from transformers import AutoModelForCausalLM

    change(folder / "config.json", norm_topk_prob=False)
    ids = prompt(60, 3, VOCAB)
    with torch.inference_mode():
        exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[
            0
        ]
    files = prepare(folder, "float32", tmp_path / "cache")
    runner = Runner(files.spec, map_weights(files.weights))
    found = runner.step(Row(pack(ids), 0, runner.pages(60), GREEDY))[0]
    assert not files.spec.experts_normed
    assert float((found - exact[-1]).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"mlp_only_layers": [1]}, "mlp_only_layers is [1], expected []: layers without experts"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2, expected 1"),
        ({"n_shared_experts": 1}, "shared experts are not supported"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid', expected 'softmax'"),
        ({"routed_scaling_factor": 2.5}, "scaled weights of experts"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false, got 'yes'"),
        ({"num_experts_per_tok": 13}, "13 experts for each token, but a layer has 12"),
        ({"num_experts_per_tok": ...}, "num_experts_per_tok must be a positive integer, but is missing"),
        ({"num_local_experts": ...}, "num_local_experts must be a positive integer, but is missing"),
    ],
)
def test_variants_are_refused_by_key(folder: Path, keys: dict[str, Any], said: str) -> None:
    """A mixture of another kind would run but answer nonsense."""
    change(folder / "config.json", **keys)
    with pytest.raises(UserError, match=re.escape(said)):
        read_spec(folder)


def test_other_tensors_of_experts_are_refused(folder: Path, tmp_path: Path) -> None:
    """Shared experts, biases and experts that are missing are refused, and so are those in one tensor, with a remedy."""
    tensors = load_file(folder / "model.safetensors")
    layer = "model.layers.1.mlp."
    shared = tensors | {layer + "shared_expert.gate_proj.weight": np.zeros((64, 96), np.float32)}
    save_file(shared, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"not part of a qwen3_moe model.*shared_expert"):
        prepare(folder, "float32", tmp_path / "cache")
    save_file(
        {name: one for name, one in tensors.items() if "experts.11.up" not in name},
        folder / "model.safetensors",
    )
    with pytest.raises(UserError, match=r"missing: model\.layers\.0\.mlp\.experts\.11\.up_proj"):
        prepare(folder, "float32", tmp_path / "cache")
    save_file(
        {layer + "experts.gate_up_proj": np.zeros((12, 128, 96), np.float32)}, folder / "model.safetensors"
    )
    with pytest.raises(UserError, match=r"gate_up_proj' holds all experts of a layer.*save_pretrained"):
        prepare(folder, "float32", tmp_path / "cache")


@pytest.fixture
def gguf(saved: dict[str, Path], tmp_path: Path) -> Path:
    """The tiny Qwen3-MoE as a GGUF file."""
    return save_gguf("qwen3_moe", read_spec(saved["qwen3_moe"]), tmp_path / "m.gguf")


def rewritten(path: Path, keys: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
    """A GGUF file with other metadata and tensors in place of its own."""
    with read_gguf(path) as file:
        own = {name: (info.type, info.shape, bytes(file.data(info))) for name, info in file.tensors.items()}
        metadata = file.metadata
    return write_gguf(path, metadata | keys, own | (tensors or {}))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("gating_func", 2, "expert_gating_func is 2, expected 1"),
        ("weights_norm", False, "weights of experts that are not normed"),
        ("weights_scale", 2.5, "scaled weights of experts"),
        ("shared_count", 1, "shared experts"),
        ("shared_feed_forward_length", 64, "shared experts"),
        ("group_count", 4, "groups of experts"),
        ("used_count", 13, "13 experts for each token"),
        ("count", 0, "expert_count must be a positive integer, got 0"),
    ],
)
def test_variants_in_gguf_are_refused(gguf: Path, key: str, value: Any, said: str) -> None:
    """A mixture of another kind would run but answer nonsense."""
    with pytest.raises(UserError, match=re.escape(said)):
        read_spec(rewritten(gguf, {f"qwen3moe.expert_{key}": value}))


def test_experts_of_a_family_without_them_are_refused(tmp_path: Path) -> None:
    """A GGUF file of a family that has no experts would lose its router."""
    metadata = {key.replace("llama", "qwen2"): one for key, one in LLAMA.items()}
    metadata |= {"general.architecture": "qwen2", "qwen2.expert_count": 4, "qwen2.expert_used_count": 2}
    with pytest.raises(UserError, match="experts of this family are not supported"):
        read_spec(write_gguf(tmp_path / "m.gguf", metadata))


def test_quantised_experts_of_gguf_are_cut_where_they_end(gguf: Path, tmp_path: Path) -> None:
    """One tensor holds all experts of a layer: each must get its own blocks."""
    generator = np.random.default_rng(1)
    scales = generator.uniform(0.5, 2, (12, 64, 3)).astype(np.float16)
    values = generator.integers(-127, 128, (12, 64, 3, 32), np.int8)
    blocks = np.concatenate([scales.view(np.int8).reshape(12, 64, 3, 2), values], axis=3)
    exact = (scales.astype(np.float32)[..., None] * values).reshape(12, 64, 96)
    rewritten(gguf, {}, {"blk.1.ffn_up_exps.weight": ("Q8_0", (12, 64, 96), blocks.tobytes())})
    found = map_bits(prepare(gguf, "float32", tmp_path / "cache").weights)["1.gate_up"]
    assert np.array_equal(found.reshape(12, 2, 64, 96)[:, 1], exact)


@pytest.mark.parametrize("stored", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_conversion_holds_one_matrix_of_one_expert(saved: dict[str, Path], name: str, stored: str) -> None:
    """A layer's experts may take gigabytes, and must not be in memory several times at once."""
    with open_checkpoint(saved[name]) as model:
        spec = model.spec
        for weight in conversion(model, stored, tiled=True):
            pieces = [piece[0].nbytes for piece in weight.pieces()]
            assert sum(pieces) == weight.tensors[0].nbytes
            if weight.tensors[0].name.endswith(("gate_up", "down")):
                assert len(pieces) == spec.experts * (2 if "gate" in weight.tensors[0].name else 1)


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", MIXTURES)
def test_tiles_hold_the_rows_of_all_experts(
    saved: dict[str, Path], tmp_path: Path, name: str, stored: str
) -> None:
    """Experts in tiles have the values of those in rows; a router is never stored as int8."""
    rows, tiles = (prepare(saved[name], stored, tmp_path, tiled=tiled) for tiled in (False, True))
    expected_bits, found = map_bits(rows.weights), map_bits(tiles.weights)
    assert expected_bits["1.router"].dtype == np.uint16 and "1.router" + SCALE not in expected_bits
    assert expected_bits["1.gate_up"].shape == weight_shapes(rows.spec)["1.gate_up"]
    back, again = in_rows(found, rows.spec), in_tiles(expected_bits)
    assert back.keys() == expected_bits.keys()
    assert all(np.array_equal(back[key], expected_bits[key]) for key in back)
    assert all(np.array_equal(again[key], found[key]) for key in found)


# ---- engines --------------------------------------------------------------------------------------------------


def with_experts(normed: bool = True) -> ModelSpec:
    """A tiny model with experts."""
    return attrs.evolve(tiny_spec(6, 2, 16), experts=10, experts_used=3, experts_normed=normed)


@pytest.mark.parametrize("normed", [True, False])
def test_of_equal_logits_the_first_are_chosen(normed: bool) -> None:
    """torch's topk may choose any of equal ones: another than the native step, and another on each device."""
    logits = torch.tensor([[1.0, 3, 3, 3, 0, 3, 3, 3, 2, 3], [0.0] * 10, [*range(10)]])
    weights, chosen = chosen_experts(logits, with_experts(normed))
    assert chosen.tolist() == [[1, 2, 3], [0, 1, 2], [9, 8, 7]]
    whole = torch.softmax(logits, dim=-1).gather(1, chosen)
    assert torch.allclose(weights, whole / whole.sum(1, keepdim=True) if normed else whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_experts_are_those_they_stand_for(dtype: torch.dtype) -> None:
    """A model of int8 experts gives the logits of its exact weights."""
    spec = attrs.evolve(with_experts(), hidden=64, intermediate=64, experts_used=10)
    weights = random_weights(spec, "int8", 1)
    assert weights["0.router"].dtype == torch.bfloat16
    row = pack(prompt(30, 3))
    exact = Runner(spec, widened(weights))
    rough = Runner(spec, weights, dtype=dtype)
    found, right = (one.step(Row(row, 0, one.pages(30), GREEDY))[0] for one in (rough, exact))
    assert float((found - right).norm() / right.norm()) < (0.03 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("captures", [True, False])
def test_conversations_on_a_gpu_give_the_tokens_of_the_torch_model(captures: bool) -> None:
    """Grouped products of experts, in captured steps and others, give the tokens of experts computed one by one."""
    spec = with_experts(captures)
    weights = random_weights(spec, "float32", 3)
    arena = torch.full((PAGES + 1, *spec.page_shape(PAGE_TOKENS)), float("nan"))
    graphs = Replays()
    engine = CudaEngine(
        spec, weights, arena, fake_flashinfer, graphs, rows=8, backend="fa3", captures=captures
    )
    engine.warm_up()
    drawn, sequences = drive(engine, spec, 1)
    assert (graphs.log.count("replay") > 20) == (graphs.captured > 0) == captures
    check_by_the_torch_model(spec, weights, drawn, sequences)
    engine.close()


def test_experts_on_a_gpu_need_no_wait_and_can_be_captured() -> None:
    """A step that read back which experts were chosen would wait for the GPU in each layer and could be no graph."""
    device, spec = gpu_rehearsal.machine().device, attrs.evolve(with_experts(), hidden=64, intermediate=64)
    weights = random_weights(spec, "bfloat16", 1)
    placed = {name: one.to(device) for name, one in weights.items()}
    layers = [Layer.of(one, 0, torch.bfloat16) for one in (weights, placed)]
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    on_device = x.to(device)
    reference = TorchOps(spec, torch.bfloat16, torch.device("cpu"))
    ops = FlashInferOps(fake_flashinfer, spec, torch.bfloat16, device)
    made: list[torch.Tensor] = []

    def run(x: torch.Tensor, layer: Layer, ops: Ops) -> torch.Tensor:
        assert layer.router is not None
        return ops.experts(
            x, layer, *chosen_experts(torch.nn.functional.linear(x.float(), layer.router), spec)
        )

    expected = run(x, layers[0], reference).float()
    gpu_rehearsal.machine().waits()
    graph = gpu_rehearsal.machine().capture(lambda: made.append(run(on_device, layers[1], ops)))
    graph.replay()
    assert gpu_rehearsal.machine().waits() == 0
    assert float((made[0].cpu().float() - expected).norm() / expected.norm()) < 0.01
    on_device.copy_(x.flip(0))
    graph.replay()
    assert float((made[0].cpu().float() - expected.flip(0)).norm() / expected.norm()) < 0.01


def test_a_gpu_worker_has_room_for_what_its_experts_compute() -> None:
    """Each token runs through several experts at once, in values of their own."""
    dense = attrs.evolve(tiny_spec(), hidden=2048, intermediate=768)
    mixture = attrs.evolve(dense, experts=128, experts_used=8)
    batch = BatchConfig()
    pairs = 8 * (2 * batch.chunk_tokens + batch.rows)
    more = worker_bytes(mixture, batch) - worker_bytes(dense, batch)
    # Of each pair of token and expert: input, gate and up, and both outputs, in bfloat16.
    assert more > pairs * (3 * 2048 + 2 * 768) * 2 + mixture.layers * 128 * 2048 * 4


def test_weights_are_found_again(tmp_path: Path, saved: dict[str, Path]) -> None:
    """A model that was converted before has the same spec, with its experts."""
    first = prepare(saved["mixtral"], "bfloat16", tmp_path)
    again = prepare(saved["mixtral"], "bfloat16", tmp_path)
    assert first == again and again.spec == read_spec(saved["mixtral"])
    assert map_weights(again.weights)["0.down"].shape == (4 * 96, 160)
