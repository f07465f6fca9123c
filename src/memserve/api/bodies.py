"""The request bodies: every field that is read, with its type and range. ``docs/api.md`` explains each.

Unknown fields are ignored, as OpenAI's servers do. Fields of OpenAI's and vLLM's APIs that would change the
answer and are not supported here are refused, unless they hold a value that requests nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import attrs
import msgspec
from msgspec import Meta

from memserve.api.errors import ApiError, unsupported
from memserve.api.formats import FORMATS, ResponseFormat, StructuredOutputs
from memserve.api.messages import MESSAGES_MAX, ROLES, SPEAKERS, ChatMessage, check_messages
from memserve.api.tools import CHOICES, TOOLS_MAX, Offer, Tool, ToolChoice, check_tools, offered
from memserve.drawing import LOGPROBS_MAX
from memserve.engine.detokenizer import check_stops

LONG_BODY = 1_048_576
"""Bytes from which to check and render a body can take over a tenth of a second: call it from a thread then.
Most prompts that fill a long context have fewer; they do not wait for the thread twice more."""
LONG_OBJECTS = 1_000
"""Objects in a body, such as messages, from which that can take over a hundredth of a second."""
CHOICES_MAX = 64
"""Most answers that one HTTP request may ask for: prompts times ``n``."""
STOP_TOKENS_MAX = 1024
"""Most ids in ``stop_token_ids``: a worker looks through them after each token, and all its streams wait."""
SEED_BITS = 63
PRIORITY_MAX = 100

REFUSED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "return_tokens_as_token_ids": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "web_search_options": (),
}
"""Fields that are not supported, with the values that pass as they request nothing (null always passes)."""

REMEDIES = {
    "function_call": "send tool_choice",
    "functions": "send tools",
    **{
        f"guided_{kind}": f"send structured_outputs.{kind}" for kind in ("choice", "grammar", "json", "regex")
    },
}
"""What to send in place of a field that is not supported; the others must be left out."""

CHATS_ALONE: dict[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Fields that only chats support, with the values that pass elsewhere because they request nothing."""
COMPLETIONS_ALONE: dict[str, tuple[object, ...]] = {"add_special_tokens": (False,), "echo": (False,)}
"""Fields that only completions support, likewise."""
SOMEWHERE_REFUSED = REFUSED | CHATS_ALONE | COMPLETIONS_ALONE
TEMPLATE_ARGUMENTS_MAX = 32
TEMPLATE_NAMES = frozenset(
    ("add_generation_prompt", "bos_token", "documents", "eos_token", "messages", "raise_exception", "strftime_now", "tools")
)  # fmt: skip
"""Variables of chat templates that ``chat_template_kwargs`` may not set."""
EFFORT = "reasoning_effort"
"""A field, and the variable of chat templates in which those that know efforts expect it."""
Scalar = str | int | float | bool | None

Ending = Literal["answer", "closed", "open"]
"""How a chat's prompt ends: with the head of the answer's message ("answer"), after the last message
("closed"), or within the last message, which the answer continues ("open")."""
Count = Annotated[int, Meta(ge=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
COMPLETION_LOGPROBS_MAX = 5


@attrs.frozen(kw_only=True)
class StreamOptions:
    """``stream_options``."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


@attrs.frozen(kw_only=True)
class SharedFields:
    """The fields that mean the same wherever text is generated."""

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    """Bounded so that no logit leaves the range of float32."""
    logit_bias: dict[str, Any] | None = None
    """Biases by token id; :mod:`memserve.api.sampling` parses them."""
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    structured_outputs: StructuredOutputs | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | tuple[str, ...] | None = None
    stop_token_ids: Annotated[tuple[int, ...], Meta(max_length=STOP_TOKENS_MAX)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: Annotated[tuple[int, ...], Meta(min_length=1)] | None = None
    truncate_prompt_tokens: Count | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, whether the body has one text or several."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()


@attrs.frozen(kw_only=True)
class _Body(SharedFields):
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=CHOICES_MAX)] | None = None
    best_of: int | None = None
    """Accepted only if it requests nothing: equal to ``n``."""
    max_tokens: Count | None = None
    response_format: ResponseFormat | None = None
    return_token_ids: bool | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)] | None = None


@attrs.frozen(kw_only=True)
class CompletionBody(_Body):
    """POST /v1/completions."""

    prompt: Any
    """A text, several texts, token ids, or lists of token ids; :mod:`memserve.api.prompts` parses it."""
    add_special_tokens: bool | None = None
    echo: bool | None = None
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=COMPLETION_LOGPROBS_MAX)] | None = None

    @property
    def logprobs_wanted(self) -> int | None:
        """How many of the likeliest tokens to report at each position; None: no log probabilities."""
        return self.logprobs

    @property
    def scores_of_echo(self) -> int | None:
        """How many of the likeliest tokens to report at each position of the echo.

        None: no log probabilities, or no echo.
        """
        return self.logprobs if self.echo else None


@attrs.frozen(kw_only=True, slots=False)  # only one of several bases can have slots
class Conversation:
    """The fields that determine a chat's prompt."""

    messages: Annotated[tuple[ChatMessage, ...], Meta(min_length=1, max_length=MESSAGES_MAX)]
    chat_template_kwargs: dict[str, Scalar] | None = None
    """Further variables of the model's chat template, such as Qwen3's ``enable_thinking``."""
    reasoning_effort: Annotated[str, Meta(max_length=64)] | None = None
    """The same, for the one variable that OpenAI's API has a field for."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Annotated[tuple[Tool, ...], Meta(max_length=TOOLS_MAX)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def offer(self) -> Offer | None:
        """The tools that the answer may call; None: it may not call any."""
        return offered(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def template_arguments(self) -> dict[str, Scalar]:
        """The variables that the client sets for the chat template; those that it names itself take precedence."""
        effort = {} if self.reasoning_effort is None else {EFFORT: self.reasoning_effort}
        return effort | (self.chat_template_kwargs or {})

    @property
    def ending(self) -> Ending:
        """How the prompt ends."""
        if self.continue_final_message:
            return "open"
        return "closed" if self.add_generation_prompt is False else "answer"


@attrs.frozen(kw_only=True)
class ChatBody(Conversation, _Body):
    """POST /v1/chat/completions."""

    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)] | None = None

    @property
    def logprobs_wanted(self) -> int | None:
        """How many of the likeliest tokens to report at each position; None: no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def may_be_text(self) -> bool:
        """Whether the answer may be any text: it has no given form, and need not be a call."""
        plain = self.response_format is None or self.response_format.type == "text"
        return plain and self.structured_outputs is None and not (self.offer is not None and self.offer.must)

    @property
    def scores_of_echo(self) -> None:
        """None: a chat has no echo."""


Body = TypeVar("Body", CompletionBody, ChatBody)
Fields = TypeVar("Fields", bound=attrs.AttrsInstance)
Part = TypeVar("Part")


def is_long(data: bytes) -> bool:
    """Whether a body takes so long to check and render that streams should continue meanwhile, in other threads."""
    return len(data) >= LONG_BODY or data.count(b"{") > LONG_OBJECTS


def read_body(data: bytes, kind: type[Body]) -> Body:
    """Parse the body in ``data``. Raises ApiError (400) that names the field, the rule and the value."""
    body = read_fields(read_object(data), kind)
    _check_logprobs(body)
    _check_max_tokens(body)
    _check_best_of(body)
    check_shared(body, body.stream_options)
    return body


def check_shared(body: SharedFields, stream_options: object) -> None:
    """Check what the types of the shared fields do not express. Raises ApiError (400)."""
    try:
        check_stops(body.stops)
    except ValueError as error:
        raise ApiError(f"stop: {error}", "stop", code="invalid_value") from error
    if stream_options is not None and not body.stream:
        raise ApiError(
            "stream_options: only allowed when stream is true", "stream_options", code="invalid_value"
        )


def _check_logprobs(body: CompletionBody | ChatBody) -> None:
    if isinstance(body, ChatBody) and body.top_logprobs and not body.logprobs:
        message = "top_logprobs: only allowed when logprobs is true"
        raise ApiError(message, "top_logprobs", code="invalid_value")


def _check_max_tokens(body: _Body) -> None:
    if body.max_tokens == 0 and not (isinstance(body, CompletionBody) and body.echo):
        message = "max_tokens: expected int >= 1, or 0 with echo, which then is the whole answer; got 0"
        raise ApiError(message, "max_tokens", code="invalid_value")


def read_fields(raw: dict[str, Any], kind: type[Fields]) -> Fields:
    """Convert ``raw`` to a body, checking each field by itself. Raises ApiError (400)."""
    refuse(raw, attrs.fields_dict(kind), SOMEWHERE_REFUSED, REMEDIES)
    body = converted(raw, raw, kind)
    if isinstance(body, Conversation):
        _check_conversation(body, raw)
    return body


def converted(raw: dict[str, Any], value: Any, kind: type[Part], path: str = "") -> Part:
    """``value``, found at ``path`` in the body ``raw``, as a ``kind``. Raises ApiError (400)."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        if path:  # msgspec writes " - at `$.name`", or nothing if the value itself is wrong
            rule, _, within = text.partition(" - at `$")
            text = f"{rule} - at `$.{path}{within or '`'}"
        raise _invalid(raw, text) from error


def read_object(data: bytes) -> dict[str, Any]:
    """Parse the JSON object in ``data``. Raises ApiError (400)."""
    if not data.strip():
        raise ApiError("The body is empty; it must be a JSON object", code="invalid_json")
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(f"The body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(raw, dict):
        raise ApiError("The body must be a JSON object", code="invalid_json")
    return raw


def _check_best_of(body: _Body) -> None:
    if body.best_of not in (None, body.n or 1):
        message = (
            f"best_of: no more answers are generated than n = {body.n or 1}, got {body.best_of}; leave it out"
        )
        raise ApiError(message, "best_of", code="unsupported_parameter")


def _check_conversation(body: Conversation, raw: dict[str, Any]) -> None:
    check_messages(body.messages, raw)
    check_tools(body.tools, body.tool_choice)
    check_template_arguments(body.chat_template_kwargs or {})
    if body.continue_final_message and body.add_generation_prompt:
        message = "continue_final_message: not together with add_generation_prompt; set one of them"
        raise ApiError(message, "continue_final_message", code="invalid_value")


def check_template_arguments(given: dict[str, Scalar]) -> None:
    """Check the number and the names of ``chat_template_kwargs``: they become variables of the template.

    The template decides which values it accepts.
    """
    field = "chat_template_kwargs"
    if len(given) > TEMPLATE_ARGUMENTS_MAX:
        message = f"{field}: expected at most {TEMPLATE_ARGUMENTS_MAX} names, got {len(given)}"
        raise ApiError(message, field, code="invalid_value")
    for name in given:
        if not name.isidentifier() or name in TEMPLATE_NAMES:
            rule = (
                "expected names of variables"
                if name not in TEMPLATE_NAMES
                else "leave out what the server sets"
            )
            raise ApiError(f"{field}: {rule}, got {_shown(name)}", field, code="invalid_value")


def refuse(
    raw: dict[str, Any],
    served: Mapping[str, Any],
    refused: Mapping[str, tuple[object, ...]],
    remedies: Mapping[str, str],
) -> None:
    """Raise ApiError (400) if the body has one of the fields ``refused``, with a value that requests something.

    Fields in ``served`` pass.
    """
    for name in (raw.keys() & refused.keys()) - served.keys():
        value = raw[name]
        neutral = any(type(value) is type(passes) and value == passes for passes in refused[name])
        if value is not None and not neutral:
            raise unsupported(name, remedies.get(name, "leave it out"))


_KNOWN = (
    (r"^input\[\d+\]\.role$", SPEAKERS),
    (r"^input.*\.type$", ("input_text", "output_text")),
    (r"^text\.format", FORMATS),
    (r"^truncation$", ("disabled", "auto")),
    (r"^tool_choice\.mode$", ("auto", "required")),
    (r"\.role$", ROLES),
    (r"^response_format", FORMATS),
    (r"^tool_choice$", CHOICES),
    (r"^tool_choice\.type$", ("function", "allowed_tools")),
    (r"^tool_choice\.allowed_tools\.mode$", ("auto", "required")),
    (r"^tool|\.tool_calls", ("function",)),
    ("", ("text",)),
)
"""The values that enumerated fields may have, by patterns of the field's path; the first match counts."""


def _invalid(raw: dict[str, Any], text: str) -> ApiError:
    """Translate msgspec's error into ours. msgspec writes "Expected `int` >= 1 - at `$.max_tokens`"."""
    rule, _, path = text.partition(" - at `$.")
    param = path.rstrip("`") or None
    if missing := re.fullmatch(r"Object missing required field `(\w+)`(?: - at `\$\.?(.*)`)?", text):
        param = f"{missing[2]}.{missing[1]}" if missing[2] else missing[1]
        return ApiError(f"{param}: this field is required", param, code="missing_required_parameter")
    rule = rule[0].lower() + rule[1:].replace("`", "")
    rule = re.sub(r"( \| null)?, got \w+$", "", rule)  # the value itself is appended below
    if param is None:
        return ApiError(rule)
    if rule.startswith("invalid enum value"):
        known = next(known for pattern, known in _KNOWN if re.search(pattern, param))
        rule = "expected one of " + ", ".join(known)
    return ApiError(f"{param}: {rule}, got {_shown(_at(raw, param))}", param, code="invalid_value")


def _at(raw: Any, path: str) -> Any:
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        try:
            raw = raw[int(index)] if index else raw[name]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _shown(value: object) -> str:
    """``value`` as JSON, shortened if it is long."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else text[:57] + "..."
