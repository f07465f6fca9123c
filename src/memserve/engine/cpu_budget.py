"""The host's core budget: workers of one host share its cores, step by step.

Two workers that each run as many threads as the host has cores are 5 to 30 times slower together than one
alone, because every barrier waits for a thread that is not running. So each step takes cores from a budget
that the cluster's workers on this host share: at least one core, at most its worker's share among the workers
that have work now. An idle worker has no share. Shares change during a step, and a step with a prompt takes
as long as dozens of decode steps. A long step therefore checks its share after each layer: it takes free
cores, and releases cores above its share once another worker has waited for GIVE_AFTER_S.

The budget is a file of byte-range locks and holds no data. Byte ``c`` is locked while a step uses core ``c``,
``_BUSY + slot`` while the worker in that slot has work, ``_WAITING + slot`` while it waits for a core, and
``_TAKEN + slot`` as long as it lives. The locks are *open file description* locks (fcntl(2), F_OFD_SETLK).
The kernel drops them when the last descriptor is closed, also for a process killed in the middle of a step,
so no core is ever lost. Unlike POSIX locks, they survive when another descriptor of the file is closed in the
same process.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from memserve.costs import GIVE_AFTER_S

_BUSY, _WAITING, _TAKEN = 4096, 8192, 12288
_SLOTS = 4096
_FLOCK = "@hhqqi4x"
"""Layout of ``struct flock``: type, whence, start, len, pid."""

_POLL_S = 0.001
"""Interval at which a waiting worker tries to take a core."""
_AFTER_YOU_S = 0.003
"""Pause before a new step while others wait: longer than their poll, so that they are served first."""


def engine_environment() -> dict[str, str]:
    """Environment of a process that will run an engine, to be set before it imports torch.

    By default, OpenMP's idle threads spin for milliseconds after every parallel region, on a core that the
    native step, another worker or the event loop needs by then. Passive threads sleep at once, and waking
    them in each of a step's hundreds of regions cost a third of the prefill rate. This spin count takes some
    tens of microseconds: prefill of 256 tokens ran at 1,135 and 1,191 tok/s with it, at 908 and 1,030 by
    default, and at 827 and 635 with passive threads (2 threads, two interleaved rounds).
    """
    return {"GOMP_SPINCOUNT": "10000"}


class Outsiders:
    """Number of the host's cores used by processes that are not workers, smoothed over some tens of samples.

    It counts runnable threads (the fourth field of /proc/loadavg) at the end of a step, when the actors
    around the step sleep. At its start they have just handed it work, and would count as outsiders. Where
    this process may run on only part of the host's cores, the count says nothing about that part, and the
    answer is always 0.
    """

    SAMPLE_S = 0.005
    """Least time between two samples; closer ones would tell nothing new."""
    WEIGHT = 0.1
    """Weight of a sample in the moving average."""

    def __init__(
        self, read: Callable[[], str] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._read = read or _loadavg()
        self._clock = clock
        self._whole_host = read is not None or len(os.sched_getaffinity(0)) == os.cpu_count()
        self._sampled_at = float("-inf")
        self._cores = 0.0

    @property
    def cores(self) -> int:
        """Cores in use by outsiders, rounded to the nearest integer."""
        return round(self._cores)

    def sample(self, workers: int) -> None:
        """Take a sample. ``workers``: running threads of workers, the caller's included."""
        now = self._clock()
        if self._whole_host and now - self._sampled_at >= self.SAMPLE_S:
            self._sampled_at = now
            runnable = int(self._read().split()[3].partition("/")[0])
            self._cores += self.WEIGHT * (max(0, runnable - workers) - self._cores)


DISTURBED = 0.1
"""Part of a step's duration for which its threads together may wait for cores; a step that waited for more was
disturbed. Alone on its cores a step waits for less than a hundredth; beside one busy process on two cores, two
threads wait for as long as the step takes, and it takes up to twice as long."""


def threads_had(threads: int, seconds: float, waited_s: float) -> int:
    """The threads that count for a step of ``threads``: 0 if other processes used its cores meanwhile.

    ``waited_s``: how long its threads, in total, were ready to run and had no core.
    """
    return threads if waited_s <= DISTURBED * seconds else 0


def waited_s(tasks: Path = Path("/proc/self/task")) -> float:
    """Seconds in which this process's threads were ready to run and had no core, since they began.

    It falls when a thread ends. 0 where the kernel does not count it (it does if built with
    CONFIG_SCHED_INFO).
    """
    total = 0
    for task in tasks.iterdir():
        with suppress(OSError):  # the thread has just ended, or the kernel does not count
            total += int((task / "schedstat").read_text().split()[1])
    return total / 1e9


def _loadavg() -> Callable[[], str]:
    """A reader of /proc/loadavg that keeps it open: opening it in every step would take ten times as long."""
    file = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)
    return lambda: os.pread(file, 100, 0).decode()


class Cores:
    """One worker's access to the host's cores. Only its engine thread may use it: ``hold`` may block."""

    def __init__(
        self,
        path: Path,
        cores: int,
        want: int,
        slot: int | None = None,
        patience_s: float = 10.0,
        outsiders: Outsiders | None = None,
    ) -> None:
        """``want``: the most threads that a step of this worker runs. ``slot``: by default the first free.

        ``outsiders``: counts the cores that other processes use; by default none.

        After ``patience_s`` without a core, a step runs on one thread without a lock: a worker that holds all
        cores for that long is stopped (SIGSTOP) rather than running, and does not use them.
        """
        if cores < 1 or not 0 <= (slot or 0) < _SLOTS:
            raise ValueError(f"needs at least one core and a slot below {_SLOTS}, got {cores} and {slot}")
        self.want = want
        self._held: list[int] = []
        """Cores that the running step holds."""
        self._waited_since = float("inf")
        """Since when the running step has seen another worker wait; infinity: none waits."""
        self._neighbours: list[int] = []
        """Number of other workers with work, each time that the last step looked."""
        self._cores, self._patience_s = cores, patience_s
        self._outsiders = outsiders
        # Never inherited: a child of a killed worker would keep its cores.
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.key = _key(os.fstat(self._fd))
        self._is_busy = False
        self._slot = self._take_slot() if slot is None else slot

    def _take_slot(self) -> int:
        """Lock the first free slot: two workers never share one, and a dead worker's slot is free again."""
        for slot in range(_SLOTS):
            if self._set(_TAKEN + slot, True):
                return slot
        raise RuntimeError(f"{_SLOTS} workers share the cores of this host already")

    def busy(self, has_work: bool) -> None:
        """Announce whether this worker has work, on which the shares depend. Cheap when nothing changed."""
        if has_work == self._is_busy:
            return
        if not self._set(_BUSY + self._slot, has_work):
            raise RuntimeError(f"slot {self._slot} is another worker's")
        self._is_busy = has_work

    def look(self) -> int:
        """Number of other workers with work, for a time-shared site whose steps do not wait for each other.

        Also announces that this worker has work.
        """
        self.busy(True)
        self._neighbours = [self._others(_BUSY)]
        return self._neighbours[0]

    @property
    def neighbours(self) -> float:
        """Number of other workers with work, averaged over the times that the last step looked.

        It looked at its start and, if it was long, once per layer.
        """
        return sum(self._neighbours) / max(1, len(self._neighbours))

    @contextmanager
    def hold(self) -> Iterator[int]:
        """Take cores for one step and yield their number, at least 1. Waits while all cores are in use."""
        self.busy(True)
        if self._others(_WAITING):
            time.sleep(_AFTER_YOU_S)
        try:
            self._take()
            yield max(1, len(self._held))
        finally:
            if self._outsiders is not None:
                self._outsiders.sample(max(1, len(self._held)) + self._others(0))
            self._give_back(0)

    def regroup(self, threads: int) -> int:
        """Adjust the cores of a held step to the current share, between two layers; its new thread count."""
        share = self._share()
        if self._waited_for() >= GIVE_AFTER_S:
            self._give_back(share)
        self._take_free(share)
        return max(1, len(self._held))

    def _waited_for(self) -> float:
        """Seconds for which this step has continuously seen another worker wait for a core."""
        if not self._others(_WAITING):
            self._waited_since = float("inf")
            return 0.0
        self._waited_since = min(self._waited_since, time.monotonic())
        return time.monotonic() - self._waited_since

    def close(self) -> None:
        """Close the budget file, which drops all locks."""
        os.close(self._fd)

    def _take(self) -> None:
        deadline = time.monotonic() + self._patience_s
        while True:
            self._neighbours.clear()
            self._waited_since = float("inf")
            self._take_free(self._share())
            if self._held or time.monotonic() >= deadline:
                break
            self._set(_WAITING + self._slot, True)
            time.sleep(_POLL_S)
        self._set(_WAITING + self._slot, False)

    def _take_free(self, most: int) -> None:
        """Take free cores until this worker holds ``most``."""
        for offset in range(self._cores):
            core = (self._slot + offset) % self._cores
            if len(self._held) < most and core not in self._held and self._set(core, True):
                self._held.append(core)

    def _give_back(self, keep: int) -> None:
        """Release all cores but the first ``keep`` that this worker took."""
        while len(self._held) > keep:
            self._set(self._held.pop(), False)

    def _share(self) -> int:
        """This worker's share: the cores that outsiders leave, divided among the workers that have work."""
        outside = self._outsiders.cores if self._outsiders is not None else 0
        self._neighbours.append(self._others(_BUSY))
        return max(1, min(self.want, (self._cores - outside) // (1 + self._neighbours[-1])))

    def _set(self, byte: int, locked: bool) -> bool:
        """Lock or unlock one byte without waiting. False when another descriptor holds it."""
        kind = fcntl.F_WRLCK if locked else fcntl.F_UNLCK
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0))
        except BlockingIOError:
            return False
        return True

    def _others(self, base: int) -> int:
        """Number of bytes from ``base`` on that others have locked. Our own locks are not reported."""
        found = 0
        ranges = [(base, base + _SLOTS)]
        while ranges:
            # The kernel reports any one conflict in the range: search both sides of it again.
            begin, end = ranges.pop()
            ask = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, begin, end - begin, 0)
            kind, _, start, length, _ = struct.unpack(_FLOCK, fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, ask))
            if kind != fcntl.F_UNLCK:
                found += 1
                sides = ((begin, start), (start + length, end))
                ranges += [(low, high) for low, high in sides if low < high]
        return found


def _key(budget: os.stat_result) -> str:
    """Site key of a budget file: exactly the workers that open the same file share its cores."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    identity = f"{boot} {budget.st_dev} {budget.st_ino}"
    return hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()
