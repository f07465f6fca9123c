"""The common parts of the notes under docs/measurements: header, tables, numbers, merging of samples."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import attrs
import msgspec

Sample = TypeVar("Sample", bound=attrs.AttrsInstance)

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "measurements"
INSTRUCTIONS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512f", "avx2")
"""The CPU flags that decide how fast a model can run."""


@attrs.frozen
class Note:
    """One file of measurements, ``<date>-<name>.md``, with its plots next to it."""

    name: str
    folder: Path = FOLDER
    date: str = attrs.field(factory=lambda: f"{datetime.now(UTC):%Y-%m-%d}")
    commit: str = attrs.field(factory=lambda: commit())
    """The commit at the time the note is created. Its own plots do not count as changes."""

    @property
    def path(self) -> Path:
        """The note itself."""
        return self.folder / f"{self.date}-{self.name}.md"

    def plot(self, what: str) -> Path:
        """Path of one of the note's plots."""
        return self.folder / f"{self.date}-{self.name}-{what}.svg"

    def write(self, title: str, command: str, *parts: str) -> Path:
        """Write the note: title, machine, commit, command, then ``parts`` (paragraphs, tables, images)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        head = f"Machine: {machine()}. Commit {self.commit}. Command: `{command}`."
        self.path.write_text("\n\n".join([f"# {title} ({self.date})", head, *parts]) + "\n")
        return self.path


def take_pieces(parser: argparse.ArgumentParser) -> None:
    """Add ``--json`` and ``--merge``, for runs in pieces: see :func:`save` and :func:`merged`."""
    parser.add_argument("--json", type=Path, help="write samples to this file, and no note: for --merge")
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        help="measure nothing: write the note of these files' samples together",
    )


def save(samples: Sequence[attrs.AttrsInstance], path: Path) -> None:
    """Write samples for :func:`merged`."""
    path.write_text(json.dumps([attrs.asdict(one) for one in samples], indent=1) + "\n")


def merged(paths: Iterable[Path], kind: type[Sample], same: Sequence[str]) -> list[Sample]:
    """The samples of several runs, to be shown in one table.

    Raises ValueError if there are none, or if they differ in a field named in ``same``.
    """
    samples = [one for path in paths for one in msgspec.json.decode(path.read_bytes(), type=list[kind])]  # type: ignore[valid-type]
    if not samples:
        raise ValueError("no samples to merge")
    for what in same:
        if len(found := {getattr(one, what) for one in samples}) > 1:
            raise ValueError(
                f"runs of {what} {', '.join(sorted(map(_as_text, found)))} are not to be compared"
            )
    return samples


def _as_text(value: object) -> str:
    """A value as a person would write it in a command."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def machine() -> str:
    """This machine in a line: CPU, cores, instruction sets, memory, system, Python."""
    cpu = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", cpu, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", cpu, re.MULTILINE)
    sets = [one for one in INSTRUCTIONS if flags and one in flags[1].split()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [
        f"{len(os.sched_getaffinity(0))} cores of {model[1] if model else platform.machine()}",
        f"({', '.join(sets)})" if sets else "",
        f"{memory:.0f} GiB, Linux {platform.release()}, Python {platform.python_version()}",
    ]
    return " ".join(filter(None, parts))


def commit() -> str:
    """The checked-out commit, with ``-dirty`` if files differ from it.

    Files under docs/measurements do not count: an earlier run may have written them.
    """

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", f":(exclude){FOLDER.relative_to(ROOT)}")
    return (git("rev-parse", "--short=7", "HEAD") or "unknown") + ("-dirty" if changed else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. Raises ValueError when a row is longer or shorter than the head."""
    if wrong := [row for row in rows if len(row) != len(head)]:
        raise ValueError(f"a table of {len(head)} columns got the row {wrong[0]}")
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """A number with three significant digits; from 100 on, a whole number with thousands separators."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def quoted(arguments: Sequence[str]) -> list[str]:
    """The command-line words that a note repeats: all but ``--json`` and its path."""
    return [
        word
        for before, word in zip(["", *arguments], arguments, strict=False)
        if before != "--json" and not word.startswith("--json")
    ]
