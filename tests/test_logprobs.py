"""Log probabilities in answers: OpenAI's two formats, whole and streamed."""

from __future__ import annotations

import json

import pytest

from api_client import CHAT, HI, post
from fake_service import IM_END, FakeService, demo_tokenizer, sse
from memserve.api.service import Chunk
from memserve.drawing import Logprobs
from memserve.tokens import pack

TEXT = "one 日本 END two"
TOKENS = [*demo_tokenizer().encode(TEXT, False), IM_END]
TEXTS = [demo_tokenizer().decode([token], skip_special=False) for token in TOKENS]


def logprobs_at(place: int, count: int) -> Logprobs:
    """Log probabilities of the token at a place: it is the second likeliest, and another is the likeliest."""
    ids, values = (
        [5 + place, TOKENS[place], 7, 8, 9][:count],
        [-0.5, -1.5 - place, -3.0, -4.0, float("-inf")][:count],
    )
    return Logprobs(-1.5 - place, pack(ids), tuple(values))


def service() -> FakeService:
    """A service that answers TEXT, one token a chunk."""

    def script(request):
        count = request.params.sampling.logprobs
        steps = []
        for place, token in enumerate(TOKENS):
            known = () if count is None else (logprobs_at(place, count),)
            steps += [Chunk((token,), "stop" if token == IM_END else None, 0, known), 0.001]
        return steps

    return FakeService(script)


async def chunks(body, path) -> list[dict]:
    """The choices of a stream's events."""
    answer = await post(body | {"stream": True}, path, service())
    events = [json.loads(data) for data in sse(answer.text) if data != "[DONE]"]
    return [choice for event in events for choice in event["choices"]]


async def test_a_completion_reports_each_token():
    """A completion reports tokens, log probabilities, likeliest tokens and offsets in OpenAI's shape."""
    answer = await post({"prompt": "x", "logprobs": 1}, service=service())
    found = answer.json()["choices"][0]["logprobs"]

    assert found["tokens"] == TEXTS
    assert found["token_logprobs"] == [-1.5 - place for place in range(len(TOKENS))]
    likeliest = [demo_tokenizer().decode([5 + place], skip_special=False) for place in range(len(TOKENS))]
    pairs = zip(likeliest, TEXTS, found["token_logprobs"], strict=True)
    assert found["top_logprobs"] == [{likely: -0.5, text: value} for likely, text, value in pairs]
    assert found["text_offset"] == [sum(map(len, TEXTS[:place])) for place in range(len(TOKENS))]


async def test_no_likeliest_tokens_leave_the_drawn_one():
    """With ``logprobs: 0`` only the drawn token is reported."""
    answer = await post({"prompt": "x", "logprobs": 0}, service=service())
    found = answer.json()["choices"][0]["logprobs"]
    assert found["top_logprobs"] == [{text: -1.5 - place} for place, text in enumerate(TEXTS)]


async def test_a_chat_reports_each_token():
    """A chat reports each token with its bytes and its likeliest tokens."""
    answer = await post({"messages": HI, "logprobs": True, "top_logprobs": 5}, CHAT, service())
    found = answer.json()["choices"][0]["logprobs"]

    assert found["refusal"] is None
    assert [one["token"] for one in found["content"]] == TEXTS
    assert bytes(byte for one in found["content"] for byte in one["bytes"]).decode() == TEXT + "<|im_end|>"
    assert [one["logprob"] for one in found["content"]] == [-1.5 - place for place in range(len(TOKENS))]
    likeliest = found["content"][3]["top_logprobs"]
    assert [one["logprob"] for one in likeliest] == [-0.5, -4.5, -3.0, -4.0, -9999.0]
    assert likeliest[1]["token"] == TEXTS[3] and likeliest[1]["bytes"] == found["content"][3]["bytes"]


async def test_unasked_for_nothing_is_reported():
    """Log probabilities are reported only if they are asked for."""
    chat = (await post({"messages": HI}, CHAT, service())).json()["choices"][0]
    completion = (await post({"prompt": "x"}, service=service())).json()["choices"][0]
    assert "logprobs" not in chat and completion["logprobs"] is None
    bare = await post({"messages": HI, "logprobs": True}, CHAT, service())
    assert {len(one["top_logprobs"]) for one in bare.json()["choices"][0]["logprobs"]["content"]} == {0}


@pytest.mark.parametrize("n", [1, 2])
async def test_streams_report_the_same(n):
    """A stream reports the same log probabilities as a whole answer, for each of several answers."""
    asked = {"messages": HI, "logprobs": True, "top_logprobs": 2, "n": n}
    whole = (await post(asked, CHAT, service())).json()["choices"]
    found = await chunks(asked, CHAT)
    for index in range(n):
        mine = [one["logprobs"]["content"] for one in found if one["index"] == index and one.get("logprobs")]
        assert len(mine) > 2
        assert [entry for part in mine for entry in part] == whole[index]["logprobs"]["content"]

    asked = {"prompt": "x", "logprobs": 2, "n": n}
    whole = (await post(asked, service=service())).json()["choices"]
    found = await chunks(asked, "/v1/completions")
    for index in range(n):
        mine = [one["logprobs"] for one in found if one["index"] == index and one["logprobs"]]
        for part in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [value for one in mine for value in one[part]] == whole[index]["logprobs"][part]


async def test_nothing_is_reported_of_tokens_after_a_stop_string():
    """Tokens after a stop string have no log probabilities."""
    asked = {"messages": HI, "logprobs": True, "stop": "END", "return_token_ids": True}
    choice = (await post(asked, CHAT, service())).json()["choices"][0]
    assert choice["message"]["content"] == "one 日本 "
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"]) < len(TOKENS)
