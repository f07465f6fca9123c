"""Whole clusters on played GPUs: every process, message, handle and copy is real, and the cards are not.

``played_gpu`` stands for the driver, CuPy and FlashInfer in all processes; the card's memory is in files that they
share.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import gpu_rehearsal
from backends import Exact
from clusters import Cluster, command, running, stream_through_a_kill
from test_model import prompt

HERE = Path(__file__).parent
SMALL = ("batch.rows=8", "batch.chunk_tokens=256", "model.max_context=1024")
ON_ONE = ("shard.g0.memory=200MiB", *SMALL)
ON_TWO = ("shard.g0.memory=100MiB", "shard.g1.memory=100MiB", *SMALL)


@pytest.fixture(params=["computed", "flashinfer"])
def cards(request, tmp_path, monkeypatch):
    """A function that sets how many cards there are.

    FlashInfer's calls are computed by torch, or by its own kernels if they were compiled.
    """
    if request.param == "flashinfer" and (why := gpu_rehearsal.missing()):
        pytest.skip(f"no rehearsal: {why}")
    memory = tmp_path / "memory"
    memory.mkdir()
    paths = [str(HERE / "played_gpu"), str(HERE), os.environ.get("PYTHONPATH", "")]
    if request.param == "computed":
        paths.insert(0, str(HERE / "played_gpu" / "computed"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("PATH", f"{HERE / 'played_gpu' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PLAYED_GPU", str(memory))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what plays a card is one thread of each worker
    monkeypatch.setenv("PLAYED_GPU_LIBRARY", request.param)
    return lambda many: monkeypatch.setenv("PLAYED_GPUS", str(many))


@pytest.fixture(scope="module")
def exact() -> Exact:
    return Exact.of_demo()


def moved_bytes(cluster: Cluster) -> set[int]:
    """Bytes of KV moved between the workers of each request."""
    return {line["moved_bytes"] for line in cluster.lines("decode started")}


def test_one_gpu_serves_two_workers_from_one_copy_whatever_becomes_of_them(cards, exact, tmp_path):
    """The one-gpu configuration serves with right tokens, cached prefixes and scores, without moving pages, through a
    kill."""
    cards(1)
    ids = prompt(100, 2, 10_000)
    with running("one-gpu.toml", tmp_path / "logs", *ON_ONE, "pool.host_bytes=40MiB") as cluster:
        cold, warm = (cluster.complete(ids, 6, ignore_eos=True) for _ in range(2))
        assert [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in (cold, warm)] == [0, 96]
        for one in (cold, warm):
            exact.check(ids, one["choices"][0]["token_ids"])
        answer = cluster.complete(ids, 6, ignore_eos=True, logprobs=1)["choices"][0]
        whole = ids + answer["token_ids"]
        scored = cluster.complete(whole, 0, echo=True, logprobs=1)["choices"][0]["logprobs"]
        assert len(scored["tokens"]) == len(whole)
        # Rows of a prompt and of an answer go through products of other shapes, which round differently in bfloat16.
        assert scored["token_logprobs"][len(ids) :] == pytest.approx(
            answer["logprobs"]["token_logprobs"], abs=0.25
        )
        found = stream_through_a_kill(cluster, ids[:40], 16, "g0")  # of d0 alone: below
        assert len(found) == 16
        exact.check(ids[:40], found)
        cluster.wait_idle()
    assert moved_bytes(cluster) == {0}


def test_pages_go_from_one_gpu_to_another(cards, exact, tmp_path):
    """With two GPUs, pages are copied from one to the other, with right tokens and through a kill."""
    cards(2)
    ids = prompt(100, 3, 10_000)
    with running("two-gpus.toml", tmp_path / "logs", *ON_TWO) as cluster:
        for _ in range(2):
            exact.check(ids, cluster.tokens(ids, 6))
        found = stream_through_a_kill(cluster, ids[:50], 16, "d0")
        assert len(found) == 16
        exact.check(ids[:50], found)
        cluster.wait_idle()
    assert min(moved_bytes(cluster)) > 0


def test_a_card_that_is_not_there_is_refused_in_one_line(cards, tmp_path):
    """A configuration for more GPUs than there are is refused in one line with an alternative."""
    cards(1)
    done = subprocess.run(
        command("two-gpus.toml", tmp_path / "logs", *ON_TWO),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode != 0
    said = (done.stdout + done.stderr).strip()
    assert (
        said == "shard[1].device is cuda:1, but this machine has cuda:0; memserve up -c demo serves on CPUs"
    )
