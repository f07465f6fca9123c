"""A real cluster whose arena is much too small for its cache: prompts come back from host memory and disk."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import msgspec
import trio

from clusters import running
from memserve.costs import StepCosts
from memserve.engine.load import swap_least

PROMPTS = 10
LENGTH = 300
"""Tokens of a prompt."""
WHOLE = LENGTH // 16 * 16
"""Tokens of a prompt in whole pages of 16."""


async def test_prompts_come_back_from_every_tier(tmp_path: Path) -> None:
    """Prompts that left the arena come back from every tier with the same tokens, and are not computed again."""
    rng = random.Random(5)
    prompts = [[rng.randrange(2, 40_000) for _ in range(LENGTH)] for _ in range(PROMPTS)]
    settings = (
        "model.max_context=512",
        "shard.s0.memory=20MiB",
        "pool.host_bytes=20MiB",
        "pool.disk_bytes=200MiB",
        f"pool.disk_path={tmp_path / 'pages'}",
        "pool.swap_low=0.3",
        "pool.swap_high=0.5",
    )
    with running("colocated.toml", tmp_path / "logs", *settings) as cluster:
        first = [cluster.complete(prompt, 4) for prompt in prompts]
        again = [cluster.complete(prompt, 4) for prompt in prompts]
        with trio.fail_after(20):
            shard = cluster.wait_idle()
            while shard["requested_tokens_total"] < 2 * PROMPTS * LENGTH:  # a heartbeat from before the end
                await trio.sleep(0.1)
                shard = cluster.wait_idle()
        costs = [msgspec.convert(one["costs"], StepCosts) for one in cluster.members() if one.get("costs")]

    assert [one["choices"][0]["token_ids"] for one in again] == [
        one["choices"][0]["token_ids"] for one in first
    ]
    missing = [WHOLE - one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in again]
    # What is faster computed than copied back stays where it is. When a request cannot wait for a slow disk, the pool drops
    # the least recently used pages and counts them.
    least = max(swap_least(one, LENGTH) for one in costs)
    assert sum(one for one in missing if one >= least) <= 16 * shard["evicted_pages_total"]
    assert shard["swapped_out_pages_total"] > 100
    assert shard["matched_host_tokens_total"] + shard["matched_disk_tokens_total"] > PROMPTS * LENGTH / 2
    assert shard["matched_disk_tokens_total"] > 0
    assert shard["bad_pages_total"] == 0
    assert not list((tmp_path / "pages").iterdir())


def test_a_shard_comes_back_without_its_disk(tmp_path: Path) -> None:
    """A disk that became full or read-only would keep a shard that dies from coming back, and nothing would be served."""
    pages = tmp_path / "pages"
    settings = (
        "shard.s0.memory=20MiB",
        "model.max_context=512",
        "pool.disk_bytes=20MiB",
        f"pool.disk_path={pages}",
    )
    with running("colocated.toml", tmp_path / "logs", *settings) as cluster:
        before = cluster.tokens([7, 8, 9], 4)
        pages.rmdir()
        pages.write_text("in the way")
        os.kill(cluster.pid("s0"), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not cluster.lines("disk tier lost"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        cluster.wait_healthy()
        assert cluster.tokens([7, 8, 9], 4) == before
    assert [line["disk_pages"] > 0 for line in cluster.lines("arena ready")] == [
        True,
        False,
    ]
