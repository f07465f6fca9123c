"""The input of /v1/responses: its items, and the messages of the chat that they are.

What the assistant did in one turn, thoughts, text and calls, is one message of a chat, but several items here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import attrs
from msgspec import Meta

from memserve.api.bodies import converted
from memserve.api.errors import ApiError, unsupported
from memserve.api.messages import SPEAKERS, Called, ChatMessage, Label, ToolCall, check_depth

ITEMS = ("message", "function_call", "function_call_output", "reasoning")
"""The types of items."""


@attrs.frozen(kw_only=True)
class InputText:
    """One part of a content."""

    type: Literal["input_text", "output_text"]
    text: str


Content = str | tuple[InputText, ...]


@attrs.frozen(kw_only=True)
class InputMessage:
    """An item of type ``message``."""

    role: Literal[SPEAKERS]  # type: ignore[valid-type]
    content: Content


@attrs.frozen(kw_only=True)
class InputCall:
    """An item of type ``function_call``."""

    call_id: Label
    name: Label
    arguments: str = ""


@attrs.frozen(kw_only=True)
class InputResult:
    """An item of type ``function_call_output``."""

    call_id: Annotated[str, Meta(min_length=1, max_length=256)]
    output: Content


@attrs.frozen(kw_only=True)
class ThoughtText:
    """One part of a thought, or of its summary."""

    text: str


@attrs.frozen(kw_only=True)
class InputThought:
    """An item of type ``reasoning``. It may have neither text if another server has encrypted it."""

    content: tuple[ThoughtText, ...] | None = None
    summary: tuple[ThoughtText, ...] | None = None

    @property
    def text(self) -> str:
        """What was thought, or its summary if that is all there is."""
        return "\n".join(part.text for part in self.content or self.summary or ())


def read_items(raw: dict[str, Any], instructions: str | None) -> tuple[ChatMessage, ...]:
    """The messages of the chat in ``raw["input"]``, whose items are objects. Raises ApiError (400)."""
    first = [] if instructions is None else [ChatMessage(role="system", content=instructions)]
    if isinstance(raw["input"], str):
        return (*first, ChatMessage(role="user", content=raw["input"]))
    found = _Conversation()
    for index, item in enumerate(raw["input"]):
        found.add(_item(raw, item, f"input[{index}]"))
    if not (messages := found.finish()):
        text = "input: expected a message, a call or its output; reasoning items without text are left out"
        raise ApiError(text, "input", code="invalid_value")
    return (*first, *messages)


Item = InputMessage | InputCall | InputResult | InputThought


def _item(raw: dict[str, Any], item: dict[str, Any], path: str) -> Item:
    """One item, which is at ``path`` in the body. Raises ApiError (400)."""
    kind = item.get("type") or ("message" if "role" in item else None)
    match kind:
        case "message":
            return converted(raw, item, InputMessage, path)
        case "function_call":
            call = converted(raw, item, InputCall, path)
            check_depth(_called(call).values, f"{path}.arguments")
            return call
        case "function_call_output":
            return converted(raw, item, InputResult, path)
        case "reasoning":
            return converted(raw, item, InputThought, path)
        case "item_reference":
            raise unsupported(
                f"{path}.type", "nothing is stored: send the item itself instead of item_reference"
            )
        case None:
            text = f"{path}.type: this field is required"
            raise ApiError(text, f"{path}.type", code="missing_required_parameter")
    field, rule = f"{path}.type", f"expected one of {', '.join(ITEMS)}"
    raise ApiError(f"{field}: {rule}, got {str(kind)[:60]}; leave this item out", field, code="invalid_value")


def _called(call: InputCall) -> Called:
    return Called(name=call.name, arguments=call.arguments)


def _text(content: Content) -> str:
    """A content as one text, joined as in chats."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


@attrs.define
class _Turn:
    """What the assistant did in one turn, while its items are read."""

    thoughts: list[str] = attrs.field(factory=list)
    texts: list[str] = attrs.field(factory=list)
    calls: list[ToolCall] = attrs.field(factory=list)

    @property
    def message(self) -> Sequence[ChatMessage]:
        """The message that it makes; none if it has nothing."""
        if not (self.thoughts or self.texts or self.calls):
            return ()
        said = ChatMessage(
            role="assistant",
            # Text on both sides of a call is one text in a chat, too.
            content="".join(self.texts) if self.texts else None,
            reasoning_content="\n".join(self.thoughts) if self.thoughts else None,
            tool_calls=tuple(self.calls) or None,
        )
        return (said,)


@attrs.define
class _Conversation:
    """Makes messages of items."""

    messages: list[ChatMessage] = attrs.field(factory=list)
    turn: _Turn = attrs.field(factory=_Turn)

    def add(self, item: Item) -> None:
        """Take in the next item."""
        match item:
            case InputThought():
                self._new_message_behind_text()
                self.turn.thoughts += [item.text] if item.text else []
            case InputMessage(role="assistant"):
                self._new_message_behind_text()
                self.turn.texts.append(_text(item.content))
            case InputCall():
                self.turn.calls.append(ToolCall(id=item.call_id, function=_called(item)))
            case InputMessage():
                self._end_turn()
                self.messages.append(ChatMessage(role=item.role, content=_text(item.content)))
            case InputResult():
                self._end_turn()
                text = _text(item.output)
                self.messages.append(ChatMessage(role="tool", content=text, tool_call_id=item.call_id))

    def finish(self) -> list[ChatMessage]:
        """All messages."""
        self._end_turn()
        return self.messages

    def _new_message_behind_text(self) -> None:
        """Text ends a message, unless calls follow it: their outputs must follow the message with the calls."""
        if self.turn.texts and not self.turn.calls:
            self._end_turn()

    def _end_turn(self) -> None:
        self.messages += self.turn.message
        self.turn = _Turn()
