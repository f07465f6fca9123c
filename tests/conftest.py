"""Shared by all tests: async tests run under trio, with a virtual clock where they ask for one."""

from __future__ import annotations

import inspect
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

TEST_TIMEOUT_S = 60.0
"""Real seconds after which an async test counts as hung."""

LONG_FIRST = (
    "test_up.py",
    "test_played_gpu.py",
    "test_kill_matrix.py",
    "test_supervisor.py",
    "test_join.py",
    "test_model.py",
    "test_sim.py",
    "test_same_tokens.py",
    "test_native_sanitized.py",
    "test_transfer_processes.py",
    "test_cuda_engine.py",
)
"""Files that take longest, by which `make test`, which runs two files at a time, begins: none of them is left for the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first; within a file, and among the others, tests stay in their order."""
    rank = {name: place for place, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def _one_thread_each() -> None:
    """Of torch, where several files run at a time: threads that wait for each other on cores that are taken only spin.

    By a call, because a variable would reach the clusters that tests start, and how many threads those take is theirs.
    """
    if "PYTEST_XDIST_WORKER" in os.environ and (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    """A clock that jumps to the next deadline whenever every task waits. Not for real sockets or processes."""
    return trio.testing.MockClock(autojump_threshold=0)


@pytest.fixture
def folder(tmp_path_factory) -> Path:
    """A short path that only we can enter."""
    path = tmp_path_factory.mktemp("p")
    path.chmod(0o700)
    return path


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run ``async def`` tests under trio."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments: dict[str, Any] = {name: pyfuncitem.funcargs[name] for name in names}
    clock = next((one for one in arguments.values() if isinstance(one, trio.testing.MockClock)), None)
    trio.run(partial(_limited, pyfuncitem.obj, arguments, clock is None), clock=clock)
    return True


async def _limited(test: Any, arguments: dict[str, Any], real_clock: bool) -> None:
    if not real_clock:
        await test(**arguments)
        return
    with trio.fail_after(TEST_TIMEOUT_S):
        await test(**arguments)
