"""What the index holds behind a prompt: its own tokens, the newest, and no other tenant's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memserve.mempool.prompt_tree import PromptTree
from memserve.mempool.sequel import NEWEST, SEQUEL_MAX, sequel_of
from memserve.tokens import pack, unpack

PAGE = 4


class Index:
    """A tree with an unlimited number of pages."""

    def __init__(self) -> None:
        self.tree = PromptTree(PAGE)
        self.pages = 0

    def add(self, tokens: list[int], scope: str = "") -> None:
        """Insert a sequence's whole pages."""
        whole = tokens[: len(tokens) // PAGE * PAGE]
        pin = self.tree.pin(scope, pack(whole))
        new = whole[pin.tokens :]
        pages = range(self.pages, self.pages + len(new) // PAGE)
        self.tree.insert(pin, pack(new), list(pages))
        self.pages += len(pages)
        self.tree.unpin(pin)

    def sequel(self, tokens: list[int], most: int = 100, scope: str = "") -> list[int]:
        """The tokens behind a prompt, as a worker gets them."""
        return list(unpack(sequel_of(self.tree, scope, pack(tokens), most)))


def test_an_answer_is_found_behind_its_prompt() -> None:
    """The answer that followed a prompt is found, from any place in it, up to a limit."""
    index = Index()
    index.add([*range(10), *range(50, 73)])
    assert index.sequel(list(range(10))) == list(range(50, 72))  # 33 tokens: the last fills no page
    assert index.sequel(list(range(8))) == [8, 9, *range(50, 72)]
    assert index.sequel([*range(10), 50, 51]) == list(range(52, 72))
    assert index.sequel(list(range(10)), most=3) == [50, 51, 52]
    assert index.sequel(list(range(10)), most=0) == []


def test_nothing_is_found_behind_what_is_not_there() -> None:
    """Nothing is found behind a prompt that is not in the index, or at its end."""
    index = Index()
    assert index.sequel([1, 2]) == []
    index.add(list(range(12)))
    assert index.sequel([*range(9), 99]) == []
    assert index.sequel([*range(4), 99]) == []
    assert index.sequel([99]) == []
    assert index.sequel([*range(12), 12]) == []
    assert index.sequel(list(range(12))) == []
    assert index.sequel(list(range(20))) == []


def test_another_tenant_s_tokens_are_not_found() -> None:
    """Tokens of another scope are not found."""
    index = Index()
    index.add(list(range(12)), scope="anne")
    assert index.sequel(list(range(5)), scope="ben") == []
    assert index.sequel(list(range(5)), scope="anne") == list(range(5, 12))


def test_of_several_the_newest_is_found() -> None:
    """Of several answers the newest is found."""
    index = Index()
    for answer in (20, 30, 40):
        index.add([*range(6), *range(answer, answer + 6)])
    assert index.sequel(list(range(6))) == list(range(40, 46))
    assert index.sequel([*range(6), 30]) == list(range(31, 36))


def test_it_looks_at_few_of_many_and_returns_no_more_than_its_limit() -> None:
    """Only the NEWEST branches are searched, and at most SEQUEL_MAX tokens returned."""
    index = Index()
    for answer in range(NEWEST + 1):
        index.add([*range(4), answer, 1, 2, 3])
    assert index.sequel([*range(4), 1]) == [1, 2, 3]
    assert index.sequel([*range(4), 0]) == []  # the oldest, beyond those that are looked at
    index.add([7] * (SEQUEL_MAX + 100))
    assert len(index.sequel([7], most=1 << 20)) == SEQUEL_MAX


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=20), max_size=6),
    st.lists(st.integers(0, 1), max_size=14),
    st.integers(0, 9),
)
def test_it_is_what_some_sequence_goes_on_with(said: list[list[int]], prompt: list[int], most: int) -> None:
    """What is found is the continuation of some sequence, and found if there is one."""
    index = Index()
    for one in said:
        index.add(one)
    whole = [one[: len(one) // PAGE * PAGE] for one in said]
    after = [one[len(prompt) :] for one in whole if one[: len(prompt)] == prompt]
    found = index.sequel(prompt, most)
    longest = max(map(len, after), default=0)
    assert bool(found) == (min(longest, most) > 0)
    assert len(found) <= most
    assert not found or any(one[: len(found)] == found for one in after)
