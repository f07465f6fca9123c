"""Adjustments of logits in torch: their arithmetic to the bit, that they touch nothing else, and in a cluster."""

from __future__ import annotations

import random

import attrs
import pytest
import torch
import trio

from adjustments import adjustments, by_definition, past_of, some_adjustments
from memory_cluster import MemoryCluster, PageEngine, baseline, memory_cluster
from memserve.api.service import GenerationParams
from memserve.drawing import Logprobs, Sampling
from memserve.engine.adjusting import adjusted, logprobs_of, logprobs_of_draws
from memserve.engine.plans import BatchPlan, BatchResult, Past, Row
from memserve.engine.sampling import draw
from memserve.tokens import pack, unpack

VOCAB = 500


def _logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return 4 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def _row(how: Sampling, past: Past | None) -> Row:
    return Row(pack([1]), 0, (0,), how, past)


@pytest.mark.parametrize("vocab", [2, 9, VOCAB])
def test_adjusted_logits_are_the_definitions_to_the_bit(vocab: int) -> None:
    """Adjusted logits equal the definition to the bit, as all engines must: a stream may move between them."""
    generator = random.Random(vocab)
    for turn in range(60):
        logits = _logits(1, vocab, turn)
        how, past = some_adjustments(generator, vocab)
        found = adjusted(logits, [_row(Sampling(adjust=how), past)])
        assert torch.equal(found[0], by_definition(logits[0], how, past)), (how, past)


def test_every_adjustment_shows() -> None:
    """Each adjustment changes a logit by an amount that is worked out by hand."""
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5, 3.0]])
    past = Past(prompt=pack([0, 1]), output=pack([2, 2, 0]), forbidden=pack([4]))
    how = adjustments({3: 7.0}, repetition=2.0, frequency=0.5, presence=0.25)
    found = adjusted(logits, [_row(Sampling(adjust=how), past)])[0].tolist()
    # 2/2 - 0.5 - 0.25;  -2*2;  1/2 - 2*0.5 - 0.25;  0.5 + 7;  never
    assert found == [0.25, -4.0, -0.75, 7.5, float("-inf")]


def test_other_rows_and_the_models_logits_stay_as_they_are() -> None:
    """Adjusting a row changes neither other rows nor the logits that log probabilities are computed from."""
    logits = _logits(3)
    before = logits.clone()
    how = adjustments({5: 100.0}, presence=1.0)
    rows = [_row(Sampling(), None), _row(Sampling(adjust=how), Past(b"", pack([7]))), _row(Sampling(), None)]
    found = adjusted(logits, rows)

    assert torch.equal(logits, before)
    assert torch.equal(found[::2], before[::2])
    assert sorted((found[1] != before[1]).nonzero()[:, 0].tolist()) == [5, 7]
    assert adjusted(logits, [rows[0], rows[2], rows[0]]) is logits  # rows without adjustments pay for none


def test_log_probabilities_are_those_of_the_softmax() -> None:
    """Log probabilities and the most likely tokens are those of the softmax, also where logits are equal."""
    logits = _logits(1)[0].round()  # with ties
    exact = logits.double().log_softmax(-1)
    for token in (0, 17, int(logits.argmax())):
        found = logprobs_of(logits, token, 20)
        ids = list(unpack(found.ids))
        assert found.drawn == pytest.approx(float(exact[token]))
        assert found.values == pytest.approx([float(exact[i]) for i in ids])
        assert ids == sorted(range(VOCAB), key=lambda i: (-float(logits[i]), i))[:20]
    assert logprobs_of(logits, 3, 0).values == ()


# ---- in a cluster --------------------------------------------------------------------------------------------

ENDS = tuple(range(2, 60))
HOW = Sampling(
    1.5,
    top_k=30,
    seed=3,
    min_p=0.01,
    adjust=adjustments({90: 2.0, 91: -100.0}, repetition=1.3, frequency=0.7, presence=0.4, min_tokens=18),
    logprobs=2,
)
PROMPT = [random.Random(5).randrange(60, 120) for _ in range(21)]
NEW = 30


def make_believe_logits(tokens: list[int]) -> torch.Tensor:
    """(120,) logits of a model that depends on all of its tokens, likes to repeat itself, and often would end its answer."""
    random_numbers = random.Random(pack(tokens))
    logits = torch.tensor([random_numbers.gauss(0, 2) for _ in range(120)])
    logits[tokens[-6:]] += 3
    return logits


class AdjustingEngine(PageEngine):
    """Draws from the tokens that its pages hold for the whole sequence, as engines with a model do."""

    def run(self, plan: BatchPlan) -> BatchResult:
        rows = [self.drawn(row) for row in plan.rows]
        reports = {i: report for i, (_, report) in enumerate(rows) if report is not None}
        return BatchResult(tuple(token for token, _ in rows), 1.0, 1, logprobs=reports)

    def drawn(self, row: Row) -> tuple[int | None, Logprobs | None]:
        tokens = self.write(row)
        if tokens is None:
            return None, None
        logits = make_believe_logits(tokens)[None]
        found = draw(adjusted(logits, [row]), [row.sample], [row.end])
        return found[0], logprobs_of_draws(logits, [row], found)[0]


class AdjustingCluster(MemoryCluster):
    """A cluster whose workers have such engines."""

    def make_engine(self, arena):
        return AdjustingEngine(arena)


def undisturbed(prompt: list[int], new: int) -> list[tuple[int, Logprobs]]:
    """The answer of one engine that never stops."""
    tokens, answer = list(prompt), []
    for _ in range(new):
        row = Row(pack(tokens), 0, (), HOW, past_of(HOW, tokens, len(prompt), ENDS))
        logits = make_believe_logits(tokens)[None]
        found = draw(adjusted(logits, [row]), [HOW], [len(tokens)])
        tokens += found
        answer.append((found[0], *logprobs_of_draws(logits, [row], found)))
        if found[0] in ENDS:
            break
    return answer


async def ask(frontend, at: int, then=lambda: None) -> list[tuple[int, Logprobs]]:
    """The answer of a cluster; ``then`` is called when it has ``at`` tokens."""
    answer: list[tuple[int, Logprobs]] = []

    def take(chunk) -> bool:
        for one in zip(chunk.tokens, chunk.logprobs, strict=True):
            answer.append(one)
            if len(answer) == at:
                then()
        return True

    with trio.fail_after(300):
        async with frontend.open(pack(PROMPT), GenerationParams(HOW, NEW, ENDS), "") as stream:
            await stream.listen(take)
    return answer


def test_all_adjustments_matter_to_the_answer_in_the_cluster() -> None:
    """Leaving out any adjustment changes the answer, so that the tests below would notice it."""
    known = [token for token, _ in undisturbed(PROMPT, NEW)]
    assert HOW.adjust is not None
    neutral = {
        "biased": b"",
        "bias": b"",
        "repetition": 1.0,
        "frequency": 0.0,
        "presence": 0.0,
        "min_tokens": 0,
    }
    assert len(known) > HOW.adjust.min_tokens
    for name in ("repetition", "frequency", "presence", "min_tokens"):
        how = attrs.evolve(HOW, adjust=attrs.evolve(HOW.adjust, **{name: neutral[name]}))
        tokens = list(PROMPT)
        for _ in known:
            row = Row(pack(tokens), 0, (), how, past_of(how, tokens, len(PROMPT), ENDS))
            tokens += draw(adjusted(make_believe_logits(tokens)[None], [row]), [how], [len(tokens)])
        assert tokens[len(PROMPT) :] != known, name


@pytest.mark.parametrize("at", range(1, 22))
@pytest.mark.parametrize(
    "workers",
    [
        (("p0", "prefill"), ("d0", "decode"), ("d1", "decode")),
        (("w0", "both"), ("w1", "both")),
        (("p0", "prefill", "s0"), ("d0", "decode", "s1"), ("d1", "decode", "s1")),
    ],
)
async def test_a_resumed_answer_goes_on_as_if_nothing_had_happened(autojump_clock, workers, at) -> None:
    """An answer whose worker is killed at any token goes on with the same tokens and log probabilities."""
    async with memory_cluster(*workers, kind=AdjustingCluster) as (cluster, frontend):

        def kill_its_worker() -> None:
            (entry,) = frontend.core._entries.values()
            cluster.kill(entry.plan.decode.rpartition(".")[0])

        expected = undisturbed(PROMPT, NEW)
        assert len(expected) == 22  # killed at any of them but the last, something is left to do
        assert await ask(frontend, at, lambda: cluster.nursery.start_soon(later, kill_its_worker)) == expected
        assert frontend.core.counters["resubmissions_total"] == 1
        await baseline(cluster)


async def later(do) -> None:
    """Call it outside of the Frontend's turn."""
    do()


@pytest.mark.parametrize("pages", [14, 400])
@pytest.mark.parametrize("shards", [("s0", "s0"), ("s0", "s1")])
async def test_handed_over_and_preempted_answers_are_the_same(autojump_clock, shards, pages) -> None:
    """Handed over, moved to another shard or preempted, an answer has the same tokens and log probabilities."""
    workers = (("p0", "prefill", shards[0]), ("d0", "decode", shards[1]))
    async with memory_cluster(*workers, kind=AdjustingCluster, pages=pages) as (cluster, frontend):
        answers: list[list[tuple[int, Logprobs]]] = []

        async def one() -> None:
            answers.append(await ask(frontend, 0))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(one)
        assert answers == [undisturbed(PROMPT, NEW)] * 3
        await baseline(cluster)
