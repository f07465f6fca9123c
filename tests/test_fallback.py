"""A machine or model that cannot use the native step is served by torch, and the log says why, once."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np
import pytest
from structlog.testing import capture_logs

from memserve.engine.plans import BatchPlan, Row
from memserve.engine.runner import CpuEngine
from memserve.engine.spec import ModelSpec
from memserve.engine.weights import bits_of, in_tiles, random_weights, save_weights, tensors_of
from memserve.kernels import native_build
from memserve.kernels.native import open_step
from memserve.tokens import pack
from test_model import GREEDY, Runner, prompt, tiny_spec

PAGES = 16
Patch = pytest.MonkeyPatch


def no_compiler(patch: Patch) -> None:
    """No g++ is installed."""
    patch.setenv("CXX", "/nonexistent/g++")


def broken_compiler(patch: Patch) -> None:
    """A compiler that reports its version and then fails."""
    script = Path(os.environ["MEMSERVE_CACHE"]) / "g++"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no room left" >&2\nexit 1\n')
    script.chmod(0o755)
    patch.setenv("CXX", str(script))


def old_processor(patch: Patch) -> None:
    """A processor from before AVX2."""
    patch.setattr(native_build, "_processor_flags", lambda: {"avx", "sse4_2"})


LACKING: dict[Callable[[Patch], None], str] = {
    no_compiler: "no C++ compiler",
    broken_compiler: "no room left",
    old_processor: "the processor lacks avx2, fma",
}


@pytest.fixture(params=LACKING, ids=lambda lack: lack.__name__)
def reason(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Patch) -> str:
    """This machine with something missing and an empty cache; returns what the log must say of it."""
    monkeypatch.setenv("MEMSERVE_CACHE", str(tmp_path))
    monkeypatch.setattr(native_build, "_processor_flags", lambda: set(native_build._AVX2))
    request.param(monkeypatch)
    return LACKING[request.param]


def native_shape() -> ModelSpec:
    """A tiny model that the native step can run."""
    return attrs.evolve(tiny_spec(4, 2, 32), hidden=96, intermediate=160, vocab=132)


def test_the_engine_serves_without_the_native_step(reason: str, tmp_path: Path) -> None:
    """Without the native step, the engine gives the reference's tokens and logs the reason as a warning."""
    spec = native_shape()
    weights = random_weights(spec, "bfloat16", 1)
    save_weights(
        tensors_of(in_tiles(bits_of(weights))), tmp_path / "w"
    )  # converted before its compiler failed
    ids = prompt(40, 3, spec.vocab)
    with capture_logs() as logs:
        arena = mmap.mmap(-1, PAGES * spec.page_bytes(16, "bfloat16"))
        engine = CpuEngine(spec, tmp_path / "w", arena, PAGES, 16, "bfloat16", threads=2)
        engine.warm_up()
        found, length = [], 0
        for end in range(len(ids), len(ids) + 6):
            part = [*ids, *found][length:end]
            (token,) = engine.run(BatchPlan((Row(pack(part), length, (5, 3, 9), GREEDY),))).tokens
            assert token is not None
            found.append(token)
            length = end
        engine.close()

    assert found == Runner(spec, weights).generate(ids, 6)
    (entry,) = [entry for entry in logs if entry["event"] == "native step unavailable"]
    assert entry["log_level"] == "warning"
    assert reason in entry["reason"]


def test_a_model_that_the_native_step_cannot_run_is_named(tmp_path: Path) -> None:
    """For a model that the native step cannot run, the reason is logged and nothing is compiled."""
    spec = native_shape()
    weights = bits_of(random_weights(spec, "bfloat16", 1))
    with capture_logs() as logs:
        assert open_step(attrs.evolve(spec, hidden=40), weights, 16, 2, tmp_path) is None
        assert open_step(spec, {"embed": weights["embed"].astype(np.float32)}, 16, 2, tmp_path) is None

    assert [entry["event"] for entry in logs] == ["native step unavailable"] * 2
    assert "multiples of 32" in logs[0]["reason"]
    assert "float32" in logs[1]["reason"]
    assert not (tmp_path / "native").exists()  # nothing is compiled for a model that cannot have it


def test_the_engine_needs_no_native_step_in_float32(tmp_path: Path) -> None:
    """In float32, which the native step does not do, nothing is logged."""
    spec = native_shape()
    save_weights(random_weights(spec, "float32", 1), tmp_path / "w")
    arena = mmap.mmap(-1, spec.page_bytes(16, "float32"))
    with capture_logs() as logs:
        CpuEngine(spec, tmp_path / "w", arena, 1, 16, "float32", threads=1).close()
    assert not logs
