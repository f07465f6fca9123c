"""The page allocator, compared with a set."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memserve.mempool.pages import Pages

COUNT = 20


class PagesAgainstModel(RuleBasedStateMachine):
    """Random takes and gives; the model is a list of what is held."""

    def __init__(self):
        super().__init__()
        self.pages = Pages(COUNT)
        self.held: list[list[int]] = []

    @rule(n=st.integers(0, COUNT + 2))
    def take(self, n):
        free = self.pages.free_count
        taken = self.pages.take(n)
        assert (taken is None) == (n > free)
        if taken is not None:
            assert len(taken) == n
            self.held.append(taken)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give(self, data):
        self.pages.give(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: any(self.held))
    @rule(data=st.data())
    def give_wrongly(self, data):
        free = sorted(set(range(COUNT)) - {page for run in self.held for page in run})
        held = next(run for run in self.held if run)
        wrong = data.draw(st.sampled_from([[COUNT], [-1], [held[0], held[0]], [held[0], *free[:1], COUNT]]))
        with pytest.raises(AssertionError):
            self.pages.give(wrong)

    @invariant()
    def every_page_is_in_one_place(self):
        self.pages.check()
        held = [page for run in self.held for page in run]
        assert len(set(held)) == len(held) == COUNT - self.pages.free_count
        assert set(held) <= set(range(COUNT))


PagesAgainstModel.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestPages = PagesAgainstModel.TestCase
TestPages.__doc__ = "A page handed out twice would let two requests write each other's KV."


def test_runs_survive_a_round_trip():
    """Pages that are given back are taken in the same order again, so that neighbours stay together."""
    pages = Pages(8)
    first, second = pages.take(3), pages.take(3)
    pages.give(first)

    assert (first, second) == ([0, 1, 2], [3, 4, 5])
    assert pages.take(3) == [0, 1, 2]


def test_check_sees_a_corrupted_free_list():
    """check() notices a page that is both free and taken."""
    pages = Pages(4)
    pages.take(1)
    pages._free.append(0)

    with pytest.raises(AssertionError):
        pages.check()
