"""The native step's C++ for every set of instructions that it knows, whichever this machine has."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

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


def test_what_is_to_be_fetched_ahead_is(tmp_path: Path) -> None:
    """The compiler may take a function that only fetches for one without effects: attention once fetched nothing, unseen."""
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        pytest.skip(f"no C++ compiler here: there is no {compiler}")
    (tmp_path / "fetch.cpp").write_text(
        '#include "vectors.hpp"\n'
        "[[gnu::noinline]] static void fetch(const char* p) { prefetch(p); }\n"
        "void twice(const char* p) { fetch(p), fetch(p + 64); }\n"
    )
    command = [compiler, "-O3", "-std=c++17", "-mavx2", "-mfma", f"-I{SOURCES[0].parent}", "-S", "-o-"]
    done = subprocess.run(
        [*command, str(tmp_path / "fetch.cpp")], capture_output=True, text=True, timeout=120, check=False
    )
    assert "prefetcht1" in done.stdout, done.stderr
