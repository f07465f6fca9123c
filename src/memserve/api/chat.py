"""Messages to prompt tokens: the model's own chat template, in a sandbox, proof against what messages say.

A message must not be able to close its own turn by writing ``<|im_end|>``. Every string that a client wrote
is therefore disarmed with marks before the template sees it
(:meth:`memserve.engine.tokenizer.Tokenizer.disarm`). Special tokens are then recognised in the rendered text,
where only the template's own are intact. Finally, the marks are removed. Harmless messages thus get exactly
the tokens that they would get anyway, and control tokens in messages arrive as plain characters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import jinja2

from memserve.api.bodies import EFFORT, Ending, Scalar
from memserve.api.call_formats import mentions_tools
from memserve.api.errors import ApiError
from memserve.api.hermes import in_words
from memserve.api.messages import ChatMessage, ToolCall
from memserve.api.sandbox import environment, written
from memserve.api.tools import Tool
from memserve.engine.spec import ModelSpec
from memserve.engine.tokenizer import Tokenizer
from memserve.errors import UserError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template for models that have none."""

_REFUSALS = (jinja2.TemplateError, ArithmeticError, TypeError, ValueError, LookupError, RecursionError)
"""Exceptions that rendering raises because of what a client sent."""
_SCHEMA_WORDS = frozenset((
    "type", "function", "name", "description", "parameters", "properties", "required", "items", "enum", "const", "default", "title",
    "examples", "format", "pattern", "anyOf", "oneOf", "allOf", "not", "additionalProperties", "minimum", "maximum", "minLength",
    "maxLength", "minItems", "maxItems", "uniqueItems", "$ref", "$defs", "definitions", "object", "array", "string", "integer",
    "number", "boolean", "null",
))  # fmt: skip
"""Strings that templates look for in tools. They are not disarmed, since by themselves they are harmless."""
_MARKS = range(0xF0000, 0xFFFFE)
"""Private-use characters. A request's mark is the first that none of its strings contains."""


@attrs.frozen
class ChatTemplate:
    """A compiled template and its model's tokenizer."""

    template: jinja2.Template
    tokenizer: Tokenizer
    names: dict[str, str]
    """The template variables ``bos_token`` and ``eos_token``."""
    mentions_tools: bool = False
    """Whether the template presents tools; if not, messages do in plain text (:mod:`memserve.api.hermes`)."""

    @classmethod
    def of(cls, spec: ModelSpec, tokenizer: Tokenizer) -> ChatTemplate:
        """The model's template, or ChatML. Raises UserError when it does not compile."""
        try:
            template = environment().from_string(spec.chat_template or CHATML)
        except jinja2.TemplateError as error:
            raise UserError(f"{spec.name}: the model's chat template does not compile: {error}") from error
        eos = spec.eos[0] if spec.eos else None
        names = {"bos_token": _text(tokenizer, spec.bos), "eos_token": _text(tokenizer, eos)}
        return cls(template, tokenizer, names, mentions_tools(spec.chat_template))

    def render(
        self,
        messages: Sequence[ChatMessage],
        arguments: Mapping[str, Scalar] | None = None,
        ending: Ending = "answer",
        tools: Sequence[Tool] = (),
    ) -> Rendered:
        """The prompt's text. ``arguments``: template variables from the client.

        Raises ApiError (400) when the template refuses.
        """
        if not self.mentions_tools:
            messages, tools = in_words(messages, tools), ()
        given = dict(arguments or {})
        offered = [tool.for_template() for tool in tools]
        texts = list(_texts([[_variables(message, str) for message in messages], offered, given]))
        mark = _mark(texts)
        disarm: Disarm = lambda text: self.tokenizer.disarm(text, mark)  # noqa: E731
        variables = [_variables(message, disarm) for message in messages]
        given = {name: _disarmed(value, disarm) for name, value in given.items()}
        tag = _mark([*texts, mark]) if ending == "open" else ""
        variables[-1]["content"] += tag
        known = {"messages": variables, "add_generation_prompt": ending == "answer", **self.names}
        if offered:
            known["tools"] = _disarmed(offered, disarm, _SCHEMA_WORDS)
        text = self._accepted(given, known)
        return Rendered(_cut(text, tag) if tag else text, mark)

    def _accepted(self, given: dict[str, Any], known: dict[str, Any]) -> str:
        """The template's output. If it refuses, raises ApiError (400) that names the field at fault."""
        try:
            return written(self.template, given | known)
        except _REFUSALS as error:
            theirs = EFFORT if given.keys() == {EFFORT} else "chat_template_kwargs"
            field = theirs if given and self._takes(known) else "messages"
            message = f"{field}: the model's chat template refuses them: {error}"
            raise ApiError(message, field, code="invalid_value") from error

    def _takes(self, variables: dict[str, Any]) -> bool:
        """Whether the template accepts these variables."""
        try:
            written(self.template, variables)
        except _REFUSALS:
            return False
        return True

    def encode(self, rendered: Rendered, scope: str) -> list[int]:
        """The prompt's tokens, with BOS if the model wants one and the template has not written it.

        Messages that earlier prompts of the tenant (``scope``) contained are not encoded again.
        """
        tokens = self.tokenizer.encode(rendered.text, allow_special=True, mark=rendered.mark, scope=scope)
        bos = list(self.tokenizer.bos)
        return tokens if tokens[: len(bos)] == bos else bos + tokens


@attrs.frozen
class Rendered:
    """A template's output, in which ``mark`` disarms the strings that clients wrote."""

    text: str
    mark: str


Disarm = Callable[[str], str]


def _variables(message: ChatMessage, disarm: Disarm) -> dict[str, Any]:
    # Templates older than the developer role call it system.
    role = "system" if message.role == "developer" else message.role
    variables: dict[str, Any] = {"role": role, "content": disarm(message.text)}
    if message.name is not None:
        variables["name"] = disarm(message.name)
    if message.reasoning_content is not None:
        variables["reasoning_content"] = disarm(message.reasoning_content)
    if message.tool_call_id:
        variables["tool_call_id"] = disarm(message.tool_call_id)
    if message.tool_calls:
        variables["tool_calls"] = [_call(call, disarm) for call in message.tool_calls]
    return variables


def _call(call: ToolCall, disarm: Disarm) -> dict[str, Any]:
    """A call as templates expect it: the arguments are an object, where OpenAI's API has their JSON text."""
    arguments = _disarmed(call.function.values, disarm)
    function = {"name": disarm(call.function.name), "arguments": arguments}
    return {"type": "function", "id": disarm(call.id), "function": function}


def _disarmed(value: Any, disarm: Disarm, plain: frozenset[str] = frozenset()) -> Any:
    """A JSON value with all its strings disarmed, except those in ``plain``."""
    if isinstance(value, str):
        return value if value in plain else disarm(value)
    if isinstance(value, list):
        return [_disarmed(one, disarm, plain) for one in value]
    if isinstance(value, dict):
        return {_disarmed(name, disarm, plain): _disarmed(one, disarm, plain) for name, one in value.items()}
    return value


def _texts(value: Any) -> Iterator[str]:
    """All strings in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for one in value if isinstance(value, list) else (*value, *value.values()):
            yield from _texts(one)


def _cut(text: str, tag: str) -> str:
    """``text`` up to the end of the last message, where ``tag`` was appended."""
    before, found, _ = text.rpartition(tag)
    if not found:
        message = "messages: the model's chat template does not write the last one, which is to be continued"
        raise ApiError(message, "continue_final_message", code="invalid_value")
    return before


def _mark(texts: Iterable[str]) -> str:
    used = {character for text in texts if not text.isascii() for character in text}
    for code in _MARKS:
        if chr(code) not in used:
            return chr(code)
    raise ApiError(
        "messages: they use every private-use character of plane 15; leave one out",
        "messages",
        code="invalid_value",
    )


def _text(tokenizer: Tokenizer, token: int | None) -> str:
    return "" if token is None else tokenizer.piece(token, skip_special=False).decode("utf-8", "replace")
