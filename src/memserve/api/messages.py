"""The messages of a chat, as clients send them: texts, tool calls, and tool results."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import attrs
import msgspec
from msgspec import Meta

from memserve.api.errors import ApiError, unsupported

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of messages. The set is fixed, because templates write roles among their control tokens."""
SPEAKERS = ("system", "developer", "user", "assistant")
"""Roles of the messages in the input of /v1/responses, where results of tools are items of their own."""
MESSAGES_MAX = 10_000
"""Most messages in one chat. To check and render one takes some ten microseconds of the interpreter, which all
streams of the Frontend share."""
CALLS_MAX = 128
"""Most tool calls in one message."""
DEPTH_MAX = 64
"""How deeply objects and arrays may be nested in JSON that templates write."""

WRONG_ARGUMENTS = "arguments"
"""Name under which templates get arguments that are not the text of a JSON object. Templates take only objects, and
the model must see what it wrote to mend it."""

Label = Annotated[str, Meta(min_length=1, max_length=256)]
"""An id, or a name that a model made up."""


@attrs.frozen(kw_only=True)
class TextPart:
    """One part of a message's content."""

    type: Literal["text"]
    text: str


@attrs.frozen(kw_only=True)
class Called:
    """``function`` of a tool call."""

    name: Label
    arguments: str = ""
    """Text of a JSON object, or what the model wrote instead of one; empty: no arguments."""

    @property
    def values(self) -> dict[str, Any]:
        """The arguments by name. A text that is no JSON object, as of a call that was cut off, is one argument."""
        try:
            found = msgspec.json.decode(self.arguments) if self.arguments.strip() else {}
        except (msgspec.DecodeError, RecursionError):
            found = None
        return found if isinstance(found, dict) else {WRONG_ARGUMENTS: self.arguments}


@attrs.frozen(kw_only=True)
class ToolCall:
    """One element of ``tool_calls`` in an assistant's message."""

    id: Label
    type: Literal["function"] = "function"
    function: Called


@attrs.frozen(kw_only=True)
class ChatMessage:
    """One message of a chat."""

    role: Literal[ROLES]  # type: ignore[valid-type]
    content: str | tuple[TextPart, ...] | None = None
    """May be None only in an assistant's message, which may have said nothing."""
    name: str | None = None
    reasoning_content: str | None = None
    """What the model thought before this message, for templates that use it."""
    tool_calls: Annotated[tuple[ToolCall, ...], Meta(max_length=CALLS_MAX)] | None = None
    tool_call_id: Annotated[str, Meta(max_length=256)] | None = None

    @property
    def text(self) -> str:
        """The content; several parts are joined by line breaks, as in vLLM."""
        if isinstance(self.content, tuple):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


def check_messages(messages: tuple[ChatMessage, ...], raw: dict[str, Any]) -> None:
    """Check what the fields' types do not express. Raises ApiError (400).

    ``raw``: the body from which the messages were read.
    """
    for index, (message, given) in enumerate(zip(messages, raw["messages"], strict=True)):
        path = f"messages[{index}]"
        if given.get("function_call"):
            raise unsupported(f"{path}.function_call", "send tool_calls")
        _check_content(message, given, path)
        _check_tool_fields(message, path)
        for number, call in enumerate(message.tool_calls or ()):
            check_depth(call.function.values, f"{path}.tool_calls[{number}].function.arguments")


def _check_content(message: ChatMessage, given: dict[str, Any], path: str) -> None:
    if message.content is not None or message.role == "assistant":
        return
    field = f"{path}.content"
    if "content" not in given:
        raise ApiError(f"{field}: this field is required", field, code="missing_required_parameter")
    raise ApiError(f"{field}: expected str | array, got null", field, code="invalid_value")


def _check_tool_fields(message: ChatMessage, path: str) -> None:
    for name, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
        if getattr(message, name) and message.role != role:
            field = f"{path}.{name}"
            text = f"{field}: only in messages of role {role}, got role {message.role}"
            raise ApiError(text, field, code="invalid_value")
    if message.role == "tool" and not message.tool_call_id:
        field = f"{path}.tool_call_id"
        raise ApiError(f"{field}: this field is required", field, code="missing_required_parameter")


def check_depth(value: Any, field: str) -> None:
    """Raise ApiError (400) if JSON is nested too deeply for the functions that walk it."""
    if _deeper(value, DEPTH_MAX):
        text = (
            f"{field}: nested too deeply, expected at most {DEPTH_MAX} objects and arrays within one another"
        )
        raise ApiError(text, field, code="invalid_value")


def _deeper(value: Any, left: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return left == 0 or any(_deeper(one, left - 1) for one in inner)
