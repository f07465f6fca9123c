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


TESTS_OF_A_BAD_DAY = """
import os, time
def test_cuda_quick(): pass
def test_cuda_hangs(): time.sleep(60)
def test_cuda_wrong(): assert 2 == 3, "no"
def test_cuda_ends_the_process(): os._exit(9)
def test_cuda_last(): pass
"""


def test_a_test_that_hangs_or_ends_its_process_costs_no_other(tmp_path, monkeypatch):
    """If it failed, one bad kernel would take the results of all tests after it, on a machine that is lent for minutes."""
    (tmp_path / "test_it.py").write_text(TESTS_OF_A_BAD_DAY)
    # The plugin answers to SIGINT at once here; a kernel that hangs is killed.
    for name, value in (("TESTS", (str(tmp_path),)), ("SILENT_S", 8.0), ("STOP_S", 0.1), ("ROOT", tmp_path)):
        monkeypatch.setattr(gpu_check, name, value)
    journal = tmp_path / "journal"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "bench")}
    assert gpu_check.run_tests(journal, environment)
    lines = gpu_check.table(journal)[2:]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| test_cuda_quick", "passed"],
        ["| test_cuda_hangs", "never ended"],
        ["| test_cuda_wrong", "failed"],
        ["| test_cuda_ends_the_process", "never ended"],
        ["| test_cuda_last", "passed"],
    ]
    assert "assert 2 == 3" in gpu_check.report(journal)
    monkeypatch.setattr(gpu_check, "LIMIT_S", 0.0)
    assert not gpu_check.run_tests(tmp_path / "none", environment)
    assert gpu_check.table(tmp_path / "none") == ["no test was begun"]
