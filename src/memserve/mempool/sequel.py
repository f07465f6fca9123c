"""The tokens that followed a prompt when it was last in the index.

They are very likely its answer, if the same question is asked again.
"""

from __future__ import annotations

from memserve.mempool.nodes import Node
from memserve.mempool.prompt_tree import PromptTree
from memserve.tokens import TOKEN_BYTES

SEQUEL_MAX = 4096
"""Maximum number of tokens returned, however many are asked for."""
NEWEST = 64
"""How many of a node's latest children are examined: thousands may follow a system prompt."""


def sequel_of(tree: PromptTree, scope: str, tokens: bytes, max_tokens: int) -> bytes:
    """The tokens, packed, that the index has after all of ``tokens``: at most ``max_tokens``, and SEQUEL_MAX.

    If it has several continuations, the latest is taken. The look-up does not count as a use. The index has
    whole pages, and ``tokens`` may end within one: then its continuation is what follows in that page.
    """
    root = tree.roots.get(scope)
    if root is None:
        return b""
    node, inside, at = tree.descend(root, tokens)
    begun = tokens[at:]  # the part of the last page; longer if the index does not have all tokens
    wanted = len(begun) + min(max_tokens, SEQUEL_MAX) * TOKEN_BYTES
    found = node.key[inside:]
    while len(found) < wanted and (child := _newest(node, begun[len(found) :])) is not None:
        node, found = child, found + child.key
    return found[len(begun) : wanted] if found.startswith(begun) else b""


def _newest(node: Node, begun: bytes) -> Node | None:
    newest_first = zip(reversed(node.children.values()), range(NEWEST), strict=False)
    return next((child for child, _ in newest_first if child.key.startswith(begun)), None)
