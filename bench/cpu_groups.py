"""Control groups that may use a part of a core: for workers that are to be as far apart as on machines of their own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PERIOD_US = 10_000
"""So short that a step is spread over several, so that it takes as long as on a slower core; the kernel counts in milliseconds."""
ROOTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/cpu"))
"""Where version 2 and the CPU controller of version 1 are mounted."""


@contextmanager
def cpu_groups(cores: Mapping[str, float]) -> Iterator[dict[str, Path]]:
    """A group for each name, its folder, whose processes together take at most so many cores of CPU. All gone afterwards.

    Raises OSError where this user may not make them: they are root's, unless they were given away.
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
    """Move this process into a group with all of its threads."""
    (folder / "cgroup.procs").write_text(str(os.getpid()))


def _root() -> Path:
    """Where groups with a limit of CPU can be made. Raises OSError where there is no such place."""
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
