"""Control groups limited to a part of a core, for workers as independent as on machines of their own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PERIOD_US = 10_000
"""Period of a CPU limit. A step spans several, so that it takes as long as on a slower core.

It is no shorter because the kernel counts quotas in milliseconds.
"""
ROOTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/cpu"))
"""Mount points of cgroup version 2 and of version 1's CPU controller."""


@contextmanager
def cpu_groups(cores: Mapping[str, float]) -> Iterator[dict[str, Path]]:
    """Make a control group for each name and yield the groups' folders; remove them afterwards.

    The processes of a group together use at most its number of cores in ``cores``. Raises OSError if this
    user may not make groups: only root may, unless the right was delegated.
    """
    with contextlib.ExitStack() as made:
        folders = {}
        for name, part in cores.items():
            folder = _root() / f"memserve-bench-{os.getpid()}-{name}"
            folder.mkdir()
            made.callback(folder.rmdir)
            _limit(folder, round(part * PERIOD_US))
            folders[name] = folder
        yield folders


def enter(folder: Path) -> None:
    """Move this process, with all of its threads, into a group."""
    (folder / "cgroup.procs").write_text(str(os.getpid()))


def _root() -> Path:
    """The folder in which groups with a CPU limit can be made. Raises OSError if there is none."""
    version_2, version_1 = ROOTS
    if (version_1 / "cpu.cfs_quota_us").exists():
        return version_1
    if "cpu" in (version_2 / "cgroup.controllers").read_text().split():
        (version_2 / "cgroup.subtree_control").write_text("+cpu")
        return version_2
    raise FileNotFoundError(f"no controller of CPU is mounted in {version_2}")


def _limit(folder: Path, quota_us: int) -> None:
    if (one := folder / "cpu.max").exists():
        one.write_text(f"{quota_us} {PERIOD_US}")
        return
    (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
    (folder / "cpu.cfs_quota_us").write_text(str(quota_us))
