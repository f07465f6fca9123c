"""The prefix index, compared with a plain dict from whole prefixes to pages."""

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from index_mirror import Mirror
from memserve.mempool.addresses import Tier, slot
from memserve.mempool.nodes import Job, Move
from memserve.mempool.prompt_tree import PromptTree
from memserve.mempool.tree_audit import check_tree
from memserve.tokens import pack

PAGE = 2
PAGE_BYTES = PAGE * 4
HOST = slot(Tier.HOST, 0)
"""The first slot beyond the device tier."""
prompts = st.lists(st.integers(0, 1), max_size=14).map(pack)
scopes = st.sampled_from(["anne", "bob"])


def prefixes(tokens: bytes) -> list[bytes]:
    """All prefixes of ``tokens`` in whole pages, the shortest first."""
    return [tokens[:end] for end in range(PAGE_BYTES, len(tokens) + 1, PAGE_BYTES)]


def whole(tokens: bytes) -> bytes:
    """``tokens`` without the tail that fills no page."""
    return tokens[: len(tokens) // PAGE_BYTES * PAGE_BYTES]


class TreeAgainstModel(RuleBasedStateMachine):
    """Random calls. The model maps (scope, prefix) to a page, and keeps the prefix of every pin."""

    def __init__(self):
        super().__init__()
        self.tree = PromptTree(PAGE, events=[])
        self.model: dict[tuple[str, bytes], int] = {}
        self.pins = {}
        self.fresh = 0
        self.jobs = []
        self.mirror = Mirror(PAGE_BYTES)

    def longest(self, scope, tokens):
        found = [prefix for prefix in prefixes(tokens) if (scope, prefix) in self.model]
        return found[-1] if found else b""

    def pages(self, scope, tokens):
        return [self.model[scope, prefix] for prefix in prefixes(tokens)]

    def pinned(self):
        return {(scope, prefix) for scope, tokens in self.pins.values() for prefix in prefixes(tokens)}

    def remove(self, pages):
        gone = {key for key, page in self.model.items() if page in pages}
        assert len(gone) == len(pages) == len(set(pages))
        assert not gone & self.pinned()
        for key in gone:
            del self.model[key]
        for scope, tokens in self.model:  # what is left is still reachable
            assert all((scope, prefix) in self.model for prefix in prefixes(tokens))
        return gone

    @rule(scope=scopes, tokens=prompts)
    def match(self, scope, tokens):
        found = self.tree.match(scope, tokens)
        expected = self.longest(scope, tokens)
        assert found.tokens == len(expected) // 4
        assert list(found.pages) == self.pages(scope, expected)

    @rule(scope=scopes, tokens=prompts)
    def pin(self, scope, tokens):
        expected = self.longest(scope, tokens)
        pin = self.tree.pin(scope, tokens)
        assert pin.tokens == len(expected) // 4
        self.pins[pin] = (scope, expected)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data):
        pin = data.draw(st.sampled_from(list(self.pins)))
        self.tree.unpin(pin)
        del self.pins[pin]

    @precondition(lambda self: self.pins)
    @rule(data=st.data(), more=prompts)
    def insert(self, data, more):
        pin = data.draw(st.sampled_from(list(self.pins)))
        scope, before = self.pins[pin]
        more = whole(more)
        pages = list(range(self.fresh, self.fresh + len(more) // PAGE_BYTES))
        self.fresh += len(pages)
        already = len(self.longest(scope, before + more)) - len(before)
        offered = dict(zip(prefixes(before + more)[len(before) // PAGE_BYTES :], pages, strict=True))
        pinned, coming = self.pinned(), self.sources(inbound=True)
        found = self.tree.insert(pin, more, pages)
        assert found.already_tokens == already // 4
        duplicates, replaced = [], []
        for prefix, page in offered.items():
            there = self.model.setdefault((scope, prefix), page)
            if there == page:
                continue
            if there >= HOST and ((scope, prefix) not in pinned or there in coming):
                self.model[scope, prefix] = page
                replaced.append(there)
            else:
                duplicates.append(page)
        assert list(found.duplicates) == duplicates
        assert sorted(found.replaced) == sorted(replaced)
        self.pins[pin] = (scope, before + more)

    def sources(self, inbound):
        """Slots that are being copied in one direction, and whose copy is still wanted."""
        moves = [move for job in self.jobs for move in job.moves if move.node is not None]
        return {page for move in moves if move.inbound == inbound for page in move.source}

    def begin(self, nodes, tier):
        """Start moving nodes to a tier, as the pool does."""
        job = Job(len(self.jobs))
        for node in nodes:
            targets = [slot(tier, self.fresh + i) for i in range(len(node.pages))]
            self.fresh += len(targets)
            node.moving = Move(job, node, node.pages, targets)
            job.moves.append(node.moving)
            if tier:
                self.tree.depart(node)
        self.jobs.append(job)

    @rule(n=st.integers(1, 6))
    def move_out(self, n):
        nodes = self.tree.coldest(n, Tier.DEVICE)
        pages = {page for node in nodes for page in node.pages}
        assert len(pages) <= n
        assert not pages & {self.model[key] for key in self.pinned()} | pages & self.sources(inbound=False)
        self.begin(nodes, Tier.HOST)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def move_in(self, data):
        pin = data.draw(st.sampled_from(list(self.pins)))
        self.begin([node for node in pin.node.path() if node.tier and not node.moving], Tier.DEVICE)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def arrive(self, data):
        job = self.jobs.pop(data.draw(st.integers(0, len(self.jobs) - 1)))
        for move in job.moves:
            if move.node is not None:
                where = dict(zip(move.source, move.target, strict=True))
                assert self.tree.arrive(move.node, move.target) == move.source
                self.model = {key: where.get(page, page) for key, page in self.model.items()}

    @rule(n=st.integers(0, 8))
    def evict(self, n):
        free = {page for key, page in self.model.items() if key not in self.pinned() and page < HOST}
        freed = self.tree.evict(n)
        gone = {page for page in freed if page < HOST}
        assert gone <= free
        assert len(gone) >= min(n, len(free))
        roots = [key for key, page in self.model.items() if page in gone]
        for scope, tokens in (key for key, page in self.model.items() if page in freed and page not in gone):
            # Pages of other tiers go only together with the prefix that they continue.
            assert any(scope == where and tokens.startswith(start) for where, start in roots)
        self.remove(freed)

    @rule(scope=scopes, tokens=prompts)
    def delete(self, scope, tokens):
        gone = self.remove(self.tree.delete(scope, tokens))
        prompt = whole(tokens)
        assert all(where == scope for where, _ in gone)
        if prompt:
            left = {key for key in self.model if key[0] == scope and key[1].startswith(prompt)}
            assert left <= self.pinned(), "a prompt can be found after it was deleted"

    @invariant()
    def agrees(self):
        check_tree(self.tree)
        assert self.tree.pages_total == len(self.model)
        assert sum(self.tree.evictable) == len(self.model) - len(self.pinned())
        self.mirror.apply(self.tree.events)
        self.tree.events.clear()
        assert self.mirror.prefixes() == {key: int(page >= HOST) for key, page in self.model.items()}
        again = Mirror(PAGE_BYTES)
        again.apply(list(self.tree.snapshot()))
        assert again == attrs.evolve(self.mirror, next=0)
        for pin, (scope, tokens) in self.pins.items():
            assert pin.tokens == len(tokens) // 4
            assert self.tree.pages_of(pin) == self.pages(scope, tokens)
            assert self.tree.spells(pin, 0, tokens)
            assert not tokens or self.tree.spells(pin, PAGE, tokens[PAGE_BYTES:])
            assert not self.tree.spells(pin, 0, tokens + b"\1\0\0\0")


TreeAgainstModel.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestTree = TreeAgainstModel.TestCase
TestTree.__doc__ = "A wrong page for a prefix would give a request another prompt's KV."


def store(tree, tokens, pages, scope="anne"):
    """Insert pages and unpin them, as a finished request does."""
    pin = tree.pin(scope, b"")
    tree.insert(pin, pack(tokens), pages)
    tree.unpin(pin)


@given(order=st.lists(st.integers(0, 5), max_size=20), n=st.integers(1, 12))
def test_eviction_goes_by_last_use(order, n):
    """Pages are evicted in the order of their last use."""
    tree = PromptTree(PAGE)
    prompt = {i: [i, i, i, i] for i in range(6)}
    age = list(range(6))
    for i in age:
        store(tree, prompt[i], [2 * i, 2 * i + 1])
    for i in order:
        tree.match("anne", pack(prompt[i]))
        age.remove(i)
        age.append(i)

    freed = tree.evict(n)

    assert [page // 2 for page in freed] == [i for i in age for _ in range(2)][:n]
    check_tree(tree)


def test_eviction_trims_the_tail_of_a_long_leaf():
    """Evicting one page of a long leaf takes its last page and keeps the others."""
    tree = PromptTree(PAGE)
    store(tree, [1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3])

    assert tree.evict(1) == [3]
    assert tree.match("anne", pack([1, 2, 3, 4, 5, 6, 7, 8])).pages == (0, 1, 2)
    check_tree(tree)


def test_a_pin_survives_a_split_below_it():
    """A pin still covers all of its pages after its node was split."""
    tree = PromptTree(PAGE)
    pin = tree.pin("anne", b"")
    tree.insert(pin, pack([1, 2, 3, 4]), [0, 1])
    store(tree, [1, 2, 9, 9], [7, 2])

    assert tree.pages_of(pin) == [0, 1]
    assert tree.evict(10) == [2]
    assert tree.pages_of(pin) == [0, 1]


def test_a_chat_that_grows_page_by_page_stays_one_node():
    """Pages that are inserted one after another stay one node, so that matching stays fast."""
    tree = PromptTree(PAGE)
    pin = tree.pin("anne", b"")
    for page in range(100):
        tree.insert(pin, pack([page, page]), [page])

    assert len(list(tree.nodes())) == 2


def test_scopes_do_not_see_each_other():
    """A scope neither matches nor deletes the prompts of another."""
    tree = PromptTree(PAGE)
    store(tree, [1, 2], [0], scope="anne")

    assert tree.match("bob", pack([1, 2])).tokens == 0
    assert tree.delete("bob", pack([1, 2])) == []
    assert tree.match("anne", pack([1, 2])).tokens == 2


def test_deleting_a_prompt_keeps_what_others_share():
    """Deleting a prompt keeps the prefix that it shares with others."""
    tree = PromptTree(PAGE)
    store(tree, [1, 2, 3, 4], [0, 1])
    store(tree, [1, 2, 5, 6, 7, 8], [9, 2, 3])

    assert sorted(tree.delete("anne", pack([1, 2, 5, 6]))) == [2, 3]
    assert tree.match("anne", pack([1, 2, 3, 4])).pages == (0, 1)
    assert tree.delete("anne", pack([1])) == []  # no whole page: not a wish to delete everything
    check_tree(tree)


def test_deletions_leave_no_heap_entries_behind():
    """Deleted nodes leave the eviction heap, so that it does not grow without limit."""
    tree = PromptTree(PAGE)
    for i in range(200):
        store(tree, [i, i, i, i], [0, 1])
        tree.delete("anne", pack([i, i, i, i]))

    check_tree(tree)
    assert len(tree.lru[0]) < 4
    assert tree.pages_total == 0


def test_ending_a_pin_twice_is_a_bug():
    """Unpinning twice raises an AssertionError."""
    tree = PromptTree(PAGE)
    pin = tree.pin("anne", pack([1, 2]))
    tree.unpin(pin)

    with pytest.raises(AssertionError):
        tree.unpin(pin)
