"""A pytest plugin for ``gpu_check``: writes down each test as it begins and ends, so that a run can go on after it.

A kernel that hangs keeps its process from answering, and after an illegal access every later call in the process
fails. So no test that has begun is run again, and a process whose GPU no longer answers ends at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

PLACE = "MEMSERVE_GPU_JOURNAL"
"""The environment variable with the journal's path."""
BROKEN = 70
"""Exit status of a process whose GPU fails every call."""


def read(path: Path) -> dict[str, dict[str, object]]:
    """What the journal says of each test that has begun: empty if it has not ended."""
    found: dict[str, dict[str, object]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        known = found.setdefault(entry.pop("test"), {})
        known["seconds"] = float(str(known.get("seconds", 0))) + entry.pop("seconds", 0.0)
        if known.get("result", "passed") == "passed":
            known.update(entry)
    return found


def _write(**entry: object) -> None:
    with Path(os.environ[PLACE]).open("a") as journal:
        journal.write(json.dumps(entry) + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the tests that have begun in an earlier process."""
    begun = read(Path(os.environ[PLACE]))
    items[:] = [item for item in items if item.nodeid not in begun]


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test begins."""
    _write(test=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A part of a test has ended. Its call decides, unless its setup or its end went wrong."""
    if report.when != "call" and report.outcome == "passed":
        _write(test=report.nodeid, seconds=report.duration)
        return
    text = report.longreprtext
    why = report.longrepr[2] if isinstance(report.longrepr, tuple) else text.strip().rpartition("\n")[2]
    _write(test=report.nodeid, result=report.outcome, seconds=report.duration, why=why, text=text)
    if report.failed and not _answers():
        os._exit(BROKEN)


def _answers() -> bool:
    """Whether the GPU of this process answers; true if it uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
