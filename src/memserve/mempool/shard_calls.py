"""The caller's side of the pool calls: numbers them, and remembers what each is for until it is answered."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import attrs

from memserve.pool_messages import FreeMem

Key = TypeVar("Key", bound=Hashable)
Call = TypeVar("Call")


@attrs.define
class ShardCalls(Generic[Key]):
    """Numbers the calls to shards. ``key`` is whatever the caller finds its request by.

    A number is never reused within an incarnation: the shard would take the new call for a repeat.
    """

    _last: int = attrs.field(default=0, init=False)
    _pending: dict[int, tuple[Key, bool]] = attrs.field(factory=dict, init=False)
    """For each unanswered call: (key, whether its answer may be a new lease)."""

    def __len__(self) -> int:
        """Number of unanswered calls."""
        return len(self._pending)

    def ask(self, key: Key, make: Callable[[int], Call], *, grants: bool = False) -> Call:
        """Number a call, which ``make`` builds; ``grants``: its answer may be a new lease."""
        self._last += 1
        self._pending[self._last] = (key, grants)
        return make(self._last)

    def answered(self, call: int) -> Key | None:
        """The key of the call that this answer ends; None when no request waits for it.

        If it is None and the answer is an Acquired with a lease that the caller does not hold, the lease must
        be given back.
        """
        key, _ = self._pending.pop(call, (None, False))
        return key

    def of(self, key: Key) -> list[int]:
        """The unanswered calls of ``key``."""
        return [call for call, (owner, _) in self._pending.items() if owner == key]

    def forget(self, key: Key) -> tuple[FreeMem, ...]:
        """Stop waiting for every call of ``key``.

        The caller must send the returned messages: they withdraw the calls that may be granted.
        """
        ended = self.of(key)
        withdrawn = tuple(FreeMem(lease=0, call=call) for call in ended if self._pending[call][1])
        for call in ended:
            del self._pending[call]
        return withdrawn
