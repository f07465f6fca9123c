"""Finds tool calls in an answer's text as it arrives.

The output depends only on the text, not on how it was cut into pieces. A call is reported as soon as its name
is known and its arguments begin; from then on the arguments are passed on as the model writes them. What
turns out not to be a call is returned unchanged as text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import attrs
import msgspec

from memserve.api.call_formats import FUNCTION, FUNCTION_END, PARAMETER, CallFormat
from memserve.api.call_xml import XmlArguments
from memserve.api.thoughts import held

NAME_MAX = 256
"""Most characters in a name that a model may call."""
BLANKS_MAX = 1000
"""Most blanks after ``<function=NAME>``: they are looked through again with each token."""
_STRING = r'"(?:[^"\\]|\\.){1,1600}"'
_HEAD = re.compile(r'\{\s*"name"\s*:\s*(' + _STRING + r')\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_FUNCTION = re.compile(
    rf"{FUNCTION}([^<>\s]{{1,{NAME_MAX}}})>\s{{0,{BLANKS_MAX}}}(?={PARAMETER}|{FUNCTION_END})"
)


def _begun(text: str) -> str:
    """A regular expression of the beginnings of ``text``, the empty one included."""
    return f"(?:{text[0]}{_begun(text[1:])})?" if text else ""


_MAYBE_FUNCTION = re.compile(
    rf"{_begun(FUNCTION)}|{FUNCTION}[^<>\s]{{1,{NAME_MAX}}}(?:>\s{{0,{BLANKS_MAX}}}(?:{_begun(PARAMETER)}|{_begun(FUNCTION_END)}))?"
)
"""Matches every beginning of what ``_FUNCTION`` matches."""
_NAME, _KEYS, _SPACE = '"name"', ('"arguments"', '"parameters"'), r"\s{0,64}"
_ALONE = re.compile(
    rf'\{{{_SPACE}{_NAME}{_SPACE}:{_SPACE}"([A-Za-z0-9_.-]{{1,64}})"{_SPACE},{_SPACE}(?:{"|".join(_KEYS)}){_SPACE}:{_SPACE}\{{'
)
_MAYBE_ALONE = re.compile(
    rf'\{{{_SPACE}(?:{_begun(_NAME)}|{_NAME}{_SPACE}(?::{_SPACE}(?:"[A-Za-z0-9_.-]{{0,64}}|"[A-Za-z0-9_.-]{{1,64}}"{_SPACE}'
    rf"(?:,{_SPACE}(?:{'|'.join(map(_begun, _KEYS))}|(?:{'|'.join(_KEYS)}){_SPACE}(?::{_SPACE})?)?)?)?)?)"
)
"""Matches every beginning of what ``_ALONE`` matches."""
_QUOTES_AND_BRACES = re.compile(r'["\\{}]')


@attrs.frozen
class CallPart:
    """A piece of a call: its beginning, which carries the name, or more of its arguments."""

    number: int
    """Index of the call in its answer, from 0."""
    name: str | None = None
    arguments: str = ""


Found = str | CallPart
"""Text of the answer, or a piece of a call."""


@attrs.define
class _Braces:
    """Finds the brace that closes an object, ignoring braces in strings."""

    depth: int = 0
    at: int = 0
    """Index up to which the text has been scanned."""
    quoted: bool = False

    def end(self, text: str) -> int | None:
        """Index after the object; None until ``text`` has all of it.

        Between calls ``text`` may only grow at its end, unless ``at`` is reset.
        """
        while (found := _QUOTES_AND_BRACES.search(text, self.at)) is not None:
            self.at = found.end()
            if found[0] == "\\":
                if self.at == len(text):  # the escaped character is still to come
                    self.at -= 1
                    return None
                self.at += 1
            elif found[0] == '"':
                self.quoted = not self.quoted
            elif not self.quoted:
                self.depth += 1 if found[0] == "{" else -1
                if self.depth == 0:
                    return self.at
        self.at = len(text)
        return None


class CallParser:
    """Parses one answer: ``push`` its text, then ``finish``; both return what is known by then."""

    def __init__(
        self,
        form: CallFormat,
        known: Container[str],
        several: bool = True,
        schemas: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        *,
        unmarked: bool = True,
    ) -> None:
        """``known``: the names of the tools. Without ``several``, text after the first call is ignored.

        ``schemas``: those of the tools' arguments, by name; they say what the values in XML are. ``unmarked``:
        whether a known tool's call counts without the marker before it, where models are known to forget it.
        """
        self._form = form
        self._known = known
        self._schemas = schemas
        self._alone = form.alone and unmarked
        """Whether the answer as a whole may still be a call's object."""
        self._markers = (form.marker, FUNCTION) if form.style == "xml" and unmarked else (form.marker,)
        self._xml = XmlArguments({})
        self._several = several
        self.calls = 0
        """How many calls have begun."""
        self.enough = False
        """Whether all wanted calls are complete."""
        self._state: Callable[[], bool] = self._in_text
        self._rest = ""
        """Text that is not reported yet."""
        self._opened = ""
        """The text that announced a possible call; reported as text if no call follows."""
        self._begun = False
        """Whether anything but whitespace has come; then the answer as a whole cannot be a call."""
        self._listed = False
        self._named = False
        """Whether the call's arguments are not within an object of the call."""
        self._final = False
        self._braces = _Braces()
        self._found: list[Found] = []

    @property
    def cut(self) -> bool:
        """Whether the arguments of the last call are incomplete."""
        return self._state in (self._in_arguments, self._in_parameters)

    def push(self, text: str) -> list[Found]:
        """Take in ``text`` and return what is now known, in order."""
        self._rest += text
        while not self.enough and self._state():
            pass
        found, self._found = self._found, []
        return found

    def finish(self) -> list[Found]:
        """What is left when no more text follows."""
        self._final = True
        found = self.push("")
        left, self._rest = self._opened + self._rest, ""
        if left and not self.enough and self._state in (self._in_body, self._in_object):
            found.append(left)
        return found

    # ---- states: each works on the rest, and returns whether there is more to do with it -------------------

    def _in_text(self) -> bool:
        if self._form.bare and not self._begun and self._rest.lstrip().startswith("{"):
            return self._announced(len(self._rest) - len(self._rest.lstrip()))
        if self._alone and not self._begun and self._rest.lstrip().startswith("{"):
            return self._to(self._in_alone)
        found = [at for at in map(self._rest.find, self._markers) if at >= 0]
        if found:
            before = self._rest[: min(found)]
            self._add_text(before.rstrip())
            self._rest = self._rest[len(before.rstrip()) :]
            space, marker = len(before) - len(before.rstrip()), self._form.marker
            return self._announced(space + (len(marker) if self._rest.startswith(marker, space) else 0))
        keep = 0 if self._final else max(held(self._rest, marker) for marker in self._markers)
        self._add_text(self._rest[: len(self._rest) - keep])
        self._rest = self._rest[len(self._rest) - keep :]
        return False

    def _in_alone(self) -> bool:
        """The answer may be a call's object and nothing else, which is known at its end."""
        body = self._rest.lstrip()
        possible = self._may_be_alone(body)
        if possible and not self._final:
            return False
        self._alone = False
        if not possible or not self._is_call(_read(body)):
            return self._to(self._in_text)
        self._rest, self._begun = body, True
        return self._to(self._in_object)

    def _may_be_alone(self, body: str) -> bool:
        if (head := _ALONE.match(body)) is None:
            return _MAYBE_ALONE.fullmatch(body) is not None
        braces = self._braces
        end = braces.at if braces.at and not braces.depth else braces.end(body)
        return head[1] in self._known and (end is None or not body[end:].strip())

    def _is_call(self, given: Any) -> bool:
        """Whether a JSON value is the call of a tool and nothing more."""
        called = isinstance(given, dict) and len(given) == 2 and isinstance(given.get("name"), str)
        return called and isinstance(given.get("arguments", given.get("parameters")), dict)

    def _announced(self, length: int) -> bool:
        """A call may follow the first ``length`` characters of the rest."""
        self._opened, self._rest = self._rest[:length], self._rest[length:]
        self._begun = True
        return self._to(self._in_body)

    def _in_body(self) -> bool:
        body = self._rest.lstrip()
        if not body:
            return False
        if body[0] == "[" and not self._listed:
            self._listed = True
            at = self._rest.index("[") + 1
            self._opened, self._rest = self._opened + self._rest[:at], self._rest[at:]
            return True
        if self._form.style == "named" and body[0] not in "{[" and not self._listed:
            return self._at_name(body)
        if self._form.style == "xml" and body[0] == "<" and not self._listed:
            return self._at_function(body)
        if body[0] != "{":
            return self._no_call(0)
        self._opened += self._rest[: len(self._rest) - len(body)]
        self._rest = body
        return self._to(self._in_object)

    def _at_name(self, body: str) -> bool:
        whole, begun = _named_heads(self._form.inner)
        if (head := whole.match(body)) is None:
            return begun.fullmatch(body) is None and self._no_call(0)
        self._begin(head[1])
        self._rest, self._named = body[head.end() :], True
        return self._to(self._in_arguments)

    def _at_function(self, body: str) -> bool:
        marked = bool(self._opened.strip())
        if (head := _FUNCTION.match(body)) is None:
            return _MAYBE_FUNCTION.fullmatch(body) is None and self._no_call(0 if marked else 1)
        if not marked and head[1] not in self._known:
            return self._no_call(1)
        self._begin(head[1])
        self._rest, self._xml = body[head.end() :], XmlArguments(self._schemas.get(head[1], {}))
        return self._to(self._in_parameters)

    def _in_parameters(self) -> bool:
        made, self._rest = self._xml.take(self._rest, self._final)
        self._argue(made)
        return self._xml.ended and self._ended()

    def _in_object(self) -> bool:
        head = _HEAD.match(self._rest)
        if head is not None and (name := self._name(_read(head[1]))) is not None:
            self._begin(name)
            self._rest = self._rest[head.end() :]
            return self._to(self._in_arguments)
        if (end := self._braces.end(self._rest)) is None:
            return False
        if (call := self._whole(_read(self._rest[:end]))) is None:
            return self._no_call(end)
        self._begin(call[0])
        self._argue(call[1])
        self._rest = self._rest[end:]
        return self._ended()

    def _in_arguments(self) -> bool:
        end = self._braces.end(self._rest)
        known = len(self._rest) if end is None and self._final else self._braces.at
        self._argue(self._rest[:known])
        self._rest, self._braces.at = self._rest[known:], 0
        if end is None:
            return False
        return self._ended() if self._named else self._to(self._behind_arguments)

    def _behind_arguments(self) -> bool:
        """Skip what else the call's object holds. A call without its last brace also ends here."""
        rest = self._rest.lstrip()
        if not rest:
            return False
        if rest[0] == "}":
            self._rest = rest[1:]
            return self._ended()
        if rest[0] != ",":
            return self._ended()
        if not self._braces.depth:
            self._braces = _Braces(depth=1)
        if (end := self._braces.end(self._rest)) is None:
            return False
        self._rest = self._rest[end:]
        return self._ended()

    def _ended(self) -> bool:
        self.enough = not self._several
        self._opened, self._named = "", False
        return self._to(self._behind_call)

    def _behind_call(self) -> bool:
        rest, close = self._rest.lstrip(), self._form.close
        if not rest or (rest != close and close.startswith(rest)):
            return False
        if self._listed and rest[0] == ",":
            self._opened, self._rest = ",", rest[1:]
            return self._to(self._in_body)
        if self._listed and rest[0] == "]":
            self._rest, self._listed = rest[1:], False
            return True
        closed = bool(close) and rest.startswith(close)
        self._rest = rest[len(close) :] if closed else rest
        return self._to(self._between_calls)

    def _between_calls(self) -> bool:
        """Whitespace after a call belongs to the call."""
        self._rest = self._rest.lstrip()
        return bool(self._rest) and self._to(self._in_text)

    # ---- shared by the states ------------------------------------------------------------------------------

    def _to(self, state: Callable[[], bool]) -> bool:
        self._state = state
        if state in (self._in_alone, self._in_object, self._in_arguments, self._behind_arguments):
            self._braces = _Braces()
        return True

    def _no_call(self, length: int) -> bool:
        """Report the announcement and ``length`` characters of the rest as text: they are not a call."""
        self._add_text(self._opened + self._rest[:length])
        self._rest, self._opened, self._listed = self._rest[length:], "", False
        return self._to(self._in_text)

    def _add_text(self, text: str) -> None:
        self._begun = self._begun or bool(text.strip())
        if text:
            self._found.append(text)

    def _begin(self, name: str) -> None:
        self._found.append(CallPart(self.calls, name))
        self.calls += 1

    def _argue(self, text: str) -> None:
        if text:
            self._found.append(CallPart(self.calls - 1, None, text))

    def _name(self, given: Any) -> str | None:
        """The call's name, or None if it cannot be one: without a marker, only known tools can be called."""
        fits = isinstance(given, str) and 0 < len(given) <= NAME_MAX
        return given if fits and (self._opened_by_marker or given in self._known) else None

    @property
    def _opened_by_marker(self) -> bool:
        return bool(self._opened.strip()) or not self._form.bare

    def _whole(self, given: Any) -> tuple[str, str] | None:
        """Name and arguments of a complete call in an unusual notation; None if it is not a call."""
        if not isinstance(given, dict) or (name := self._name(given.get("name"))) is None:
            return None
        arguments = given.get("arguments", given.get("parameters"))
        if isinstance(arguments, str):
            arguments = _read(arguments) if arguments.strip() else None
            if arguments is None:
                return None
        arguments = {} if arguments is None else arguments
        return (name, msgspec.json.encode(arguments).decode()) if isinstance(arguments, dict) else None


@cache
def _named_heads(marks: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What the head of a call is whose name is before its arguments, and what may become such a head.

    Between the two there may be ``marks``: after each but the last, an id, which is not the one that clients
    get. The second expression also matches a few other texts.
    """
    *before_ids, last = map(re.escape, marks)
    ids = "".join(rf"(?:{mark}\s{{0,8}}[A-Za-z0-9_-]{{1,64}}\s{{0,8}})?" for mark in before_ids)
    name = r"[A-Za-z0-9_.-]{1,256}"
    whole = re.compile(rf"({name})\s{{0,8}}{ids}(?:{last}\s{{0,8}})?(?=\{{)")
    characters = re.escape("".join(sorted(set("".join(marks)))))
    return whole, re.compile(rf"{name}[A-Za-z0-9_\s\-{characters}]{{0,160}}")


def _read(text: str) -> Any:
    """The value of a JSON text; None if it is not JSON."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None
