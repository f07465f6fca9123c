"""What came after a prompt when it was last in the index: very likely its answer, where the same is asked again."""

from __future__ import annotations

from memserve.mempool.nodes import Node
from memserve.mempool.prompt_tree import PromptTree
from memserve.tokens import TOKEN_BYTES

SEQUEL_MAX = 4096
"""Tokens of an answer, however many were asked for."""
NEWEST = 64
"""Of a node's children, as many are looked at: thousands may begin behind a system prompt."""


def sequel_of(tree: PromptTree, scope: str, tokens: bytes, most: int) -> bytes:
    """At most ``most`` tokens, and SEQUEL_MAX, packed, that the index has after all of ``tokens``; where it has several, the newest. Counts as no use.

    The index has whole pages, and ``tokens`` may end within one: then what goes on in it.
    """
    root = tree.roots.get(scope)
    if root is None:
        return b""
    node, inside, at = tree.descend(root, tokens)
    begun = tokens[at:]  # of the page in which they end; longer where the index has not all of them
    wanted = len(begun) + min(most, SEQUEL_MAX) * TOKEN_BYTES
    found = node.key[inside:]
    while len(found) < wanted and (child := _newest(node, begun[len(found) :])) is not None:
        node, found = child, found + child.key
    return found[len(begun) : wanted] if found.startswith(begun) else b""


def _newest(node: Node, begun: bytes) -> Node | None:
    newest_first = zip(reversed(node.children.values()), range(NEWEST), strict=False)
    return next((child for child, _ in newest_first if child.key.startswith(begun)), None)
