"""Grammars of calls in XML-like tags (:mod:`memserve.api.call_xml`): each argument by its own part of the schema.

An argument that may be text is written as it is; of its schema, only lengths and lists of values are followed.
Others are JSON of their schema. Arguments come in the order of ``properties``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs

from memserve.api.call_formats import FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END
from memserve.api.call_xml import KEY, VALUE_ENDS, kinds_of, referred
from memserve.api.formats import cannot

LENGTH_MAX = 2000
"""Greatest length of texts in characters that a schema can demand or permit."""
EXTRA_MAX = 8
"""Most arguments that the schema permits without naming them."""

_NOTES = frozenset(
    ("title", "description", "default", "examples", "deprecated", "$comment", "$defs", "definitions")
)
_TOP = frozenset(("type", "properties", "required", "additionalProperties", "$schema", "$id", *_NOTES))
_OF_TEXT = frozenset(("type", "enum", "const", "minLength", "maxLength", "anyOf", "oneOf", *_NOTES))
_WITHOUT_ENDS = (
    "~/(.|\\n)*(" + "|".join(re.escape(end).replace("/", "\\/") for end in VALUE_ENDS) + ")(.|\\n)*/"
)
_VALUE_END = json.dumps(f"\n{PARAMETER_END}\n")


@attrs.frozen
class XmlRules:
    """The rules of one tool's call."""

    rule: str
    """Name of the call's rule; other names begin with it."""
    field: str
    """Name of the schema in errors."""
    strict: bool
    """Whether what cannot be followed is refused; otherwise it is ignored."""
    as_json: Callable[[dict[str, Any]], str]
    """The grammar for JSON of a schema; raises ApiError (400)."""

    def lines(self, name: str, schema: dict[str, Any]) -> Iterable[str]:
        """The grammar's lines; ``schema`` is that of the object of arguments. Raises ApiError (400)."""
        root = schema
        if isinstance(reference := schema.get("$ref"), str) and "properties" not in schema:
            target = referred(reference, schema)
            schema = {"additionalProperties": False, **target} if isinstance(target, dict) else schema
        self._check(schema, _TOP)
        parts = []
        named = self._properties(schema)
        for number, (key, one) in enumerate(named.items()):
            if re.fullmatch(KEY, key) is None:
                raise cannot(self.field, f"the name {key[:60]!r} cannot be written in this model's calls")
            yield from self._value(f"{self.rule}_{number}", json.dumps(f"{PARAMETER}{key}>\n"), one, root)
            parts.append(f"{self.rule}_{number}" + ("" if key in self._required(schema) else "?"))
        if (extra := schema.get("additionalProperties", "properties" not in schema)) is not False:
            head = f"{json.dumps(PARAMETER)} /[A-Za-z0-9_.\\-]{{1,64}}/ {json.dumps('>' + chr(10))}"
            yield from self._value(f"{self.rule}_x", head, extra, root)
            parts.append(f"{self.rule}_x{{0,{EXTRA_MAX}}}")
        head = json.dumps(f"{FUNCTION}{name}>\n")
        yield f"{self.rule}: {head} {' '.join(parts)} {json.dumps(FUNCTION_END)}"

    def _properties(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The arguments that have names, by name: those of ``properties`` and of ``required``."""
        properties = schema.get("properties")
        named = dict(properties) if isinstance(properties, dict) else {}
        for key in self._required(schema):
            named.setdefault(key, schema.get("additionalProperties", {}))
        return {key: one for key, one in named.items() if one is not False}

    def _required(self, schema: dict[str, Any]) -> list[str]:
        required = schema.get("required")
        return [key for key in required if isinstance(key, str)] if isinstance(required, list) else []

    def _value(self, rule: str, head: str, schema: Any, root: dict[str, Any]) -> Iterable[str]:
        """Rules for an argument: its tag, as ``head``, its value and the end of it."""
        kinds = kinds_of(schema, root)
        schema = dict(schema) if isinstance(schema, Mapping) else {}
        if "string" in kinds and isinstance(reference := schema.pop("$ref", None), str):
            target = referred(reference, root)
            if not isinstance(target, Mapping) or "$ref" in target:
                raise cannot(self.field, f"the reference {reference[:60]!r} does not lead to a type")
            schema |= target
        if "string" not in kinds:
            shared: dict[str, Any] = {key: root[key] for key in ("$defs", "definitions") if key in root}
            yield f"{rule}: {head} {self.as_json({**shared, **schema})} {_VALUE_END}"
            return
        self._check(schema, _OF_TEXT)
        for part in (*_listed(schema.get("anyOf")), *_listed(schema.get("oneOf"))):
            self._check(part, frozenset(("type", *_NOTES)))
        values = _listed(schema.get("enum")) or ([schema["const"]] if "const" in schema else [])
        if values:
            texts = [one if isinstance(one, str) else json.dumps(one) for one in values]
            if any(end in text for end in VALUE_ENDS for text in texts):
                raise cannot(self.field, "a value that holds a tag cannot be written in this model's calls")
            yield f"{rule}: {head} ({' | '.join(map(json.dumps, texts))}) {_VALUE_END}"
            return
        raw, whole = f"{rule.upper()}_RAW", f"{rule.upper()}_TEXT"
        yield f"{raw}: /(.|\\n){self._lengths(schema, kinds)}/ & {_WITHOUT_ENDS}"
        yield f"{whole}: {raw} {_VALUE_END}"
        yield f"{rule}: {head} {whole}"

    def _lengths(self, schema: dict[str, Any], kinds: frozenset[str]) -> str:
        """How often a regular expression's character may come."""
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        followed = all(one == "" or (type(one) is int and 0 <= one <= LENGTH_MAX) for one in (least, most))
        if not followed and self.strict:
            raise cannot(self.field, f"lengths of at most {LENGTH_MAX} can be followed in this model's calls")
        return f"{{{least},{most}}}" if followed and len(kinds) == 1 and (least or most != "") else "*"

    def _check(self, schema: Any, known: frozenset[str]) -> None:
        """Raise ApiError (400) if the tool is strict and its schema has keywords that are not followed."""
        if self.strict and isinstance(schema, Mapping) and (unknown := sorted(schema.keys() - known)):
            raise cannot(self.field, f"{unknown[0]!r} cannot be followed here in this model's calls")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
