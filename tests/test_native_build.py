"""The native step's C++ for every set of instructions that it knows, whichever this machine has."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from memserve.kernels import native_build
from memserve.kernels.native_build import SOURCES, target_flags

AVX2 = {"avx", "avx2", "fma"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
BF16 = AVX512 | {"avx512_bf16"}
WITH_BF16 = {"-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mavx512bf16"}
PROCESSORS = {
    "Zen 3": (AVX2, {"-mavx2", "-mfma"}),
    "Ice Lake": (AVX512, {"-mavx2", "-mfma"}),
    "Zen 4": (BF16, WITH_BF16),
    "Sapphire Rapids": (BF16 | {"amx_tile", "amx_bf16"}, WITH_BF16 | {"-mamx-tile", "-mamx-bf16"}),
}
"""What the kernel says that a processor has, and what of it the build uses."""


@pytest.mark.parametrize("name", PROCESSORS)
def test_it_compiles_for_every_processor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change tried on one machine would leave the others on torch, unseen."""
    has, used = PROCESSORS[name]
    monkeypatch.setattr(native_build, "_processor_flags", lambda: has)
    flags = target_flags()
    assert {flag for flag in flags if flag.startswith("-m")} == used
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        pytest.skip(f"no C++ compiler here: there is no {compiler}")
    command = [compiler, *flags, "-fsyntax-only", str(SOURCES[0].parent / "step.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
