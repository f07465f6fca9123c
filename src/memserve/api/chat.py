"""Messages to prompt tokens: the model's own chat template, in a sandbox, proof against what messages say.

A message must not be able to close its own turn by writing ``<|im_end|>``. Every string that a client wrote is
disarmed before the template sees it (:meth:`memserve.engine.tokenizer.Tokenizer.disarm`); special tokens are
then read in the rendered text, where only the template's own are whole; last, the marks are taken out again.
So harmless messages get exactly the tokens they would get anyway, and control tokens arrive as characters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import jinja2

from memserve.api.bodies import Ending, Scalar
from memserve.api.call_formats import tells_tools
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
"""For models that bring no template."""

_REFUSALS = (jinja2.TemplateError, ArithmeticError, TypeError, ValueError, LookupError, RecursionError)
"""What rendering raises over what a client sent."""
_SCHEMA_WORDS = frozenset((
    "type", "function", "name", "description", "parameters", "properties", "required", "items", "enum", "const", "default", "title",
    "examples", "format", "pattern", "anyOf", "oneOf", "allOf", "not", "additionalProperties", "minimum", "maximum", "minLength",
    "maxLength", "minItems", "maxItems", "uniqueItems", "$ref", "$defs", "definitions", "object", "array", "string", "integer",
    "number", "boolean", "null",
))  # fmt: skip
"""What templates look for in tools. They stay as they are: by themselves they say nothing of a client's."""
_MARKS = range(0xF0000, 0xFFFFE)
"""Private-use characters: one of them that no message holds is a request's mark."""


@attrs.frozen
class ChatTemplate:
    """A compiled template with the tokenizer it is for."""

    template: jinja2.Template
    tokenizer: Tokenizer
    names: dict[str, str]
    """``bos_token`` and ``eos_token``, as templates know them."""
    tells_tools: bool = False
    """Whether it has words for tools; where not, system and user messages tell of them (:mod:`memserve.api.hermes`)."""

    @classmethod
    def of(cls, spec: ModelSpec, tokenizer: Tokenizer) -> ChatTemplate:
        """The model's template, or ChatML. Raises UserError when it does not compile."""
        try:
            template = environment().from_string(spec.chat_template or CHATML)
        except jinja2.TemplateError as error:
            raise UserError(f"{spec.name}: the model's chat template does not compile: {error}") from error
        eos = spec.eos[0] if spec.eos else None
        names = {"bos_token": _text(tokenizer, spec.bos), "eos_token": _text(tokenizer, eos)}
        return cls(template, tokenizer, names, tells_tools(spec.chat_template))

    def render(
        self,
        messages: Sequence[ChatMessage],
        arguments: Mapping[str, Scalar] | None = None,
        ending: Ending = "answer",
        tools: Sequence[Tool] = (),
    ) -> Rendered:
        """The prompt's text. ``arguments``: of the template, from the client. Raises ApiError (400) when the template refuses."""
        if not self.tells_tools:
            messages, tools = in_words(messages, tools), ()
        given = dict(arguments or {})
        told = [tool.told() for tool in tools]
        texts = list(_texts([[_variables(message, str) for message in messages], told, given]))
        mark = _mark(texts)
        disarm: Disarm = lambda text: self.tokenizer.disarm(text, mark)  # noqa: E731
        variables = [_variables(message, disarm) for message in messages]
        given = {name: _disarmed(value, disarm) for name, value in given.items()}
        tag = _mark([*texts, mark]) if ending == "open" else ""
        variables[-1]["content"] += tag
        known = {"messages": variables, "add_generation_prompt": ending == "answer", **self.names}
        if told:
            known["tools"] = _disarmed(told, disarm, _SCHEMA_WORDS)
        text = self._accepted(given, known)
        return Rendered(_cut(text, tag) if tag else text, mark)

    def _accepted(self, given: dict[str, Any], known: dict[str, Any]) -> str:
        """What the template writes. Raises ApiError (400) that names whose fault it is that it does not."""
        try:
            return written(self.template, given | known)
        except _REFUSALS as error:
            field = "chat_template_kwargs" if given and self._takes(known) else "messages"
            message = f"{field}: the model's chat template refuses them: {error}"
            raise ApiError(message, field, code="invalid_value") from error

    def _takes(self, variables: dict[str, Any]) -> bool:
        """Whether it would write a prompt of these."""
        try:
            written(self.template, variables)
        except _REFUSALS:
            return False
        return True

    def encode(self, rendered: Rendered, scope: str) -> list[int]:
        """The prompt's tokens, with BOS where the model wants one and the template has not written it.

        Messages of the tenant's earlier prompts (``scope``) are not encoded again.
        """
        tokens = self.tokenizer.encode(rendered.text, allow_special=True, mark=rendered.mark, scope=scope)
        bos = list(self.tokenizer.bos)
        return tokens if tokens[: len(bos)] == bos else bos + tokens


@attrs.frozen
class Rendered:
    """What a template wrote, in which ``mark`` disarms what clients wrote."""

    text: str
    mark: str


Disarm = Callable[[str], str]


def _variables(message: ChatMessage, disarm: Disarm) -> dict[str, Any]:
    # Templates older than the developer role know its meaning as system's.
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
    """With the arguments themselves, where OpenAI has their text: so templates want them."""
    arguments = _disarmed(call.function.values, disarm)
    function = {"name": disarm(call.function.name), "arguments": arguments}
    return {"type": "function", "id": disarm(call.id), "function": function}


def _disarmed(value: Any, disarm: Disarm, plain: frozenset[str] = frozenset()) -> Any:
    """JSON with all its texts disarmed, but for those in ``plain``."""
    if isinstance(value, str):
        return value if value in plain else disarm(value)
    if isinstance(value, list):
        return [_disarmed(one, disarm, plain) for one in value]
    if isinstance(value, dict):
        return {_disarmed(name, disarm, plain): _disarmed(one, disarm, plain) for name, one in value.items()}
    return value


def _texts(value: Any) -> Iterator[str]:
    """All texts in JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for one in value if isinstance(value, list) else (*value, *value.values()):
            yield from _texts(one)


def _cut(text: str, tag: str) -> str:
    """``text`` up to where the last message ends, which ``tag`` was put behind."""
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
