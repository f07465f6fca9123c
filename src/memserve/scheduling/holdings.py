"""One shard's index, rebuilt from its IndexEvents and kept in the global tree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs

from memserve.identity import ActorId
from memserve.pool_messages import IndexEvent
from memserve.scheduling.global_tree import GlobalTree, Node
from memserve.scheduling.losses import Losses


class EventsDoNotFit(Exception):
    """Events that cannot follow the earlier ones: some are missing, and only a snapshot can supply them."""


@attrs.define(eq=False)
class Entry:
    """A run of pages that the shard's index keeps as one: ``size`` bytes that end where ``end`` ends."""

    end: Node
    size: int


@attrs.define
class Holdings:
    """The entries of one incarnation of a shard."""

    shard: ActorId
    tree: GlobalTree
    losses: Losses | None = None
    """Where evictions are counted."""
    entries: dict[int, Entry] = attrs.field(factory=dict, init=False)

    def apply(self, events: Iterable[IndexEvent]) -> None:
        """Apply events in order. Raises EventsDoNotFit; the events before the misfit stay applied."""
        for event in events:
            try:
                _APPLY[event.kind](self, event)
            except KeyError as error:
                raise EventsDoNotFit(f"{event.kind} of entry {event.entry}: {error} is not known") from error

    def drop(self) -> None:
        """Remove all entries: the shard holds nothing any more."""
        for number in reversed(list(self.entries)):
            self._remove(self.entries.pop(number))

    def _stored(self, event: IndexEvent) -> None:
        size = len(event.tokens)
        if not size or size % self.tree.width:
            raise EventsDoNotFit(f"{size} bytes are not whole pages of {self.tree.page_tokens} tokens")
        entry = self.entries.get(event.entry)
        if entry is None:
            start = self.entries[event.parent].end if event.parent else self.tree.root(event.scope)
        else:
            start = entry.end
        held = self.tree.hold(start, event.tokens, self.shard, event.tier)
        held[-1].ends += 1
        if entry is None:
            self.entries[event.entry] = Entry(held[-1], size)
        else:
            entry.end, entry.size = held[-1], entry.size + size
            start.ends -= 1
        for node in (start, *held):  # upper ones first, so that a run of nodes with equal holders becomes one
            if node.parent is not None:
                self.tree.tidy(node)

    def _split(self, event: IndexEvent) -> None:
        entry = self.entries[event.entry]
        front = event.pages * self.tree.width
        if not 0 < front < entry.size:
            raise EventsDoNotFit(f"entry {event.entry} of {entry.size} bytes cannot be split at {front}")
        entry.size -= front
        end = self._above(entry)
        end.ends += 1
        self.entries[event.parent] = Entry(end, front)

    def _moved(self, event: IndexEvent) -> None:
        nodes = list(self._run(self.entries[event.entry]))
        for node in nodes:
            self.tree.mark(node, self.shard, event.tier)
        self._tidy(nodes)

    def _removed(self, event: IndexEvent) -> None:
        entry = self.entries.pop(event.entry)
        if self.losses is not None:
            self._count_losses(entry, self.losses)
        self._remove(entry)

    def _count_losses(self, entry: Entry, losses: Losses) -> None:
        """Count the pages that this shard evicted, and those of them that no other shard holds."""
        losses.evicted(entry.size // self.tree.width)
        first: Node | None = None
        pages = 0
        for node in self._run(entry):
            if len(node.holders) == 1:
                first, pages = node, pages + len(node.key) // self.tree.width
        if first is not None:
            prefix, scope = self.tree.prefix(first)
            losses.lost(scope, prefix + first.key[: self.tree.width], pages)

    def _remove(self, entry: Entry) -> None:
        nodes = list(self._run(entry))
        above = nodes[-1].parent
        entry.end.ends -= 1
        for node in nodes:
            self.tree.unmark(node, self.shard)
        self._tidy(nodes)
        if above is not None:
            self.tree.tidy(above)

    def _tidy(self, nodes: list[Node]) -> None:
        for node in nodes:
            self.tree.tidy(node)

    def _above(self, entry: Entry) -> Node:
        """The node that ends where ``entry`` begins; a node is split if necessary."""
        left, node = entry.size, entry.end
        while left >= len(node.key):
            left -= len(node.key)
            if node.parent is None:
                raise EventsDoNotFit("an entry longer than its prefix")
            node = node.parent
            if not left:
                return node
        return self.tree.split(node, len(node.key) - left)

    def _run(self, entry: Entry) -> Iterator[Node]:
        """The nodes of an entry, the last first."""
        left, node = entry.size, entry.end
        while left > 0:
            yield node
            left -= len(node.key)
            if node.parent is None:
                raise EventsDoNotFit("an entry longer than its prefix")
            node = node.parent
        assert left == 0, "an entry begins inside a node"


_APPLY = {
    "stored": Holdings._stored,
    "split": Holdings._split,
    "moved": Holdings._moved,
    "removed": Holdings._removed,
}
