"""``cache_salt``: requests with different salts share nothing that was computed; equal salts do. Also how scopes are made."""

from __future__ import annotations

from contextlib import asynccontextmanager
from itertools import product

import httpx
import pytest
import trio
from trio.testing import MockClock

from api_client import CHAT, HI, post
from fake_service import FakeService, demo_spec, demo_tokenizer, says, settings
from memory_cluster import MAX_CONTEXT, PAGE_TOKENS, baseline, memory_cluster
from memserve.api.app import build_app
from memserve.scopes import salted, scope_of_key, tenant_of
from test_cluster import BOTH, PD, PD2, prompt
from test_drafting_cluster import ON_TWO_SHARDS, DraftingCluster

COMPLETIONS = "/v1/completions"


@asynccontextmanager
async def asked(*workers, **more):
    """A function that posts bodies to the HTTP API of a cluster in memory; more of it as ``cluster``, ``service``."""
    async with memory_cluster(*workers, **more) as (cluster, frontend):
        app = build_app(frontend, demo_tokenizer(), demo_spec(), settings(max_context=MAX_CONTEXT))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def ask(path, body):
                answer = await client.post(
                    path, json={"ignore_eos": True, "temperature": 0, "seed": 0, **body}
                )
                assert answer.status_code == 200, answer.text
                return answer.json()

            yield ask, cluster


def cached(answer) -> int:
    """How many of its prompt's tokens an answer found cached."""
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def ids(seed: int, length: int) -> list[int]:
    """Random tokens of the tokenizer."""
    return [token % 49_000 for token in prompt(seed, length)]


IDS = ids(1, 61)
LONG_CHAT = [
    {"role": "user", "content": "Name three rivers of Europe, with one sentence about each of them."}
]


@pytest.mark.parametrize("workers", [PD, PD2, BOTH, ON_TWO_SHARDS])
@pytest.mark.parametrize(
    ("path", "body", "found"),
    [
        (COMPLETIONS, {"prompt": IDS, "max_tokens": 9}, 60),
        (CHAT, {"messages": LONG_CHAT, "max_tokens": 9}, 40),
    ],
)
async def test_what_another_salt_computed_is_not_found(
    autojump_clock: MockClock, workers, path, body, found
) -> None:
    """cached_tokens is 0 for a prompt that was sent with another salt or none, and not for the same salt."""
    async with asked(*workers) as (ask, cluster):
        for salt in (None, "anne", "ben"):
            first, again = [await ask(path, {**body, "cache_salt": salt}) for _ in range(2)]
            assert (cached(first), cached(again) >= found) == (0, True), salt
            assert first["choices"] == again["choices"]
        await baseline(cluster)


async def test_all_answers_of_one_request_have_its_salt(autojump_clock: MockClock) -> None:
    """With several prompts and several choices, each finds what the same salt has computed, and nothing else."""
    body = {"prompt": [ids(2, 41), ids(3, 41)], "n": 3, "max_tokens": 5, "seed": 1, "temperature": 1}
    async with asked(*PD2) as (ask, _):
        answers = [await ask(COMPLETIONS, {**body, "cache_salt": salt}) for salt in ("a", "b", "a")]
    assert [cached(one) for one in answers] == [0, 0, 80]


@pytest.mark.parametrize("workers", [PD, BOTH])
async def test_a_burst_shares_within_a_salt_alone(autojump_clock: MockClock, workers) -> None:
    """Requests that wait for a prefix that another is computing do so for one of their own salt alone."""
    async with asked(*workers) as (ask, cluster), trio.open_nursery() as nursery:
        for salt in ("a", "b", "a", "b"):
            body = {"prompt": IDS, "max_tokens": 3, "cache_salt": salt}
            nursery.start_soon(ask, COMPLETIONS, body)
        await trio.sleep(30)
        computed = sum(
            one.core.gauges().get("prefill_tokens_total", 0)
            for name, one in cluster.actors.items()
            if name in ("p0", "w0")
        )
        assert 2 * len(IDS) <= computed < 2 * len(IDS) + 2 * PAGE_TOKENS


async def test_another_salt_s_answer_makes_no_draft(autojump_clock: MockClock) -> None:
    """The same request again is drafted from the answer that its own salt has cached, not from another's."""
    body = {"prompt": ids(47, 47), "max_tokens": 90}
    async with asked(*BOTH, kind=DraftingCluster) as (ask, cluster):
        taken = []
        for salt in ("a", "b", "a"):
            before = cluster.steps()
            await ask(COMPLETIONS, {**body, "cache_salt": salt})
            await trio.sleep(1)
            taken.append(cluster.steps() - before)
    assert taken[0] == taken[1] > 1.5 * taken[2]


@pytest.mark.parametrize(("victim", "after"), [("prefill", 0.02), ("decode", 0.3)])
async def test_a_resumed_request_keeps_its_salt(autojump_clock: MockClock, victim, after) -> None:
    """After the death of its worker, a request finds and leaves pages under its own salt alone."""
    body = {"prompt": IDS, "max_tokens": 60, "cache_salt": "a"}
    async with asked(*PD2) as (ask, cluster):
        undisturbed = await ask(COMPLETIONS, {**body, "cache_salt": "b"})
        answers, core = [], cluster.actors["frontend-0"].core

        async def one() -> None:
            answers.append(await ask(COMPLETIONS, body))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            await trio.sleep(after)
            (entry,) = core._entries.values()
            cluster.kill(getattr(entry.plan, victim).rpartition(".")[0])
        assert core.counters["resubmissions_total"] == 1
        assert answers[0]["choices"] == undisturbed["choices"]
        again = [await ask(COMPLETIONS, {**body, "max_tokens": 1, "cache_salt": salt}) for salt in ("a", "c")]
        assert [cached(one) for one in again] == [60, 0]


async def test_pages_from_slower_tiers_come_back_to_their_salt_alone(autojump_clock: MockClock) -> None:
    """What left the arena for host memory is found again by the same salt, and by no other."""
    body = {"prompt": IDS, "max_tokens": 3}
    async with asked(*PD, pages=60, host_pages=400) as (ask, cluster):
        for number in range(12):
            await ask(COMPLETIONS, {**body, "cache_salt": f"salt {number}"})
            await trio.sleep(1)
        again = [await ask(COMPLETIONS, {**body, "cache_salt": salt}) for salt in ("salt 0", "salt x")]
        assert [cached(one) for one in again] == [60, 0]
        assert cluster.actors["s0"].core.gauges()["matched_host_tokens_total"] == 60


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": HI})])
async def test_any_text_is_a_salt_except_the_empty_one(path, body):
    """A salt of any length and characters gives a short scope; null is no salt; the empty text is refused, as by vLLM."""
    service = FakeService(lambda _request: says("x"))
    for salt in (None, "a", "a" * 100_000, "/", "\0\n\U0001f512", "a/b"):
        assert (await post({**body, "cache_salt": salt}, path, service)).status_code == 200
    assert service.opened[0].scope == ""
    assert len({one.scope for one in service.opened}) == 6
    assert {len(one.scope) for one in service.opened[1:]} == {33}
    for wrong in ("", 7, ["a"]):
        answer = await post({**body, "cache_salt": wrong}, path)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cache_salt")


def test_no_two_pairs_of_key_and_salt_have_one_scope():
    """Scopes differ whenever the key or the salt differs, and all scopes of a key belong to one tenant."""
    tenants = ["", *map(scope_of_key, ("a", "b", "a/b"))]
    salts = [None, "a", "b", "a/b", "/", " a", scope_of_key("a"), salted("", "a")]
    scopes = {salted(tenant, salt): tenant for tenant, salt in product(tenants, salts)}
    assert len(scopes) == len(tenants) * len(salts)
    assert all(tenant_of(scope) == tenant for scope, tenant in scopes.items())
