"""A copy of a shard's index, made only from its IndexEvents: all that a scheduler can know of it."""

from __future__ import annotations

import attrs

from memserve.pool_messages import IndexDelta, IndexEvent, IndexSnapshot


@attrs.define
class Entry:
    """One entry: all tokens up to its end, and the number of their bytes that are its own."""

    scope: str
    tokens: bytes
    own: int
    tier: int


@attrs.define
class Mirror:
    """Turns events into cached prefixes. ``page_bytes``: bytes of the tokens of one page."""

    page_bytes: int
    entries: dict[int, Entry] = attrs.field(factory=dict)
    next: int | None = 0
    """The expected sequence number; None from a gap until a snapshot is complete."""
    parts: list[IndexSnapshot] = attrs.field(factory=list)

    def hear(self, message: IndexDelta | IndexSnapshot) -> bool:
        """Process a message; whether a snapshot must be requested."""
        if isinstance(message, IndexDelta):
            if self.next != message.first:
                self.next = None
                return True
            self.apply(message.events)
            self.next += len(message.events)
            return False
        self.parts = [*self.parts, message] if message.part else [message]
        if len(self.parts) == message.parts:
            self.entries.clear()
            for part in self.parts:
                self.apply(part.events)
            self.next, self.parts = message.next, []
        return False

    def apply(self, events: tuple[IndexEvent, ...] | list[IndexEvent]) -> None:
        """Apply events, in order."""
        for event in events:
            getattr(self, f"_{event.kind}")(event)

    def prefixes(self) -> dict[tuple[str, bytes], int]:
        """Every cached prefix of whole pages, with the tier of its last page."""
        found = {}
        for entry in self.entries.values():
            start = len(entry.tokens) - entry.own
            for end in range(start + self.page_bytes, len(entry.tokens) + 1, self.page_bytes):
                assert (entry.scope, entry.tokens[:end]) not in found, "a prefix in two entries"
                found[entry.scope, entry.tokens[:end]] = entry.tier
        return found

    def _stored(self, event: IndexEvent) -> None:
        known = self.entries.get(event.entry)
        if known is not None:
            known.tokens += event.tokens
            known.own += len(event.tokens)
            return
        above = self.entries.get(event.parent)
        scope, before = (event.scope, b"") if above is None else (above.scope, above.tokens)
        self.entries[event.entry] = Entry(scope, before + event.tokens, len(event.tokens), event.tier)

    def _split(self, event: IndexEvent) -> None:
        entry = self.entries[event.entry]
        front = event.pages * self.page_bytes
        end = len(entry.tokens) - entry.own + front
        self.entries[event.parent] = Entry(entry.scope, entry.tokens[:end], front, entry.tier)
        entry.own -= front

    def _moved(self, event: IndexEvent) -> None:
        self.entries[event.entry].tier = event.tier

    def _removed(self, event: IndexEvent) -> None:
        del self.entries[event.entry]
