"""A run's directory: ``requests.jsonl`` (one line per request), ``summary.json``, ``report.html``."""

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
    """A run that has ended: its summary and the records of all requests."""

    summary: dict[str, Any]
    records: list[Record]
    directory: Path | None = None

    @property
    def label(self) -> str:
        """The run's name in reports."""
        return str(self.summary.get("label") or (self.directory.name if self.directory else "run"))


def fresh(directory: Path) -> Path:
    """Make a directory for a run.

    Raises LoadgenError if that fails, or if the directory holds a run already, so that no run is lost.
    """
    try:
        if any((directory / name).exists() for name in (SUMMARY, REQUESTS, SWEEP)):
            raise LoadgenError(f"--out {directory}: holds a run already; give another directory")
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoadgenError(f"--out {directory}: cannot be made: {error.strerror}") from None
    return directory


@contextmanager
def journal(directory: Path) -> Iterator[BinaryIO]:
    """The open file for the requests' records; all lines are written when it closes.

    Raises LoadgenError if it cannot be made.
    """
    try:
        file = (directory / REQUESTS).open("wb")
    except OSError as error:
        raise LoadgenError(f"--out {directory}: cannot be written: {error.strerror}") from None
    with file:
        yield file


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write an indented JSON file."""
    path.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises LoadgenError if the file is missing or holds anything else."""
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
    """Read a run from its directory. Raises LoadgenError if there is none, or if it has another format."""
    summary = read_json(directory / SUMMARY)
    if summary.get("format") != 1:
        raise LoadgenError(
            f"{directory / SUMMARY}: has format {summary.get('format')!r}; this loadgen reads format 1"
        )
    return Run(summary, records.read(directory / REQUESTS), directory)


def points(directory: Path) -> list[Run]:
    """The runs of a sweep in the sweep's order, or the one run of a directory."""
    if not (directory / SWEEP).exists():
        return [read(directory)]
    return [read(directory / str(name)) for name in read_json(directory / SWEEP)["points"]]
