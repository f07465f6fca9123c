"""Grammars as llguidance reads them, and its panics as errors.

The library is written in Rust. Where it gives up by panicking, pyo3 raises what is no Exception, so that nothing on the way would
catch it: one request's grammar would end the process, and with it the streams of all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llguidance import LLMatcher

_PANIC = "PanicException"
"""pyo3's class, which cannot be imported."""


class GrammarPanic(ValueError):
    """llguidance gave up over a grammar in a way that it does not foresee."""


@contextmanager
def panics_told() -> Iterator[None]:
    """Raises GrammarPanic for a panic of the library within."""
    try:
        yield
    except BaseException as found:
        if type(found).__name__ != _PANIC:
            raise
        raise GrammarPanic(f"the library that follows grammars failed over it: {found}") from found


def wrong_with(grammar: str) -> str:
    """Why a grammar, llguidance's text, cannot be followed; empty: it can. It can take a second: call it in a thread."""
    try:
        with panics_told():
            wrong: str = LLMatcher.validate_grammar(grammar)
    except GrammarPanic as panic:
        return str(panic)
    return wrong
