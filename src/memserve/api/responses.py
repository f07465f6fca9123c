"""The body of POST /v1/responses, OpenAI's newer API, and the chat that it asks for.

Everything after that is the chat's: the prompt, the grammar, the answer. Only the names of fields in errors, and
the form of the answer (:mod:`memserve.api.response_wire`), are this API's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeVar

import attrs
from msgspec import Meta

from memserve.api.bodies import REMEDIES as CHAT_REMEDIES
from memserve.api.bodies import (
    SOMEWHERE_REFUSED,
    ChatBody,
    Count,
    Scalar,
    SharedFields,
    check_shared,
    check_template_arguments,
    converted,
    read_object,
    refuse,
)
from memserve.api.errors import ApiError, unsupported
from memserve.api.formats import FORMATS, JsonSchema, ResponseFormat
from memserve.api.messages import MESSAGES_MAX
from memserve.api.response_items import read_items
from memserve.api.tools import (
    TOOLS_MAX,
    AllowedTools,
    ChosenTools,
    Function,
    NamedFunction,
    NamedTool,
    Tool,
    ToolChoice,
    ToolName,
    check_tools,
)
from memserve.drawing import LOGPROBS_MAX

Value = TypeVar("Value")
LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (
    LOGPROBS, "reasoning.encrypted_content", "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs",
)  # fmt: skip
"""What ``include`` may ask for. All but the first belong to what no answer here has, or has anyway."""
METADATA_MAX = 16

REFUSED: dict[str, tuple[object, ...]] = {
    "background": (False,),
    "best_of": (1,),
    "context_management": ([],),
    "conversation": (),
    "logprobs": (False,),
    "max_completion_tokens": (),
    "max_tokens": (),
    "messages": (),
    "moderation": (),
    "n": (1,),
    "previous_response_id": (),
    "prompt": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
}
"""Fields that other endpoints or OpenAI's servers have and this endpoint has not, with the values that pass."""

REMEDIES = {
    "background": "keep the connection open instead",
    "conversation": "nothing is stored: send the whole conversation in input",
    "logprobs": f'send include: ["{LOGPROBS}"]',
    "max_completion_tokens": "send max_output_tokens",
    "max_tokens": "send max_output_tokens",
    "messages": "send input",
    "n": "send several requests",
    "previous_response_id": "nothing is stored: send the whole conversation in input",
    "prompt": "nothing is stored: send instructions and input",
    "reasoning_effort": "send reasoning.effort",
    "response_format": "send text.format",
}


@attrs.frozen(kw_only=True)
class ResponseStreamOptions:
    """``stream_options``."""

    include_obfuscation: bool | None = None
    """Without effect: events are never padded."""


@attrs.frozen(kw_only=True)
class FlatTool:
    """One element of ``tools``."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


@attrs.frozen(kw_only=True)
class FlatName:
    """One element of ``tool_choice.tools``."""

    type: Literal["function"]
    name: str


@attrs.frozen(kw_only=True)
class FlatChoice:
    """``tool_choice`` if it names tools."""

    type: Literal["function", "allowed_tools"]
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[tuple[FlatName, ...], Meta(min_length=1, max_length=TOOLS_MAX)] | None = None


@attrs.frozen(kw_only=True)
class FlatFormat:
    """``text.format``."""

    type: Literal[FORMATS]  # type: ignore[valid-type]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


@attrs.frozen(kw_only=True)
class TextSettings:
    """``text``."""

    format: FlatFormat | None = None
    verbosity: str | None = None


@attrs.frozen(kw_only=True)
class ReasoningSettings:
    """``reasoning``."""

    effort: Annotated[str, Meta(max_length=64)] | None = None
    summary: str | None = None
    """Without effect: answers have the thoughts themselves."""


@attrs.frozen(kw_only=True)
class ResponseBody(SharedFields):
    """POST /v1/responses."""

    input: str | Annotated[tuple[dict[str, Any], ...], Meta(min_length=1, max_length=MESSAGES_MAX)]
    """A text, or items; :mod:`memserve.api.response_items` parses them."""
    instructions: str | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: Count | None = None
    include: tuple[str, ...] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)] | None = None
    tools: Annotated[tuple[FlatTool, ...], Meta(max_length=TOOLS_MAX)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    chat_template_kwargs: dict[str, Scalar] | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=METADATA_MAX)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    truncation: Literal["disabled", "auto"] | None = None


def read_response(data: bytes) -> tuple[ResponseBody, ChatBody]:
    """Parse the body in ``data``; returns it with the chat that it asks for. Raises ApiError (400)."""
    raw = read_object(data)
    refuse(raw, attrs.fields_dict(ResponseBody), SOMEWHERE_REFUSED | REFUSED, CHAT_REMEDIES | REMEDIES)
    _refuse_hosted(raw)
    body = converted(raw, raw, ResponseBody)
    _check(body)
    with own_names():
        chat = _chat(body, raw)
        check_tools(chat.tools, chat.tool_choice)
    return body, chat


def _refuse_hosted(raw: dict[str, Any]) -> None:
    """Refuse tools that OpenAI's servers run: only functions are served, which the client runs."""
    remedy = "offer a tool of type function, which your client runs"
    tools = raw.get("tools")
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise _hosted(f"tools[{index}].type", kind, remedy)
    choice = raw.get("tool_choice")
    kind = choice.get("type") if isinstance(choice, dict) else None
    if isinstance(kind, str) and kind not in ("function", "allowed_tools"):
        raise _hosted("tool_choice.type", kind, remedy)


def _hosted(field: str, kind: str, remedy: str) -> ApiError:
    message = f"{field}: {kind[:60]} is not supported by this server; {remedy}"
    return ApiError(message, field, code="unsupported_parameter")


def _check(body: ResponseBody) -> None:
    """Check what the fields' types do not express. Raises ApiError (400)."""
    check_shared(body, body.stream_options)
    check_template_arguments(body.chat_template_kwargs or {})
    for index, name in enumerate(body.include or ()):
        if name not in INCLUDABLE:
            field = f"include[{index}]"
            text = f"{field}: expected one of {', '.join(INCLUDABLE)}, got {name[:60]}"
            raise ApiError(text, field, code="invalid_value")
    if body.top_logprobs and LOGPROBS not in (body.include or ()):
        text = f"top_logprobs: only allowed when include has {LOGPROBS}"
        raise ApiError(text, "top_logprobs", code="invalid_value")
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        raise unsupported("text.verbosity", "say in instructions how long answers should be")


def _chat(body: ResponseBody, raw: dict[str, Any]) -> ChatBody:
    """The chat that the body asks for. Raises ApiError (400)."""
    shared = {name: getattr(body, name) for name in attrs.fields_dict(SharedFields)}
    return ChatBody(
        **shared,
        messages=read_items(raw, body.instructions),
        max_completion_tokens=body.max_output_tokens,
        logprobs=LOGPROBS in (body.include or ()),
        top_logprobs=body.top_logprobs,
        tools=None if body.tools is None else tuple(_tool(tool) for tool in body.tools),
        tool_choice=_choice(body.tool_choice)
        if isinstance(body.tool_choice, FlatChoice)
        else body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_format(body.text.format if body.text is not None else None),
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        chat_template_kwargs=body.chat_template_kwargs,
    )


def _tool(tool: FlatTool) -> Tool:
    function = Function(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )
    return Tool(type="function", function=function)


def _choice(choice: FlatChoice) -> ToolChoice:
    if choice.type == "function":
        name = _required(choice.name, "tool_choice.name")
        return ChosenTools(type="function", function=NamedFunction(name=name))
    mode: Literal["auto", "required"] = _required(choice.mode, "tool_choice.mode")
    tools = _required(choice.tools, "tool_choice.tools")
    named = tuple(NamedTool(type="function", function=NamedFunction(name=tool.name)) for tool in tools)
    return ChosenTools(type="allowed_tools", allowed_tools=AllowedTools(mode=mode, tools=named))


def _required(value: Value | None, field: str) -> Value:
    if value is None:
        raise ApiError(f"{field}: this field is required", field, code="missing_required_parameter")
    return value


def _format(form: FlatFormat | None) -> ResponseFormat | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return ResponseFormat(type="json_object", schema=form.schema)
    schema = JsonSchema(
        schema=_required(form.schema, "text.format.schema"), name=form.name, strict=form.strict
    )
    return ResponseFormat(type="json_schema", json_schema=schema)


_NAMES = (
    (r"^messages\b", "input"),
    (r"\b(max_completion_tokens|max_tokens)\b", "max_output_tokens"),
    (r"\bresponse_format(\.json_schema)?\b", "text.format"),
    (r"\breasoning_effort\b", "reasoning.effort"),
    (r"\btool_choice\.allowed_tools\b", "tool_choice"),
    (r"\b(tools\[\d+\]|tool_choice)\.function\b", r"\1"),
)
"""A chat's fields by patterns, each with the name that the field has here."""


@contextmanager
def own_names() -> Iterator[None]:
    """Errors about a chat's fields, raised within, name the fields of this API instead."""
    try:
        yield
    except ApiError as error:
        rule, got, value = error.message.partition(", got ")  # what follows are the client's own words
        message = f"{_renamed(rule)}{got}{value}"
        param = None if error.param is None else _renamed(error.param)
        raise attrs.evolve(error, message=message, param=param) from error


def _renamed(text: str) -> str:
    for pattern, name in _NAMES:
        text = re.sub(pattern, name, text)
    return text


def echoed(body: ResponseBody) -> dict[str, Any]:
    """The fields of a response that repeat what was asked for, or say what was done instead."""
    reasoning = body.reasoning or ReasoningSettings()
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": _echoed_format(body.text), "verbosity": "medium"},
        "tool_choice": _echoed_choice(body.tool_choice),
        "tools": [attrs.asdict(tool, recurse=False) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _echoed_format(text: TextSettings | None) -> dict[str, Any]:
    if text is None or text.format is None:
        return {"type": "text"}
    if text.format.type != "json_schema":
        return {"type": text.format.type}
    return attrs.asdict(text.format, recurse=False) | {"name": text.format.name or ""}


def _echoed_choice(choice: Literal["none", "auto", "required"] | FlatChoice | None) -> Any:
    if not isinstance(choice, FlatChoice):
        return choice or "auto"
    if choice.type == "function":
        return {"type": "function", "name": choice.name}
    tools = [attrs.asdict(tool) for tool in choice.tools or ()]
    return {"type": "allowed_tools", "mode": choice.mode, "tools": tools}
