"""What a running actor reports about itself: JSON lines in its log file, and metrics in Prometheus' format.

Modules log through ``structlog.get_logger()`` only; each process calls :func:`configure` once. Serving never
depends on the log: a line that cannot be written (a full disk) is counted, and the count is written when
there is room again.
"""

from __future__ import annotations

import json
import logging
import math
import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import orjson
import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor

from memserve.errors import UserError
from memserve.identity import actor_name
from memserve.messages import Member

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
FIRST_KEYS = ("ts", "level", "event", "actor", "kind", "pid")
"""The keys that every line begins with, so that people can read the raw file too."""


# ---- logs ----------------------------------------------------------------------------------------------------


def configure(
    path: str | Path, level: str, *, actor: str, kind: str, pid: int | None = None, later: bool = False
) -> None:
    """Write this process's structlog lines, and libraries' warnings, to the file ``path`` as JSON lines.

    Raises UserError when the file cannot be opened, unless it may be opened ``later``, with the first line for
    which it can be.
    """
    identity = {"actor": actor, "kind": kind, "pid": os.getpid() if pid is None else pid}
    sink = LineFile.open(Path(path), identity, later=later)
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
        # Local variables are left out: they hold prompts and keys.
        structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False, max_frames=30)),
        _identified(identity),
        _rendered,
    ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: sink,
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=max(LEVELS[level], logging.WARNING), handlers=[ForeignLines()], force=True)


@attrs.define(eq=False)
class LineFile:
    """A log file. A line is one append, so lines of threads and processes never mix.

    Failures are counted, not raised.
    """

    _fd: int
    """-1 while the file is not open."""
    _identity: Mapping[str, object]
    _path: Path | None = None
    """The file to open with the next line; None: it is not opened again."""
    lost: int = attrs.field(init=False, default=0)
    """Lines that could not be written since the last one that could."""
    _torn: bool = attrs.field(init=False, default=False)

    @classmethod
    def open(cls, path: Path, identity: Mapping[str, object], *, later: bool = False) -> LineFile:
        """Open the file for appending, and make its directories.

        If that fails, it is tried again with each line if it may be opened ``later``. Otherwise raises UserError.
        """
        try:
            return cls(_opened(path), identity)
        except OSError as error:
            if later:
                return cls(-1, identity, path)
            raise UserError(f"logging.dir: cannot write {path}: {error.strerror}") from error

    def write(self, line: bytes) -> None:
        """Append one line."""
        if self.lost and not self._append(self._loss()):
            self.lost += 1
            return
        if self._append(line):
            self.lost = 0
        else:
            self.lost += 1

    debug = info = warning = error = critical = msg = write
    """The methods that structlog calls, one per level."""

    def close(self) -> None:
        """Close the file; later lines are counted as lost."""
        fd, self._fd, self._path = self._fd, -1, None
        if fd >= 0:
            os.close(fd)

    def _append(self, line: bytes) -> bool:
        """Whether the whole line was written.

        A full disk may take only part of it; the next append starts a new line.
        """
        data = b"\n" + line + b"\n" if self._torn else line + b"\n"
        try:
            if self._fd < 0 and self._path is not None:
                self._fd = _opened(self._path)
            written = os.write(self._fd, data)
        except OSError:
            return False
        self._torn = written < len(data)
        return not self._torn

    def _loss(self) -> bytes:
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        return to_json(
            {"ts": now, "level": "warning", "event": "log lines lost", **self._identity, "lines": self.lost}
        )


def _opened(path: Path) -> int:
    """A descriptor to append to a file, which is made, with its directories, if it is missing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)


class ForeignLines(logging.Handler):
    """Forwards what libraries log through the standard library's logging to this process's log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as one line."""
        level = max(
            (name for name in LEVELS if LEVELS[name] <= record.levelno),
            key=LEVELS.__getitem__,
            default="debug",
        )
        log = structlog.get_logger()
        exc_info = record.exc_info if record.exc_info and record.exc_info[0] else None
        getattr(log, level)(
            "library message", library=record.name, message=record.getMessage(), exc_info=exc_info
        )


def _identified(identity: Mapping[str, object]) -> Processor:
    """Adds the actor's identity to each line, and puts the first keys in order."""

    def processor(_logger: Any, _method: str, event: EventDict) -> EventDict:
        event.update(identity)
        first = {key: event.pop(key) for key in FIRST_KEYS if key in event}
        return {**first, **event}

    return processor


def _rendered(_logger: Any, _method: str, event: EventDict) -> bytes:
    return to_json(event)


def to_json(value: Any) -> bytes:
    """JSON of any value; a value without a JSON form is written as its repr."""
    try:
        return orjson.dumps(value, default=repr)
    except TypeError:  # an integer beyond 64 bits, a key that is not a string, half of a surrogate pair
        text = json.dumps(value, default=repr, skipkeys=True, ensure_ascii=False)
        return text.encode(errors="replace")  # orjson, which reads the logs, refuses half of a surrogate pair


# ---- metrics -------------------------------------------------------------------------------------------------

TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
"""Upper bounds of vLLM's buckets for the time to first token, so that its dashboards work."""


@attrs.define
class Histogram:
    """Counts by upper bound, as in a Prometheus histogram."""

    bounds: tuple[float, ...] = TTFT_BUCKETS_S
    """Upper bounds of the buckets, ascending, in the unit of the observed values."""
    counts: list[int] = attrs.field(init=False)
    """Number of values within each bound and above the previous one; the last is for those above all."""
    sum: float = attrs.field(init=False, default=0.0)

    def __attrs_post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


Labels = Mapping[str, str]
Metric = float | Histogram


@attrs.define
class Exposition:
    """Samples grouped by metric, so that each has its HELP and TYPE once, before all of its samples."""

    _families: dict[str, tuple[str, list[str]]] = attrs.field(init=False, factory=dict)

    def add(self, name: str, value: Metric, labels: Labels) -> None:
        """Add one sample, or all of a histogram's. A name that ends in ``_total`` is a counter."""
        kind = (
            "histogram" if isinstance(value, Histogram) else "counter" if name.endswith("_total") else "gauge"
        )
        header = f"# HELP {name} {_escaped(describe(name))}\n# TYPE {name} {kind}"
        _, samples = self._families.setdefault(name, (header, []))
        if not isinstance(value, Histogram):
            samples.append(f"{name}{_braced(labels)} {_number(value)}")
            return
        total = 0
        for bound, count in zip((*value.bounds, math.inf), value.counts, strict=True):
            total += count
            samples.append(f"{name}_bucket{_braced({**labels, 'le': _number(bound)})} {total}")
        samples.append(f"{name}_sum{_braced(labels)} {_number(value.sum)}")
        samples.append(f"{name}_count{_braced(labels)} {total}")

    def render(self) -> bytes:
        """The samples in the text exposition format 0.0.4 (media type ``text/plain; version=0.0.4``)."""
        lines = [line for header, samples in self._families.values() for line in (header, *samples)]
        return "".join(f"{line}\n" for line in lines).encode()


def render_metrics(
    members: Iterable[Member], own: Mapping[str, Metric], labels: Labels | None = None
) -> bytes:
    """The members' reported figures, the answering process's own metrics, and the same under vLLM's names.

    ``own`` has plain names, which get the prefix ``memserve_``, or vLLM's (``vllm:...``); its samples carry
    ``labels``.
    """
    members = sorted(members, key=lambda member: (member.kind, member.id))
    exposition = Exposition()
    for member in members:
        who = {"actor": actor_name(member.id), "kind": member.kind}
        exposition.add("memserve_up", float(member.state == "ready"), who)
        for name, value in member.load.items():
            exposition.add(f"memserve_{name}", value, who)
    for name, metric in own.items():
        exposition.add(name if ":" in name else f"memserve_{name}", metric, labels or {})
    for name, value in vllm_metrics(members).items():
        exposition.add(name, value, {})
    return exposition.render()


def vllm_metrics(members: Sequence[Member]) -> dict[str, float]:
    """The members' load under the names that vLLM's dashboards and autoscalers look for."""
    workers = [member.load for member in members if member.kind in ("PrefillWorker", "DecodeWorker")]
    shards = [member.load for member in members if member.kind == "MemPoolShard"]
    schedulers = [member.load for member in members if member.kind == "GlobalScheduler"]

    def total(loads: list[dict[str, float]], name: str) -> float:
        return sum(load.get(name, 0.0) for load in loads)

    pages = total(shards, "pages_total")
    idle = total(shards, "pages_free") + total(shards, "pages_evictable")
    return {
        "vllm:num_requests_running": total(workers, "requests_running"),
        "vllm:num_requests_waiting": total(workers, "requests_waiting") + total(schedulers, "requests_held"),
        "vllm:kv_cache_usage_perc": 1 - idle / pages if pages else 0.0,
        "vllm:prefix_cache_queries_total": total(workers, "requested_tokens_total"),
        "vllm:prefix_cache_hits_total": total(workers, "cached_tokens_total"),
    }


HELP: dict[str, str] = {
    "memserve_up": "1 while the actor is ready, 0 while it starts or drains",
    "vllm:num_requests_running": "Requests in the workers' batches",
    "vllm:num_requests_waiting": "Requests that wait for a worker, for pages or for their handoff",
    "vllm:kv_cache_usage_perc": "Pages held by running requests, as a share of all (1 is all)",
    "vllm:prefix_cache_queries_total": "Prompt tokens looked up in the pool",
    "vllm:prefix_cache_hits_total": "Prompt tokens found in the pool",
    "vllm:time_to_first_token_seconds": "From the request's arrival to its first token",
}
"""Help texts of metrics whose names do not say everything."""


def describe(name: str) -> str:
    """Help text of a metric: its own, or its name in words with the unit."""
    if name in HELP:
        return HELP[name]
    words = name.removeprefix("memserve_").removesuffix("_total").replace("_", " ")
    for suffix, unit in (("ms", "milliseconds"), ("s", "seconds"), ("bytes", "bytes")):
        if words.endswith(f" {suffix}"):
            words = f"{words.removesuffix(suffix).rstrip()}, in {unit}"
    return words[:1].upper() + words[1:] + (", since the actor's start" if name.endswith("_total") else "")


def _braced(labels: Labels) -> str:
    inside = ",".join(f'{key}="{_escaped(value, quoted=True)}"' for key, value in labels.items())
    return f"{{{inside}}}" if inside else ""


def _escaped(text: str, *, quoted: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quoted else text


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(float(value))
