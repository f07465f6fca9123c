"""Reads a run's JSON lines back: all in order of time, one request's timeline, or a summary of the run.

Damaged logs are expected: an unfinished line (being written, or cut by a full disk) and a corrupt line are
counted and skipped. Memory does not grow with the run, except for 24 bytes per finished request in
:class:`Summary`.
"""

from __future__ import annotations

import heapq
import os
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import orjson

from memserve.errors import UserError
from memserve.observe import FIRST_KEYS, LEVELS
from memserve.percentiles import percentile

Record = dict[str, Any]

LINE_BYTES_MAX = 1 << 20
"""Longest line of a log. A longer one is not from memserve; it counts as corrupt and is never held whole."""
REQUEST_LINES_MAX = 20_000
"""Most lines of one request that a timeline uses."""
POLL_S = 0.2


# ---- finding a run -------------------------------------------------------------------------------------------


def find_run(place: Path) -> Path:
    """``place`` itself if it holds log files, otherwise the run in it that was written to last.

    Raises UserError.
    """
    if not place.is_dir():
        raise UserError(
            f"there is no log directory {place}: give a run's directory, or start in the one of `memserve up`"
        )
    if any(place.glob("*.jsonl")):
        return place
    runs = [run for run in place.iterdir() if run.is_dir() and any(run.glob("*.jsonl"))]
    if not runs:
        raise UserError(f"{place} holds no run: no directory in it has .jsonl files")
    return max(runs, key=lambda run: max(file.stat().st_mtime_ns for file in run.glob("*.jsonl")))


def check_actor(run: Path, actor: str) -> None:
    """Raise UserError when no actor with this name, or with the name in this id, has logged in the run."""
    names = {name_of(file.name) for file in run.glob("*.jsonl")}
    if name_of(actor) not in names:
        raise UserError(
            f"--actor: {run} has logs of {', '.join(sorted(names))}, not of {actor!r}; give a name or an id's beginning"
        )


# ---- reading -------------------------------------------------------------------------------------------------


@attrs.define
class Tally:
    """How many lines were read, and how many could not be."""

    lines: int = 0
    corrupt: int = 0
    """Whole lines that are not a JSON object with a time and an event."""
    torn: int = 0
    """Last lines without a line end: still being written, or cut by a crash."""

    def complaint(self) -> str:
        """One sentence for the user about skipped lines, or an empty string."""
        parts = [f"{self.corrupt} corrupt line{'s' * (self.corrupt != 1)}"] if self.corrupt else []
        parts += [f"{self.torn} unfinished line{'s' * (self.torn != 1)}"] if self.torn else []
        return f"passed over {' and '.join(parts)}" if parts else ""


def parse(line: bytes, tally: Tally) -> Record | None:
    """A line's record, or None for a corrupt one."""
    try:
        record = orjson.loads(line)
        if isinstance(record, dict) and isinstance(record["ts"], str) and isinstance(record["event"], str):
            tally.lines += 1
            return record
    except (orjson.JSONDecodeError, KeyError):
        pass
    tally.corrupt += bool(line.strip())
    return None


def whole_lines(file: BinaryIO, tally: Tally) -> Iterator[bytes]:
    """The complete lines of a file. An unfinished last line is counted, and left to be read again."""
    while line := file.readline(LINE_BYTES_MAX):
        if line.endswith(b"\n"):
            yield line
        elif len(line) == LINE_BYTES_MAX:
            tally.corrupt += 1
            while (rest := file.readline(LINE_BYTES_MAX)) and not rest.endswith(b"\n"):
                pass
        else:
            tally.torn += 1
            file.seek(-len(line), 1)
            return


def read_file(path: Path, tally: Tally) -> Iterator[Record]:
    """One actor's records, in the order written."""
    with path.open("rb") as file:
        for line in whole_lines(file, tally):
            if (record := parse(line, tally)) is not None:
                yield record


def read_run(run: Path, tally: Tally) -> Iterator[Record]:
    """All records of a run, merged by time."""
    return heapq.merge(
        *(read_file(path, tally) for path in sorted(run.glob("*.jsonl"))), key=itemgetter("ts")
    )


def follow(run: Path, tally: Tally, sleep: Callable[[float], None] = time.sleep) -> Iterator[Record]:
    """All records, then new ones as they are written; never ends. New files are picked up."""
    files: dict[Path, BinaryIO] = {}
    try:
        while True:
            for path in run.glob("*.jsonl"):
                if path not in files:
                    files[path] = path.open("rb")
            readers = [_new_records(file, tally) for file in files.values()]
            yield from heapq.merge(*readers, key=itemgetter("ts"))
            sleep(POLL_S)
    finally:
        for file in files.values():
            file.close()


def _new_records(file: BinaryIO, tally: Tally) -> Iterator[Record]:
    if os.fstat(file.fileno()).st_size < file.tell():
        file.seek(0)  # emptied since, for example by logrotate's copytruncate
    for line in whole_lines(file, tally):
        if (record := parse(line, tally)) is not None:
            yield record


@attrs.frozen
class Filter:
    """Selects records; empty fields select everything."""

    actor: str = ""
    """A name (``p0``), or an id or the beginning of one (``p0.9f3a``)."""
    level: str = "debug"
    """The least severe level that is selected."""
    request: str = ""
    """A request's id, or the beginning of it."""

    def __call__(self, record: Record) -> bool:
        return (
            LEVELS.get(record.get("level", "info"), 20) >= LEVELS[self.level]
            and (not self.actor or self._is_actor(str(record.get("actor", ""))))
            and (not self.request or str(record.get("request", "")).startswith(self.request))
        )

    def _is_actor(self, actor: str) -> bool:
        return name_of(actor) == self.actor or ("." in self.actor and actor.startswith(self.actor))


def name_of(actor: str) -> str:
    """The configured name in an actor's id."""
    return actor.partition(".")[0]


def data_of(record: Record) -> Record:
    """The data of an event: everything except the keys that every line has, and the request."""
    return {key: value for key, value in record.items() if key not in (*FIRST_KEYS, "request")}


# ---- one request ---------------------------------------------------------------------------------------------


@attrs.frozen
class Moment:
    """One event of a request's timeline."""

    at_ms: float
    """Time since the request's first event."""
    until_ms: float
    """Time of the next event."""
    actor: str
    event: str
    level: str
    data: Record


@attrs.frozen
class Timeline:
    """The events of one request across the actors."""

    request: str
    total_ms: float
    moments: tuple[Moment, ...]

    def to_dict(self) -> Record:
        """The timeline for JSON."""
        return attrs.asdict(self)


def timeline(records: Iterable[Record], request: str) -> Timeline:
    """The timeline of the request whose id begins with ``request``.

    Raises UserError for no such request, or several.
    """
    found = [
        record
        for record, _ in zip(filter(Filter(request=request), records), range(REQUEST_LINES_MAX), strict=False)
    ]
    ids = sorted({str(record["request"]) for record in found})
    if not ids:
        raise UserError(f"no line of this run is about a request {request!r}")
    if len(ids) > 1 and request not in ids:
        raise UserError(
            f"{request!r} begins {len(ids)} requests: {', '.join(ids[:8])}{', ...' * (len(ids) > 8)}"
        )
    chosen = request if request in ids else ids[0]
    lines = [record for record in found if record["request"] == chosen]
    times = [moment_ms(record) - moment_ms(lines[0]) for record in lines]
    moments = [
        Moment(
            at, until, name_of(line.get("actor", "")), line["event"], line.get("level", "info"), data_of(line)
        )
        for line, at, until in zip(lines, times, [*times[1:], times[-1]], strict=True)
    ]
    return Timeline(chosen, times[-1], tuple(moments))


def moment_ms(record: Record) -> float:
    """A record's time in milliseconds; 0 if it is malformed."""
    try:
        return datetime.fromisoformat(record["ts"]).timestamp() * 1e3
    except ValueError:
        return 0.0


def bar(start: float, end: float, whole: float, width: int) -> str:
    """A bar of ``width`` characters that shows where ``start`` to ``end`` lies in ``whole``."""
    scale = width / whole if whole > 0 else 0.0
    first = min(int(start * scale), width - 1)
    length = max(1, round(end * scale) - first)
    return ("·" * first + "█" * length).ljust(width, "·")[:width]


# ---- the whole run -------------------------------------------------------------------------------------------


@attrs.define
class Summary:
    """The outcomes of a run's requests. Add every record, then read :meth:`to_dict`."""

    received: int = 0
    outcomes: Counter[str] = attrs.field(factory=Counter)
    """Finished requests by outcome; errors by ``error: code``."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    resubmitted: int = 0
    actors: set[str] = attrs.field(factory=set)
    prefills: Counter[str] = attrs.field(factory=Counter)
    decodes: Counter[str] = attrs.field(factory=Counter)
    """Finished requests by the worker that decoded them; ``prefills``: by the one that ran the prompt."""
    troubles: Counter[str] = attrs.field(factory=Counter)
    """Events at warning or above, as ``level: event``."""
    first_ts: str = ""
    last_ts: str = ""
    _times: dict[str, array[float]] = attrs.field(
        init=False, factory=lambda: {key: array("d") for key in ("ttft_ms", "tpot_ms", "total_ms")}
    )

    def add(self, record: Record) -> None:
        """Add one record."""
        self.first_ts = self.first_ts or record["ts"]
        self.last_ts = record["ts"]
        self.actors.add(name_of(str(record.get("actor", ""))))
        if LEVELS.get(record.get("level", "info"), 20) >= LEVELS["warning"]:
            self.troubles[f"{record['level']}: {record['event']}"] += 1
        match record["event"]:
            case "request received":
                self.received += 1
            case "request resubmitted":
                self.resubmitted += 1
            case "request finished":
                self._finished(record)

    def _finished(self, record: Record) -> None:
        outcome = str(record.get("outcome", "unknown"))
        self.outcomes[f"{outcome}: {record['code']}" if record.get("code") else outcome] += 1
        self.prompt_tokens += whole(record.get("prompt_tokens"))
        self.cached_tokens += whole(record.get("cached_tokens"))
        self.output_tokens += whole(record.get("output_tokens"))
        for part, workers in (("prefill", self.prefills), ("decode", self.decodes)):
            if record.get(part):
                workers[name_of(str(record[part]))] += 1
        for key, values in self._times.items():
            if isinstance(value := record.get(key), int | float):
                values.append(value)

    def to_dict(self) -> Record:
        """All results, for people and machines. Times are percentiles in milliseconds."""
        finished = self.outcomes.total()
        elapsed_s = (moment_ms({"ts": self.last_ts}) - moment_ms({"ts": self.first_ts})) / 1e3
        return {
            "elapsed_s": round(elapsed_s, 3),
            "actors": sorted(self.actors),
            "requests": {
                "received": self.received,
                "finished": finished,
                "unfinished": max(0, self.received - finished),
                "resubmitted": self.resubmitted,
                "outcomes": dict(self.outcomes.most_common()),
            },
            **{key: percentiles(values) for key, values in self._times.items()},
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "cached_share": round(self.cached_tokens / self.prompt_tokens, 4) if self.prompt_tokens else 0.0,
            "output_tokens": self.output_tokens,
            "workers": {
                name: {"prefills": self.prefills[name], "decodes": self.decodes[name]}
                for name in sorted({*self.prefills, *self.decodes})
            },
            "troubles": dict(self.troubles.most_common()),
        }


def summarize(records: Iterable[Record]) -> Summary:
    """The summary of a run."""
    summary = Summary()
    for record in records:
        summary.add(record)
    return summary


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 by the nearest rank; empty for no values."""
    ordered = sorted(values)
    return {f"p{p}": round(percentile(ordered, p), 3) for p in (50, 90, 99)} if ordered else {}


def whole(value: Any) -> int:
    """``value`` if it is a whole number, otherwise 0: a damaged line must not spoil the sums."""
    return value if isinstance(value, int) else 0
