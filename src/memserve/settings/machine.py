"""What decisions depend on of the machine that memserve runs on: cores, free memory, directories, GPUs."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import attrs

from memserve.processes.place import place_path
from memserve.settings.gpus import Gpus, find_gpus
from memserve.settings.rules import expanded


@attrs.frozen(kw_only=True)
class Machine:
    """Properties of a machine that decisions depend on; a test can pass other ones."""

    cores: int
    free_bytes: int
    log_dir: str
    """``[logging] dir``, absolute."""
    runtime_dir: str
    """The directory for sockets and locks; see :func:`memserve.processes.place.place_path`."""
    run: str
    """Name of the run that is to start."""
    gpus: Callable[[], Gpus] = find_gpus
    """Finds GPUs; called only if a shard is on one, because it takes a second."""

    @classmethod
    def here(cls, log_dir: str) -> Machine:
        """This machine at present, within the limits of this process's control groups.

        Raises UserError when there is no usable directory for sockets.
        """
        absolute = expanded(log_dir, "logging.dir").resolve()
        return cls(
            cores=usable_cores(),
            free_bytes=free_memory(),
            log_dir=str(absolute),
            runtime_dir=str(place_path(absolute)),
            run=f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
        )


def usable_cores() -> int:
    """Cores that this process may use, at least 1: its affinity, or a control group's quota if less."""
    cores = float(len(os.sched_getaffinity(0)))
    for folder in control_groups():
        quota, _, period = read_line(folder / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal():
            cores = min(cores, int(quota) / int(period))
    return max(1, int(cores))


def free_memory() -> int:
    """Bytes that can be allocated without swapping, or that a control group's limit leaves if less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    for folder in control_groups():
        limit, used = read_line(folder / "memory.max"), read_line(folder / "memory.current")
        if limit.isdecimal() and used.isdecimal():
            free = min(free, int(limit) - int(used) + reclaimable(folder))
    return max(0, free)


def control_groups() -> Iterator[Path]:
    """The control groups (version 2) of this process, the root first, then from its own upwards."""
    root = Path("/sys/fs/cgroup")
    yield root
    own = next((line[3:] for line in read_lines(Path("/proc/self/cgroup")) if line[:3] == "0::"), "/")
    folder = root / own.strip("/")
    while folder != root and root in folder.parents:
        yield folder
        folder = folder.parent


def reclaimable(folder: Path) -> int:
    """Bytes of a control group's file cache that the kernel gives up first."""
    for line in read_lines(folder / "memory.stat"):
        key, _, value = line.partition(" ")
        if key == "inactive_file":
            return int(value)
    return 0


def read_lines(file: Path) -> list[str]:
    """The lines of a file under /proc or /sys; none if it is absent."""
    with contextlib.suppress(OSError):
        return file.read_text().splitlines()
    return []


def read_line(file: Path) -> str:
    """The first line of a file under /proc or /sys; empty if it is absent."""
    return next(iter(read_lines(file)), "")
