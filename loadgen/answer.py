"""Turns the events of an answer into tokens, text and usage."""

from __future__ import annotations

import hashlib
from typing import Any

import attrs
import orjson

DONE = b"[DONE]"


@attrs.define
class Answer:
    """One answer as it arrives."""

    event_s: list[float] = attrs.field(factory=list)
    """When each event with tokens arrived."""
    first_tokens: int | None = None
    """Tokens up to the end of the first event with tokens, by its ids or its usage; None if it has neither."""
    parts: list[str] = attrs.field(factory=list)
    ids: list[int] | None = None
    usage: dict[str, Any] | None = None
    finish_reason: str = ""
    error: str = ""
    detail: str = ""
    done: bool = False

    def receive(self, name: str, data: bytes, now: float) -> int:
        """Take in an event; 1 if it brought tokens, otherwise 0."""
        if data == DONE:
            self.done = True
            return 0
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            self._failed("bad event", data.decode(errors="replace"))
            return 0
        if not isinstance(chunk, dict):
            self._failed("bad event", str(chunk))
            return 0
        if name == "error" or chunk.get("error"):
            self._failed("server error", error_text(chunk))
            return 0
        self.usage = chunk.get("usage") or self.usage
        first = not self.event_s
        brought = sum(self._choice(one, now) for one in chunk.get("choices") or ())
        if first and brought:
            so_far = (chunk.get("usage") or {}).get("completion_tokens")
            self.first_tokens = so_far or (len(self.ids) if self.ids is not None else None)
        return brought

    def _choice(self, choice: dict[str, Any], now: float) -> int:
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        delta = choice.get("delta")
        if delta is None:
            text = choice.get("text")
        else:
            text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
        ids = choice.get("token_ids")
        if ids:
            self.ids = (self.ids or []) + ids
        if not text and not ids:
            return 0
        if text:
            self.parts.append(text)
        self.event_s.append(now)
        return 1

    def _failed(self, error: str, detail: str) -> None:
        if not self.error:
            self.error, self.detail = error, detail[:300]

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self.parts)

    @property
    def digest(self) -> str:
        """A short digest of the answer's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def tokens(self, key: str) -> int | None:
        """A count from the usage, such as ``prompt_tokens``; None if the server reported none."""
        value = (self.usage or {}).get(key)
        return value if isinstance(value, int) else None

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens that were found in a cache; None if the server did not report them."""
        details = (self.usage or {}).get("prompt_tokens_details") or {}
        value = details.get("cached_tokens")
        return value if isinstance(value, int) else None

    @property
    def output_tokens(self) -> int:
        """Tokens by the usage; without it, by the ids; without both, one per event."""
        reported = self.tokens("completion_tokens")
        if reported is not None:
            return reported
        return len(self.ids) if self.ids is not None else len(self.event_s)


def error_text(document: Any) -> str:
    """The message in an error answer of an OpenAI-compatible server, or the answer itself."""
    error = document.get("error", document) if isinstance(document, dict) else document
    message = error.get("message") if isinstance(error, dict) else error
    return str(message if message is not None else error)
