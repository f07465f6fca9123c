"""What `make gpu-check` runs, tried without a GPU: a table of every GPU test, each skipped with a reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gpu_check

ROOT = Path(__file__).parent.parent
MARKS = ("@pytest.mark.gpu", "from backends import BACKENDS", "from backends import CARDS, ON_CARDS")
"""Text by which a file with GPU tests is recognised."""


def test_every_gpu_test_is_in_the_table(tmp_path):
    """The table lists every GPU test, skipped here with the reason."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 0\n")
    tool.chmod(0o700)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "bench/gpu_check.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| test_")]
    assert len(rows) > 30
    assert {row[1] for row in rows} == {"skipped"} and all(
        "no GPU" in row[3] or "flashinfer" in row[3] for row in rows
    )
    names = " ".join(row[0] for row in rows)
    for one in (
        "conversations_get_the_tokens_of_the_reference[cuda]",
        "another_process_sees_and_writes",
        "stand_in_has_flashinfers_wrappers",
    ):
        assert one in names
    assert " s in all" in done.stdout


def test_every_file_with_gpu_tests_is_run():
    """Every test file with GPU tests is run by `make gpu-check`."""
    found = {
        f"tests/{path.name}"
        for path in Path(__file__).parent.glob("test_*.py")
        if path != Path(__file__) and any(mark in path.read_text() for mark in MARKS)
    }
    assert found == set(gpu_check.TESTS)


def test_a_run_that_was_cut_short_still_has_its_table(tmp_path, monkeypatch):
    """A run that is cut short still has a table of the tests that were done."""
    (tmp_path / "test_it.py").write_text(
        "import time\ndef test_cuda_quick(): pass\ndef test_cuda_slow(): time.sleep(60)\n"
    )
    for name, value in (("TESTS", (str(tmp_path),)), ("LIMIT_S", 6.0), ("ROOT", tmp_path)):
        monkeypatch.setattr(gpu_check, name, value)
    report = tmp_path / "report.xml"
    assert gpu_check.run_tests(report, dict(os.environ)) is None
    assert any("test_cuda_quick | passed" in line for line in gpu_check.table(report))
    assert gpu_check.table(tmp_path / "none") == ["no report: pytest was killed, or never began"]
