"""What is drafted of an answer, and how many tokens: the deciding code alone."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import memserve.engine.drafting as drafting_module
from memserve.costs import StepCosts
from memserve.drawing import Adjustments, Sampling
from memserve.engine.batching import BatchLimits, form_batch
from memserve.engine.drafting import ACCEPTANCE, DRAFTED_MOST, Acceptance, Drafting, Guess, guess, worth
from memserve.engine.outbox import Outbox
from memserve.engine.plans import BatchResult, Row
from memserve.engine.sequence import Phase, Sequence
from memserve.identity import ActorId
from memserve.messages import Plan, Request
from memserve.scheduling.cost_model import CostModel
from memserve.tokens import count, pack, unpack

PAGE_TOKENS = 16
GREEDY = Sampling(0.0)
WEIGHTS_ALONE = StepCosts(((1.0, 0.010), (8.0, 0.011), (16.0, 0.018), (64.0, 0.060)), row_s=0.0001)
"""Costs of a machine on which eight tokens take hardly longer than one, and sixteen nearly twice as long."""


def followed(tokens: list[int], length: int, most: int) -> list[int] | None:
    """What followed the last earlier occurrence of the last ``length`` tokens, repeated where it reaches the end."""
    for end in range(len(tokens) - 1, length - 1, -1):
        if tokens[end - length : end] == tokens[len(tokens) - length :]:
            return [tokens[end + i % (len(tokens) - end)] for i in range(most)]
    return None


@given(st.lists(st.sampled_from([0, 1, 256, 65536, 257]), max_size=60), st.integers(1, 9))
def test_a_guess_is_what_followed_the_most_alike_tokens(tokens: list[int], most: int) -> None:
    """A guess is what followed the longest earlier match of the last tokens, at token borders only."""
    found = guess(pack(tokens), most)
    expected = next((one for n in (5, 3, 2, 1) if (one := followed(tokens, n, most)) is not None), None)
    assert (None if found is None else list(unpack(found.tokens))) == expected
    if found is not None:
        assert followed(tokens, found.suffix, most) == expected
        assert (
            found.suffix == len(ACCEPTANCE) - 1
            or followed(tokens, found.suffix + 1, most) is None
            or (found.suffix + 1 not in (5, 3, 2, 1))
        )


def test_the_more_is_alike_the_likelier_a_guess() -> None:
    """A guess reports the length of its match, up to 8 tokens, by which its chance is estimated."""
    text = [7, *range(10, 20), 99, 8]
    assert [guess(pack(text + text[1 : 1 + n]), 1).suffix for n in (1, 2, 3, 4, 5, 8, 9)] == [
        1,
        2,
        3,
        4,
        5,
        8,
        8,
    ]
    assert guess(pack([1, 2, 3]), 4) is None
    assert guess(b"", 4) is None


def test_what_came_after_the_prompt_before_is_guessed_first() -> None:
    """What the index holds behind the prompt is used for guesses, unless the answer itself has a longer match."""
    sequel = pack([1, 2, 3, 4, 5, 90, 91, 92, 93])
    assert guess(pack([9, 9, 2, 3, 4, 5]), 2, sequel) == Guess(pack([90, 91]), 4)
    assert guess(pack([9, 9, 2, 3, 4, 5, 90, 91]), 8, sequel) == Guess(pack([92, 93]), 6)
    assert guess(pack([9, 1, 9, 9, 93]), 8, sequel) is None  # it ends there
    own = [7, 8, 5, 60, 61, 7, 8, 5]
    assert guess(pack(own), 2, sequel) == Guess(pack([60, 61]), 3)  # more is alike than of the sequel


def test_acceptance_is_learned_and_nothing_is_learned_of_what_was_not_reached() -> None:
    """Acceptance is learned for each match length from tokens that were checked, not from those behind a wrong one."""
    acceptance = Acceptance()
    acceptance.saw(2, drafted=3, right=1)
    assert acceptance.after(2) > ACCEPTANCE[2]
    assert acceptance.after(3) < ACCEPTANCE[3]
    assert acceptance.after(4) == ACCEPTANCE[4]
    for _ in range(2000):
        acceptance.saw(8, drafted=2, right=0)
    assert acceptance.after(8) < 0.01
    assert acceptance.after(20) == acceptance.after(8)


def test_what_was_learned_is_forgotten_where_nothing_is_tried() -> None:
    """A worker whose guesses were all wrong tries one now and then, and guesses again when they become right."""
    dear = StepCosts(((1.0, 0.010), (2.0, 0.018), (9.0, 0.074)))
    drafting = Drafting(1, PAGE_TOKENS, 1000, Outbox())

    def step(right: int) -> int:
        batch = drafting.added(form_batch([stream(ROUND * 3)], BatchLimits(64, 8), PAGE_TOKENS), dear)
        drafted = count(batch.plan.rows[0].draft)
        drafting.saw(batch, BatchResult((12,), 1.0, 1, more={0: pack([13])} if drafted and right else {}))
        return drafted

    tried = [step(0) for _ in range(2000)]
    assert sum(tried[:10]) == 10 and 0 < sum(tried[-1000:]) < 100
    assert sum(step(1) for _ in range(2000)) > 1500


def rows(number: int, context: int = 100) -> list[Row]:
    """Decode rows of several streams."""
    return [Row(pack([1]), context, (), GREEDY) for _ in range(number)]


def likeliest(probability: float, number: int, length: int) -> list[tuple[float, int]]:
    """Guesses for streams that are all alike, sorted by probability."""
    found = [(probability**place, row) for row in range(number) for place in range(1, length + 1)]
    return sorted(found, reverse=True)


def test_one_stream_guesses_far_and_many_do_not() -> None:
    """One stream drafts as far as tokens cost nothing; with many streams only drafts that pay are run."""
    model = CostModel(WEIGHTS_ALONE)
    assert worth(rows(1), likeliest(0.7, 1, 8), model) == {
        0: 7
    }  # the eighth token would be the ninth of the step
    assert worth(rows(8), likeliest(0.5, 8, 8), model) == {}
    assert worth(rows(4), [(0.9, 2), (0.8, 1), (0.7, 2), (0.05, 3)], model) == {2: 2, 1: 1}
    assert worth(rows(1), [(0.001, 0)], model) == {}


def test_a_long_context_is_read_once_for_a_draft() -> None:
    """A row's context is read once, however many draft tokens it has. If each were priced like a row of its own, long
    chats and documents would get hardly any drafts."""
    model = CostModel(attrs.evolve(WEIGHTS_ALONE, read_s=1e-6))
    far = [attrs.evolve(one, start=8_000) for one in rows(4)]
    assert sum(worth(far, likeliest(0.7, 4, 4), model).values()) >= 4


def test_a_likely_guess_is_worth_its_costs_in_a_full_step() -> None:
    """Likely drafts are run even where they make the step longer."""
    found = worth(rows(16), likeliest(0.99, 16, 8), CostModel(WEIGHTS_ALONE))
    assert sum(found.values()) > 16


def test_a_slow_prompt_in_the_step_makes_guesses_cheap() -> None:
    """With a prompt chunk in the step, drafts cost relatively less, and more of them are run."""
    chunk = Row(pack(range(50)), 0, (), None)
    model = CostModel(WEIGHTS_ALONE)
    alone = worth(rows(8), likeliest(0.5, 8, 1), model)
    assert sum(worth([*rows(8), chunk], likeliest(0.5, 8, 1), model).values()) > sum(alone.values())


def stream(tokens: list[int], how: Sampling = GREEDY, *, prompt: int = 10, most: int = 100) -> Sequence:
    """A sequence in the middle of its answer, with pages for its tokens and one more."""
    me, shard = ActorId("w"), ActorId("s")
    request = Request("r", 0, ActorId("f"), "", pack(tokens[:prompt]), prompt, most, (), how)
    one = Sequence(request, Plan(me, me, shard, me), pack(tokens), Phase.READY, 0.0, 0)
    one.pages = tuple(range(len(tokens) // PAGE_TOKENS + 2))
    one.computed = len(tokens) - 1
    return one


def drafted(
    one: Sequence, most: int = 8, max_context: int = 1000, costs: StepCosts | None = None
) -> list[int]:
    """The draft of its next step."""
    drafting = Drafting(most, PAGE_TOKENS, max_context, Outbox())
    batch = form_batch([one], BatchLimits(64, 8), PAGE_TOKENS)
    return list(unpack(drafting.added(batch, costs).plan.rows[0].draft))


ROUND = [*range(10, 17), *range(10, 17), 10, 11]


def test_a_draft_is_no_longer_than_what_can_be_used() -> None:
    """A draft ends at its own limit, at the answer's last token, at the context and at the last page."""
    assert drafted(stream(ROUND)) == [12, 13, 14, 15, 16, 10, 11, 12]
    assert drafted(stream(ROUND), most=3) == [12, 13, 14]
    assert drafted(stream(ROUND), most=0) == []
    assert drafted(stream(ROUND, most=9)) == [12, 13]  # six are generated, the seventh is drawn in any case
    assert drafted(stream(ROUND, most=7)) == []
    assert drafted(stream(ROUND), max_context=19) == [12, 13]
    one = stream(ROUND)
    one.pages = one.pages[:1]
    assert drafted(one) == []  # it does not even have room for its token
    assert drafted(stream(ROUND[:-2] * 2 + ROUND[:4])) == [14, 15, 16, 10, 11, 12, 13, 14]


def test_who_wants_more_than_tokens_guesses_nothing() -> None:
    """An answer with log probabilities gets no draft: they are reported for one token a step."""
    assert drafted(stream(ROUND, Sampling(0.0, logprobs=2))) == []
    assert drafted(stream(ROUND, Sampling(0.7, seed=3))) != []


def test_a_draft_ends_where_other_tokens_are_forbidden() -> None:
    """A draft does not cross the least length of an answer, up to which its end tokens are forbidden."""
    how = Sampling(0.0, adjust=Adjustments(presence=0.5, min_tokens=10))
    assert drafted(stream(ROUND, how)) == [
        12,
        13,
        14,
    ]  # six are generated, and the tenth is the last one for which end tokens are forbidden
    assert drafted(stream(ROUND, attrs.evolve(how, adjust=Adjustments(presence=0.5, min_tokens=6)))) == [
        *ROUND[2:7],
        *ROUND[:3],
    ]


def test_only_an_answer_that_follows_a_grammar_may_be_forced() -> None:
    """Only an answer with a grammar allows forced tokens, and no more of them than there is room for."""
    for how, most in ((GREEDY, 0), (Sampling(0.0, adjust=Adjustments(grammar="start: /x*/")), 8)):
        drafting = Drafting(8, PAGE_TOKENS, 1000, Outbox())
        batch = form_batch([stream(ROUND, how)], BatchLimits(64, 8), PAGE_TOKENS)
        assert drafting.added(batch, None).plan.rows[0].draft_most == most
    one = stream(
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], Sampling(0.0, adjust=Adjustments(grammar="start: /x*/")), most=4
    )
    drafting = Drafting(8, PAGE_TOKENS, 1000, Outbox())
    row = drafting.added(form_batch([one], BatchLimits(64, 8), PAGE_TOKENS), None).plan.rows[0]
    assert (row.draft, row.draft_most) == (b"", 2)


def test_prompts_guess_nothing() -> None:
    """A prompt chunk has no draft."""
    one = stream(ROUND)
    one.computed = 3
    assert drafted(one) == []


def test_what_is_known_of_steps_limits_the_draft() -> None:
    """The measured costs of steps limit the length of drafts."""
    dear = StepCosts(((1.0, 0.010), (2.0, 0.1)))
    assert drafted(stream(ROUND), costs=dear) == []
    assert drafted(stream(ROUND), costs=WEIGHTS_ALONE) == [12, 13, 14, 15, 16, 10, 11]


def test_a_step_has_a_limit_of_guesses() -> None:
    """A step has at most DRAFTED_MOST draft tokens in all."""
    drafting = Drafting(64, PAGE_TOKENS, 1000, Outbox())
    many = [stream(ROUND * 4) for _ in range(8)]
    for one in many:
        one.pages = tuple(range(30))
    batch = form_batch(many, BatchLimits(64, 8), PAGE_TOKENS)
    free = StepCosts(((1.0, 0.01), (2.0, 0.01)))
    total = sum(count(row.draft) for row in drafting.added(batch, free).plan.rows)
    assert total == DRAFTED_MOST


def test_nobody_looks_where_not_even_sure_guesses_would_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """With many streams, texts are searched for guesses only if even certain guesses would pay."""
    looked: list[int] = []
    monkeypatch.setattr(drafting_module, "guess", lambda tokens, most, sequel: looked.append(most))
    dear = StepCosts(((1.0, 0.010), (2.0, 0.1)), row_s=0.1)
    for streams, costs, expected in ((8, dear, 8), (9, dear, 0), (9, WEIGHTS_ALONE, 9), (9, None, 9)):
        looked.clear()
        batch = form_batch([stream(ROUND) for _ in range(streams)], BatchLimits(64, 16), PAGE_TOKENS)
        Drafting(8, PAGE_TOKENS, 1000, Outbox()).added(batch, costs)
        assert len(looked) == expected, (streams, costs)


def test_what_came_of_guesses_is_counted() -> None:
    """Drafted, accepted and forced tokens are counted."""
    outbox = Outbox()
    drafting = Drafting(4, PAGE_TOKENS, 1000, outbox)
    one = stream(ROUND)
    batch = drafting.added(form_batch([one], BatchLimits(64, 8), PAGE_TOKENS), None)
    drafting.saw(batch, BatchResult((12,), 1.0, 1, more={0: pack([13, 99])}))
    assert outbox.counters == {"drafted_tokens_total": 4, "accepted_tokens_total": 2}
    drafting.saw(
        batch, BatchResult((70,), 1.0, 1, more={0: pack([71, 72])})
    )  # a grammar's, in the guess's place
    assert outbox.counters == {
        "drafted_tokens_total": 8,
        "accepted_tokens_total": 2,
        "forced_tokens_total": 2,
    }
    drafting.saw(batch, BatchResult((12,), 1.0, 1, more={0: pack([13, 14, 15, 16, 50, 51])}))
    assert outbox.counters == {
        "drafted_tokens_total": 12,
        "accepted_tokens_total": 6,
        "forced_tokens_total": 4,
    }


def test_a_sequence_ends_within_a_draft() -> None:
    """An answer ends at a stop token, its length or the context within a draft, and drops the tokens behind that."""
    one = stream(ROUND)
    one.request = attrs.evolve(one.request, stop_tokens=(14,))
    assert one.take(16, pack([12, 13, 14, 15]), 1000) == "stop"
    assert list(unpack(one.tokens)) == [*ROUND, 12, 13, 14]
    assert one.computed == one.length - 1
    assert list(unpack(one.update(16, "stop").tokens)) == [12, 13, 14]
    other = stream(ROUND)
    assert other.take(16, pack([12, 13, 14]), 1000) is None
    assert (other.computed, other.length) == (18, 19)
    assert stream(ROUND, most=8).take(16, pack([12, 13, 14]), 1000) == "length"
    assert stream(ROUND).take(16, pack([12, 13, 14]), 18) == "length"
