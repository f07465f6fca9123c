"""The tools of a chat, as clients offer them, and which of them the answer must call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import attrs
from msgspec import Meta

from memserve.api.errors import ApiError
from memserve.api.messages import check_depth

TOOLS_MAX = 128
NAME_PATTERN = "^[A-Za-z0-9_.-]{1,64}$"

ToolName = Annotated[str, Meta(pattern=NAME_PATTERN)]


@attrs.frozen(kw_only=True)
class Function:
    """``function`` of a tool."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema; None: the function takes no parameters."""
    strict: bool | None = None


@attrs.frozen(kw_only=True)
class Tool:
    """One element of ``tools``."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates expect it. ``strict`` is for the server, not for the model."""
        known = {
            "name": self.function.name,
            "description": self.function.description,
            "parameters": self.function.parameters,
        }
        return {"type": "function", "function": {name: one for name, one in known.items() if one is not None}}


@attrs.frozen(kw_only=True)
class NamedFunction:
    """``function`` of a named tool."""

    name: str


@attrs.frozen(kw_only=True)
class NamedTool:
    """One element of ``tool_choice.allowed_tools.tools``."""

    type: Literal["function"]
    function: NamedFunction


@attrs.frozen(kw_only=True)
class AllowedTools:
    """``tool_choice.allowed_tools``: some of the tools, and whether the answer must call one of them."""

    mode: Literal["auto", "required"]
    tools: Annotated[tuple[NamedTool, ...], Meta(min_length=1, max_length=TOOLS_MAX)]


@attrs.frozen(kw_only=True)
class ChosenTools:
    """``tool_choice`` if it names tools: one that the answer must call, or those that it may call."""

    type: Literal["function", "allowed_tools"]
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None

    @property
    def named(self) -> dict[str, str]:
        """The names of the tools, by the fields that name them."""
        if self.function is not None and self.type == "function":
            return {"tool_choice.function.name": self.function.name}
        tools = self.allowed_tools.tools if self.allowed_tools is not None else ()
        path = "tool_choice.allowed_tools.tools"
        return {f"{path}[{i}].function.name": tool.function.name for i, tool in enumerate(tools)}


ToolChoice = Literal["none", "auto", "required"] | ChosenTools
CHOICES = ("none", "auto", "required", "an object")
"""The values that ``tool_choice`` may have, in words."""


@attrs.frozen
class Offer:
    """The tools that an answer may call, and whether it must."""

    tools: tuple[Tool, ...]
    must: bool = False
    """Whether the answer must be one or more calls, and nothing else."""
    only: str | None = None
    """Name of the only tool that may be called; then it must be called exactly once."""
    several: bool = True
    """Whether the answer may have more than one call."""
    places: tuple[int, ...] = ()
    """Indexes of the tools in the body; empty: all of the body's tools are offered."""

    def path(self, tool: Tool) -> str:
        """The path of one of the tools in the body."""
        at = self.tools.index(tool)
        return f"tools[{self.places[at] if self.places else at}]"

    @property
    def allowed(self) -> tuple[Tool, ...]:
        """The tools that a forced answer may call."""
        return tuple(tool for tool in self.tools if self.only in (None, tool.function.name))

    @property
    def followed(self) -> bool:
        """Whether calls follow their tools' schemas, whatever else is asked for."""
        return self.must or any(tool.function.strict for tool in self.tools)

    @property
    def schemas(self) -> dict[str, dict[str, Any]]:
        """The schemas of all tools' arguments, by name."""
        return {tool.function.name: tool.function.parameters or {} for tool in self.tools}

    @property
    def names(self) -> frozenset[str]:
        """The names of all tools."""
        return frozenset(tool.function.name for tool in self.tools)


def offered(tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None) -> Offer | None:
    """The offer that a body's fields make; None: no tools. The fields must have been checked."""
    if not tools or choice == "none":
        return None
    several = parallel is not False
    if isinstance(choice, ChosenTools):
        if choice.allowed_tools is None or choice.type == "function":
            (name,) = choice.named.values()
            return Offer(tuple(tools), True, name, several=False)
        allowed = {*choice.named.values()}
        places = tuple(at for at, tool in enumerate(tools) if tool.function.name in allowed)
        must = choice.allowed_tools.mode == "required"
        return Offer(tuple(tools[at] for at in places), must, None, several, places)
    return Offer(tuple(tools), choice == "required", None, several)


def check_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> None:
    """Check what the fields' types do not express. Raises ApiError (400)."""
    seen: set[str] = set()
    for index, tool in enumerate(tools or ()):
        field = f"tools[{index}].function"
        if tool.function.name in seen:
            text = f"{field}.name: expected another name for each tool, got {tool.function.name} again"
            raise ApiError(text, f"{field}.name", code="invalid_value")
        seen.add(tool.function.name)
        check_depth(tool.function.parameters, f"{field}.parameters")
    if choice not in (None, "none", "auto") and not tools:
        text = "tool_choice: only none and auto without tools"
        raise ApiError(text, "tool_choice", code="invalid_value")
    if isinstance(choice, ChosenTools):
        if getattr(choice, choice.type) is None:
            field = f"tool_choice.{choice.type}"
            raise ApiError(f"{field}: this field is required", field, code="missing_required_parameter")
        for field, name in choice.named.items():
            if name not in seen:
                text = f"{field}: expected the name of one of tools, got {name[:60]}"
                raise ApiError(text, field, code="invalid_value")
