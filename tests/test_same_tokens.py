"""A real cluster with the default dtype gives the tokens that one engine gives for the same prompt alone, in one piece.

The native step is deterministic: the bits of a row depend on its sequence alone. So also in bfloat16 nothing that the
cluster does may change a token: cutting prompts, batching, cached prefixes of any worker, handoffs, and going on where
a dead worker stopped.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
import httpx
import openai
import pytest

from adjustments import adjustments, mask_of
from alone import Alone
from clusters import UNKNOWN, Cluster, running
from fake_service import demo_tokenizer
from memserve.drawing import Sampling
from test_model import prompt

pytestmark = pytest.mark.usefixtures("native_step")
VOCAB = 40_000
CHUNK = 40
"""Prompt tokens per step of the cluster; not a multiple of a page, so that pages fill in several steps."""
LONG = prompt(900, 1, VOCAB)
"""A prompt so long that its chunks are not done before a worker is killed."""
STREAMS = [prompt(length, length, VOCAB) for length in (33, 75)]
STREAMED = 120
"""Tokens of a stream: more than are sent until the workers are killed, even if this process is slow."""


@pytest.fixture(scope="module")
def alone() -> Alone:
    """The reference."""
    return Alone()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One prefill and one decode worker with the default dtype and chunks of CHUNK tokens."""
    settings = (f"batch.chunk_tokens={CHUNK}",)
    with running("demo.toml", tmp_path_factory.mktemp("rounded"), *settings) as started:
        assert not started.lines("native step unavailable")
        yield started


def test_chunks_cache_and_hand_over_change_no_token(cluster: Cluster, alone: Alone) -> None:
    """Answers with and without a cache, and on a cache written by decode steps and chunks, have the same tokens."""
    ids = prompt(210, 2, VOCAB)
    expected = alone.tokens(ids, 40)
    cold = cluster.complete(ids, 40, ignore_eos=True)
    warm = cluster.complete(ids, 40, ignore_eos=True)
    resumed = cluster.complete(ids + expected[:25], 15, ignore_eos=True)
    other = cluster.complete(ids[:100] + ids[:50], 8, ignore_eos=True)

    answers = [one["choices"][0]["token_ids"] for one in (cold, warm, resumed, other)]
    assert answers == [expected, expected, expected[25:], alone.tokens(ids[:100] + ids[:50], 8)]
    cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in (cold, warm, resumed, other)]
    assert cached == [0, 208, 224, 96]


def test_company_changes_no_token(cluster: Cluster, alone: Alone) -> None:
    """The tokens of a request do not depend on the others in its batch."""
    prompts = [prompt(length, length, VOCAB) for length in range(3, 150, 10)]
    expected = {i: alone.tokens(prompts[i], 12) for i in (0, 7, 14)}
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(lambda ids: cluster.tokens(ids, 12), prompts))

    assert {i: found[i] for i in expected} == expected


def test_lost_workers_change_no_token(cluster: Cluster, alone: Alone) -> None:
    """Both workers are killed, one during a prompt and one during streams: all answers have the same tokens."""
    hows = [
        Sampling(1.0, seed=seed) for seed in (3, 4)
    ]  # greedy answers repeat themselves, and speculation would end them too early
    streamed = [alone.tokens(ids, STREAMED, how) for ids, how in zip(STREAMS, hows, strict=True)]
    expected = [*streamed, alone.tokens(LONG, 8)]
    found: dict[int, list[int]] = {}
    begun = threading.Barrier(len(STREAMS) + 1)

    def follow(i: int) -> None:
        stream = cluster.stream(STREAMS[i], STREAMED, temperature=1.0, seed=hows[i].seed)
        found[i] = next(stream)
        begun.wait(30)
        found[i] += [token for event in stream for token in event]

    def ask() -> None:
        found[2] = cluster.tokens(LONG, 8)

    threads = [threading.Thread(target=follow, args=(i,)) for i in range(len(STREAMS))]
    for thread in threads:
        thread.start()
    begun.wait(30)
    victims = [cluster.pid(name) for name in ("p0", "d0")]
    known = started(cluster)
    threads.append(threading.Thread(target=ask))
    threads[-1].start()
    deadline = time.monotonic() + 10
    while started(cluster) == known:
        assert time.monotonic() < deadline
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join(60)

    assert [found.get(i) for i in range(3)] == expected
    finished = [line["attempts"] for line in cluster.lines("request finished")][-3:]
    assert min(finished) >= 2, finished  # each was under way when its worker died
    cluster.wait_healthy()
    cluster.wait_idle()


ALLOWED = range(0, 49_152, 3)
HOW = Sampling(
    0.9, top_k=40, top_p=0.95, seed=12, min_p=0.02,
    adjust=adjustments(
        {261: 4.0, 30: -100.0}, repetition=1.2, frequency=0.5, presence=0.3, min_tokens=50,
        allowed=mask_of(ALLOWED, 49_152),
    ),
)  # fmt: skip
ASKED = {
    "temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 12, "min_p": 0.02, "logit_bias": {"261": 4, "30": -100},
    "repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.3, "min_tokens": 50, "logprobs": 2,
    "allowed_token_ids": [*ALLOWED],
}  # fmt: skip
"""The same settings as fields of a request."""


def test_an_adjusted_answer_goes_on_as_it_was_when_its_worker_is_killed(
    cluster: Cluster, alone: Alone
) -> None:
    """An answer with penalties and biases keeps its tokens when its worker is killed: they count from its beginning."""
    ends = (15, 24)
    ids = prompt(90, 5, VOCAB)
    known = alone.tokens(ids, STREAMED, HOW, ends)
    assert len(known) >= 50 and all(token in ALLOWED for token in known)
    assert known[:50] != alone.tokens(ids, STREAMED, attrs.evolve(HOW, adjust=None))[:50]

    stream = cluster.stream(ids, STREAMED, stop_token_ids=[*ends], **ASKED)
    found = next(stream)
    os.kill(cluster.pid("d0"), signal.SIGKILL)
    for event in stream:
        found = found + event
    assert found == known
    assert cluster.lines("request finished")[-1]["attempts"] == 2
    cluster.wait_healthy()
    cluster.wait_idle()


FORM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 30, "maxLength": 60},
        "parts": {"type": "array", "items": {"type": "integer"}, "minItems": 5, "maxItems": 8},
    },
    "required": ["name", "parts"],
    "additionalProperties": False,
}


def test_an_answer_of_a_given_form_keeps_it_when_its_worker_is_killed(cluster: Cluster) -> None:
    """An answer with a JSON schema stays valid and keeps its tokens when its worker is killed."""
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": FORM}}
    asked = {"temperature": 1.0, "seed": 4, "response_format": form, "ignore_eos": False}
    ids = prompt(90, 6, VOCAB)
    known = [token for event in cluster.stream(ids, STREAMED, **asked) for token in event]
    victim = cluster.pid("d0")
    stream = cluster.stream(ids, STREAMED, **asked, **UNKNOWN)
    found = next(stream)
    os.kill(victim, signal.SIGKILL)
    for event in stream:
        found = found + event
    assert found == known
    answer = json.loads(demo_tokenizer().decode(found))
    assert 30 <= len(answer["name"]) <= 60 and 5 <= len(answer["parts"]) <= 8
    assert cluster.lines("request finished")[-1]["attempts"] == 2
    cluster.wait_healthy()
    cluster.wait_idle()


STORY = {
    "type": "object",
    "properties": {"text": {"type": "string", "minLength": 300, "maxLength": 400}},
    "required": ["text"],
}
TOOL = {"type": "function", "function": {"name": "write_story", "parameters": STORY}}


def test_a_call_of_a_tool_is_the_same_and_made_once_when_its_worker_is_killed(cluster: Cluster) -> None:
    """A tool call is sent once and with the same arguments when its worker is killed."""
    asked = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "temperature": 1.0}
    messages = [{"role": "user", "content": "Write about a fox"}]

    def pieces() -> Iterator[dict[str, Any]]:
        with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="any", max_retries=0) as client:
            for chunk in client.chat.completions.create(
                model="SmolLM2-135M-Instruct.Q4_1", messages=messages, seed=5, stream=True, **asked
            ):
                for piece in chunk.choices[0].delta.tool_calls or ():
                    yield piece.model_dump(exclude_none=True)
                finish = chunk.choices[0].finish_reason
        assert finish == "tool_calls"

    first, *known = pieces()
    victim = cluster.pid("d0")
    stream = pieces()
    begun, *found = next(stream), next(stream)
    os.kill(victim, signal.SIGKILL)
    found += stream
    assert begun["function"] == first["function"] == {"name": "write_story", "arguments": ""}
    written = ["".join(one["function"]["arguments"] for one in parts) for parts in (known, found)]
    assert written[0] == written[1]
    assert 300 <= len(json.loads(written[0])["text"]) <= 400
    assert not [one for one in found if "id" in one], "the call began once"
    cluster.wait_healthy()
    cluster.wait_idle()
    assert cluster.lines("request finished")[-1]["attempts"] == 2


def test_an_answer_scored_as_a_prompt_has_the_same_log_probabilities(cluster: Cluster) -> None:
    """Scoring a prompt that contains an earlier answer gives the log probabilities of that answer, and caches the prompt."""
    ids = prompt(130, 8, VOCAB)
    answer = cluster.complete(ids, 50, ignore_eos=True, logprobs=5)["choices"][0]
    whole = ids + answer["token_ids"]
    for _ in range(2):
        asked = cluster.complete(whole, 0, echo=True, logprobs=5, prompt_logprobs=2)
        (choice,) = asked["choices"]
        assert asked["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        for column in ("tokens", "token_logprobs", "top_logprobs"):
            assert choice["logprobs"][column][len(ids) :] == answer["logprobs"][column]
        values = [
            known[str(token)]["logprob"]
            for token, known in zip(whole[1:], choice["prompt_logprobs"][1:], strict=True)
        ]
        assert [None, *values] == choice["logprobs"]["token_logprobs"]
    assert cluster.complete(whole, 1)["usage"]["prompt_tokens_details"]["cached_tokens"] == 176


@pytest.mark.parametrize(("victim", "doing"), [("p0", "prefill"), ("d0", "decode")])
def test_a_prompt_is_scored_once_when_its_worker_is_killed(cluster: Cluster, victim: str, doing: str) -> None:
    """When a worker is killed, each prompt token is scored once in the answer, with the same values."""
    asked = {"echo": True, "logprobs": 3, "ignore_eos": True}
    ids = prompt(400, 9, VOCAB)
    calm = cluster.complete(ids, STREAMED, **asked)["choices"][0]
    known, found = started(cluster, doing), []
    thread = threading.Thread(target=lambda: found.append(cluster.complete(ids, STREAMED, **asked)))
    thread.start()
    deadline = time.monotonic() + 30
    while started(cluster, doing) == known:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(cluster.pid(victim), signal.SIGKILL)
    thread.join(90)
    (choice,) = found[0]["choices"]
    assert choice["logprobs"] == calm["logprobs"] and choice["token_ids"] == calm["token_ids"]
    assert cluster.lines("request finished")[-1]["attempts"] >= 2
    cluster.wait_healthy()
    cluster.wait_idle()


def started(cluster: Cluster, doing: str = "prefill") -> int:
    """How many prompts a prefill worker has begun, or answers a decode worker has continued."""
    return len(cluster.lines(f"{doing} started"))


def test_a_response_is_the_chat_that_it_asks_for_though_its_worker_is_killed(cluster: Cluster) -> None:
    """The same conversation has the same text as a chat and as a response, whose worker is killed while it is streamed."""
    text, how = "Write a long story about a lighthouse.", {"temperature": 1.0, "seed": 5}
    chat = {"messages": [{"role": "user", "content": text}], "max_tokens": STREAMED, **how}
    known = httpx.post(f"{cluster.url}/v1/chat/completions", json=chat, timeout=120).json()
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="k", max_retries=0, timeout=120) as client:
        asked = {"temperature": 1.0, "max_output_tokens": STREAMED, "extra_body": {"seed": 5, **UNKNOWN}}
        model, victim = client.models.list().data[0].id, cluster.pid("d0")
        found = ""
        for event in client.responses.create(model=model, input=text, stream=True, **asked):
            if event.type == "response.output_text.delta":
                if not found:
                    os.kill(victim, signal.SIGKILL)
                found += event.delta
    last = event.response
    assert found == last.output_text == known["choices"][0]["message"]["content"]
    assert last.usage.output_tokens == known["usage"]["completion_tokens"]
    assert cluster.lines("request finished")[-1]["attempts"] == 2
    cluster.wait_healthy()
    cluster.wait_idle()
