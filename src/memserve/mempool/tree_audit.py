"""Every invariant of the prefix index, for :func:`memserve.mempool.audit.check_pool` and the tests."""

from __future__ import annotations

from memserve.mempool.addresses import Tier, tier_of
from memserve.mempool.nodes import Node, Root
from memserve.mempool.prompt_tree import PromptTree
from memserve.tokens import TOKEN_BYTES


def check_tree(tree: PromptTree) -> None:
    """Assert every invariant of a tree; walks all of it."""
    nodes = list(tree.nodes())
    pins = _counted_pins(tree)
    for node in nodes:
        assert node.pins == pins.pop(node, 0), f"{node.pins} pins counted wrongly"
        _check_node(tree, node)
        _check_children(tree, node)
    assert not pins, "a pinned root is not in the tree"
    pages = [page for node in nodes for page in node.pages]
    assert len(set(pages)) == len(pages), "a page is in the index twice"
    for tier in Tier:
        _check_tier(tree, tier, [node for node in nodes if node.tier == tier])


def _counted_pins(tree: PromptTree) -> dict[Node, int]:
    pins: dict[Node, int] = {}
    for pin in tree.pins:
        path = list(pin.node.path())
        assert isinstance(path[-1], Root), "a pin's node left the tree"
        tokens = sum(len(node.key) for node in path)
        assert tokens == pin.tokens * TOKEN_BYTES, "a pin does not end at its node's end"
        for node in path:
            pins[node] = pins.get(node, 0) + 1
    return pins


def _check_node(tree: PromptTree, node: Node) -> None:
    assert len(node.key) == len(node.pages) * tree.page_bytes, "a key does not fill its node's pages"
    assert {tier_of(page) for page in node.pages} <= {node.tier}, "a node's pages are in several tiers"
    if node.moving is not None:
        assert node.moving.node is node, "a move names another node"
        assert node.moving.source == node.pages, "a move is of other pages than its node's"
        assert len(node.moving.target) == len(node.pages), "a move has too few places"
        assert not (node.pins and node.leaving), "pinned pages are on their way out"
    if isinstance(node, Root):
        assert not node.key, "a root has tokens"
        assert node.parent is None, "a root hangs below a node"
        assert tree.roots[node.scope] is node, "a root is filed under another scope"
        assert node.pins or node.children, f"the empty root of scope {node.scope!r} was kept"
    else:
        assert node.key, "a node without pages was kept"
        assert node.pins or node.staying_children or node.ticket, (
            "a node that can go is not queued: it never would"
        )


def _check_children(tree: PromptTree, node: Node) -> None:
    staying = sum(child.tier == node.tier and not child.leaving for child in node.children.values())
    assert node.staying_children == staying, (
        f"{node.staying_children} children in the same tier counted, {staying} there"
    )
    for first, child in node.children.items():
        assert child.parent is node, "a child names another parent"
        assert child.key[: tree.page_bytes] == first, "a child is filed under another page"
        assert child.pins <= node.pins, "a child is pinned more often than its parent"
        assert child.last_use <= node.last_use, "a child was used after its parent"


def _check_tier(tree: PromptTree, tier: Tier, nodes: list[Node]) -> None:
    tree.lru[tier].check()
    pages = sum(len(node.pages) for node in nodes)
    assert pages == tree.indexed[tier], f"{pages} pages in tier {tier.name}, {tree.indexed[tier]} counted"
    free = sum(len(node.pages) for node in nodes if not node.pins)
    assert free == tree.evictable[tier], (
        f"{free} pages unpinned in {tier.name}, {tree.evictable[tier]} counted"
    )
