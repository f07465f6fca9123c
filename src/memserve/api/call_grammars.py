"""Grammars for answers that must or may call tools: the model's call format with each tool's schema in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from llguidance import LLMatcher

from memserve.api.call_formats import CallFormat
from memserve.api.call_xml_grammars import XmlRules
from memserve.api.errors import ApiError
from memserve.api.formats import COMPACT, cannot
from memserve.api.tools import Offer, Tool
from memserve.engine.grammars import wrong_with

CALLS_MAX = 16
"""Most calls in an answer that follows a grammar: a small model that repeats itself would never end."""
SCHEMAS_BYTES_MAX = 131_072
"""Most bytes in all schemas that one answer follows."""


def call_grammar(offer: Offer, form: CallFormat, specials: Mapping[str, int], answer: str = "") -> str:
    """The grammar for an answer that is offered these tools; empty: it need not follow any.

    ``specials``: the tokenizer's special tokens; marks found there are written as single tokens. ``answer``:
    the grammar for an answer without calls; empty: none. Raises ApiError (400), naming the tool, if its
    schema cannot be followed. This can take a second: call it in a thread.
    """
    if not (offer.followed or answer):
        return ""
    if offer.must and answer:
        text = "tool_choice: not beside response_format or structured_outputs, where it asks for a call"
        raise ApiError(text, "tool_choice", code="invalid_value")
    if (size := sum(_size(tool) for tool in offer.allowed)) > SCHEMAS_BYTES_MAX:
        raise cannot("tools", f"schemas of at most {SCHEMAS_BYTES_MAX} bytes can be followed, got {size}")
    lark = "\n".join(["%llguidance {}", *_rules(offer, form, specials, bool(answer))])
    made = json.dumps({"grammars": [{"name": "calls", "lark_grammar": lark}, *_named(answer)]})
    # Each tool's part has been checked, but all of them together may be too much.
    if wrong := wrong_with(made):
        raise cannot("tools", wrong)
    return made


def _rules(offer: Offer, form: CallFormat, specials: Mapping[str, int], answered: bool) -> Iterable[str]:
    def written(marks: Iterable[str]) -> str:
        return " ".join(_written(mark, specials) for mark in marks)

    more = f" ({written(form.between)} call){{0,{CALLS_MAX - 1}}}" if offer.several and form.several else ""
    calls = f"call{more} {written(form.after)}"
    if offer.must or answered:
        yield ("start: calls" if offer.must else "start: @answer | calls")
        yield f"calls: {written(form.before)} {calls}"
    else:
        yield from _among_text(form, specials, f"{written(form.before[1:])} {calls}")
    names = [f"call{number}" for number, _ in enumerate(offer.allowed)]
    yield f"call: {' | '.join(names)}"
    for name, tool in zip(names, offer.allowed, strict=True):
        if form.style == "xml":
            yield from _xml_call(name, tool, offer)
        else:
            yield f"{name}: {_call(tool, offer, form, specials)}"


def _among_text(form: CallFormat, specials: Mapping[str, int], calls: str) -> Iterable[str]:
    """Rules for any text; once it announces calls, it must end with them."""
    if form.bare:
        yield "start: TEXT | call"
        yield r"TEXT: /\s*([^{\s](.|\n)*)?/"
        return
    yield r"TEXT: /(.|\n)*/"
    if form.marker in specials:
        yield f"start: TEXT | TEXT {_written(form.marker, specials)} {calls}"
    else:
        yield f"start: TEXT | announced {calls}"
        yield f"announced[lazy]: TEXT {_text(form.marker)}"


def _written(mark: str, specials: Mapping[str, int]) -> str:
    """A mark as a grammar writes it: as a single token, or as text."""
    return f"<[{specials[mark]}]>" if mark in specials else _text(mark)


def _text(text: str) -> str:
    return json.dumps(text)


def _call(tool: Tool, offer: Offer, form: CallFormat, specials: Mapping[str, int]) -> str:
    """One call of the tool. Raises ApiError (400)."""
    name, schema = tool.function.name, _schema(tool, offer)
    if form.style == "named":
        return f"{_text(name)} {_written(form.inner[-1], specials)} {schema}"
    head = f'{{"name": "{name}", "{form.key}": '
    return f'{_text(head)} {schema} "}}"'


def _xml_call(rule: str, tool: Tool, offer: Offer) -> Iterable[str]:
    """The rules of one call of the tool in XML. Raises ApiError (400)."""
    field, strict = _field(tool, offer), bool(tool.function.strict)

    def as_json(schema: dict[str, Any]) -> str:
        return _json(schema, strict, field)

    lines = list(XmlRules(rule, field, strict, as_json).lines(tool.function.name, _object(tool, field)))
    _check("\n".join(["%llguidance {}", f"start: {rule}", *lines]), field)
    return lines


def _size(tool: Tool) -> int:
    return len(msgspec.json.encode(tool.function.parameters))


def _schema(tool: Tool, offer: Offer) -> str:
    """The part of the grammar for the tool's arguments. Raises ApiError (400)."""
    field = _field(tool, offer)
    return _json(_object(tool, field), bool(tool.function.strict), field)


def _field(tool: Tool, offer: Offer) -> str:
    return f"{offer.path(tool)}.function.parameters"


def _object(tool: Tool, field: str) -> dict[str, Any]:
    """The schema of the object of the tool's arguments. Raises ApiError (400)."""
    return _closed(tool.function.parameters or {"properties": {}}, field)


def _json(schema: dict[str, Any], strict: bool, field: str) -> str:
    """The grammar for JSON of a schema. Raises ApiError (400)."""
    options = COMPACT if strict else {**COMPACT, "lenient": True}
    made = "%json " + json.dumps({**schema, "x-guidance": options})
    _check(f"start: {made}", field)
    return made


def _check(lark: str, field: str) -> None:
    """Raise ApiError (400) if a grammar cannot be followed."""
    if wrong := wrong_with(LLMatcher.grammar_from_lark(lark)):
        raise cannot(field, wrong.partition("\n")[0].partition("): ")[2] or wrong)


def _closed(schema: dict[str, Any], field: str) -> dict[str, Any]:
    """``schema`` for objects only; if it lists ``properties``, others are excluded unless it permits them.

    Otherwise a model would invent arguments without end. Raises ApiError (400) if the type is not an object.
    """
    kinds = schema.get("type", "object")
    if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        raise cannot(field, f"expected the schema of an object, got one of {json.dumps(kinds)}")
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return {**closed, **schema, "type": "object"}


def _named(answer: str) -> list[dict[str, Any]]:
    if not answer:
        return []
    if not answer.startswith("{"):
        return [{"name": "answer", "lark_grammar": answer}]
    (made,) = msgspec.json.decode(answer)["grammars"]
    return [{**made, "name": "answer"}]
