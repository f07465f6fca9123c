"""The native step's C++ for every instruction set that it supports, whichever this machine has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memserve.kernels import native_build
from memserve.kernels.native_build import SOURCES, built_library, target_flags

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
"""Which features the kernel reports for a processor, and which flags the build uses for it."""

LINEAR = """
#include "scratch.hpp"
extern "C" void product(void* linear, const Matrix* w, const void* x, int rows, float* out) {
    ((Linear*)linear)->strips(*w, 0, TILE, 576, (const Operand*)x, rows, out, COLUMNS, [](int) {});
}
"""
PRODUCT = re.compile(r"\tv(dpbf16|fmadd)")
STORE_ON_STACK = re.compile(r"\tvmov\w+\t%[xyz]mm\d+, [^,]*\(%r[sb]p\)")
JUMP = re.compile(r"\tj(?!mp)\w+\t(\.L\d+)")


def compiled(source: Path, flags: tuple[str, ...], *how: str) -> str:
    """The compiler's output for a file that includes parts of the step. Skips the test if there is no compiler."""
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        pytest.skip(f"no C++ compiler here: there is no {compiler}")
    command = [compiler, *flags, f"-I{SOURCES[0].parent}", *how, "-o-", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def inner_loops(assembly: str) -> Iterator[list[str]]:
    """The lines of every loop that contains no other."""
    lines = assembly.splitlines()
    label_at = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
    jumps = [(at, label_at[jump[1]]) for at, line in enumerate(lines) if (jump := JUMP.match(line))]
    loops = [(start, end) for end, start in jumps if start < end]
    for start, end in loops:
        if not any(start <= first and last < end for first, last in loops):
            yield lines[start:end]


@pytest.mark.parametrize("name", PROCESSORS)
def test_it_compiles_for_every_processor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step compiles for every kind of processor, with the flags for it."""
    has, used = PROCESSORS[name]
    monkeypatch.setattr(native_build, "_processor_flags", lambda: has)
    flags = target_flags()
    assert {flag for flag in flags if flag.startswith("-m")} == used
    compiled(SOURCES[0].parent / "step.cpp", flags, "-fsyntax-only")


@pytest.mark.parametrize(("unknown", "like"), [("-mamx*", "Zen 4"), ("-mavx512bf16|-mamx*", "Zen 3")])
def test_a_compiler_older_than_the_processor_builds_what_it_knows(
    unknown: str, like: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distributions are kept for ten years: on a new machine with one, everything would run on torch."""
    old = tmp_path / "g++"
    told = f'for one; do case "$one" in {unknown}) echo "unknown: $one" >&2; exit 1;; esac; done'
    old.write_text(f'#!/bin/sh\n{told}\nexec {os.environ.get("CXX", "g++")} "$@"\n')
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    monkeypatch.setattr(native_build, "_processor_flags", lambda: PROCESSORS["Sapphire Rapids"][0])

    assert {flag for flag in target_flags() if flag.startswith("-m")} == PROCESSORS[like][1]


def test_a_library_in_a_cache_that_is_read_only_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an image that brings its cache along, everything would run on torch."""
    monkeypatch.setattr(native_build, "_compile", lambda compiler, flags, library, lock: library.touch())
    library = built_library(tmp_path)
    library.with_suffix(".lock").unlink()
    library.with_suffix(".lock").mkdir()  # cannot be opened, as in a read-only folder
    assert built_library(tmp_path) == library


def test_a_compiler_that_outlives_its_caller_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two compilers that wrote to one file would leave a damaged library, for every later start."""
    slow, log = tmp_path / "g++", tmp_path / "log"
    slow.write_text(
        '#!/bin/sh\nfor last; do true; done\ncase "$*" in *-shared*) ;; *) exit 0;; esac\n'
        f'echo begin >> {log}; sleep 1; echo built > "$last"; echo end >> {log}\n'
    )
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    code = "import sys, pathlib; from memserve.kernels.native_build import built_library as b; b(pathlib.Path(sys.argv[1]))"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) as caller:
        deadline = time.monotonic() + 20
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        caller.kill()

    assert built_library(tmp_path).read_text() == "built\n"
    assert log.read_text().split() == ["begin", "end"] * 2


@pytest.mark.parametrize("name", ["Zen 3", "Zen 4"])
def test_sums_of_products_stay_in_registers(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The inner loops of products keep their sums in registers: stored, they make steps of 8 rows half as slow again."""
    monkeypatch.setattr(native_build, "_processor_flags", lambda: PROCESSORS[name][0])
    source = tmp_path / "linear.cpp"
    source.write_text(LINEAR)
    loops = list(inner_loops(compiled(source, ("-O3", *target_flags()), "-S")))
    counts = [
        [sum(1 for line in loop if kind.match(line)) for kind in (PRODUCT, STORE_ON_STACK)] for loop in loops
    ]
    assert max(products for products, _ in counts) >= 16, "no loop of products was found"
    assert [count for count in counts if count[1] * 4 > count[0] > 0] == []


def test_what_is_to_be_fetched_ahead_is(tmp_path: Path) -> None:
    """Prefetches are compiled: the compiler may drop a function that only prefetches as one without effects."""
    source = tmp_path / "fetch.cpp"
    source.write_text(
        '#include "vectors.hpp"\n'
        "[[gnu::noinline]] static void fetch(const char* p) { prefetch(p); }\n"
        "void twice(const char* p) { fetch(p), fetch(p + 64); }\n"
    )
    assert "prefetcht1" in compiled(source, ("-O3", "-std=c++17", "-mavx2", "-mfma"), "-S")
