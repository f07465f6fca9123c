"""Tools for models whose chat template does not present them: a system message does, in the Hermes format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby

import attrs

from memserve.api.messages import ChatMessage, ToolCall
from memserve.api.tools import Tool

_INSTRUCTIONS = """\
You can call functions. Each line between these tags is one of them in JSON, with a schema of its arguments:
<tools>
{tools}
</tools>

When a function helps to answer, call it: write its name and its arguments as JSON between tags, like this, and nothing after it.
<tool_call>
{{"name": "name of the function", "arguments": {{"name of an argument": "its value"}}}}
</tool_call>
What it returns comes between <tool_response> tags. When none helps, answer in plain words."""


def in_words(messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[ChatMessage]:
    """The same conversation with tools, calls and results as plain text in its messages."""
    plain: list[ChatMessage] = []
    for answered, group in groupby(messages, lambda message: message.role == "tool"):
        several = list(group)
        plain += [_results(several)] if answered else map(_calls, several)
    return _with_tools(plain, tools) if tools else plain


def _with_tools(messages: list[ChatMessage], tools: Sequence[Tool]) -> list[ChatMessage]:
    text = _INSTRUCTIONS.format(tools="\n".join(_json(tool.for_template()) for tool in tools))
    if messages and messages[0].role in ("system", "developer"):
        first = attrs.evolve(messages[0], content=f"{messages[0].text}\n\n{text}")
        return [first, *messages[1:]]
    return [ChatMessage(role="system", content=text), *messages]


def _results(messages: Sequence[ChatMessage]) -> ChatMessage:
    parts = [f"<tool_response>\n{message.text}\n</tool_response>" for message in messages]
    return ChatMessage(role="user", content="\n".join(parts))


def _calls(message: ChatMessage) -> ChatMessage:
    if not message.tool_calls:
        return message
    parts = [message.text] if message.text else []
    parts += [f"<tool_call>\n{_call(call)}\n</tool_call>" for call in message.tool_calls]
    return attrs.evolve(message, content="\n".join(parts), tool_calls=None)


def _call(call: ToolCall) -> str:
    return _json({"name": call.function.name, "arguments": call.function.values})


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
