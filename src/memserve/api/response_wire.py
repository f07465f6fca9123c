"""The answers of POST /v1/responses: a ``response`` with its items, whole or as OpenAI's semantic events.

An item is closed where the next one begins, so that at most one is open. A response that is not streamed is what
its stream would end with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
import msgspec

from memserve.api.call_formats import HERMES, CallFormat
from memserve.api.call_parser import CallPart
from memserve.api.choices import Choice, Delta, Piece
from memserve.api.errors import ApiError
from memserve.api.logprobs import Piece as TokenPiece
from memserve.api.logprobs import TokenLogprobs, chat_logprobs
from memserve.api.prompts import Prompt
from memserve.api.thoughts import Thought
from memserve.api.wire import EventStream, Head

Status = Literal["in_progress", "completed", "incomplete", "failed"]


@attrs.frozen
class ResponseWire:
    """/v1/responses."""

    prompt: Prompt
    settings: Mapping[str, Any]
    """Fields of the response that repeat those of the request."""
    piece: TokenPiece | None = None
    """Set if log probabilities are requested."""
    calls: CallFormat = HERMES
    """Format in which the model writes tool calls; it determines what their ids look like."""

    def whole(self, head: Head, answers: Sequence[tuple[Choice, Delta]]) -> dict[str, Any]:
        ((choice, delta),) = answers
        stream = ResponseStream(self, head, choice)
        stream.events(choice, delta)
        return stream.response()

    def stream(self, head: Head, choices: Sequence[Choice]) -> EventStream:
        (choice,) = choices
        return ResponseStream(self, head, choice)


@attrs.frozen
class _Kind:
    """What a kind of items is called."""

    prefix: str
    """Of their ids."""
    text: str
    """Stem of the events about their text."""
    part: str | None
    """Type of the part that holds the text; None: the item itself does."""


_MESSAGE = _Kind("msg", "response.output_text", "output_text")
_REASONING = _Kind("rs", "response.reasoning_text", "reasoning_text")
_CALL = _Kind("fc", "response.function_call_arguments", None)


@attrs.define
class _Item:
    """An item of the output while it is written."""

    kind: _Kind
    id: str
    index: int
    call_id: str = ""
    name: str = ""
    texts: list[str] = attrs.field(factory=list)
    logprobs: list[dict[str, Any]] = attrs.field(factory=list)
    mould: bytes = b""
    """What every event about more text begins with, if it has no log probabilities."""

    @property
    def place(self) -> dict[str, Any]:
        """Where its text is, in the events about it."""
        place: dict[str, Any] = {"item_id": self.id, "output_index": self.index}
        return place if self.kind.part is None else place | {"content_index": 0}

    @property
    def text(self) -> str:
        """All of its text so far."""
        return "".join(self.texts)

    def part(self, text: str) -> dict[str, Any]:
        """The part that holds ``text``."""
        part = {"type": self.kind.part, "text": text}
        return part | {"annotations": [], "logprobs": self.logprobs} if self.kind is _MESSAGE else part

    def shown(self, status: Status, empty: bool = False) -> dict[str, Any]:
        """The item as clients get it; ``empty``: before it has any text."""
        shown: dict[str, Any] = {"id": self.id, "status": status}
        if self.kind is _CALL:
            arguments = "" if empty else self.text
            call = {"type": "function_call", "call_id": self.call_id, "name": self.name}
            return shown | call | {"arguments": arguments}
        content = [] if empty else [self.part(self.text)]
        if self.kind is _REASONING:
            return shown | {"type": "reasoning", "summary": [], "content": content, "encrypted_content": None}
        return shown | {"type": "message", "role": "assistant", "content": content}


class ResponseStream:
    """The events of one response, in order."""

    def __init__(self, wire: ResponseWire, head: Head, choice: Choice) -> None:
        self._wire, self._head, self._choice = wire, head, choice
        self._number = 0
        """Of the next event."""
        self._item: _Item | None = None
        self._closed: list[dict[str, Any]] = []
        self._status: Status = "in_progress"
        self._error: dict[str, Any] | None = None
        self._pending: list[TokenLogprobs] = []
        """Log probabilities of tokens whose text has not come."""

    def events(self, choice: Choice, delta: Delta) -> bytes:
        if self._item is not None and not delta.pieces and not delta.finish and self._item.kind is _MESSAGE:
            return self._more(self._item, delta.text) if delta.text else b""
        events = b"" if self._number else self._beginning()
        events += b"".join([self._event(choice, one) for one in delta.pieces or [delta.text]])
        return events + self._finish(delta.finish) if delta.finish else events

    def ending(self) -> bytes:
        return self._of_response()

    def failure(self, error: ApiError) -> bytes:
        if not self._number:
            fields = {"code": error.code, "message": error.message, "param": error.param}
            return self._named("error", fields)
        # OpenAI has these two codes for what can happen here, and clients know no others.
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self._status, self._error = "failed", {"code": code, "message": error.message}
        self._closed += [self._item.shown("incomplete")] if self._item is not None else []
        return self._of_response()

    def response(self) -> dict[str, Any]:
        """The response so far."""
        cut = self._status == "incomplete"
        return {
            "id": f"resp_{self._head.id}",
            "object": "response",
            "created_at": self._head.created,
            "status": self._status,
            "model": self._head.model,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._closed,
            **self._wire.settings,
            "usage": _usage(self._wire.prompt, self._choice)
            if self._status in ("completed", "incomplete")
            else None,
        }

    def _event(self, choice: Choice, piece: Piece | TokenLogprobs) -> bytes:
        """The events for one more piece of the answer."""
        match piece:
            case TokenLogprobs():
                self._pending.append(piece)
                return b""
            case Thought(text):
                self._pending.clear()
                if not text:
                    return b""
                opened = self._opened(_REASONING)
            case CallPart(number, name, text):
                self._pending.clear()
                call_id = self._wire.calls.call_id(self._head.id, choice.index, number)
                opened = b"" if name is None else self._open(_CALL, call_id, name)
            case str(text):
                opened = self._opened(_MESSAGE) if text else b""
        assert self._item is not None or not text, "a piece of a call without its beginning"
        return opened + self._more(self._item, text) if self._item is not None and text else opened

    def _beginning(self) -> bytes:
        return self._named("response.created", {"response": self.response()}) + self._of_response()

    def _of_response(self) -> bytes:
        return self._named(f"response.{self._status}", {"response": self.response()})

    def _opened(self, kind: _Kind) -> bytes:
        """Open an item, unless one of this kind is open."""
        return b"" if self._item is not None and self._item.kind is kind else self._open(kind)

    def _open(self, kind: _Kind, call_id: str = "", name: str = "") -> bytes:
        closed = self._close("completed")
        index = len(self._closed)
        self._item = item = _Item(kind, f"{kind.prefix}_{self._head.id}_{index}", index, call_id, name)
        started = {"type": f"{kind.text}.delta", **item.place}
        started |= {"logprobs": []} if kind is _MESSAGE else {}
        begun = msgspec.json.encode(started)[:-1]
        item.mould = b"event: %b.delta\ndata: %b" % (kind.text.encode(), begun) + b',"sequence_number":'
        shown = {"output_index": index, "item": item.shown("in_progress", empty=True)}
        added = self._named("response.output_item.added", shown)
        if kind.part is not None:
            added += self._named("response.content_part.added", item.place | {"part": item.part("")})
        return closed + added

    def _more(self, item: _Item, text: str) -> bytes:
        """The event for more of the text of ``item``."""
        item.texts.append(text)
        if self._wire.piece is None or item.kind is not _MESSAGE:
            number, self._number = self._number, self._number + 1
            return item.mould + b'%d,"delta":%b}\n\n' % (number, msgspec.json.encode(text))
        known = chat_logprobs(self._pending, self._wire.piece)["content"]
        self._pending.clear()
        item.logprobs += known
        return self._named(f"{item.kind.text}.delta", item.place | {"delta": text, "logprobs": known})

    def _close(self, status: Status) -> bytes:
        """Close the open item, if any."""
        if (item := self._item) is None:
            return b""
        shown = item.shown(status)
        self._item = None
        self._closed.append(shown)
        whole: dict[str, Any] = (
            {"name": item.name, "arguments": item.text} if item.kind is _CALL else {"text": item.text}
        )
        whole |= {"logprobs": item.logprobs} if item.kind is _MESSAGE else {}
        events = self._named(f"{item.kind.text}.done", item.place | whole)
        if item.kind.part is not None:
            events += self._named("response.content_part.done", item.place | {"part": item.part(item.text)})
        return events + self._named("response.output_item.done", {"output_index": item.index, "item": shown})

    def _finish(self, finish: str) -> bytes:
        """Close the last item, as the answer is complete. An answer of nothing is an empty message."""
        events = b"" if self._item is not None else self._open(_MESSAGE)
        if self._pending and self._item is not None and self._item.kind is _MESSAGE:
            events += self._more(self._item, "")  # the token that ended the answer has no text
        self._status = "incomplete" if finish == "length" else "completed"
        return events + self._close(self._status)

    def _named(self, name: str, fields: Mapping[str, Any]) -> bytes:
        """One server-sent event."""
        document = {"type": name, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(document))


def _usage(prompt: Prompt, choice: Choice) -> dict[str, Any]:
    return {
        "input_tokens": len(prompt.tokens),
        "input_tokens_details": {"cached_tokens": choice.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": choice.output_tokens,
        "output_tokens_details": {"reasoning_tokens": choice.thought_tokens},
        "total_tokens": len(prompt.tokens) + choice.output_tokens,
    }
