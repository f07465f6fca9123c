"""Reads workload files (JSON, JSON lines, CSV and text, plain or gzipped) into records."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import orjson

from loadgen.errors import LoadgenError
from loadgen.workload import Ruler, Session

Record = dict[str, Any]


@attrs.frozen
class Settings:
    """What readers need to know in addition to the file."""

    ruler: Ruler = attrs.field(factory=Ruler)
    output_tokens: int = 256
    """Answer length for requests whose file does not give one."""
    think_s: float = 0.0
    document_tokens: int | None = None
    questions: int | None = None
    trial: int | None = None
    prefixes: dict[str, str] = attrs.field(factory=dict)
    prefix: str = ""
    block_tokens: int = 512
    scale: float = 1.0

    def answer_tokens(self, answer: str | None) -> int:
        """Tokens to ask for: the length of the recorded answer, or ``output_tokens`` if there is none."""
        return max(1, self.ruler.tokens(answer)) if answer else self.output_tokens


Reader = Callable[[Sequence[Record], Settings, str], list[Session]]
"""Turns all records of a file into sessions; the last argument is the file's name without its endings."""


@attrs.frozen
class Format:
    """A file format: its name, the fields its records have, and its reader."""

    name: str
    fields: frozenset[str]
    read: Reader


def stem(path: Path) -> str:
    """A file's name without its endings."""
    return path.name.partition(".")[0]


def text_of(path: Path) -> str:
    """A file's text, decompressed. Raises LoadgenError if it cannot be read."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise LoadgenError(f"--data {path}: cannot be read: {error}") from None


def records(path: Path) -> list[Record]:
    """All records of a file; text that is neither JSON nor CSV is one record with the field ``transcript``.

    Raises LoadgenError for a file without records.
    """
    text = text_of(path)
    start = text.lstrip()[:1]
    if start == "[":
        found: Any = _json(path, text)
    elif start == "{":
        found = _lines(path, text)
    elif "," in text.partition("\n")[0]:
        found = list(csv.DictReader(io.StringIO(text)))
    else:
        found = [{"transcript": text}] if start else []
    if not found or not all(isinstance(one, dict) for one in found):
        raise LoadgenError(
            f"--data {path}: holds no records: JSON objects, or rows under a header, are expected"
        )
    return list(found)


def _json(path: Path, text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise LoadgenError(f"--data {path}: is not JSON: {error}") from None


def _lines(path: Path, text: str) -> list[Record]:
    lines = [line for line in text.split("\n") if line.strip()]
    found: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(orjson.loads(line))
        except orjson.JSONDecodeError as error:
            if number == 1:
                return [_json(path, text)]
            raise LoadgenError(f"--data {path}: line {number} is not JSON: {error}") from None
    return found


def read(path: Path, formats: Sequence[Format], settings: Settings, name: str) -> list[Session]:
    """The sessions of a file in the first of these formats that the fields of its first record match.

    ``name``: begins the ids of sessions and of content for which the file has none of its own. Raises
    LoadgenError if no format matches, or if the records are not as that format's.
    """
    found = records(path)
    keys = set(found[0])
    for one in formats:
        if one.fields <= keys:
            try:
                return one.read(found, settings, name)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise LoadgenError(
                    f"--data {path}: is not {one.name} as published: {type(error).__name__} {error}"
                ) from None
    known = "; ".join(f"{one.name}: {', '.join(sorted(one.fields))}" for one in formats)
    raise LoadgenError(f"--data {path}: has the fields {', '.join(sorted(keys))}; known are {known}")


def grouped(rows: Sequence[Record], key: str) -> Iterator[tuple[str, list[Record]]]:
    """Records grouped by a field, in the order in which its values first appear."""
    groups: dict[str, list[Record]] = {}
    for row in rows:
        groups.setdefault(str(row[key]), []).append(row)
    yield from groups.items()
