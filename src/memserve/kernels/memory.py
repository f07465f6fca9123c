"""How much memory a process of this host can still get, and the error texts for when it is too little."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from pathlib import Path

_WORDS = ("Cannot allocate memory", "failed to map segment from shared object")
"""How torch and the loader of shared objects report a lack of memory, in untyped errors."""
_NO_THREAD = "can't start new thread"
"""Python's error text for a thread whose stack finds no addresses, or that exceeds the limit of threads."""


def shortage(error: BaseException) -> str:
    """The text for the user, with a remedy, if ``error`` is a lack of memory; otherwise an empty string."""
    limited, text = too_few_addresses(), str(error)
    known = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if not known and not any(words in text for words in _WORDS) and not (limited and _NO_THREAD in text):
        return ""
    return limited or (
        f"There is too little memory: {memory_available() >> 20} MiB are available on this machine. "
        "Set a smaller [[shard]] memory or fewer [[worker]]s, or stop something else."
    )


def too_few_addresses() -> str:
    """The text for the user if the shell limits each process's addresses; otherwise an empty string."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return ""
    return (
        f"There is too little memory: each process is limited to {limit >> 20} MiB of addresses (ulimit -v), and a worker "
        "takes the weights, its shard's arena and over 1 GiB beside them. Lift the limit (ulimit -v unlimited), "
        "or set a smaller [[shard]] memory."
    )


def memory_available() -> int:
    """Bytes that can be allocated now without swapping, according to the machine and the control groups."""
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
