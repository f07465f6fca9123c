"""GPUs in a configuration: found or not, large enough or not, and the errors that say so."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import attrs
import pytest

from memserve import config
from memserve.errors import ConfigError
from memserve.settings import configfile, gpus, resolve
from memserve.settings.gpu_room import CONTEXT_BYTES, SPARE, worker_bytes
from memserve.settings.gpus import Gpu, Gpus, find_gpus, parse, visible
from memserve.settings.sections import BatchConfig, ModelConfig
from test_config import MACHINE, SPEC

ANSWER = "0, GPU-aa, NVIDIA H100 80GB HBM3, 80000, 9.0\n1, GPU-bb, NVIDIA H100 80GB HBM3, 1024, 9.0\n"
H100 = Gpu(0, "GPU-aa", "NVIDIA H100 80GB HBM3", 80000 << 20, (9, 0))
ON_GPU = """
[model]
path = "m.gguf"
[[shard]]
name = "g0"
device = "cuda:0"
[[worker]]
name = "p0"
role = "prefill"
[[worker]]
name = "d0"
role = "decode"
"""
MODEL = attrs.evolve(SPEC, head_dim=64, heads=4, kv_heads=2)


@pytest.fixture
def decided(tmp_path, monkeypatch):
    """A function that resolves a file on a machine with the given GPUs."""
    monkeypatch.setattr(resolve, "find_model", lambda path: Path("/models") / path)
    monkeypatch.setattr(resolve, "read_spec", lambda path: MODEL)

    def decide(found: Gpus, *overrides: str, text: str = ON_GPU) -> config.Resolved:
        path = tmp_path / "cluster.toml"
        path.write_text(text)
        machine = attrs.evolve(MACHINE, gpus=lambda: found)
        return resolve.resolve(configfile.load(str(path), overrides), machine)

    return decide


def test_what_nvidia_smi_says_is_understood():
    """The output of nvidia-smi is parsed, and other lines are ignored."""
    first, second = parse(ANSWER + "some warning\n")
    assert first == H100
    assert (second.index, second.free_bytes) == (1, 1 << 30)


@pytest.mark.parametrize(
    ("limit", "uuids"),
    [(None, ["GPU-aa", "GPU-bb"]), ("1", ["GPU-bb"]), ("1,0", ["GPU-bb", "GPU-aa"]), ("GPU-bb", ["GPU-bb"]), ("", []), ("0,7,1", ["GPU-aa"])],
)  # fmt: skip
def test_gpus_are_numbered_as_cuda_does(limit, uuids):
    """CUDA_VISIBLE_DEVICES numbers GPUs as CUDA does."""
    found = visible(parse(ANSWER), limit)
    assert [gpu.uuid for gpu in found] == uuids
    assert [gpu.index for gpu in found] == list(range(len(uuids)))


def fake_smi(folder: Path, script: str) -> None:
    """Write an ``nvidia-smi`` to ``folder``."""
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def test_looking_for_gpus_never_raises(tmp_path, monkeypatch):
    """A missing or broken nvidia-smi gives a problem text and no exception."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_gpus().problem == "there is no NVIDIA GPU here (no nvidia-smi)"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    fake_smi(tmp_path, "echo 'No devices were found'; exit 6")
    assert find_gpus().problem == "there is no NVIDIA GPU here (nvidia-smi: No devices were found)"
    fake_smi(tmp_path, "echo rubbish")
    assert find_gpus().problem == "there is no NVIDIA GPU that this process may use"
    monkeypatch.setattr(gpus, "missing_packages", lambda: None)
    fake_smi(tmp_path, f"cat <<'end'\n{ANSWER}end")
    assert find_gpus() == Gpus(parse(ANSWER))


def test_missing_packages_are_named_with_the_remedy():
    """Missing packages are named with the command that installs them."""
    said = gpus.missing_packages({"memserve_no_such": "cupy-cuda13x", "attrs": "attrs"})
    assert said == "cupy-cuda13x is not installed: pip install 'memserve[cuda]'"


def test_without_a_gpu_one_line_says_so(decided):
    """A GPU configuration without a GPU is refused in one line that names an alternative."""
    with pytest.raises(ConfigError) as caught:
        decided(Gpus(problem="there is no NVIDIA GPU here (no nvidia-smi)"))
    assert str(caught.value) == (
        "shard[0].device is cuda:0, but there is no NVIDIA GPU here (no nvidia-smi); memserve up -c demo serves on CPUs"
    )


def test_no_gpu_is_looked_for_where_no_shard_is_on_one(decided):
    """GPUs are not looked for if no shard is on one."""

    def never() -> Gpus:
        raise AssertionError("looked")

    machine = attrs.evolve(MACHINE, gpus=never)
    loaded = config.Config(model=ModelConfig(path="m.gguf"))
    assert not resolve.resolve(loaded, machine).on_gpus


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["shard.g0.device=cuda:1"], r"shard\[0\]\.device is cuda:1, but this machine has cuda:0"),
        (["model.dtype=float32"], "model.dtype must be bfloat16 with shard"),
        (["model.weights=int8"], "model.weights must be dtype with shard"),
        (["shard.g0.memory=79GiB"], r"shard\[0\]\.memory must fit in what weights and workers leave of cuda:0"),
        (["shard.g0.memory=1MiB"], r"shard\[0\]\.memory must hold one context of 2048 tokens \(2 MiB\), not 1 MiB"),
    ],
)  # fmt: skip
def test_what_a_gpu_cannot_do_is_refused(decided, overrides, said):
    """A GPU that is missing, too small or does not support the dtype is refused."""
    with pytest.raises(ConfigError, match=said):
        decided(Gpus((H100,)), *overrides)


def test_an_old_gpu_and_a_model_of_other_heads_are_refused(decided, monkeypatch):
    """GPUs that are too old, and models with other head dimensions, are refused."""
    with pytest.raises(ConfigError, match=r"compute capability 7\.5: 8\.0 or more is needed"):
        decided(Gpus((attrs.evolve(H100, capability=(7, 5)),)))
    monkeypatch.setattr(resolve, "read_spec", lambda path: SPEC)
    with pytest.raises(ConfigError, match=r"heads of 64, 128, 256 with shard\[0\] on cuda:0, not of 16"):
        decided(Gpus((H100,)))


def test_a_sliding_window_limits_the_context_on_a_gpu_alone(decided, monkeypatch):
    """FlashInfer computes full attention, which is right up to the window; CPUs serve the whole context."""
    windowed = attrs.evolve(MODEL, sliding_window=512, local_layers=(0,))
    monkeypatch.setattr(resolve, "read_spec", lambda path: windowed)
    found = decided(Gpus((H100,)))
    why = {one.key: one.why for one in found.reasons}
    assert found.max_context == 512
    assert why["model.max_context"] == "the model's sliding window, as attention on a GPU is full"
    with pytest.raises(ConfigError, match=r"sliding window, .* \(512 tokens\), not 1024"):
        decided(Gpus((H100,)), "model.max_context=1024")
    assert decided(Gpus(), text='[model]\npath = "m.gguf"\n').max_context == 2048


def test_two_shards_cannot_own_one_gpu(decided):
    """Two shards cannot be on one GPU."""
    text = ON_GPU + '[[shard]]\nname = "g1"\ndevice = "cuda:0"\n'
    text = text.replace('role = "prefill"', 'role = "prefill"\nshard = "g0"').replace(
        'role = "decode"', 'role = "decode"\nshard = "g0"'
    )
    with pytest.raises(ConfigError, match=r"shard\[1\]\.device must be another than shard\[0\]'s"):
        decided(Gpus((H100,)), text=text)


def test_pages_are_what_weights_and_workers_leave(decided):
    """A GPU shard gets the memory that weights, workers and a reserve leave."""
    found = decided(Gpus((H100,)))
    weights = resolve.weight_bytes(MODEL, "bfloat16")
    taken = weights + 2 * worker_bytes(MODEL, BatchConfig()) + CONTEXT_BYTES
    pages = found.shard_pages["g0"]
    assert pages * found.page_bytes + taken <= H100.free_bytes * (1 - SPARE)
    assert (pages + 2) * found.page_bytes + taken > H100.free_bytes * (1 - SPARE)
    assert found.on_gpus and found.gpu_worker_bytes == worker_bytes(MODEL, BatchConfig())
    why = {one.key: f"{one.value} {one.why}" for one in found.reasons}
    assert "of cuda:0: " in why["shard.g0"]
    assert why["model.weights"].endswith("once on each GPU, shared by its workers")
    assert why["worker.p0"].endswith("its workspaces, activations and CUDA context")


def test_written_memory_is_taken_as_written(decided):
    """A shard's memory that is configured is used as it is."""
    assert decided(Gpus((H100,)), "shard.g0.memory=1GiB").shard_pages == {"g0": (1 << 30) // 16384}
