"""Panics of libraries that are written in Rust (llguidance, tokenizers), as errors.

Where they give up in a way that they do not foresee, pyo3 raises what is no Exception, so that nothing on the way would catch it:
one request would end the process, and with it the streams of all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_PANIC = "PanicException"
"""pyo3's class, which cannot be imported."""


class Panic(RuntimeError):
    """A library gave up."""


def is_panic(error: BaseException) -> bool:
    """Whether it is one, or a group of nothing else."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(is_panic, error.exceptions))
    return type(error).__name__ == _PANIC


@contextmanager
def panics_told() -> Iterator[None]:
    """Raises Panic for a panic within."""
    try:
        yield
    except BaseException as found:
        if not is_panic(found):
            raise
        raise Panic(f"a library failed over it: {found}") from found
