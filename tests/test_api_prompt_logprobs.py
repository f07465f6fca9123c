"""Log probabilities of prompts in answers: with ``echo`` in completions, and as vLLM's ``prompt_logprobs``."""

from __future__ import annotations

import json
from array import array

import pytest

from api_client import CHAT, HI, post
from fake_service import IM_END, FakeService, demo_tokenizer, sse
from memserve.api.service import Chunk
from memserve.drawing import Logprobs, PromptLogprobs
from memserve.errors import RequestFailed
from memserve.tokens import pack

TEXT = "one 日本 two"
PROMPT = demo_tokenizer().encode(TEXT, False)
TEXTS = [demo_tokenizer().decode([token], skip_special=False) for token in PROMPT]
SAYS = demo_tokenizer().encode(" and three", False)
VALUES = [-1.5 - place for place in range(1, len(PROMPT))]
"""Log probabilities of the prompt's tokens, from the second on."""


def scores(tokens: list[int], count: int) -> tuple[PromptLogprobs, ...]:
    """Scores of a prompt in two pieces: each token is the second likeliest, and ``100 + place`` the likeliest."""
    lines = [
        (
            -1.5 - place,
            [100 + place, token, 7, 8, 9][:count],
            [-0.5, -1.5 - place, -30.0, -40.0, float("-inf")][:count],
        )
        for place, token in enumerate(tokens[1:], 1)
    ]
    pieces = [part for part in (lines[:1], lines[1:]) if part]
    return tuple(
        PromptLogprobs(
            array("d", [value for value, _, _ in part]).tobytes(),
            pack([2] * len(part)),
            pack([one for _, ids, _ in part for one in ids]),
            array("d", [one for *_, values in part for one in values]).tobytes(),
        )
        for part in pieces
    )


def service(finish: str = "stop") -> FakeService:
    """A service that answers SAYS, one token a chunk, after the scores of the prompt if they are wanted."""

    def script(request):
        how = request.params.sampling
        count = how.prompt_logprobs
        prompt = () if count is None else scores(request.prompt, count)
        known = () if how.logprobs is None else (Logprobs(-0.25, b"", ()),)
        tokens = [*SAYS, IM_END][: request.params.max_tokens]
        steps = [0.002 * (count is not None)]
        for place, token in enumerate(tokens):
            last = place == len(tokens) - 1
            steps += [Chunk((token,), finish if last else None, 0, known, () if place else prompt), 0.001]
        return steps

    return FakeService(script)


async def choices(body, path="/v1/completions") -> list[dict]:
    """The choices of an answer that is not streamed."""
    answer = await post(body, path, service())
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


async def events(body, path="/v1/completions") -> list[dict]:
    """The events of a streamed answer."""
    answer = await post(body | {"stream": True}, path, service())
    return [json.loads(data) for data in sse(answer.text) if data != "[DONE]"]


ECHO = {"prompt": TEXT, "echo": True, "logprobs": 1, "temperature": 0}


async def test_an_echo_is_scored_before_the_answer():
    """With echo, the lists of log probabilities begin with the prompt's, where evaluation harnesses look for them."""
    (choice,) = await choices(ECHO)
    found = choice["logprobs"]
    said = [demo_tokenizer().decode([token], skip_special=False) for token in (*SAYS, IM_END)]
    assert choice["text"] == TEXT + " and three"
    assert found["tokens"] == TEXTS + said
    assert found["token_logprobs"] == [None, *VALUES, *[-0.25] * 3]
    likeliest = [
        demo_tokenizer().decode([100 + place], skip_special=False) for place in range(1, len(PROMPT))
    ]
    shown = [{best: -0.5, own: value} for best, own, value in zip(likeliest, TEXTS[1:], VALUES, strict=True)]
    assert found["top_logprobs"] == [None, *shown, *[{one: -0.25} for one in said]]
    assert found["text_offset"] == [
        sum(map(len, (TEXTS + said)[:place])) for place in range(len(TEXTS + said))
    ]


@pytest.mark.parametrize("prompt", [TEXT, PROMPT, [TEXT, "x"], [PROMPT, PROMPT[:2]]])
@pytest.mark.parametrize("most", [0, 1])
async def test_what_harnesses_send_scores_each_prompt(prompt, most):
    """What lm-evaluation-harness sends (texts or tokens, one or many, ``max_tokens`` 1 or 0) has each prompt scored."""
    found = await choices(ECHO | {"prompt": prompt, "max_tokens": most, "seed": 1234})
    lengths = [len(PROMPT), 1 if prompt == [TEXT, "x"] else 2][: len(found)]
    assert [one["index"] for one in found] == list(range(len(found)))
    for one, length in zip(found, lengths, strict=True):
        assert len(one["logprobs"]["tokens"]) == length + most
        assert one["logprobs"]["token_logprobs"][:length] == [None, *VALUES[: length - 1]]


async def test_a_prompt_alone_is_answered_with_nothing_else():
    """With ``max_tokens`` 0 the answer is the prompt alone: the token that is computed anyway is not shown or counted."""
    body = ECHO | {"max_tokens": 0, "return_token_ids": True, "stop": "three"}
    answer = (await post(body, service=service("stop"))).json()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["token_ids"], choice["finish_reason"]) == (TEXT, [], "length")
    assert choice["logprobs"]["tokens"] == TEXTS
    assert answer["usage"]["completion_tokens"] == 0
    (bare,) = await choices({"prompt": TEXT, "echo": True, "max_tokens": 0})
    assert (bare["text"], bare["logprobs"]) == (TEXT, None)
    parts = [one for event in await events(body) for one in event["choices"]]
    assert "".join(one["text"] for one in parts) == TEXT and parts[-1]["finish_reason"] == "length"


async def test_prompt_logprobs_are_vllms():
    """``prompt_logprobs`` have vLLM's form: per choice in completions, once in a chat, with token ids as names."""
    first, second = await choices({"prompt": TEXT, "prompt_logprobs": 3, "n": 2})
    found = first["prompt_logprobs"]
    assert second["prompt_logprobs"] == found and first["logprobs"] is None and first["text"] == " and three"
    assert found[0] is None and len(found) == len(PROMPT)
    assert list(found[1].items()) == [
        (str(PROMPT[1]), {"logprob": -2.5, "rank": 2, "decoded_token": TEXTS[1]}),
        (
            "101",
            {"logprob": -0.5, "rank": 1, "decoded_token": demo_tokenizer().decode([101], skip_special=False)},
        ),
        (
            "7",
            {"logprob": -30.0, "rank": 3, "decoded_token": demo_tokenizer().decode([7], skip_special=False)},
        ),
    ]
    none = (await choices({"prompt": TEXT, "prompt_logprobs": 0}))[0]["prompt_logprobs"]
    assert [list(one) for one in none[1:]] == [[str(token)] for token in PROMPT[1:]]
    assert (await choices({"prompt": "x", "prompt_logprobs": 2}))[0]["prompt_logprobs"] == [None]

    chat = (await post({"messages": HI, "prompt_logprobs": 5, "n": 2}, CHAT, service())).json()
    assert "prompt_logprobs" not in chat["choices"][0]
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert min(one["logprob"] for one in chat["prompt_logprobs"][1].values()) == -9999.0


async def test_echo_and_prompt_logprobs_go_together():
    """Echo and ``prompt_logprobs`` may ask for different numbers of likely tokens, and each shows its own number."""
    (choice,) = await choices(ECHO | {"prompt_logprobs": 4})
    assert {len(one) for one in choice["logprobs"]["top_logprobs"][1 : len(PROMPT)]} == {2}
    assert {len(one) for one in choice["prompt_logprobs"][1:]} == {4}
    (other,) = await choices(ECHO | {"prompt_logprobs": 0})
    assert other["logprobs"] == choice["logprobs"]
    assert {len(one) for one in other["prompt_logprobs"][1:]} == {1}


@pytest.mark.parametrize("n", [1, 3])
async def test_a_stream_begins_with_the_scores_of_its_prompt(n):
    """Each streamed choice begins with the scores of its prompt, and its parts add up to the answer that is not streamed."""
    asked = ECHO | {"prompt": [TEXT, "x"], "n": n, "prompt_logprobs": 2}
    whole = await choices(asked)
    parts = [one for event in await events(asked) for one in event["choices"]]
    for index in range(2 * n):
        mine = [one for one in parts if one["index"] == index]
        assert mine[0]["text"] == asked["prompt"][index // n]
        assert mine[0]["prompt_logprobs"] == whole[index]["prompt_logprobs"]
        assert not any("prompt_logprobs" in one for one in mine[1:])
        for column, values in whole[index]["logprobs"].items():
            assert [value for one in mine if one["logprobs"] for value in one["logprobs"][column]] == values

    chat = {"messages": HI, "prompt_logprobs": 1, "n": n}
    found = await events(chat, CHAT)
    known = (await post(chat, CHAT, service())).json()["prompt_logprobs"]
    assert [one["prompt_logprobs"] for one in found if "prompt_logprobs" in one] == [known]
    assert {one["choices"][0]["index"] for one in found} == set(range(n))


async def test_only_the_first_answer_has_its_prompt_computed():
    """Of n answers to a prompt only the first has it scored, and none where no scores are wanted."""
    asked = service()
    await post(ECHO | {"prompt": [TEXT, "x"], "n": 3, "prompt_logprobs": 7}, service=asked)
    by_prompt = [
        [one.params.sampling.prompt_logprobs for one in asked.opened if len(one.prompt) == length]
        for length in (len(PROMPT), 1)
    ]
    assert [sorted(one, key=lambda count: count is None) for one in by_prompt] == [[7, None, None]] * 2
    plain = service()
    for body in ({"prompt": TEXT, "echo": True}, {"prompt": TEXT, "logprobs": 3}, {"prompt": TEXT}):
        await post(body, service=plain)
    await post({"messages": HI, "logprobs": True}, CHAT, plain)
    assert {one.params.sampling.prompt_logprobs for one in plain.opened} == {None}


async def test_a_failure_before_its_prompt_is_scored_decides_the_status():
    """A request that fails before its prompt is scored has the status of the failure, streamed or not."""
    failing = FakeService(lambda request: [0.01, RequestFailed("no_capacity", "nobody is there", 503)])
    for stream in (False, True):
        assert (await post(ECHO | {"stream": stream}, service=failing)).status_code == 503
