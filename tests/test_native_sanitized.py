"""The native step's C++ under the compiler's sanitizers, in its own program."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from memserve.kernels.native_build import SOURCES, target_flags

DRIVER = Path(__file__).parent / "native" / "driver.cpp"


@pytest.mark.parametrize(("sanitizer", "optimized"), [("address,undefined", "-O0"), ("thread", "-O1")])
def test_steps_are_clean(native_step: None, sanitizer: str, optimized: str, tmp_path: Path) -> None:
    """Steps run without errors of the address, undefined behaviour and thread sanitizers."""
    compiler, flag = os.environ.get("CXX", "g++"), f"-fsanitize={sanitizer}"
    (tmp_path / "empty.cpp").write_text("int main() { return 0; }\n")
    if not shutil.which(compiler) or _run(
        compiler, flag, str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")
    ):
        pytest.skip(f"{compiler} has no {sanitizer} sanitizer here")
    program = str(tmp_path / "driver")
    build = (
        optimized,  # the level at which building plus running takes least
        "-g1",  # line numbers for reports, without the full debug information of every template
        "-fno-sanitize-recover=all",
        flag,
        *target_flags(),
        f"-I{SOURCES[0].parent}",
        str(DRIVER),
    )
    assert not (output := _run(compiler, *build, "-o", program)), output
    assert not (output := _run(program)), output


def _run(*command: str) -> str:
    """Its output if it failed, otherwise nothing."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return (done.stdout + done.stderr or f"exit status {done.returncode}") if done.returncode else ""
