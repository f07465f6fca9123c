"""The record that is kept of every request, as a line of JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import orjson

from loadgen.errors import LoadgenError


@attrs.define
class Record:
    """One request. Times in ``_s`` are seconds since the run began.

    None stands for what did not happen or was not reported.
    """

    session: str
    turn: int
    tenant: str
    due_s: float
    """When it should have been sent: at its arrival, or a think time after the previous answer."""
    sent_s: float
    asked_tokens: int
    prompt_digest: str = ""
    end_s: float = 0.0
    error: str = ""
    """The kind of failure, such as ``http 429``, ``timeout`` or ``incomplete``; empty for a success."""
    detail: str = ""
    event_ms: list[float] = attrs.field(factory=list)
    """When each event with tokens arrived, in milliseconds since the request was sent."""
    first_tokens: int | None = None
    """Tokens up to the end of the first event, if the server says how many there are."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str = ""
    request_id: str = ""
    """The server's id of the request, from the header ``x-request-id``."""
    answer_digest: str = ""
    answer: str | None = None
    token_ids: list[int] | None = None

    @property
    def ok(self) -> bool:
        """Whether the complete answer arrived."""
        return not self.error

    @property
    def lag_s(self) -> float:
        """How late the request was sent."""
        return self.sent_s - self.due_s

    @property
    def ttft_ms(self) -> float | None:
        """Time to first token."""
        return self.event_ms[0] if self.event_ms else None

    @property
    def jct_ms(self) -> float:
        """Job completion time: from sending to the end of the answer."""
        return (self.end_s - self.sent_s) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token after those of the first event; None for answers of one event."""
        later = (self.output_tokens or len(self.event_ms)) - (self.first_tokens or 1)
        if later < 1 or len(self.event_ms) < 2:
            return None
        return (self.event_ms[-1] - self.event_ms[0]) / later

    @property
    def gaps_ms(self) -> list[float]:
        """Inter-token latencies: times between events with tokens.

        A server may put several tokens into one event.
        """
        return [after - before for before, after in zip(self.event_ms, self.event_ms[1:], strict=False)]

    def to_json(self) -> bytes:
        """One line of JSON, without the line end."""
        return orjson.dumps({name: value for name, value in attrs.asdict(self).items() if value is not None})


FIELDS = {field.name for field in attrs.fields(Record)}
NEEDED = {field.name for field in attrs.fields(Record) if field.default is attrs.NOTHING}


def from_json(document: dict[str, Any]) -> Record:
    """A record from a line of ``requests.jsonl``; unknown fields are ignored."""
    return Record(**{name: value for name, value in document.items() if name in FIELDS})


def read(path: Path) -> list[Record]:
    """All records of a run. Raises LoadgenError for anything but a file of records."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise LoadgenError(
            f"{path}: cannot be read: {error.strerror}. Give a directory that `run --out` wrote"
        ) from None
    return list(_parsed(path, lines))


def _parsed(path: Path, lines: Iterable[bytes]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        try:
            document = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise LoadgenError(f"{path}: line {number} is not JSON ({error})") from None
        lacks = NEEDED - set(document)
        if lacks:
            raise LoadgenError(f"{path}: line {number} lacks {', '.join(sorted(lacks))}")
        yield from_json(document)
