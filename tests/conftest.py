"""Fixtures and hooks for all tests: async tests run under trio, with a virtual clock if they request one."""

from __future__ import annotations

import gc
import inspect
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis  # noqa: F401 - before the objects are frozen that it looks for with the garbage collector
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
"""The slowest files: `make test` runs two at a time and starts with these, so none is left for the end."""


def pytest_configure() -> None:
    """Collect no garbage while test files are imported: all that they make stays."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave what was imported out of all later collections: each would look at a million objects that stay."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow files first; otherwise files and the tests in them keep their order."""
    rank = {name: place for place, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def _one_thread_each() -> None:
    """Give torch one thread when several files run at a time: more would spin, waiting for occupied cores.

    A call sets it and not an environment variable, which the clusters that tests start would inherit; they
    choose their own number of threads.
    """
    if "PYTEST_XDIST_WORKER" in os.environ and (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def native_step() -> None:
    """Skip the test where the native step cannot run: no compiler, or a processor without its instructions."""
    from memserve.engine.weights import default_cache_dir
    from memserve.kernels.native import load
    from memserve.kernels.native_build import NativeUnavailable

    try:
        load(default_cache_dir())
    except NativeUnavailable as reason:
        pytest.skip(f"no native step here: {reason}")


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    """A clock that jumps to the next deadline when every task waits. Not for real sockets or processes."""
    return trio.testing.MockClock(autojump_threshold=0)


@pytest.fixture
def folder(tmp_path_factory) -> Path:
    """A directory with a short path that only this user can enter."""
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
