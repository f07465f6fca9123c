"""What memory a process of this host can still have, and what its user is told where there was too little."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from pathlib import Path

_WORDS = ("Cannot allocate memory", "failed to map segment from shared object")
"""How torch and the loader of shared objects say it, in errors of no type of their own."""
_NO_THREAD = "can't start new thread"
"""A stack that found no place, or more threads than are allowed."""


def shortage(error: BaseException) -> str:
    """What to tell the user, with a remedy, when ``error`` is a want of memory; empty when it is anything else."""
    limited, text = too_few_addresses(), str(error)
    known = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if not known and not any(words in text for words in _WORDS) and not (limited and _NO_THREAD in text):
        return ""
    return limited or (
        f"There is too little memory: {memory_available() >> 20} MiB are available on this machine. "
        "Set a smaller [[shard]] memory or fewer [[worker]]s, or stop something else."
    )


def too_few_addresses() -> str:
    """What to tell the user whose shell limits the addresses of each process; empty when it does not."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return ""
    return (
        f"There is too little memory: each process is limited to {limit >> 20} MiB of addresses (ulimit -v), and a worker "
        "takes the weights, its shard's arena and over 1 GiB beside them. Lift the limit (ulimit -v unlimited), "
        "or set a smaller [[shard]] memory."
    )


def memory_available() -> int:
    """Bytes that can be allocated now without swapping, by the machine's and the control groups' accounts."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    machine = int(fields["MemAvailable"].split()[0]) * 1024
    return min([machine, *_cgroup_rooms()])


def _cgroup_rooms(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Bytes left in each control group (v2) that limits this process; droppable page cache counts as left."""
    paths = [line[3:] for line in membership.read_text().splitlines() if line.startswith("0::")]
    if not paths:
        return
    group = root / paths[0].lstrip("/")
    for level in [group, *group.parents]:
        try:
            limit = (level / "memory.max").read_text().strip()
            if limit != "max":
                used = int((level / "memory.current").read_text())
                counts = dict(line.split() for line in (level / "memory.stat").read_text().splitlines())
                yield max(int(limit) - used + int(counts.get("inactive_file", 0)), 0)
        except OSError:
            pass  # the root group has no limit files, and a container may hide some
        if level == root:
            return
