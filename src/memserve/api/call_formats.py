"""How models write the calls of their tools, and how it is told from a model's chat template which way is its own."""

from __future__ import annotations

import hashlib
import re
from typing import Literal

import attrs

Key = Literal["arguments", "parameters"]

_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@attrs.frozen(kw_only=True)
class CallFormat:
    """One way of writing calls. A call itself is a JSON object everywhere: a name, and an object of arguments."""

    name: str
    marker: str
    """Announces calls, anywhere in an answer."""
    close: str = ""
    """Follows each call."""
    key: Key = "arguments"
    """What a forced answer calls the arguments; either is read."""
    before: tuple[str, ...]
    """What a forced answer writes before its first call, between two of them, and behind the last."""
    between: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    bare: bool = False
    """Whether an answer that begins with the object of a call is one."""
    several: bool = True
    """Whether an answer may have several calls."""
    id_prefix: str = "call_"
    id_characters: int = 24
    """Of an id, behind its prefix."""

    @property
    def marks(self) -> tuple[str, ...]:
        """What may be a special token of the tokenizer, whose text an answer does not show otherwise."""
        return (self.marker, self.close) if self.close else (self.marker,)

    def call_id(self, request: str, choice: int, number: int) -> str:
        """The id of a call: the same whenever it is asked for, and another one for every call."""
        digest = hashlib.blake2b(f"{request} {choice} {number}".encode()).digest()
        left, found = int.from_bytes(digest), ""
        for _ in range(self.id_characters):
            left, digit = divmod(left, len(_BASE62))
            found += _BASE62[digit]
        return self.id_prefix + found


_OPEN, _CLOSE, _TOOL_CALLS, _PYTHON = "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"

HERMES = CallFormat(
    name="hermes",
    marker=_OPEN,
    close=_CLOSE,
    before=(_OPEN, "\n"),
    between=("\n", _CLOSE, "\n", _OPEN, "\n"),
    after=("\n", _CLOSE),
)
"""A pair of tags around each call: Qwen, Hermes and many that were trained after them."""
LLAMA3_JSON = CallFormat(
    name="llama3_json", marker=_PYTHON, key="parameters", before=(), bare=True, several=False
)
"""The answer is the call: Llama 3, whose templates refuse conversations with two calls at once."""
MISTRAL = CallFormat(
    name="mistral", marker=_TOOL_CALLS, before=(_TOOL_CALLS, " ["), between=(", ",), after=("]",),
    id_prefix="", id_characters=9,  # their templates refuse ids of other lengths
)  # fmt: skip
"""A JSON array behind a control token."""

CALL_FORMATS = {one.name: one for one in (HERMES, LLAMA3_JSON, MISTRAL)}
_TELLS_TOOLS = re.compile(r"\btools\b")


def tells_tools(template: str | None) -> bool:
    """Whether a chat template tells the model of its tools."""
    return template is not None and _TELLS_TOOLS.search(template) is not None


def format_of(template: str | None) -> CallFormat:
    """How a model with this chat template writes calls; Hermes' way where the template does not say."""
    if not tells_tools(template):
        return HERMES
    assert template is not None
    if _TOOL_CALLS in template:
        return MISTRAL
    if _OPEN not in template and (_PYTHON in template or re.search(r'"parameters\\?": ', template)):
        return LLAMA3_JSON
    return HERMES


def format_named(name: str, template: str | None) -> CallFormat:
    """The format of ``[model] tool_format``."""
    return format_of(template) if name == "auto" else CALL_FORMATS[name]
