"""Two shards as a user starts them, with pages sent over TCP: the second turn of a chat finds the first on both."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from clusters import Cluster, running
from test_model import prompt

pytestmark = pytest.mark.usefixtures("native_step")
VOCAB = 40_000
TURN = 40
"""Tokens of an answer."""


def test_a_chat_whose_pages_go_over_tcp(tmp_path: Path) -> None:
    """Pages are sent, returned and found again over TCP, with right tokens and counts."""
    settings = ("transfer.path=tcp", "scheduler.policy=least_load")
    with running("2shards.toml", tmp_path, *settings) as cluster:
        first = prompt(100, 1, VOCAB)
        answer = cluster.tokens(first, TURN)
        deadline = time.monotonic() + 20
        while not (back := cluster.lines("answer returned")):
            assert time.monotonic() < deadline, "the answer's pages never came back"
            time.sleep(0.1)
        again = cluster.tokens(first + answer[:20], TURN - 20)

        one, two = cluster.lines("request finished")
        moved = one["bytes_to_decode"] + two["bytes_to_decode"]
        deadline = time.monotonic() + 20
        while loads(cluster)["s0"]["transfer_out_bytes_total"] != moved:  # a heartbeat later
            assert time.monotonic() < deadline, (loads(cluster), moved)
            time.sleep(0.1)
        assert loads(cluster)["s1"]["fetches_failed_total"] == 0
    assert again == answer[20:]
    assert one["bytes_to_decode"] > 0 and one["bytes_saved"] == 0
    assert two["bytes_saved"] > two["bytes_to_decode"] > 0
    assert one["bytes_to_prefill"] == back[0]["moved_bytes"] > 0
    assert two["matched_device_tokens"] == two["matched_decode_tokens"] == 112


def loads(cluster: Cluster) -> dict[str, dict[str, float]]:
    """What each actor last reported, by its name."""
    return {one["id"].partition(".")[0]: one["load"] for one in cluster.members()}
