"""The official openai client with a real server: what users of OpenAI's API do first."""

from __future__ import annotations

from functools import partial

import openai
import outcome
import pytest
import trio

from fake_service import IM_END, FakeService, demo_tokenizer, says, served
from memserve.errors import RequestFailed
from test_logprobs import service as scored

MESSAGES = [{"role": "user", "content": "Hi"}]


async def with_client(service, use, **changes):
    """Run ``use(client)`` in a thread while the server runs."""
    async with served(service, **changes) as url:

        def in_thread():
            with openai.OpenAI(base_url=f"{url}/v1", api_key="k1", max_retries=0, timeout=20) as client:
                return use(client)

        result = await trio.to_thread.run_sync(outcome.capture, in_thread)
    # Unwrapped only after the server has ended: its nursery would wrap the error in a group.
    return result.unwrap()


def greeting(**changes):
    return FakeService(lambda _request: says("Hello there, 日本", cached=3, **changes))


async def test_completions():
    """The client parses a completion."""
    answer = await with_client(
        greeting(), lambda c: c.completions.create(model="demo", prompt="Say it", max_tokens=9)
    )

    assert answer.choices[0].text == "Hello there, 日本"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer._request_id == "r1"


async def test_log_probabilities():
    """The client parses log probabilities of completions and of streamed chats."""
    whole = await with_client(
        scored(), lambda c: c.completions.create(model="demo", prompt="x", logprobs=2, logit_bias={"7": -100})
    )
    known = whole.choices[0].logprobs
    assert (known.tokens[0], known.token_logprobs[0], known.text_offset[:2]) == ("one", -1.5, [0, 3])
    assert known.top_logprobs[0]["one"] == -1.5

    def use(client):
        asked = {
            "logprobs": True,
            "top_logprobs": 2,
            "presence_penalty": 0.5,
            "extra_body": {"min_tokens": 1},
        }
        return list(client.chat.completions.create(model="demo", messages=MESSAGES, stream=True, **asked))

    parts = [chunk.choices[0].logprobs for chunk in await with_client(scored(), use)]
    first = next(part for part in parts if part).content[0]
    assert (first.token, first.logprob, bytes(first.bytes)) == ("one", -1.5, b"one")
    assert [one.logprob for one in first.top_logprobs] == [-0.5, -1.5]


async def test_streamed_completions():
    """The client parses a streamed completion, with usage and token ids."""

    def use(client):
        extra = {"return_token_ids": True}
        options = {"include_usage": True}
        return list(
            client.completions.create(
                model="demo", prompt=[40, 41], stream=True, stream_options=options, extra_body=extra
            )
        )

    chunks = await with_client(greeting(delay_s=0.005), use)

    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "Hello there, 日本"
    ids = [token for chunk in chunks for choice in chunk.choices for token in choice.token_ids]
    assert ids == [*demo_tokenizer().encode("Hello there, 日本", False), IM_END]
    assert chunks[-1].usage.completion_tokens == len(ids)
    assert len(chunks) > 4


async def test_chat():
    """The client parses several chat answers."""
    answer = await with_client(
        greeting(), lambda c: c.chat.completions.create(model="demo", messages=MESSAGES, n=2)
    )

    assert [choice.message.content for choice in answer.choices] == ["Hello there, 日本"] * 2
    assert answer.choices[0].message.role == "assistant"


async def test_streamed_chat():
    """The client parses a streamed chat answer."""
    create = partial(lambda c: list(c.chat.completions.create(model="demo", messages=MESSAGES, stream=True)))
    chunks = await with_client(greeting(delay_s=0.005), create)

    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello there, 日本"
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_tools():
    """The client finds calls in whole, parsed and streamed answers, and can send their results."""
    from test_tools import CALL, PARIS, WEATHER

    class GetWeather(openai.BaseModel):
        city: str

    tools = [openai.pydantic_function_tool(GetWeather, name="get_weather")]
    asked = {"model": "demo", "messages": MESSAGES, "tools": tools}

    def use(client):
        plain = client.chat.completions.create(**asked | {"tools": [WEATHER]}, tool_choice="required")
        parsed = client.chat.completions.parse(**asked)
        with client.chat.completions.stream(**asked) as stream:
            kinds = {event.type for event in stream}
            return plain, parsed, stream.get_final_completion(), kinds

    *answers, kinds = await with_client(
        FakeService(lambda _request: says(f"I look.\n{CALL}", delay_s=0.001)), use
    )
    for answer in answers:
        choice = answer.choices[0]
        (call,) = choice.message.tool_calls
        assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
        assert (call.type, call.function.name, call.function.arguments) == ("function", "get_weather", PARIS)
    for answer in answers[1:]:
        assert answer.choices[0].message.tool_calls[0].function.parsed_arguments == GetWeather(city="Paris")
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds

    def go_on(client):
        message = answers[0].choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
        return client.chat.completions.create(**asked | {"messages": [*MESSAGES, message, result]})

    assert (await with_client(greeting(), go_on)).choices[0].message.content == "Hello there, 日本"


async def test_responses():
    """The client parses a response, whole and streamed, and finds its text, its usage and its end."""

    def use(client):
        whole = client.responses.create(
            model="demo", input="Hi", instructions="Be brief", metadata={"a": "b"}
        )
        with client.responses.stream(model="demo", input="Hi", instructions="Be brief") as stream:
            deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
            return whole, stream.get_final_response(), deltas

    whole, final, deltas = await with_client(greeting(delay_s=0.005), use)
    for answer in (whole, final):
        assert (answer.output_text, answer.status, answer.store) == ("Hello there, 日本", "completed", False)
        assert answer.usage.input_tokens_details.cached_tokens == 3
    assert whole._request_id == "r1" and whole.metadata == {"a": "b"}
    assert len(deltas) > 4 and "".join(deltas) == final.output_text


async def test_a_loop_of_tools_in_responses():
    """The client finds calls in whole, parsed and streamed responses, and sends their outputs back with the items."""
    from test_tools import CALL, PARIS

    class GetWeather(openai.BaseModel):
        city: str

    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
    asked = {"model": "demo", "tools": [{"type": "function", **tool["function"]}]}
    typed = {"model": "demo", "tools": [tool]}

    def script(request):
        answered = "18 degrees" in demo_tokenizer().decode(request.prompt)
        return says("It is 18 degrees." if answered else f"I look.\n{CALL}", delay_s=0.001)

    def use(client):
        talk = [{"role": "user", "content": "Weather in Paris?"}]
        plain = client.responses.create(**asked, input=talk)
        parsed = client.responses.parse(**typed, input=talk)
        with client.responses.stream(**typed, input=talk) as stream:
            pieces = [
                event.delta for event in stream if event.type == "response.function_call_arguments.delta"
            ]
            answers = [plain, parsed, stream.get_final_response()]
        ends = []
        for answer in answers:
            (call,) = (item for item in answer.output if item.type == "function_call")
            result = {"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees"}
            ends.append(client.responses.create(**asked, input=[*talk, *answer.output, result]))
        return answers, pieces, ends

    service = FakeService(script)
    answers, pieces, ends = await with_client(service, use)
    assert "".join(pieces) == PARIS and len(pieces) > 1
    for answer in answers:
        message, call = answer.output
        assert message.content[0].text == "I look."
        assert (call.name, call.arguments) == ("get_weather", PARIS)
    assert [answer.output[1].parsed_arguments for answer in answers[1:]] == [GetWeather(city="Paris")] * 2
    assert [end.output_text for end in ends] == ["It is 18 degrees."] * 3
    first, later = service.opened[0].prompt, service.opened[3].prompt
    assert later[: len(first)] == first, "the second turn finds the first one's prompt in the cache"


async def test_structured_responses():
    """The client parses a response of a pydantic model's form, whole and streamed, and the grammar is asked for."""

    class Place(openai.BaseModel):
        city: str

    def use(client):
        asked = {"model": "demo", "input": "Where?", "text_format": Place}
        with client.responses.stream(**asked) as stream:
            return client.responses.parse(**asked), stream.get_final_response()

    service = FakeService(lambda _request: says('{"city": "Paris"}', delay_s=0.001))
    for answer in await with_client(service, use):
        assert answer.output_parsed == Place(city="Paris")
        assert answer.text.format.name == "Place"
    assert all(one.params.sampling.adjust.grammar for one in service.opened)


async def test_responses_that_fail_or_are_left():
    """The client gets its own errors for refusals, a failed response in a stream, and may leave at any time."""

    def refused(client):
        client.responses.create(model="demo", input="Hi", previous_response_id="resp_1")

    with pytest.raises(openai.BadRequestError, match="send the whole conversation") as caught:
        await with_client(greeting(), refused)
    assert caught.value.param == "previous_response_id"

    script = [
        *says("so far", "length", delay_s=0.01)[:2],
        0.05,
        RequestFailed("worker_lost", "It is gone", 503),
    ]

    def failing(client):
        return list(client.responses.create(model="demo", input="Hi", stream=True))

    *_, last = await with_client(FakeService(lambda _request: script), failing)
    assert (last.type, last.response.error.message) == ("response.failed", "It is gone")

    service = FakeService(lambda _request: says("word " * 1000, delay_s=0.005))

    def leaving(client):
        with client.responses.create(model="demo", input="Hi", stream=True) as stream:
            next(iter(stream))

    await with_client(service, leaving)
    assert service.opened[0].outcome == "cancelled"


async def test_models():
    """The client lists the model."""
    models = await with_client(greeting(), lambda client: list(client.models.list()))

    assert [model.id for model in models] == ["demo"]
    assert models[0].max_model_len == 8192


@pytest.mark.parametrize(
    ("use", "error", "param"),
    [
        (lambda c: c.completions.create(model="gpt-4", prompt="x"), openai.NotFoundError, "model"),
        (lambda c: c.completions.create(model="demo", prompt="x", temperature=3), openai.BadRequestError, "temperature"),
        (lambda c: c.chat.completions.create(model="demo", messages=MESSAGES, tools=[{}]), openai.BadRequestError, "tools[0].type"),
    ],
)  # fmt: skip
async def test_errors_are_the_clients_own(use, error, param):
    """The client raises its specific errors, with the field at fault."""
    with pytest.raises(error) as caught:
        await with_client(greeting(), use)
    assert caught.value.param == param


async def test_keys_and_refusals():
    """A wrong key and an overload raise the client's own errors."""

    def use(client):
        return client.completions.create(model="demo", prompt="x")

    with pytest.raises(openai.AuthenticationError):
        await with_client(greeting(), use, api_keys=("k2",))
    assert await with_client(greeting(), use, api_keys=("k1",))
    busy = FakeService(lambda _request: [], RequestFailed("overloaded", "Try later", 429, 2.0))
    with pytest.raises(openai.RateLimitError) as caught:
        await with_client(busy, use)
    assert caught.value.response.headers["retry-after"] == "2"


async def test_a_stream_that_fails_raises():
    """A stream that fails raises an error in the client."""
    script = [
        *says("so far", "length", delay_s=0.01)[:2],
        0.05,
        RequestFailed("worker_lost", "It is gone", 503),
    ]
    with pytest.raises(openai.APIError, match="It is gone"):
        await with_client(
            FakeService(lambda _request: script),
            lambda c: list(c.completions.create(model="demo", prompt="x", stream=True)),
        )


async def test_closing_a_stream_cancels_its_request():
    """Closing a stream cancels its request."""
    service = FakeService(lambda _request: says("word " * 1000, delay_s=0.005))

    def use(client):
        with client.chat.completions.create(model="demo", messages=MESSAGES, stream=True) as stream:
            next(iter(stream))

    await with_client(service, use)

    assert service.opened[0].outcome == "cancelled"
