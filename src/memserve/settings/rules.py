"""What values settings may have: rules (attrs validators with a text), and sizes and paths as users write them."""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs

from memserve.errors import UserError

GIB = 1 << 30
HOST_NAME_MAX = 253
"""Most characters of a host name; each of its labels has at most 63 (RFC 1035)."""
SIZE_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": GIB, "TiB": 1 << 40}


class RuleError(ValueError):
    """A value breaks its setting's rule.

    ``rule`` continues a sentence after "must"; ``known`` has values to suggest. ``at``: index of the element
    that breaks it, if the value has elements.
    """

    def __init__(self, rule: str, known: Sequence[str] = (), at: int | None = None) -> None:
        super().__init__(f"must {rule}")
        self.rule = rule
        self.known = tuple(known)
        self.at = at


@attrs.frozen
class Rule:
    """What a setting's value must be: an attrs validator with a text for errors and for the documentation."""

    text: str
    """Continues a sentence after "must"."""
    holds: Callable[[Any], bool]
    known: tuple[str, ...] = ()

    def __call__(self, _instance: object, _attribute: object, value: Any) -> None:
        if not self.holds(value):
            raise RuleError(self.text, self.known)


@attrs.frozen
class EachRule(Rule):
    """What each element of a setting's value must be."""

    def __call__(self, _instance: object, _attribute: object, value: Sequence[Any]) -> None:
        for at, one in enumerate(value):
            if not self.holds(one):
                raise RuleError(self.text, self.known, at)


def one_of(*known: str | int) -> Rule:
    """The rule that a value is one of those listed."""
    names = tuple(map(str, known))
    return Rule(f"be one of {', '.join(names)}", lambda value: value in known, names)


def between(low: float, high: float) -> Rule:
    """The rule that a value is from ``low`` to ``high`` inclusive; None passes, for optional settings."""
    return Rule(f"be between {low} and {high}", lambda value: value is None or low <= value <= high)


def matching(pattern: str, text: str) -> Rule:
    """The rule that a string matches ``pattern`` as a whole."""
    compiled = re.compile(pattern)
    return Rule(text, lambda value: compiled.fullmatch(value) is not None)


def or_unset(rule: Rule) -> Rule:
    """``rule`` for a string that may be left out."""
    return Rule(rule.text, lambda value: value == "" or rule.holds(value), rule.known)


def expanded(path: str | Path, key: str) -> Path:
    """The path with a leading ``~`` or ``~user`` replaced by the home directory.

    Raises UserError, which names the setting or option ``key``, where there is no such directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{key}: {str(path)!r} begins with ~, and no such home directory is known: give the whole path"
        ) from error


def why_not_private(found: os.stat_result, mode: int) -> str:
    """Why others may access a file or directory that must have ``mode``; empty if only this user may."""
    if found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o077:
        return ""
    return (
        f"is not private: it has owner {found.st_uid} and mode {stat.S_IMODE(found.st_mode):04o}, must have owner"
        f" {os.getuid()} and mode {mode:04o}"
    )


def is_host(value: str) -> bool:
    """Whether ``value`` is an IP address or a host name.

    Digits and dots alone are a mistyped address, not a name.
    """
    try:
        ipaddress.ip_address(value)
    except ValueError:
        label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
        name = rf"(?!\d+(\.\d+)*$){label}(\.{label})*"
        return len(value) <= HOST_NAME_MAX and re.fullmatch(name, value) is not None
    return True


def is_host_port(value: str) -> bool:
    """Whether ``value`` is HOST:PORT that other hosts can use; an IPv6 address must be in brackets."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^:\[\]]+)):(\d{1,5})", value)
    if match is None or not 1 <= int(match[3]) <= 65535:
        return False
    return a_reachable_host.holds(match[1] or match[2])


def are_keys(value: tuple[str, ...]) -> bool:
    """Whether all of ``value`` fit in an Authorization header, and none occurs twice."""
    return len(set(value)) == len(value) and all(re.fullmatch(r"[\x21-\x7e]{1,256}", key) for key in value)


def is_origin(value: str) -> bool:
    """Whether ``value`` is "*" or can equal a browser's Origin header (RFC 6454, 6.2)."""
    origin = r"\*|(?!http://[^/]*:80$|https://[^/]*:443$)[a-z][a-z0-9+.-]*://[a-z0-9._\-\[\]:]+"
    return re.fullmatch(origin, value) is not None


a_name = matching(
    "[a-z][a-z0-9-]{0,31}", "be 1 to 32 characters: a lower-case letter, then letters, digits or '-'"
)
a_host = Rule("be an IP address or a host name, without a port", is_host)
a_reachable_host = Rule(
    "be an IP address or a host name, without a port, and not 0.0.0.0 or ::",
    lambda value: is_host(value) and value not in ("0.0.0.0", "::"),
)
a_host_port = Rule(
    "be HOST:PORT, with an IP address or a host name other than 0.0.0.0 and ::, and a port from 1 to 65535",
    is_host_port,
)
each_an_origin = EachRule(
    'be "*" or an origin as browsers send it: scheme://host, a port if it is not the default one, all in lower '
    "case, and nothing after that",
    is_origin,
)
some_keys = Rule("be distinct keys of 1 to 256 printable ASCII characters without blanks", are_keys)


def parse_size(value: object) -> int:
    """The bytes that ``"1GiB"``, ``"512MiB"`` or a whole number of bytes means. Raises RuleError."""
    rule = 'be a size such as "512MiB" or "2GiB", or a whole number of bytes'
    if type(value) is int:
        return value
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?) ?([A-Za-z]*)", value) if isinstance(value, str) else None
    if match is None:
        raise RuleError(rule)
    if match[2] not in SIZE_UNITS:
        raise RuleError(rule, [match[1] + unit for unit in SIZE_UNITS if unit])
    return int(float(match[1]) * SIZE_UNITS[match[2]])


def size_text(count: int) -> str:
    """A number of bytes for people to read."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.4g} {unit}"
    return f"{count} bytes"


def parse_mode(value: object) -> object:
    """A caching mode's name: modes 1, 2 and 3 may be written as numbers."""
    return str(value) if type(value) is int else value
