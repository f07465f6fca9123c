"""What several tests do to a cluster in virtual time: many requests at once, and workers that die under them."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence

import trio

from memory_cluster import MemoryCluster, baseline, generate
from memserve.actors.frontend import FrontendService

Reference = Callable[..., list[int]]
"""The tokens of an undisturbed run, from prompt, number of new tokens and ``seed``."""


async def nothing() -> None:
    """Leave the requests alone."""


async def answers(
    frontend: FrontendService,
    prompts: Sequence[list[int]],
    new: int,
    seeds: Sequence[int],
    gap_s: float = 0.0,
    meanwhile: Callable[[], Awaitable[None]] = nothing,
) -> list[list[int]]:
    """The answers of ``new`` tokens to all prompts, which are sent ``gap_s`` apart while ``meanwhile`` runs."""
    found: dict[int, list[int]] = {}

    async def one(i: int) -> None:
        await trio.sleep(i * gap_s)
        found[i] = await generate(frontend, prompts[i], new, seed=seeds[i])

    async with trio.open_nursery() as nursery:
        for i in range(len(prompts)):
            nursery.start_soon(one, i)
        await meanwhile()
    return [found[i] for i in range(len(prompts))]


async def all_are_served(
    cluster: MemoryCluster, frontend: FrontendService, prompts: Sequence[list[int]], reference: Reference
) -> None:
    """All prompts at once get the right 60 tokens, and leave no page leased."""
    found = await answers(frontend, prompts, 60, [0] * len(prompts))
    assert found == [reference(text, 60) for text in prompts]
    await baseline(cluster)


async def a_worker_dies_under_load(
    cluster: MemoryCluster,
    frontend: FrontendService,
    victim: str,
    after_s: float,
    prompts: Sequence[list[int]],
    new: int,
    reference: Reference,
) -> None:
    """``victim`` is killed ``after_s`` seconds into the prompts' answers: all tokens are right, no page is leaked."""

    async def kill() -> None:
        await trio.sleep(after_s)
        cluster.kill(victim)

    found = await answers(frontend, prompts, new, range(len(prompts)), 0.01, meanwhile=kill)
    assert found == [reference(text, new, seed=i) for i, text in enumerate(prompts)]
    await baseline(cluster)


async def die_and_return(cluster: MemoryCluster, workers: Mapping[str, str], rng: random.Random) -> None:
    """Kill four workers, one by one at random times, and start each again; ``workers``: roles by name."""
    for _ in range(4):
        await trio.sleep(rng.random() * 0.4)
        name = rng.choice(sorted(workers))
        cluster.kill(name)
        await trio.sleep(rng.random() * 0.3)
        await cluster.worker(name, workers[name])


async def chats_while_workers_die(
    cluster: MemoryCluster,
    frontend: FrontendService,
    workers: Mapping[str, str],
    prompts: Sequence[list[int]],
    reference: Reference,
    rng: random.Random,
) -> None:
    """Eight clients that continue their answers or leave, while workers die and return: all tokens are right."""

    async def client(i: int) -> None:
        text = prompts[i % 3][: rng.randrange(1, 30)]
        for _ in range(3):
            new = rng.randrange(1, 40)
            with trio.move_on_after(rng.choice([0.1, 1e4])) as patience:
                got = await generate(frontend, text, new, seed=i % 3)
            if not patience.cancelled_caught:
                assert got == reference(text, new, seed=i % 3)
                text = text + got

    async with trio.open_nursery() as nursery:
        for i in range(8):
            nursery.start_soon(client, i)
        nursery.start_soon(die_and_return, cluster, workers, rng)
