"""Arguments of calls that are written as XML-like parameters, as Qwen3-Coder does, turned into JSON.

A call is ``<function=NAME>``, parameters, and ``</function>``. A parameter is ``<parameter=KEY>``, its value, and
``</parameter>``; one line break after the first tag and one before the last are not part of the value. The
tool's schema says whether a value is text or JSON. A text ends at the first tag, JSON at the first one outside of
its strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import attrs
import msgspec

from memserve.api.call_formats import FUNCTION_END, PARAMETER, PARAMETER_END
from memserve.api.thoughts import held

KEY = "[^<>\n]{1,256}"
"""A regular expression of the keys that can be written."""
VALUE_ENDS = (PARAMETER_END, PARAMETER, FUNCTION_END)
"""Each ends a value: models forget the first at times, and Qwen's own parser then ends it as well."""

_TEXT = frozenset(("string",))
_NEXT = re.compile(f"<parameter=({KEY})>|</function>|</tool_call>")
_VALUE_END = re.compile("|".join(VALUE_ENDS))
_QUOTE_OR_END = re.compile(f'"|{_VALUE_END.pattern}')
_IN_STRING = re.compile(r'(?:[^"\\\x00-\x1f]++|\\[^\x00-\x1f])*+')
"""What a JSON string may hold: it escapes control characters, line breaks among them."""
_WIDER = {"integer": "number"}
_LEVELS_MAX = 32

Schema = Mapping[str, Any]


def kinds_of(schema: Any, root: Schema) -> frozenset[str]:
    """The JSON types that a schema permits; ``string`` alone if it does not say.

    ``root``: the schema that references are resolved in.
    """
    return _kinds(schema, root, set(), _LEVELS_MAX) or _TEXT


def _kinds(schema: Any, root: Schema, seen: set[str], left: int) -> frozenset[str]:
    # Each reference is followed once: schemas may refer to themselves.
    if not isinstance(schema, Mapping) or not left:
        return _TEXT
    reference, kind = schema.get("$ref"), schema.get("type")
    if isinstance(reference, str):
        if reference in seen:
            return frozenset()
        seen.add(reference)
        return _kinds(referred(reference, root), root, seen, left - 1)
    if kind is not None:
        return frozenset(one for one in (kind if isinstance(kind, list) else [kind]) if isinstance(one, str))
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(parts := schema.get(key), list) and parts:
            return frozenset().union(*(_kinds(part, root, seen, left - 1) for part in parts))
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return frozenset(map(_kind, values)) if isinstance(values, list) and values else _TEXT


def referred(reference: str, root: Schema) -> Any:
    """The part of ``root`` that ``reference`` names, or None if it names none."""
    found: Any = root
    for step in reference.removeprefix("#").split("/")[1:]:
        found = found.get(step) if isinstance(found, Mapping) else None
    return found if reference.startswith("#") else None


def property_of(schema: Schema, key: str) -> Any:
    """The schema of the argument ``key`` in the schema of a tool's arguments."""
    if isinstance(reference := schema.get("$ref"), str) and "properties" not in schema:
        schema = found if isinstance(found := referred(reference, schema), Mapping) else schema
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and key in properties:
        return properties[key]
    return schema.get("additionalProperties")


def _kind(value: Any) -> str:
    names = {bool: "boolean", str: "string", list: "array", dict: "object", int: "integer", float: "number"}
    return names.get(type(value), "null")


def as_json(text: str, kinds: frozenset[str]) -> str:
    """The JSON text of a parameter's value: as it is if that is JSON of one of ``kinds``, or else a string."""
    bare = text.strip()
    if bare.lower() in ("true", "false", "null"):
        bare = bare.lower()
    try:
        value = msgspec.json.decode(bare)
    except (msgspec.DecodeError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    kind = _kind(value)
    plain = "string" in kinds and (kind == "string" or kinds.isdisjoint((kind, _WIDER.get(kind, kind))))
    return json.dumps(text, ensure_ascii=False) if plain else bare


@attrs.define
class _ValueEnd:
    """Finds the end of a value that is reported whole: the first tag, but if the value is JSON, the first one
    outside of its strings."""

    _json: bool | None = None
    """Whether the value still looks like JSON with strings; None before its first character."""
    _at: int = 0
    """Index up to which there is no end."""
    _in_string: bool = False

    def find(self, rest: str, final: bool) -> re.Match[str] | None:
        """The end in ``rest``, which begins with the value; None if more is needed, unless ``final``."""
        if self._json is None and (bare := rest.lstrip()):
            self._json = bare[0] in '{["'
        if self._json:
            found, undecided = self._outside_strings(rest)
            if undecided and not final:
                return None
            if found is not None and _is_json(rest[: found.start()]):
                return found
            self._json, self._at = False, 0
        found = _VALUE_END.search(rest, self._at)
        self._at = max(0, len(rest) - len(PARAMETER_END))
        return found

    def _outside_strings(self, rest: str) -> tuple[re.Match[str] | None, bool]:
        """The first end outside of a string, and whether more text may bring it. Neither, if no JSON has such a string."""
        while True:
            if self._in_string:
                self._at = at = _in_string_until(rest, self._at)
                if at >= len(rest) - (rest[at : at + 1] == "\\"):
                    return None, True
                if rest[at] != '"':
                    return None, False
                self._at, self._in_string = at + 1, False
            found = _QUOTE_OR_END.search(rest, self._at)
            if found is None:
                self._at = max(self._at, len(rest) - len(PARAMETER_END))
                return None, True
            if found[0] != '"':
                return found, False
            self._at, self._in_string = found.end(), True


def _in_string_until(rest: str, at: int) -> int:
    """Index of what ends the part of a JSON string that begins at ``at``."""
    found = _IN_STRING.match(rest, at)
    assert found is not None, "the expression also matches nothing"
    return found.end()


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


class XmlArguments:
    """Reads the parameters of one call: ``take`` the text that is there, as often as there is more."""

    def __init__(self, schema: Schema) -> None:
        """``schema``: that of the tool's arguments; empty if the tool is not known."""
        self._schema = schema
        self._made = "{"
        """JSON that is not reported yet."""
        self._keys = 0
        self._kinds: frozenset[str] | None = None
        """What the value that is being read may be; None between values."""
        self._started = False
        """Whether the first character of the value has come."""
        self._end = _ValueEnd()
        """Finds the end of the value that is being read, if that is not a text."""
        self.ended = False
        """Whether the call's last parameter has been read."""

    def take(self, rest: str, final: bool = False) -> tuple[str, str]:
        """Read what can be read of ``rest``: more of the arguments' JSON, and what of ``rest`` is left.

        ``final``: no more text follows.
        """
        more = True
        while more and not self.ended:
            rest, more = self._between(rest) if self._kinds is None else self._value(rest, final)
        made, self._made = self._made, ""
        return made, rest

    def _between(self, rest: str) -> tuple[str, bool]:
        """Go to the next value, or to the end; anything else between parameters is ignored."""
        if (found := _NEXT.search(rest)) is None:
            # A tag holds no "<", so only what follows the last one may become a tag.
            at = rest.rfind("<")
            return rest[at:] if at >= 0 else "", False
        if found[1] is None:
            self._made += "}"
            self.ended = True
            return rest[found.end() if found[0] == FUNCTION_END else found.start() :], False
        self._made += ", " if self._keys else ""
        self._made += json.dumps(found[1], ensure_ascii=False) + ": "
        self._keys += 1
        self._kinds = kinds_of(property_of(self._schema, found[1]), self._schema)
        self._made += '"' if self._kinds == _TEXT else ""
        self._started = False
        return rest[found.end() :], True

    def _value(self, rest: str, final: bool) -> tuple[str, bool]:
        if not self._started and self._kinds == _TEXT and rest:
            self._started = True
            return rest.removeprefix("\n"), True
        found = _VALUE_END.search(rest) if self._kinds == _TEXT else self._end.find(rest, final)
        if found is None:
            if self._kinds != _TEXT:
                return rest, False
            keep = max(held(rest, end) for end in VALUE_ENDS)
            self._say(rest[: len(rest) - keep])
            return rest[len(rest) - keep :], False
        value = rest[: found.start()].removesuffix("\n")
        if self._kinds == _TEXT:
            self._say(value)
            self._made += '"'
        else:
            assert self._kinds is not None
            self._made += as_json(value.removeprefix("\n"), self._kinds)
        self._kinds, self._end = None, _ValueEnd()
        return rest[found.end() if found[0] == PARAMETER_END else found.start() :], True

    def _say(self, text: str) -> None:
        self._made += json.dumps(text, ensure_ascii=False)[1:-1]
