"""Cores follow the work: the workers of one host share its cores, step by step.

Two workers that each run as many threads as the host has cores are 5 to 30 times slower together than one, because
every barrier waits for a thread that is not running. So a step takes cores from a budget of the whole cluster: at
least one, at most its worker's share among the workers that have work now. An idle worker has no share. Shares change
while a step is under way, and a step with a prompt takes as long as dozens of steps of streams: so a long one asks anew
after each layer, takes what others leave, and gives what is above its share to who has waited for a while.

The budget is a file of byte-range locks and holds no data: byte ``c`` is locked while core ``c`` is in use by a step,
``_BUSY + slot`` while that worker has work, ``_WAITING + slot`` while it waits for a core, ``_TAKEN + slot`` as long as it
lives. They are *open file
description* locks (fcntl(2), F_OFD_SETLK): the kernel drops them when the last descriptor is closed, which it does
for a process killed in the middle of a step, so that no core is ever lost; and unlike POSIX locks, another
descriptor's closing in the same process does not drop them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from memserve.costs import GIVE_AFTER_S

_BUSY, _WAITING, _TAKEN = 4096, 8192, 12288
_SLOTS = 4096
_FLOCK = "@hhqqi4x"
"""struct flock: type, whence, start, len, pid."""

_POLL_S = 0.001
_AFTER_YOU_S = 0.003
"""Longer than a waiter's poll, so that a waiter is served before the one that had its turn."""


def engine_environment() -> dict[str, str]:
    """Environment of a process that will run an engine, to be set before it imports torch.

    By default OpenMP's idle threads spin for milliseconds after every parallel region, on a core that by then is the
    native step's, another worker's or the event loop's; passive ones sleep at once, and waking them in every one of a
    step's hundreds of regions cost a third of the prefill rate. This many rounds are some tens of microseconds:
    prefill of 256 tokens ran at 1,135 and 1,191 tok/s with it, 908 and 1,030 by default, 827 and 635 passive
    (2 threads, two interleaved rounds).
    """
    return {"GOMP_SPINCOUNT": "10000"}


class Outsiders:
    """How many of the host's cores are taken by processes that are not workers, smoothed over some tens of samples.

    Counted are runnable threads (the fourth field of /proc/loadavg) at the end of a step, when the actors around it
    sleep; at its start they have just handed it its work, and would be taken for outsiders. Where this process may
    run on a part of the host's cores only, the count says nothing about that part, and the answer is always 0.
    """

    SAMPLE_S = 0.005
    """Samples closer to one another than this tell the same."""
    WEIGHT = 0.1
    """Of a sample against all before it."""

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
        """Cores in use by outsiders, to the nearest."""
        return round(self._cores)

    def sample(self, workers: int) -> None:
        """Count now; ``workers``: threads of workers that run at this moment, the caller's included."""
        now = self._clock()
        if self._whole_host and now - self._sampled_at >= self.SAMPLE_S:
            self._sampled_at = now
            runnable = int(self._read().split()[3].partition("/")[0])
            self._cores += self.WEIGHT * (max(0, runnable - workers) - self._cores)


def _loadavg() -> Callable[[], str]:
    """Reads /proc/loadavg, which stays open: opening it takes ten times as long, in every step."""
    file = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)
    return lambda: os.pread(file, 100, 0).decode()


class Cores:
    """One worker's access to the host's cores. For the thread that runs its steps only: ``hold`` may block."""

    def __init__(
        self,
        path: Path,
        cores: int,
        want: int,
        slot: int | None = None,
        patience_s: float = 10.0,
        outsiders: Outsiders | None = None,
    ) -> None:
        """``want``: the most threads a step of this worker runs; ``slot``: its number, unset the first that is free.

        ``outsiders``: who else uses the cores; unset, nobody.

        After ``patience_s`` without a core, a step runs on one thread without: whoever holds them all for so long is
        stopped (SIGSTOP) rather than running, and needs none.
        """
        if cores < 1 or not 0 <= (slot or 0) < _SLOTS:
            raise ValueError(f"needs at least one core and a slot below {_SLOTS}, got {cores} and {slot}")
        self.want = want
        self._held: list[int] = []
        """Of the step under way."""
        self._waited_since = float("inf")
        """Since when it has seen another wait."""
        self._beside: list[int] = []
        """Other workers that had work each time that the last step looked."""
        self._cores, self._patience_s = cores, patience_s
        self._outsiders = outsiders
        # Never inherited: a child of a killed worker would keep its cores.
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.key = _key(os.fstat(self._fd))
        self._is_busy = False
        self._slot = self._take_slot() if slot is None else slot

    def _take_slot(self) -> int:
        """Two workers that start at once do not take the same one; that of a dead worker is free again."""
        for slot in range(_SLOTS):
            if self._set(_TAKEN + slot, True):
                return slot
        raise RuntimeError(f"{_SLOTS} workers share the cores of this host already")

    def busy(self, has_work: bool) -> None:
        """Say whether this worker has work, which is what its share of cores depends on. Cheap when nothing changed."""
        if has_work == self._is_busy:
            return
        if not self._set(_BUSY + self._slot, has_work):
            raise RuntimeError(f"slot {self._slot} is another worker's")
        self._is_busy = has_work

    def look(self) -> int:
        """How many other workers have work: for a site that is shared in time, without steps that wait for one another."""
        self.busy(True)
        self._beside = [self._others(_BUSY)]
        return self._beside[0]

    @property
    def beside(self) -> float:
        """Other workers that had work during the last step, on average over the times it looked: at its start, and once a layer of a long one."""
        return sum(self._beside) / max(1, len(self._beside))

    @contextmanager
    def hold(self) -> Iterator[int]:
        """Take cores for one step and yield how many, at least 1. Waits while all are in use."""
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
        """Between two layers of a step that ``hold`` gave cores to: how many ``threads`` go on, by the share of this moment."""
        share = self._share()
        if self._waited_for() >= GIVE_AFTER_S:
            self._give_back(share)
        self._take_free(share)
        return max(1, len(self._held))

    def _waited_for(self) -> float:
        """Seconds for which this step has seen another worker wait for a core, without a break."""
        if not self._others(_WAITING):
            self._waited_since = float("inf")
            return 0.0
        self._waited_since = min(self._waited_since, time.monotonic())
        return time.monotonic() - self._waited_since

    def close(self) -> None:
        """Give everything back."""
        os.close(self._fd)

    def _take(self) -> None:
        deadline = time.monotonic() + self._patience_s
        while True:
            self._beside.clear()
            self._waited_since = float("inf")
            self._take_free(self._share())
            if self._held or time.monotonic() >= deadline:
                break
            self._set(_WAITING + self._slot, True)
            time.sleep(_POLL_S)
        self._set(_WAITING + self._slot, False)

    def _take_free(self, most: int) -> None:
        """Cores that nobody uses, until this worker has so many."""
        for offset in range(self._cores):
            core = (self._slot + offset) % self._cores
            if len(self._held) < most and core not in self._held and self._set(core, True):
                self._held.append(core)

    def _give_back(self, keep: int) -> None:
        """All but the first ``keep`` that this worker took."""
        while len(self._held) > keep:
            self._set(self._held.pop(), False)

    def _share(self) -> int:
        """Cores for this worker's next step: those that outsiders leave, divided among the workers that have work."""
        outside = self._outsiders.cores if self._outsiders is not None else 0
        self._beside.append(self._others(_BUSY))
        return max(1, min(self.want, (self._cores - outside) // (1 + self._beside[-1])))

    def _set(self, byte: int, locked: bool) -> bool:
        """Lock or unlock one byte without waiting. False when another holds it."""
        kind = fcntl.F_WRLCK if locked else fcntl.F_UNLCK
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0))
        except BlockingIOError:
            return False
        return True

    def _others(self, base: int) -> int:
        """How many bytes from ``base`` on are locked by others. (Our own locks are no conflict, so not reported.)"""
        found = 0
        ranges = [(base, base + _SLOTS)]
        while ranges:
            # The kernel reports some conflict within a range, in no promised order; look again on both its sides.
            begin, end = ranges.pop()
            ask = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, begin, end - begin, 0)
            kind, _, start, length, _ = struct.unpack(_FLOCK, fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, ask))
            if kind != fcntl.F_UNLCK:
                found += 1
                sides = ((begin, start), (start + length, end))
                ranges += [(low, high) for low, high in sides if low < high]
        return found


def _key(budget: os.stat_result) -> str:
    """Of the budget's file: whoever has opened the same one shares its cores, and nobody else does."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    told = f"{boot} {budget.st_dev} {budget.st_ino}"
    return hashlib.blake2b(told.encode(), digest_size=6).hexdigest()
