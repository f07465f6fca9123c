"""The sandbox of chat templates: what they are written for works, but no client's number can fill the memory.

jinja2's sandbox bounds only ranges. This one also bounds the operators, methods and filters whose result can
be as large as a number says; output that a template makes piece by piece is counted as it is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sized
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

CHARACTERS_MAX = 32 << 20
"""Most characters of a rendered prompt. No context holds this many, yet a template may write more than a body
of 8 MiB holds."""
POWER_MAX = 64
"""Largest exponent that a template may use."""
WIDTH_MAX = 9_999
"""Largest width to which a template may pad, indent or split."""
_WIDE = re.compile(r"\*|\d{5}")
"""Matches, in the text before ``%``, a width that is passed as an argument, or one beyond WIDTH_MAX."""
_WIDE_FIELD = re.compile(r":[^{}]*(\{|\d{5})")
"""Matches, in a text for ``format``, a width that is passed as an argument, or one beyond WIDTH_MAX."""
_WIDTHS = ("center", "expandtabs", "ljust", "rjust", "zfill")
_FORMATS = ("format", "format_map")
_FILTERS = ("batch", "center", "indent", "slice", "tojson")


def environment() -> ImmutableSandboxedEnvironment:
    """A sandboxed environment with the settings and helpers of transformers' apply_chat_template."""
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    sandbox.filters["tojson"] = _to_json
    for name in _FILTERS:
        sandbox.filters[name] = _narrow(sandbox.filters[name])
    sandbox.filters["format"] = _format
    sandbox.globals.update(raise_exception=_raise, strftime_now=_now)
    return sandbox


def written(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """The template's output. Raises TemplateError if it exceeds CHARACTERS_MAX, and what rendering raises."""
    pieces, left = [], CHARACTERS_MAX
    for piece in template.generate(variables):  # one dict: a client's "self" is a variable like others
        left -= len(piece)
        if left < 0:
            raise jinja2.TemplateError(f"it writes more than {CHARACTERS_MAX} characters")
        pieces.append(piece)
    return "".join(pieces)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute ``left operator right``. Raises TemplateError if the result could be too large."""
        _check(not _could_be_huge(operator, left, right), operator)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a global, a macro or a method. Raises TemplateError if its result could be too large."""
        text, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if isinstance(text, str):
            _check(name not in _WIDTHS or not _wide((*args, *kwargs.values())), name)
            _check(name not in _FORMATS or not _WIDE_FIELD.search(text), name)
        return super().call(context, called, *args, **kwargs)


def _check(small: bool, name: str) -> None:
    if not small:
        raise jinja2.TemplateError(f"{name} would make too large a value")


def _could_be_huge(operator: str, left: Any, right: Any) -> bool:
    if operator == "**":
        return isinstance(right, int) and abs(right) > POWER_MAX
    if operator == "%":
        return isinstance(left, str) and bool(_WIDE.search(left))
    if isinstance(left, int) and isinstance(right, Sized):
        left, right = right, left
    return isinstance(left, Sized) and isinstance(right, int) and len(left) * right > CHARACTERS_MAX


def _wide(numbers: Iterable[Any]) -> bool:
    return any(isinstance(one, int) and one > WIDTH_MAX for one in numbers)


def _narrow(filtering: Callable[..., Any]) -> Callable[..., Any]:
    """Limit a filter to widths up to WIDTH_MAX; its first argument is not a width."""

    @wraps(filtering)
    def narrow(value: Any, *args: Any, **kwargs: Any) -> Any:
        _check(not _wide((*args, *kwargs.values())), filtering.__name__.removeprefix("do_"))
        return filtering(value, *args, **kwargs)

    return narrow


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    """jinja2's filter ``format``, limited to widths up to WIDTH_MAX."""
    _check(not _could_be_huge("%", value, args or kwargs), "format")
    return value % (kwargs or args)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON with the whitespace that models were trained on: that of Python's own ``json``."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
