"""`memserve up` as a user meets it: real processes, real ZeroMQ, the real model, and actors that are stopped or killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from clusters import Cluster, actor_processes, command, running, start
from memserve.processes.place import place_path
from real_model import agreed

CAPITAL = [504, 3575, 282, 4649, 314]
"""The tokens of: The capital of France is"""
NEW = 12
"""Tokens generated where each of them is compared."""
DRAINED = 50
"""Tokens of a stream that is under way when the cluster is stopped."""
PAGE = "http://localhost:3000"
"""A web page's origin."""
PREFIX = [(i * 37) % 40_000 + 20 for i in range(150)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One prefill and one decode worker on a shard."""
    page = f'frontend.cors_origins=["{PAGE}"]'
    with running("demo.toml", tmp_path_factory.mktemp("demo"), page) as cluster:
        yield cluster


@pytest.mark.parametrize(
    ("config", "settings", "whole_group"),
    [
        ("colocated.toml", ("pool.page_tokens=8", "batch.chunk_tokens=48"), False),
        ("demo.toml", ("pool.page_tokens=32", "batch.chunk_tokens=17", "worker.0.threads=1"), True),
    ],
)
def test_tokens_equal_transformers_and_nothing_is_left(
    tmp_path: Path, config: str, settings: tuple[str, ...], whole_group: bool
) -> None:
    """In float32, tokens are those of transformers, cached or not; SIGTERM lets streams finish and leaves nothing behind."""
    cluster = start(config, tmp_path, "model.dtype=float32", *settings)
    prompts = (PREFIX + CAPITAL, PREFIX + CAPITAL, PREFIX + CAPITAL[::-1])
    answers = [cluster.complete(ids, NEW, ignore_eos=True) for ids in prompts]
    for ids, answer in zip(prompts, answers, strict=True):
        found = answer["choices"][0]["token_ids"]
        assert found == agreed(ids, found) and len(found) == NEW
    cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in answers]
    page = 8 if "pool.page_tokens=8" in settings else 32
    assert cached == [0, len(PREFIX + CAPITAL) // page * page, len(PREFIX) // page * page]
    cluster.wait_idle()

    stream = cluster.stream(CAPITAL, DRAINED)
    tokens = next(stream)
    (os.killpg if whole_group else os.kill)(cluster.process.pid, signal.SIGTERM)
    tokens += [token for event in stream for token in event]
    assert tokens == agreed(CAPITAL, tokens) and len(tokens) == DRAINED
    assert cluster.process.wait(timeout=30) == 0
    assert actor_processes(tmp_path) == []
    assert not place_path(tmp_path).exists()
    cluster.close()


def test_a_second_chat_turn_is_cached(demo: Cluster) -> None:
    """With the official client, the next turn finds prompt and answer of the last one cached."""
    client = openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none")
    model = client.models.list().data[0].id
    talk = [{"role": "user", "content": "Name three rivers of Europe, with one sentence about each."}]
    first = client.chat.completions.create(model=model, messages=talk, max_tokens=40, temperature=0)
    talk += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "Which is the longest?"},
    ]
    second = client.chat.completions.create(model=model, messages=talk, max_tokens=8, temperature=0)
    known = first.usage.prompt_tokens + first.usage.completion_tokens
    assert second.usage.prompt_tokens_details.cached_tokens >= known // 16 * 16 - 16
    streamed = client.chat.completions.create(
        model=model, messages=talk, max_tokens=8, temperature=0, stream=True
    )
    text = "".join(one.choices[0].delta.content or "" for one in streamed)
    assert text == second.choices[0].message.content
    salt = {"extra_body": {"cache_salt": "another user"}, "max_tokens": 8, "temperature": 0}
    salted = [client.chat.completions.create(model=model, messages=talk, **salt) for _ in range(2)]
    assert {one.choices[0].message.content for one in salted} == {text}
    cached = [one.usage.prompt_tokens_details.cached_tokens for one in salted]
    assert (cached[0], cached[1] >= known // 16 * 16 - 16) == (0, True)


def test_a_web_page_may_ask(demo: Cluster) -> None:
    """A browser lets a page of an origin that the configuration names read a stream."""
    body = {"prompt": CAPITAL, "max_tokens": NEW, "stream": True}
    answer = httpx.post(f"{demo.url}/v1/completions", json=body, headers={"origin": PAGE}, timeout=60)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
    assert answer.text.endswith("data: [DONE]\n\n")


def test_seeded_draws_repeat(demo: Cluster) -> None:
    """The same seed gives the same answer, with and without a cache, and another seed another one."""
    one, two, other = (demo.tokens(CAPITAL, 10, temperature=1.0, top_p=0.9, seed=seed) for seed in (7, 7, 8))
    assert one == two != other


def test_64_streams_and_back_to_the_baseline(demo: Cluster) -> None:
    """64 streams at once finish without an error, and every page is released."""
    before = demo.wait_idle()
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda i: demo.tokens([i + 90, i + 3, 7], 8), range(64)))
    assert [len(one) for one in answers] == [8] * 64
    after = demo.wait_idle()
    assert after["pages_total"] == after["pages_free"] + after["pages_indexed"]
    assert after["pages_total"] == before["pages_total"]


def test_workers_of_one_host_say_so(demo: Cluster) -> None:
    """Workers of one host report the same site and how many cores they have."""
    sites = {one["id"]: one["site"] for one in demo.members() if one["role"]}
    assert len(sites) == 2 and len({one["key"] for one in sites.values()}) == 1
    cores = len(os.sched_getaffinity(0))
    assert all(1 <= one["threads"] <= one["cores"] <= cores for one in sites.values())


def test_a_client_that_leaves_frees_its_pages(demo: Cluster) -> None:
    """When a client disconnects, its request is cancelled and its pages are released."""
    stream = demo.stream(PREFIX[:40], 1500)
    next(stream)
    stream.close()
    demo.wait_idle()
    assert demo.lines("request finished")[-1]["outcome"] == "cancelled"


def test_a_stopped_worker_costs_no_token(demo: Cluster) -> None:
    """Streams whose worker is stopped complete with the same tokens. Killed workers: test_same_tokens.py."""
    prompts = [[i + 200, *PREFIX[:60]] for i in range(4)]
    done: dict[int, list[int]] = {}
    begun = threading.Barrier(5)

    def follow(i: int) -> None:
        stream = demo.stream(prompts[i], 24)
        done[i] = next(stream)
        begun.wait(30)
        done[i] += [token for event in stream for token in event]

    threads = [threading.Thread(target=follow, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    begun.wait(30)
    os.kill(demo.pid("d0"), signal.SIGSTOP)
    for thread in threads:
        thread.join(60)
    demo.wait_idle()
    demo.wait_healthy()
    with ThreadPoolExecutor(4) as pool:
        undisturbed = list(pool.map(lambda prompt: demo.tokens(prompt, 24), prompts))
    assert [done.get(i) for i in range(4)] == undisturbed


def test_actors_without_an_engine_stay_small(demo: Cluster) -> None:
    """A Frontend, a GlobalScheduler and a CPU shard have less than 64 MiB that they share with no process."""
    for name in ("frontend-0", "scheduler-0", "s0"):
        rollup = Path(f"/proc/{demo.pid(name)}/smaps_rollup").read_text()
        kib = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private"))
        assert kib < 64 * 1024, (name, rollup)


def test_logs_show_every_request_s_life(demo: Cluster) -> None:
    """A finished request has one canonical line, its id is on every line about it, and the handoff copied no byte."""
    answer = demo.complete(PREFIX[:33], 12, ignore_eos=True)
    request = answer["id"].partition("-")[2]
    lines = [line for line in demo.lines() if line.get("request") == request]
    events = {line["event"] for line in lines}
    assert events >= {
        "request received",
        "request placed",
        "prefill started",
        "handed over",
        "decode started",
    }
    (last,) = [line for line in lines if line["event"] == "request finished"]
    assert (last["prompt_tokens"], last["output_tokens"], last["outcome"]) == (33, 12, "length")
    assert min(last[key] for key in ("ttft_ms", "tpot_ms", "prefill_ms", "handoff_ms", "decode_ms")) > 0
    metrics = httpx.get(f"{demo.url}/metrics").text
    assert "memserve_handed_over_pages_total" in metrics
    assert 'memserve_handoff_bytes_copied_total{actor="s0",kind="MemPoolShard"} 0\n' in metrics


def test_a_second_up_says_so(demo: Cluster) -> None:
    """A second `memserve up` with the same log directory is refused and names the one that runs."""
    second = subprocess.run(command("demo.toml", demo.logs), capture_output=True, text=True, timeout=60)
    assert second.returncode == 2
    assert "already runs" in second.stderr
    assert str(demo.process.pid) in second.stderr
    assert demo.url in second.stderr


@pytest.mark.parametrize("frontends", [1, 2])
def test_a_taken_port_is_refused_before_anything_starts(tmp_path: Path, frontends: int) -> None:
    """A port in use is refused before anything starts, also with several Frontends, which share their port."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = (f"frontend.port={port}", f"frontend.count={frontends}")
        done = subprocess.run(
            command("demo.toml", tmp_path, *settings), capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 2
    assert f"frontend.port: {port} on 127.0.0.1 is in use already" in done.stderr
    assert done.stdout == ""


def test_sigkill_of_the_supervisor_leaves_nothing(tmp_path: Path) -> None:
    """When the supervisor is killed, the actors end by themselves and remove their files."""
    cluster = start("colocated.toml", tmp_path)
    assert len(actor_processes(tmp_path)) == 5  # with the zygote
    cluster.process.kill()
    deadline = time.monotonic() + 15
    while actor_processes(tmp_path) or place_path(tmp_path).exists():
        assert time.monotonic() < deadline, (actor_processes(tmp_path), list(place_path(tmp_path).iterdir()))
        time.sleep(0.1)
    cluster.process.wait(timeout=10)
    cluster.close()
