"""The formats in which models write tool calls, and how to detect a model's format from its chat template."""

from __future__ import annotations

import hashlib
import re
from typing import Literal

import attrs

Key = Literal["arguments", "parameters"]
Style = Literal["json", "named", "xml"]
"""How a call is written: a JSON object with its name in it, its name and a JSON object, or XML-like tags."""

_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@attrs.frozen(kw_only=True)
class CallFormat:
    """One format of tool calls."""

    name: str
    marker: str
    """Announces calls; may occur anywhere in an answer."""
    close: str = ""
    """Follows each call; empty: no mark does."""
    style: Style = "json"
    inner: tuple[str, ...] = ()
    """Marks within a call; the last one is between a name and its arguments in a forced answer."""
    key: Key = "arguments"
    """Key of the arguments in a forced answer; the parser accepts either."""
    before: tuple[str, ...]
    """Marks and text that a forced answer writes before its first call."""
    between: tuple[str, ...] = ()
    """Marks and text that a forced answer writes between two calls."""
    after: tuple[str, ...] = ()
    """Marks and text that a forced answer writes after its last call."""
    bare: bool = False
    """Whether an answer that begins with a call's object is a call, without any marker."""
    alone: bool = False
    """Whether an answer that is a call's object and nothing else is a call, without any marker."""
    several: bool = True
    """Whether an answer may have several calls."""
    id_prefix: str = "call_"
    id_characters: int = 24
    """Length of a call's id without its prefix."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Marks that may be special tokens of the tokenizer, whose text answers otherwise do not show."""
        return (self.marker, *((self.close,) if self.close else ()), *self.inner)

    def call_id(self, request: str, choice: int, number: int) -> str:
        """The id of a call: different for every call, and the same each time that it is computed."""
        digest = hashlib.blake2b(f"{request} {choice} {number}".encode()).digest()
        left, found = int.from_bytes(digest), ""
        for _ in range(self.id_characters):
            left, digit = divmod(left, len(_BASE62))
            found += _BASE62[digit]
        return self.id_prefix + found


_OPEN, _CLOSE, _TOOL_CALLS, _PYTHON = "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"
_CALL_ID, _ARGS = "[CALL_ID]", "[ARGS]"
FUNCTION, PARAMETER = "<function=", "<parameter="
PARAMETER_END, FUNCTION_END = "</parameter>", "</function>"

HERMES = CallFormat(
    name="hermes",
    marker=_OPEN,
    close=_CLOSE,
    before=(_OPEN, "\n"),
    between=("\n", _CLOSE, "\n", _OPEN, "\n"),
    after=("\n", _CLOSE),
    alone=True,
)
"""A pair of tags around each call: Qwen, Hermes and many models trained after them."""
QWEN3_CODER = attrs.evolve(HERMES, name="qwen3_coder", style="xml")
"""Tags for the name and for each argument within Hermes' pair of tags: Qwen3-Coder and later Qwen models. They at
times forget the first tag of the pair."""
LLAMA3_JSON = CallFormat(
    name="llama3_json", marker=_PYTHON, key="parameters", before=(), bare=True, several=False
)
"""The whole answer is the call: Llama 3, whose templates refuse conversations with two calls at once."""
MISTRAL = CallFormat(
    name="mistral", marker=_TOOL_CALLS, before=(_TOOL_CALLS, " ["), between=(", ",), after=("]",),
    id_prefix="", id_characters=9,  # their templates refuse ids of other lengths
)  # fmt: skip
"""A JSON array after a control token: Mistral until 2025."""
MISTRAL_ARGS = CallFormat(
    name="mistral_args", marker=_TOOL_CALLS, style="named", inner=(_CALL_ID, _ARGS),
    before=(_TOOL_CALLS,), between=(_TOOL_CALLS,), id_prefix="", id_characters=9,
)  # fmt: skip
"""A control token before each call's name, and mostly another between the name and the arguments: newer Mistral."""

CALL_FORMATS = {one.name: one for one in (HERMES, QWEN3_CODER, LLAMA3_JSON, MISTRAL, MISTRAL_ARGS)}
_MENTIONS_TOOLS = re.compile(r"\btools\b")


def mentions_tools(template: str | None) -> bool:
    """Whether a chat template presents tools to the model, judged by whether it mentions ``tools``."""
    return template is not None and _MENTIONS_TOOLS.search(template) is not None


def format_of(template: str | None) -> CallFormat:
    """The call format of a model with this chat template; Hermes if the template does not show one."""
    if not mentions_tools(template):
        return HERMES
    assert template is not None
    if _TOOL_CALLS in template:
        return MISTRAL_ARGS if _ARGS in template else MISTRAL
    if _OPEN in template and FUNCTION in template and PARAMETER in template:
        return QWEN3_CODER
    if _OPEN not in template and (_PYTHON in template or re.search(r'"parameters\\?": ', template)):
        return LLAMA3_JSON
    return HERMES


def format_named(name: str, template: str | None) -> CallFormat:
    """The format that ``[model] tool_format`` names; ``auto``: detected from the template."""
    return format_of(template) if name == "auto" else CALL_FORMATS[name]
