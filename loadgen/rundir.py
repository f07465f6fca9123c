"""A run's directory: ``requests.jsonl`` (a line for each request), ``summary.json``, ``report.html``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import orjson

from loadgen import records
from loadgen.errors import LoadgenError
from loadgen.records import Record

REQUESTS = "requests.jsonl"
SUMMARY = "summary.json"
REPORT = "report.html"
SWEEP = "sweep.json"


@attrs.frozen
class Run:
    """A run that is over: what was summed up, and every request."""

    summary: dict[str, Any]
    records: list[Record]
    directory: Path | None = None

    @property
    def label(self) -> str:
        """Its name in reports."""
        return str(self.summary.get("label") or (self.directory.name if self.directory else "run"))


def fresh(directory: Path) -> Path:
    """Make a directory for a run; LoadgenError where one was written already, so that no run is lost."""
    if any((directory / name).exists() for name in (SUMMARY, REQUESTS, SWEEP)):
        raise LoadgenError(f"--out {directory}: holds a run already; give another directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoadgenError(f"--out {directory}: cannot be made: {error.strerror}") from None
    return directory


@contextmanager
def journal(directory: Path) -> Iterator[BinaryIO]:
    """The file for the requests; lines are on disk when it closes."""
    with (directory / REQUESTS).open("wb") as file:
        yield file


def write_json(path: Path, document: dict[str, Any]) -> None:
    """A JSON file for people and machines."""
    path.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; LoadgenError where there is none."""
    try:
        document = orjson.loads(path.read_bytes())
    except OSError as error:
        raise LoadgenError(
            f"{path}: cannot be read: {error.strerror}. Give a directory that --out wrote"
        ) from None
    except orjson.JSONDecodeError as error:
        raise LoadgenError(f"{path}: is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise LoadgenError(f"{path}: must be a JSON object")
    return document


def read(directory: Path) -> Run:
    """A run as it was written; LoadgenError for a directory that holds none, or one of another version."""
    summary = read_json(directory / SUMMARY)
    if summary.get("format") != 1:
        raise LoadgenError(
            f"{directory / SUMMARY}: has format {summary.get('format')!r}; this loadgen reads format 1"
        )
    return Run(summary, records.read(directory / REQUESTS), directory)


def points(directory: Path) -> list[Run]:
    """The runs of a sweep in its order, or the one run of a directory."""
    if not (directory / SWEEP).exists():
        return [read(directory)]
    return [read(directory / str(name)) for name in read_json(directory / SWEEP)["points"]]
