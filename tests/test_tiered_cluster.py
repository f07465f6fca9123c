"""A real cluster whose arena is far too small for what it caches: prompts come back from host memory and from disk."""

from __future__ import annotations

import random
from pathlib import Path

import trio

from clusters import running

PROMPTS = 10
LENGTH = 300
"""Tokens of a prompt: 18 whole pages of 16."""


async def test_prompts_come_back_from_every_tier(tmp_path: Path) -> None:
    """Cached or computed, from whichever tier: the same tokens; and what has left the arena is not computed again."""
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

    assert [one["choices"][0]["token_ids"] for one in again] == [
        one["choices"][0]["token_ids"] for one in first
    ]
    cached = sum(one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in again)
    whole = LENGTH // 16 * 16 * PROMPTS
    # A request that cannot wait for a slow disk has the coldest pages dropped, and the pool says how many.
    assert whole - 16 * shard["evicted_pages_total"] <= cached <= whole
    assert cached > 0.8 * whole
    assert shard["swapped_out_pages_total"] > 100
    assert shard["matched_host_tokens_total"] + shard["matched_disk_tokens_total"] > PROMPTS * LENGTH / 2
    assert shard["matched_disk_tokens_total"] > 0
    assert shard["bad_pages_total"] == 0
    assert not list((tmp_path / "pages").iterdir())
