"""Messages to prompt tokens: the model's own chat template, in a sandbox, proof against what messages say.

A message must not be able to close its own turn by writing ``<|im_end|>``. Every string that a client wrote is
disarmed before the template sees it (:meth:`memserve.engine.tokenizer.Tokenizer.disarm`); special tokens are
then read in the rendered text, where only the template's own are whole; last, the marks are taken out again.
So harmless messages get exactly the tokens they would get anyway, and control tokens arrive as characters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import jinja2

from memserve.api.bodies import ChatMessage, Ending, Scalar
from memserve.api.errors import ApiError
from memserve.api.sandbox import environment, written
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
_MARKS = range(0xF0000, 0xFFFFE)
"""Private-use characters: one of them that no message holds is a request's mark."""


@attrs.frozen
class ChatTemplate:
    """A compiled template with the tokenizer it is for."""

    template: jinja2.Template
    tokenizer: Tokenizer
    names: dict[str, str]
    """``bos_token`` and ``eos_token``, as templates know them."""

    @classmethod
    def of(cls, spec: ModelSpec, tokenizer: Tokenizer) -> ChatTemplate:
        """The model's template, or ChatML. Raises UserError when it does not compile."""
        try:
            template = environment().from_string(spec.chat_template or CHATML)
        except jinja2.TemplateError as error:
            raise UserError(f"{spec.name}: the model's chat template does not compile: {error}") from error
        eos = spec.eos[0] if spec.eos else None
        names = {"bos_token": _text(tokenizer, spec.bos), "eos_token": _text(tokenizer, eos)}
        return cls(template, tokenizer, names)

    def render(
        self,
        messages: Sequence[ChatMessage],
        arguments: Mapping[str, Scalar] | None = None,
        ending: Ending = "answer",
    ) -> Rendered:
        """The prompt's text. ``arguments``: of the template, from the client. Raises ApiError (400) when the template refuses."""
        given = dict(arguments or {})
        texts = [text for message in messages for text in (message.text, message.name or "")]
        texts += [value for value in given.values() if isinstance(value, str)]
        mark = _mark(texts)
        disarm: Callable[[str], str] = lambda text: self.tokenizer.disarm(text, mark)  # noqa: E731
        variables = [_variables(message, disarm) for message in messages]
        given = {name: disarm(value) if isinstance(value, str) else value for name, value in given.items()}
        tag = _mark([*texts, mark]) if ending == "open" else ""
        variables[-1]["content"] += tag
        known = {"messages": variables, "add_generation_prompt": ending == "answer", **self.names}
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


def _variables(message: ChatMessage, disarm: Callable[[str], str]) -> dict[str, str]:
    # Templates older than the developer role know its meaning as system's.
    role = "system" if message.role == "developer" else message.role
    variables = {"role": role, "content": disarm(message.text)}
    if message.name is not None:
        variables["name"] = disarm(message.name)
    return variables


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
