"""The HTTP API around a scripted service: what it asks of the service, and what it answers to clients."""

from __future__ import annotations

import json
import re
import threading
from array import array
from pathlib import Path

import attrs
import pytest
import trio

from api_client import CHAT, HI, post
from fake_service import (
    IM_END,
    IM_START,
    FakeService,
    demo_tokenizer,
    says,
    sse,
)
from memserve.api import app, prompts
from memserve.api.bodies import LONG_BODY, REFUSED, ChatBody, CompletionBody
from memserve.api.service import Chunk
from memserve.drawing import Adjustments, Sampling
from memserve.errors import RequestFailed
from memserve.tokens import pack


def pack_floats(*values):
    """Float32 values as bytes, the form of biases in messages."""
    return array("f", values).tobytes()


DOCS = Path(__file__).parent.parent / "docs" / "api.md"


# ---- answers -------------------------------------------------------------------------------------------------


async def test_a_completion_has_openais_shape_and_counts():
    """A completion has OpenAI's fields: text, finish reason and token counts."""
    response = await post(
        {"prompt": "Say it", "model": "demo"}, service=FakeService(lambda _r: says("Hello", cached=1))
    )

    answer = response.json()
    assert response.status_code == 200
    assert response.headers["x-request-id"] == "r1"
    assert answer["id"] == "cmpl-r1"
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"] == {
        "prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4, "prompt_tokens_details": {"cached_tokens": 1},
    }  # fmt: skip


async def test_a_chat_has_openais_shape():
    """A chat completion has its message where OpenAI's has it."""
    response = await post({"messages": HI}, CHAT)

    answer = response.json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello there", "refusal": None},
            "finish_reason": "stop",
        }
    ]


async def test_parameters_reach_the_service():
    """Sampling parameters, limits and stop tokens of a request are passed to the service."""
    service = FakeService(lambda _r: says("x"))
    body = {"prompt": [5, 6], "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": -1, "max_tokens": 3}
    await post(body | {"stop_token_ids": [9, 9]}, service=service)
    await post(body | {"ignore_eos": True, "top_k": -1}, service=service)
    first, second = service.opened

    assert first.prompt == [5, 6]
    assert first.params.sampling == Sampling(0.5, 7, 0.9, 2**63 - 1)
    assert first.params.max_tokens == 3
    assert first.params.stop_tokens == (IM_END, 9)
    assert second.params.stop_tokens == ()
    assert second.params.sampling.top_k == 0


async def test_a_limit_beyond_the_vocabulary_is_none():
    """A number that no message can carry would be a server error, where it asks for nothing."""
    service = FakeService(lambda _r: says("x"))
    await post({"prompt": "x", "top_k": 10**30}, service=service)
    assert service.opened[0].params.sampling.top_k == demo_tokenizer().vocabulary


async def test_adjustments_reach_the_service_of_every_answer():
    """Penalties, biases, min_p and min_tokens are passed to the service for each of several answers."""
    service = FakeService(lambda _r: says("x"))
    body = {
        "min_p": 0.25,
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
    }
    await post({"prompt": "x", "n": 2, "logit_bias": {"7": -100, "0": 2.5, "8": 0}} | body, service=service)
    await post({"messages": HI, "n": 2} | body, CHAT, service)
    completions, chats = service.opened[:2], service.opened[2:]

    asked = Adjustments(pack([7, 0]), pack_floats(-100, 2.5), 1.5, 0.5, -1.0, 2)
    assert [one.params.sampling.adjust for one in completions] == [asked] * 2
    assert [one.params.sampling.adjust for one in chats] == [attrs.evolve(asked, biased=b"", bias=b"")] * 2
    assert {one.params.sampling.min_p for one in service.opened} == {0.25}


async def test_what_asks_for_nothing_adjusts_nothing():
    """Fields that hold their neutral values adjust nothing: every step of such a request would cost more."""
    service = FakeService(lambda _r: says("x"))
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1, "min_tokens": 0}
    await post({"prompt": "x", "logit_bias": {}, "min_p": 0, "logprobs": None} | neutral, service=service)
    await post({"messages": HI, "logprobs": False, "top_logprobs": 0} | neutral, CHAT, service)
    for one in service.opened:
        how = one.params.sampling
        assert (how.adjust, how.min_p, how.logprobs) == (None, 0.0, None)


async def test_defaults_are_openais():
    """Parameters that are left out have OpenAI's defaults."""
    service = FakeService(lambda _r: says("x"))
    await post({"prompt": "x"}, service=service)
    await post({"messages": HI}, CHAT, service=service)
    await post({"messages": HI, "max_tokens": 9, "max_completion_tokens": 7}, CHAT, service=service)
    completion, chat, limited = service.opened

    assert completion.params.max_tokens == 16
    assert chat.params.max_tokens == 8192 - len(chat.prompt)
    assert limited.params.max_tokens == 7
    assert completion.params.sampling.temperature == 1.0
    assert completion.params.sampling.top_p == 1.0
    assert completion.params.sampling.seed != chat.params.sampling.seed


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", ["ab"]),
        (["ab", "cd"], ["ab", "cd"]),
        ([29, 30], [[29, 30]]),
        ([[29, 30], [31]], [[29, 30], [31]]),
        ("<|im_start|>", [[IM_START]]),
    ],
)
async def test_prompts_come_in_four_forms(prompt, expected):
    """A prompt may be text, token ids, or a list of either."""
    service = FakeService(lambda _r: says("x"))
    response = await post({"prompt": prompt}, service=service)
    encode = demo_tokenizer().encode

    want = [encode(item, False) if isinstance(item, str) else item for item in expected]
    assert sorted(request.prompt for request in service.opened) == sorted(want)
    assert [choice["index"] for choice in response.json()["choices"]] == list(range(len(want)))


async def test_several_answers_differ_in_seed_and_count_their_prompt_once():
    """Each of n answers has its own seed, and usage counts each prompt once."""
    service = FakeService(lambda request: says(str(request.params.sampling.seed), cached=len(service.opened)))
    response = await post({"prompt": ["a b", "c"], "n": 2, "seed": 10}, service=service)
    answer = response.json()

    assert [choice["text"] for choice in answer["choices"]] == ["10", "11", "10", "11"]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 4 * 3


async def test_token_ids_and_echo():
    """return_token_ids adds the token ids of prompt and answer, and echo puts the prompt's text before the answer."""
    response = await post({"prompt": "Say it", "echo": True, "return_token_ids": True})
    (choice,) = response.json()["choices"]
    assert choice["text"] == "Say itHello there"
    assert choice["prompt_token_ids"] == demo_tokenizer().encode("Say it", False)
    assert choice["token_ids"] == [*demo_tokenizer().encode("Hello there", False), IM_END]

    response = await post({"messages": HI, "return_token_ids": True}, CHAT)
    assert response.json()["prompt_token_ids"][-4:] == demo_tokenizer().encode(
        "<|im_start|>assistant\n", True
    )
    assert response.json()["choices"][0]["token_ids"] == choice["token_ids"]


async def test_a_stop_string_ends_the_answer_and_the_request():
    """At a stop string the answer ends, without it, and the request is closed at the service."""
    service = FakeService(
        lambda _r: [Chunk(tuple(demo_tokenizer().encode("one two END three", False)), None), 60.0]
    )
    with trio.fail_after(5):
        response = await post({"prompt": "x", "stop": "END", "return_token_ids": True}, service=service)
    (choice,) = response.json()["choices"]

    assert choice["text"] == "one two "
    assert choice["finish_reason"] == "stop"
    assert "three" not in demo_tokenizer().decode(choice["token_ids"])
    assert response.json()["usage"]["completion_tokens"] == len(choice["token_ids"])
    assert service.opened[0].outcome == "stop string"


async def test_a_stop_string_waits_for_the_least_length():
    """A stop string among the first min_tokens tokens does not end the answer."""
    tokens = demo_tokenizer().encode("END one END two", False)
    service = FakeService(lambda _r: [Chunk((token,)) for token in tokens] + [Chunk((IM_END,), "stop")])
    response = await post({"prompt": "x", "stop": "END", "min_tokens": 2}, service=service)
    assert response.json()["choices"][0]["text"] == "END one "


async def test_the_token_that_ends_an_answer_is_no_part_of_its_text():
    """An answer that a stop token ends would show that token, unlike one that the model's own end token does."""
    *words, end = demo_tokenizer().encode("one two.", False)
    service = FakeService(lambda _r: [Chunk(tuple(words)), Chunk((end,), "stop")])
    body = {"prompt": "x", "stop_token_ids": [end], "return_token_ids": True}
    (choice,) = (await post(body, service=service)).json()["choices"]
    assert (choice["text"], choice["token_ids"]) == ("one two", [*words, end])
    (choice,) = (await post(body | {"include_stop_str_in_output": True}, service=service)).json()["choices"]
    assert choice["text"] == "one two."


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_is_shown_to_those_who_ask(stream):
    """A client that needs the end of what it asked for, such as a closing brace, would have to guess it."""
    service = FakeService(lambda _r: says("one two END three", delay_s=0.001))
    body = {"prompt": "x", "stop": ["o E", "END", "three"], "include_stop_str_in_output": True}
    if stream:
        *chunks, _done = await events(body, "/v1/completions", service)
        choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    else:
        choices = (await post(body, service=service)).json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "one two E"
    assert choices[-1]["finish_reason"] == "stop"
    assert service.opened[0].outcome == "stop string"


async def test_special_tokens_are_shown_to_those_who_ask():
    """A client that parses a model's own control tokens would not find them."""
    text = demo_tokenizer().encode("a <|im_start|> b", True)
    service = FakeService(lambda _r: [Chunk(tuple(text)), Chunk((IM_END,), "stop")])

    async def shown(**asked) -> str:
        answer = await post({"messages": HI, **asked}, CHAT, service)
        return answer.json()["choices"][0]["message"]["content"]

    assert await shown() == "a  b"
    assert await shown(skip_special_tokens=False) == "a <|im_start|> b"
    both = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    assert await shown(**both) == "a <|im_start|> b<|im_end|>"
    assert await shown(skip_special_tokens=False, stop="<|im_start|>") == "a "


async def test_a_completion_begins_with_bos_unless_its_client_says_no():
    """A prompt that has the token already would begin with two of them, whatever the client asks for."""
    service, tokenizer = FakeService(lambda _r: says("x")), demo_tokenizer()
    tokenizer.bos = (IM_START,)
    try:
        for asked in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
            await post({"prompt": "x", **asked}, service=service)
    finally:
        tokenizer.bos = ()
    plain = tokenizer.encode("x", False)
    assert [one.prompt for one in service.opened] == [[IM_START, *plain], [IM_START, *plain], plain]


async def test_allowed_tokens_reach_the_service_of_every_answer():
    """A client that wants one of a few tokens would get any."""
    service = FakeService(lambda _r: says("x"))
    await post({"prompt": "x", "n": 2, "allowed_token_ids": [9, 8, 9, 49151]}, service=service)
    for one in service.opened:
        mask = one.params.sampling.adjust.allowed
        assert (len(mask), int.from_bytes(mask, "little")) == (49152 // 8, 1 << 8 | 1 << 9 | 1 << 49151)


@pytest.mark.parametrize(("bos", "most", "kept"), [
    ((), 2, 2), ((), 4, 4), ((), 9, 4), ((IM_START,), 3, 2), ((IM_START,), 1, 0), ((IM_START,), 5, 4),
])  # fmt: skip
async def test_a_prompt_is_cut_at_its_head_if_its_client_asks_for_that(bos, most, kept):
    """A client with a long history would be refused, or lose the end, which is what it asks."""
    service, tokenizer = FakeService(lambda _r: says("x")), demo_tokenizer()
    ids, text = tokenizer.encode("one two three four", False), "one two three four"
    asked = {"truncate_prompt_tokens": most, "max_tokens": 1}
    tokenizer.bos = bos
    try:
        answer = await post({"prompt": text, "echo": True, **asked}, service=service)
        await post({"prompt": ids, **asked}, service=service)
        await post({"messages": HI, **asked}, CHAT, service)
        await post({"messages": HI}, CHAT, service)
    finally:
        tokenizer.bos = ()
    cut, listed, chat, whole = (one.prompt for one in service.opened)
    assert cut == [*bos, *ids[4 - kept :]] and listed == ids[-most:]
    assert answer.json()["choices"][0]["text"] == tokenizer.decode(ids[4 - kept :]) + "x"
    assert whole[0] == IM_START
    assert chat == [*bos, *whole[len(whole) - most + len(bos) :]]


@pytest.mark.parametrize(("kind", "items"), [(CHAT, "messages"), ("/v1/responses", "input")])
@pytest.mark.parametrize(
    "long", [[HI[0] | {"content": "x" * LONG_BODY}], HI * 10_000], ids=["bytes", "items"]
)
async def test_a_long_body_is_read_and_rendered_while_streams_go_on(monkeypatch, kind, items, long):
    """One client's megabytes, or thousands of messages, would hold up all other clients' streams."""
    here = threading.current_thread()
    aside: list[bool] = []

    def noting(call):
        def noted(*given):
            aside.append(threading.current_thread() is not here)
            return call(*given)

        return noted

    read = "read_body" if kind == CHAT else "read_response"
    monkeypatch.setattr(app, read, noting(getattr(app, read)))
    monkeypatch.setattr(prompts, "_rendered", noting(prompts._rendered))
    assert (await post({items: HI}, kind)).status_code == 200
    assert (await post({items: long}, kind)).json()["error"]["param"] == items
    assert aside == [False, False, True, True]


async def test_a_cut_answer_has_the_reason_length():
    """An answer that was cut at its length has the finish reason ``length``."""
    response = await post({"prompt": "x"}, service=FakeService(lambda _r: says("and so", "length")))
    assert response.json()["choices"][0]["finish_reason"] == "length"


# ---- streams -------------------------------------------------------------------------------------------------


async def events(body, path=CHAT, service=None, **changes):
    response = await post(body | {"stream": True}, path, service, **changes)
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    return list(sse(response.text))


async def test_a_chat_stream_begins_with_the_role_and_ends_with_done():
    """A chat stream begins with the role, ends with usage and [DONE], and has the text between them."""
    *chunks, done = await events({"messages": HI, "stream_options": {"include_usage": True}})
    chunks = [json.loads(chunk) for chunk in chunks]

    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    assert text == "Hello there"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_a_stream_tells_its_usage_so_far_to_those_who_ask():
    """A client that meters its users as they read would have nothing to count by until the end."""
    service = FakeService(lambda _r: says("one two three", cached=1, delay_s=0.005))
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _done = await events({"messages": HI, "n": 2, "stream_options": options}, CHAT, service)
    *chunks, last = [json.loads(chunk) for chunk in chunks]

    for index in range(2):
        told = [one["usage"] for one in chunks if one["choices"][0]["index"] == index]
        counts = [usage["completion_tokens"] for usage in told]
        assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 4 and len({*counts}) > 2
        assert {usage["prompt_tokens"] for usage in told} == {last["usage"]["prompt_tokens"]}
        assert told[-1]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert last["usage"]["completion_tokens"] == 8
    plain = {"messages": HI, "stream_options": {"continuous_usage_stats": True}}
    assert all("usage" not in json.loads(chunk) for chunk in (await events(plain, CHAT))[:-1])


async def test_streamed_token_ids_are_all_there_and_prompts_come_first():
    """A stream has all token ids of the answer, with those of the prompt in its first event; characters are never cut."""
    service = FakeService(lambda _r: says("日本 <|im", delay_s=0.001))
    *chunks, _done = await events(
        {"prompt": "a b", "return_token_ids": True, "echo": True, "stop": "<|im_end|>"},
        "/v1/completions",
        service,
    )
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]

    assert choices[0]["prompt_token_ids"] == demo_tokenizer().encode("a b", False)
    assert choices[0]["text"] == "a b"
    ids = [token for choice in choices for token in choice["token_ids"]]
    assert ids == [*demo_tokenizer().encode("日本 <|im", False), IM_END]
    assert "".join(choice["text"] for choice in choices) == "a b日本 <|im"
    assert "�" not in "".join(choice["text"] for choice in choices)


async def test_waiting_tokens_share_an_event():
    """Tokens that are there at once share an event: one write per token would limit a Frontend's throughput."""
    tokens = tuple(demo_tokenizer().encode("one two three four five", False))
    service = FakeService(lambda _r: [*(Chunk((token,)) for token in tokens), Chunk((IM_END,), "stop")])
    chunks = await events({"messages": HI}, service=service)

    assert len(chunks) <= 4


async def test_a_failure_after_the_first_byte_is_an_event():
    """A failure after the stream has begun is sent as an error event, and no [DONE] follows."""
    service = FakeService(
        lambda _r: [*says("so far", "length")[:1], 0.01, RequestFailed("worker_lost", "gone", 503)]
    )
    response = await post({"messages": HI, "stream": True}, CHAT, service)

    assert response.status_code == 200
    assert "event: error\n" in response.text
    assert json.loads(list(sse(response.text))[-1])["error"]["code"] == "worker_lost"
    assert "[DONE]" not in response.text


async def test_a_silent_stream_is_kept_awake(autojump_clock):
    """A stream without tokens gets a comment at intervals, so that proxies do not close it."""
    service = FakeService(lambda _r: [40.0, *says("late")])
    response = await post({"messages": HI, "stream": True}, CHAT, service)

    assert response.text.count(": waiting\n\n") == 2
    assert response.text.endswith("data: [DONE]\n\n")


# ---- the documentation ---------------------------------------------------------------------------------------


def documented(section):
    """First cells of the table rows in a section of docs/api.md."""
    text = DOCS.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)`", text, flags=re.MULTILINE))


def test_every_field_is_documented_and_no_other():
    """The tables in docs/api.md list exactly the fields that are accepted or refused."""
    completion = {field.name for field in attrs.fields(CompletionBody)}
    chat = {field.name for field in attrs.fields(ChatBody)}

    assert documented("Fields of both") == completion & chat
    assert documented("Fields of /v1/completions") == completion - chat
    assert documented("Fields of /v1/chat/completions") == chat - completion
    assert documented("Fields that are refused") == set(REFUSED)
