"""What the index says came after a prompt: its own words, the newest, and nobody else's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memserve.mempool.prompt_tree import PromptTree
from memserve.mempool.sequel import NEWEST, SEQUEL_MAX, sequel_of
from memserve.tokens import pack, unpack

PAGE = 4


class Index:
    """A tree with pages without number."""

    def __init__(self) -> None:
        self.tree = PromptTree(PAGE)
        self.pages = 0

    def add(self, tokens: list[int], scope: str = "") -> None:
        """Retire a sequence's whole pages."""
        whole = tokens[: len(tokens) // PAGE * PAGE]
        pin = self.tree.pin(scope, pack(whole))
        new = whole[pin.tokens :]
        pages = range(self.pages, self.pages + len(new) // PAGE)
        self.tree.insert(pin, pack(new), list(pages))
        self.pages += len(pages)
        self.tree.unpin(pin)

    def sequel(self, tokens: list[int], most: int = 100, scope: str = "") -> list[int]:
        """As a worker is told."""
        return list(unpack(sequel_of(self.tree, scope, pack(tokens), most)))


def test_an_answer_is_found_behind_its_prompt() -> None:
    """Who asks the same again would wait for what is known."""
    index = Index()
    index.add([*range(10), *range(50, 73)])
    assert index.sequel(list(range(10))) == list(range(50, 72))  # 33 tokens: the last fills no page
    assert index.sequel(list(range(8))) == [8, 9, *range(50, 72)]
    assert index.sequel([*range(10), 50, 51]) == list(range(52, 72))
    assert index.sequel(list(range(10)), most=3) == [50, 51, 52]
    assert index.sequel(list(range(10)), most=0) == []


def test_nothing_is_found_behind_what_is_not_there() -> None:
    """Another prompt's answer would be guessed, whose tokens this one's is unlike."""
    index = Index()
    assert index.sequel([1, 2]) == []
    index.add(list(range(12)))
    assert index.sequel([*range(9), 99]) == []
    assert index.sequel([*range(4), 99]) == []
    assert index.sequel([99]) == []
    assert index.sequel([*range(12), 12]) == []
    assert index.sequel(list(range(12))) == []
    assert index.sequel(list(range(20))) == []


def test_another_tenant_s_words_are_not_told() -> None:
    """One tenant would be told what another's model has said."""
    index = Index()
    index.add(list(range(12)), scope="anne")
    assert index.sequel(list(range(5)), scope="ben") == []
    assert index.sequel(list(range(5)), scope="anne") == list(range(5, 12))


def test_of_several_the_newest_is_told() -> None:
    """What was said long ago would be guessed in place of what was said just now."""
    index = Index()
    for answer in (20, 30, 40):
        index.add([*range(6), *range(answer, answer + 6)])
    assert index.sequel(list(range(6))) == list(range(40, 46))
    assert index.sequel([*range(6), 30]) == list(range(31, 36))


def test_it_looks_at_few_of_many_and_tells_no_more_than_its_limit() -> None:
    """A prompt that is a thousand others' beginning would hold up all of the shard's calls."""
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
    """Tokens that never stood there, or an empty answer where there is one."""
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
