"""Panics of libraries that are written in Rust (llguidance, tokenizers), as errors.

When such a library panics, pyo3 raises a class that is not an Exception, so no handler on the way would catch
it: one request would end the process, and with it the streams of all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_PANIC = "PanicException"
"""Name of pyo3's class, which cannot be imported."""


class Panic(RuntimeError):
    """A library written in Rust panicked."""


def is_panic(error: BaseException) -> bool:
    """Whether ``error`` is a panic, or a group of nothing but panics."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(is_panic, error.exceptions))
    return type(error).__name__ == _PANIC


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise Panic for a panic within the block."""
    try:
        yield
    except BaseException as found:
        if not is_panic(found):
            raise
        raise Panic(f"a library failed over it: {found}") from found
