"""The required form of an answer: ``response_format`` and ``structured_outputs`` as grammars.

A grammar travels as text for llguidance. Workers follow it token by token (:mod:`memserve.engine.grammars`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import attrs
import msgspec
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark
from msgspec import Meta

from memserve.api.errors import ApiError
from memserve.engine.grammars import wrong_with

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

FORMATS = ("text", "json_object", "json_schema")
GRAMMAR_BYTES_MAX = 65_536
"""Most bytes of a request's description of its answer's form."""
COMPACT: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""The only whitespace in JSON, so that a model cannot fill its answer with it."""

_LARK = re.compile(r"^[^\S\n]*(?:%llguidance\b|start\s*:)", re.MULTILINE)
"""Found in grammars in Lark's notation only. The library's own expression takes half a minute for blank lines."""

Choice = Annotated[str, Meta(min_length=1)]


@attrs.frozen(kw_only=True)
class JsonSchema:
    """``response_format.json_schema``."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


@attrs.frozen(kw_only=True)
class ResponseFormat:
    """``response_format``, as OpenAI defines it."""

    type: Literal[FORMATS]  # type: ignore[valid-type]
    json_schema: JsonSchema | None = None
    schema: dict[str, Any] | None = None
    """Beside ``json_object``, as llama.cpp and others define it; OpenAI has it in ``json_schema`` alone."""


@attrs.frozen(kw_only=True)
class StructuredOutputs:
    """``structured_outputs``, as vLLM defines it: exactly one of these fields."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Annotated[tuple[Choice, ...], Meta(min_length=1, max_length=1000)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


def grammar_of(response: ResponseFormat | None, structured: StructuredOutputs | None) -> str:
    """The grammar that the two fields ask for; empty: none.

    Raises ApiError (400), naming the field, if the grammar cannot be followed or both fields ask for one.
    Checking a grammar can take a second: call this in a thread.
    """
    asked = [(field, made) for field, made in (_of_response(response), _of_structured(structured)) if made]
    if len(asked) > 1:
        raise ApiError(
            "structured_outputs: not beside response_format", "structured_outputs", code="invalid_value"
        )
    for field, grammar in asked:
        if wrong := wrong_with(grammar):
            raise cannot(field, wrong)
        return grammar
    return ""


def _of_response(asked: ResponseFormat | None) -> tuple[str, str]:
    if asked is None or asked.type == "text":
        return "", ""
    if asked.type == "json_object" and asked.schema is not None:
        return "response_format.schema", _made("response_format.schema", "json", asked.schema)
    if asked.type == "json_object":
        return "response_format", _made("response_format", "json_object", True)
    field = "response_format.json_schema"
    if asked.json_schema is None:
        raise ApiError(f"{field}: this field is required", field, code="missing_required_parameter")
    return f"{field}.schema", _made(f"{field}.schema", "json", asked.json_schema.schema)


def _of_structured(asked: StructuredOutputs | None) -> tuple[str, str]:
    if asked is None:
        return "", ""
    given = {
        name: value
        for name, value in attrs.asdict(asked, recurse=False).items()
        if value is not None and value is not False
    }
    if len(given) != 1:
        raise cannot(
            "structured_outputs",
            f"expected one of json, regex, choice, grammar and json_object, got {len(given)}",
        )
    ((name, value),) = given.items()
    field = f"structured_outputs.{name}"
    return field, _made(field, name, value)


def _made(field: str, kind: str, value: Any) -> str:
    """The grammar of one kind in ``_MAKES``. A value that is too large is refused before it is parsed."""
    try:
        size = len(value.encode() if isinstance(value, str) else msgspec.json.encode(value))
        if size > GRAMMAR_BYTES_MAX:
            raise cannot(field, f"at most {GRAMMAR_BYTES_MAX} bytes, got {size}")
        made: str = _MAKES[kind](value)
    except RecursionError as error:
        raise cannot(field, "nested too deeply") from error
    except (ValueError, msgspec.DecodeError) as error:
        raise cannot(field, str(error)) from error
    return made


def _of_schema(schema: dict[str, Any] | str) -> str:
    if isinstance(schema, str):
        schema = msgspec.json.decode(schema, type=dict[str, Any])
    made: str = LLMatcher.grammar_from_json_schema(schema, overrides=COMPACT)
    return made


def _of_choice(texts: tuple[str, ...]) -> str:
    made: str = LLMatcher.grammar_from_lark(
        "start: " + " | ".join(msgspec.json.encode(text).decode() for text in texts)
    )
    return made


def _of_grammar(text: str) -> str:
    """The grammar in ``text``, which is in Lark's notation or in GBNF (llama.cpp's)."""
    made: str = LLMatcher.grammar_from_lark(text if _LARK.search(text) else _of_gbnf(text))
    return made


def _of_gbnf(text: str) -> str:
    """A GBNF grammar in Lark's notation. Raises ValueError and RecursionError."""
    try:
        return gbnf_to_lark(text)
    except RecursionError:
        raise
    except Exception as error:  # the library raises bare Exception, as for a rule that is missing
        raise ValueError(str(error)) from error


_MAKES: dict[str, Any] = {
    "json": _of_schema, "regex": LLMatcher.grammar_from_regex, "choice": _of_choice, "grammar": _of_grammar,
    "json_object": lambda _: _of_schema({"type": "object"}),
}  # fmt: skip


def cannot(field: str, why: str) -> ApiError:
    """The error for a form that cannot be followed."""
    text = " ".join(why.split())
    return ApiError(
        f"{field}: {text if len(text) <= 300 else text[:297] + '...'}", field, code="invalid_value"
    )
