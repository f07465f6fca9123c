"""POST /v1/responses: OpenAI's newer API, with the same prompts and answers as a chat's."""

from __future__ import annotations

import json
import re

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import responses as openai_types
from pydantic import TypeAdapter

from api_client import CHAT, HI, post
from fake_service import IM_END, FakeService, demo_tokenizer, says, sse
from memserve.api.bodies import ChatBody, CompletionBody, SharedFields
from memserve.api.call_formats import CALL_FORMATS
from memserve.api.call_parser import CallParser
from memserve.api.choices import Choice
from memserve.api.prompts import Prompt
from memserve.api.response_wire import ResponseWire
from memserve.api.responses import REFUSED, ResponseBody
from memserve.api.service import Chunk
from memserve.api.thoughts import ThoughtParser
from memserve.api.wire import Head
from memserve.drawing import Logprobs
from memserve.errors import RequestFailed
from test_api import DOCS
from test_logprobs import service as scored
from test_tools import CALL, PARIS, TIME, TWO, WEATHER

RESPONSES = "/v1/responses"
EVENT = TypeAdapter(openai_types.ResponseStreamEvent)
FLAT = [{"type": "function", **tool["function"]} for tool in (WEATHER, TIME)]
THOUGHT = "<think>\nA fox.\n</think>\n\n"


def saying(text, finish="stop", **changes):
    return FakeService(lambda _request: says(text, finish, **changes))


async def whole(body, service=None, **changes):
    """The response, which the official client's types must accept."""
    answer = await post({"input": "Hi"} | body, RESPONSES, service, **changes)
    assert answer.status_code == 200, answer.text
    openai_types.Response.model_validate(answer.json(), strict=True)
    return answer.json()


async def streamed(body, service=None, **changes):
    """The events of the same response; the official client's types must accept each of them."""
    answer = await post({"input": "Hi", "stream": True} | body, RESPONSES, service, **changes)
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, _, data = block.partition("\ndata: ")
        event = json.loads(data)
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event, strict=True)
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def put_together(events):
    """The items that the events describe, put together as clients do it; what is said twice must agree."""
    items, texts = {}, {}
    for event in events:
        kind, at = event["type"], event.get("output_index")
        if kind == "response.output_item.added":
            assert at == len(items) == event["output_index"] and all(
                one["status"] != "in_progress" for one in items.values()
            )
            items[at], texts[at] = event["item"], ""
        elif kind.endswith(".delta"):
            assert event["item_id"] == items[at]["id"] and items[at]["status"] == "in_progress"
            texts[at] += event["delta"]
        elif kind in ("response.output_text.done", "response.reasoning_text.done"):
            assert event["text"] == texts[at]
        elif kind == "response.function_call_arguments.done":
            assert event["arguments"] == texts[at] and event["name"] == items[at]["name"]
        elif kind == "response.content_part.done":
            assert event["part"]["text"] == texts[at]
        elif kind == "response.output_item.done":
            items[at] = event["item"]
    return list(items.values())


def texts_of(items):
    """Type and text of each item."""
    return [
        (
            item["type"],
            item["arguments"]
            if item["type"] == "function_call"
            else "".join(part["text"] for part in item["content"]),
        )
        for item in items
    ]


# ---- answers -------------------------------------------------------------------------------------------------


async def test_a_response_has_openais_shape_and_counts():
    """A response has its text where OpenAI's has it, its settings and its counts, and says that nothing is stored."""
    answer = await whole(
        {"model": "demo", "metadata": {"a": "b"}, "store": True}, saying("Hello there", cached=2)
    )
    assert (answer["id"], answer["object"], answer["status"]) == ("resp_r1", "response", "completed")
    (message,) = answer["output"]
    assert message == {
        "id": "msg_r1_0", "type": "message", "status": "completed", "role": "assistant",
        "content": [{"type": "output_text", "text": "Hello there", "annotations": [], "logprobs": []}],
    }  # fmt: skip
    assert (answer["metadata"], answer["store"], answer["error"], answer["incomplete_details"]) == (
        {"a": "b"},
        False,
        None,
        None,
    )
    usage = answer["usage"]
    assert usage["input_tokens_details"]["cached_tokens"] == 2
    assert usage["output_tokens"] == 3 and usage["output_tokens_details"] == {"reasoning_tokens": 0}
    assert usage["total_tokens"] == usage["input_tokens"] + 3


async def test_an_answer_that_is_cut_is_incomplete():
    """At its limit a response is incomplete, says why, and so does its last item."""
    answer = await whole({"max_output_tokens": 2}, saying("and so", "length"))
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][0]["status"] == "incomplete" and answer["max_output_tokens"] == 2
    *_, last = await streamed({}, saying("and so", "length"))
    assert last["type"] == "response.incomplete" and last["response"]["output"] == answer["output"]


@pytest.mark.parametrize("finish", ["stop", "length"])
@pytest.mark.parametrize(("text", "kinds"), [
    ("Hello there", ["message"]),
    ("", ["message"]),
    (f"{THOUGHT}Yes.", ["reasoning", "message"]),
    ("<think>A fox and", ["reasoning"]),
    ("<think>\n\n</think>\n\nYes.", ["message"]),
    (TWO, ["function_call", "function_call"]),
    (f"{THOUGHT}I look.\n{TWO}\nDone.", ["reasoning", "message", "function_call", "function_call", "message"]),
    (f"{THOUGHT}{CALL}", ["reasoning", "function_call"]),
    ("No need: x < 5 <tool_", ["message"]),
    ('<tool_call>{"name": "get_weather" oops}</tool_call>', ["message"]),
])  # fmt: skip
async def test_a_stream_ends_with_what_a_whole_response_is(text, kinds, finish):
    """However the answer is cut into events, the items of its stream are those of the response as a whole."""
    if not text and finish == "length":
        return
    body = {"tools": FLAT}
    expected = await whole(body, saying(text, finish), reasoning="apart")
    assert [item["type"] for item in expected["output"]] == kinds
    alone = [Chunk((token,)) for token in demo_tokenizer().encode(text, False)]
    ended = (
        [*alone, Chunk((IM_END,), "stop")]
        if finish == "stop"
        else [*alone[:-1], attrs.evolve(alone[-1], finish="length")]
        if alone
        else []
    )
    pairs = [
        Chunk(sum((one.tokens for one in ended[at : at + 3]), ()), ended[at : at + 3][-1].finish)
        for at in range(0, len(ended), 3)
    ]
    for steps in (
        ended,
        [step for one in ended for step in (one, 0.0)],
        [step for one in pairs for step in (one, 0.001)],
    ):
        events = await streamed(body, FakeService(lambda _request, steps=steps: steps), reasoning="apart")
        final = events[-1]["response"]
        assert events[0]["type"] == "response.created" and events[1]["type"] == "response.in_progress"
        assert put_together(events) == final["output"] == expected["output"]
        same = ("status", "usage", "tools", "tool_choice", "incomplete_details")
        assert {name: final[name] for name in same} == {name: expected[name] for name in same}


PIECES = st.lists(st.sampled_from([
    "<think>", "</think>", " ", "\n", "a", "x < y", CALL, CALL[:40], CALL[40:], "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", PARIS, "get_weather", "{", "}",
    f"[TOOL_CALLS]get_weather[ARGS]{PARIS}", f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {PARIS}}}]', f'{{"name": "get_weather", "parameters": {PARIS}}}',
    "<function=get_weather>", "<parameter=city>", "Paris", "</parameter>", "</function>",
]), max_size=12)  # fmt: skip


def answered(form, pieces, finish):
    """The response, and its events, of an answer that comes in these pieces of text."""
    tokens = [Chunk(tuple(demo_tokenizer().encode(text, False))) for text in pieces if text]
    chunks = [*tokens, Chunk((IM_END,), finish)]
    schemas = {tool["name"]: tool.get("parameters") or {} for tool in FLAT}
    calls = CallParser(form, frozenset(schemas), form.several, schemas)
    choice = Choice(0, 0, demo_tokenizer().piece, (), thoughts=ThoughtParser(False), calls=calls)
    wire, events = ResponseWire(Prompt((1,), None), {}, calls=form), b""
    stream = wire.stream(Head("r", 0, "demo"), [choice])
    for chunk in chunks:
        choice.feed(chunk)
        if (delta := choice.take()) and choice.finish is None:
            events += stream.events(choice, delta)
        elif delta:
            events += stream.events(choice, delta) + stream.ending()
            break
    return [json.loads(data) for data in sse(events.decode())]


@given(PIECES, st.sampled_from([*CALL_FORMATS.values()]), st.sampled_from(["stop", "length"]))
def test_cuts_change_nothing(pieces, form, finish):
    """Whatever a model writes, in whichever format, the items do not depend on how the answer is cut."""
    text = "".join(pieces)
    whole, events = answered(form, [text], finish), answered(form, list(text), finish)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for one in (whole, events, answered(form, pieces, finish)):
        assert put_together(one) == one[-1]["response"]["output"] == whole[-1]["response"]["output"]


async def test_thoughts_are_items_and_are_counted():
    """Thoughts are reported apart or left in the text, as configured, and their tokens are counted with their marks."""
    answer = await whole({}, saying(f"{THOUGHT}Yes."), reasoning="apart")
    assert texts_of(answer["output"]) == [("reasoning", "A fox."), ("message", "Yes.")]
    thought = len(demo_tokenizer().encode("<think>\nA fox.\n</think>", False))
    assert (
        abs(answer["usage"]["output_tokens_details"]["reasoning_tokens"] - thought) <= 1
    )  # a token may have more than the mark
    answer = await whole({}, saying(f"{THOUGHT}Yes."))
    assert texts_of(answer["output"]) == [("message", f"{THOUGHT}Yes.")]
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] == 0
    answer = await whole({}, saying("Yes."), reasoning="apart")
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] == 0


async def test_log_probabilities_are_those_of_the_text():
    """With include, the text has the log probabilities that a chat's content has, whole and streamed."""
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    chat = (await post({"messages": HI, "logprobs": True, "top_logprobs": 2}, CHAT, scored())).json()
    expected = chat["choices"][0]["logprobs"]["content"]
    answer = await whole(asked, scored())
    assert answer["output"][0]["content"][0]["logprobs"] == expected
    events = await streamed(asked, scored())
    told = [one for event in events if event["type"].endswith("text.delta") for one in event["logprobs"]]
    assert told == expected == events[-1]["response"]["output"][0]["content"][0]["logprobs"]
    assert (await whole({}, scored()))["output"][0]["content"][0]["logprobs"] == []


async def test_log_probabilities_skip_thoughts_and_calls():
    """Tokens of thoughts and calls are not among those of the text, however the answer is cut into events."""
    tokens = demo_tokenizer().encode(f"{THOUGHT}I look.\n{CALL}", False)
    known = Logprobs(-1.0, b"", ())
    steps = [Chunk((token,), None, 0, (known,)) for token in tokens] + [Chunk((IM_END,), "stop", 0, (known,))]
    body = {"tools": FLAT, "include": ["message.output_text.logprobs"]}
    answer = await whole(body, FakeService(lambda _request: steps), reasoning="apart")
    (message,) = (item for item in answer["output"] if item["type"] == "message")
    assert "".join(one["token"] for one in message["content"][0]["logprobs"]).strip() == "I look."
    slow = [step for one in steps for step in (one, 0.001)]
    events = await streamed(body, FakeService(lambda _request: slow), reasoning="apart")
    assert put_together(events) == events[-1]["response"]["output"] == answer["output"]


async def test_a_stream_is_written_piece_by_piece():
    """Each token of a slow answer has its own event, whose text is not repeated before the end."""
    events = await streamed({}, saying("one two three four", delay_s=0.005))
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert len(deltas) >= 4 and "".join(deltas) == "one two three four"


# ---- failures ------------------------------------------------------------------------------------------------


async def test_a_failure_is_a_status_an_error_event_or_a_failed_response(autojump_clock):
    """Before the first token a failure sets the status, after a comment it is an error event, later the response has failed."""
    gone = RequestFailed("worker_lost", "It is gone", 503, 2.0)
    for body in ({"input": "Hi"}, {"input": "Hi", "stream": True}):
        answer = await post(body, RESPONSES, FakeService(lambda _request: [gone]))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "worker_lost")
        assert answer.headers["retry-after"] == "2"
    answer = await post(
        {"input": "Hi", "stream": True}, RESPONSES, FakeService(lambda _request: [20.0, gone])
    )
    waiting, event = answer.text.strip().split("\n\n")
    assert waiting == ": waiting"
    name, _, data = event.partition("\ndata: ")
    error = openai_types.ResponseErrorEvent.model_validate_json(data, strict=True)
    assert (name, error.code, error.message) == ("event: error", "worker_lost", "It is gone")
    events = await streamed({}, FakeService(lambda _request: [*says("so far", "length")[:1], 0.01, gone]))
    response = events[-1]["response"]
    assert (events[-1]["type"], response["status"]) == ("response.failed", "failed")
    assert response["error"] == {"code": "server_error", "message": "It is gone"}
    assert (
        texts_of(response["output"]) == [("message", "so")]
        and response["output"][0]["status"] == "incomplete"
    )


# ---- the documentation ---------------------------------------------------------------------------------------


def test_every_field_is_documented_and_no_other():
    """docs/api.md lists exactly the fields that are this API's own, those it shares, and those it refuses."""
    section = DOCS.read_text().partition("\n## Responses\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    shared, own = (
        {field.name for field in attrs.fields(SharedFields)},
        {field.name for field in attrs.fields(ResponseBody)},
    )
    assert set(rows) == own - shared
    both = {field.name for field in attrs.fields(CompletionBody)} & {
        field.name for field in attrs.fields(ChatBody)
    }
    missing = both - shared
    (named,) = re.findall(
        r"all \[fields of both\]\(#fields-of-both\) but (.*?)\.\n", section, flags=re.DOTALL
    )
    assert set(re.findall(r"`(\w+)`", named)) == missing
    assert not [name for name in REFUSED if f"`{name}`" not in section]
