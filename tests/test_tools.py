"""Tools in the HTTP API: what is offered, what is called, and how calls are reported, whole and streamed."""

from __future__ import annotations

import json
import re

import attrs
import pytest
import trio

from api_client import CHAT, HI, post
from fake_service import IM_END, FakeService, demo_spec, demo_tokenizer, says, settings, sse
from memserve.api.bodies import ChatBody, read_body
from memserve.api.call_formats import CALL_FORMATS, HERMES, MISTRAL
from memserve.api.call_grammars import CALLS_MAX as FORCED_CALLS_MAX
from memserve.api.call_grammars import SCHEMAS_BYTES_MAX
from memserve.api.chat import ChatTemplate
from memserve.api.messages import CALLS_MAX, DEPTH_MAX
from memserve.api.prompts import Model, chat_prompt
from memserve.api.service import Chunk
from memserve.api.tools import NAME_PATTERN, TOOLS_MAX
from memserve.settings.sections import ModelConfig
from test_api import DOCS
from test_logprobs import service as scored

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
ASKED = {"messages": HI, "tools": [WEATHER, TIME]}
PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
TWO = f'{CALL}\n<tool_call>\n{{"name": "get_time", "arguments": {{}}}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def saying(text, finish="stop"):
    return FakeService(lambda _request: says(text, finish))


async def whole(text, service=None, finish="stop", **changes):
    """The choices of an answer in which the model writes ``text``."""
    response = await post(ASKED | changes, CHAT, service or saying(text, finish))
    assert response.status_code == 200, response.text
    return response.json()["choices"]


async def streamed(text, service=None, finish="stop", **changes):
    """The chunks of the first choice when the same answer is streamed."""
    response = await post(ASKED | changes | {"stream": True}, CHAT, service or saying(text, finish))
    *events, done = sse(response.text)
    assert done == "[DONE]"
    chunks = [choice for event in events for choice in json.loads(event)["choices"]]
    return [chunk for chunk in chunks if chunk["index"] == 0]


async def test_tools_that_may_be_called_in_any_form_wait_for_no_grammar():
    """An agent's every turn would wait for the long texts and the grammars of other clients."""
    template = ChatTemplate.of(demo_spec(), demo_tokenizer())
    model = Model(demo_spec(), demo_tokenizer(), template, settings())
    with trio.fail_after(5):
        async with model.encoders:  # as while another client's grammar is checked
            prompt = await chat_prompt(read_body(json.dumps(ASKED).encode(), ChatBody), model, "", lambda: 1)
    assert prompt.params.sampling.adjust is None


@pytest.mark.parametrize("mode", ["auto", "required"])
async def test_some_of_the_tools_may_be_allowed(mode):
    """With allowed_tools, the prompt describes these tools alone, and the answer may or must call one of them."""
    named = {"type": "function", "function": {"name": "get_time"}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named]}}
    service = saying('<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>')
    response = await post(ASKED | {"tool_choice": choice}, CHAT, service)
    assert answered(response.json()["choices"][0])[1][0][1:] == ["get_time", "{}"]
    await post(ASKED | {"tools": [TIME], "tool_choice": mode}, CHAT, service)
    first, second = service.opened
    assert first.prompt == second.prompt
    assert first.params.sampling.adjust == second.params.sampling.adjust
    assert (first.params.sampling.adjust is not None) == (mode == "required")


def joined(chunks):
    """A stream put together as clients do it: its text, its calls and its finish reason."""
    text, calls = "", {}
    for chunk in chunks:
        text += chunk["delta"].get("content") or ""
        for piece in chunk["delta"].get("tool_calls", ()):
            if "id" in piece:
                assert piece["index"] == len(calls) and piece["type"] == "function"
                assert piece["function"]["arguments"] == ""
                calls[piece["index"]] = [piece["id"], piece["function"]["name"], ""]
            calls[piece["index"]][2] += piece["function"]["arguments"]
    return text, list(calls.values()), chunks[-1]["finish_reason"]


def answered(choice):
    """The same of an answer that is not streamed: text, calls and finish reason."""
    message = choice["message"]
    calls = [[one["id"], *one["function"].values()] for one in message.get("tool_calls", ())]
    return message["content"] or "", calls, choice["finish_reason"]


async def test_calls_have_openais_shape():
    """Calls are reported in OpenAI's shape, each with its own id."""
    (choice,) = await whole(TWO)
    first, second = choice["message"]["tool_calls"]
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"
    assert first["type"] == "function"
    assert first["function"] == {"name": "get_weather", "arguments": PARIS}
    assert second["function"] == {"name": "get_time", "arguments": "{}"}
    assert first["id"].startswith("call_") and first["id"] != second["id"]


@pytest.mark.parametrize("text", [
    TWO, f"I look it up.\n{CALL}", f"{CALL}\nDone.", "No need: x < 5 <tool_", '<tool_call>{"name": "get_weather" oops}</tool_call>', "", "<tool_call>",
])  # fmt: skip
@pytest.mark.parametrize("finish", ["stop", "length"])
async def test_a_stream_reports_the_same(text, finish):
    """A streamed answer has the same text, calls and finish reason as a whole one."""
    if not text and finish == "length":
        return
    (choice,) = await whole(text, finish=finish)
    assert joined(await streamed(text, finish=finish)) == answered(choice)


async def test_arguments_are_streamed_as_they_come():
    """Arguments of a call are streamed in pieces, after the text that precedes the call."""
    chunks = await streamed(
        f"I look.\n{CALL}", FakeService(lambda _r: says(f"I look.\n{CALL}", delay_s=0.001))
    )
    deltas = [chunk["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    kinds = ["calls" if "tool_calls" in delta else "text" for delta in deltas[1:-1]]
    assert kinds == sorted(kinds, reverse=True), "text that comes before a call is sent before it"
    assert kinds.count("calls") > 4
    assert deltas[-1] == {}


async def test_what_is_no_call_is_content():
    """Text that is not a valid call is returned as content."""
    text = '<tool_call>{"name": "get_weather", "arguments": nonsense}</tool_call>'
    (choice,) = await whole(text)
    assert answered(choice) == (text, [], "stop")
    assert "tool_calls" not in choice["message"]


async def test_a_call_that_is_cut_off_is_not_reported_as_whole():
    """A call that was cut off is reported with its partial arguments and not with the finish reason tool_calls."""
    text = CALL.partition("ris")[0]
    (choice,) = await whole(text, finish="length")
    content, ((_, name, arguments),), finish = answered(choice)
    assert (content, name, arguments, finish) == ("", "get_weather", '{"city": "Pa', "length")
    assert answered((await whole(text))[0])[2] == "stop", "the model's own end token does not make it whole"


@pytest.mark.parametrize(("asked", "finish"), [
    ({"tool_choice": NAMED}, "stop"), ({"tool_choice": "required", "parallel_tool_calls": False}, "tool_calls"), ({"parallel_tool_calls": False}, "tool_calls"),
])  # fmt: skip
async def test_one_call_ends_the_answer_where_one_is_wanted(asked, finish):
    """Where one call at most is wanted, the answer ends after it."""
    service = FakeService(lambda _r: [*says(TWO)[:-1], 60.0])
    with trio.fail_after(5):
        (choice,) = await whole("", service, **asked)
    ((_, name, arguments),) = answered(choice)[1]
    assert (name, arguments) == ("get_weather", PARIS)
    assert choice["finish_reason"] == finish
    assert service.opened[0].outcome == "stop string"


async def test_calls_that_nobody_offered_are_text():
    """Without tools, or with tool_choice ``none``, a call is plain text, and the prompt does not mention tools."""
    for asked in ({"tools": []}, {"tools": None}, {"tool_choice": "none"}):
        service = saying(CALL)
        (choice,) = await whole("", service, **asked)
        assert answered(choice) == (CALL, [], "stop")
        assert "get_weather" not in demo_tokenizer().decode(service.opened[0].prompt)


async def test_several_answers_have_their_own_calls():
    """Calls of several answers to one request have different ids."""
    choices = await whole(CALL, n=3, seed=0)
    ids = {call["id"] for choice in choices for call in choice["message"]["tool_calls"]}
    assert len(choices) == len(ids) == 3


async def test_ids_differ_between_requests():
    """Calls of different requests have different ids."""
    service = saying(CALL)
    ids = [answered(choice)[1][0][0] for _ in range(2) for choice in await whole("", service)]
    assert len(set(ids)) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_of_calls_are_reported_too(stream):
    """Token ids and log probabilities of an answer include the tokens of its calls."""
    ids = [*demo_tokenizer().encode(CALL, False), IM_END]
    if stream:
        chunks = await streamed(CALL, return_token_ids=True)
        assert [token for chunk in chunks for token in chunk.get("token_ids", ())] == ids
        assert joined(chunks)[1][0][1:] == ["get_weather", PARIS]
    else:
        (choice,) = await whole(CALL, return_token_ids=True)
        assert choice["token_ids"] == ids
    response = await post(ASKED | {"logprobs": True}, CHAT, scored())
    assert response.json()["choices"][0]["logprobs"]["content"]


async def test_a_stop_string_ends_a_call():
    """A stop string within a call ends the answer, and the call is not reported as complete."""
    (choice,) = await whole(f"Well. {CALL}", stop="Paris")
    content, ((_, name, arguments),), finish = answered(choice)
    assert (content, name, arguments, finish) == ("Well.", "get_weather", '{"city": "', "stop")


async def test_marks_may_be_control_tokens(monkeypatch):
    """Calls whose marks are control tokens are found, although the text of an answer leaves these out."""
    special = attrs.evolve(HERMES, marker="<file_sep>", close="<empty_output>")
    monkeypatch.setitem(CALL_FORMATS, "hermes", special)
    ids = demo_tokenizer().specials
    encode = demo_tokenizer().encode
    body = [*encode('{"name": "get_weather", "arguments": ', False), *encode(PARIS + "}", False)]
    tokens = [
        ids["<repo_name>"],
        ids["<file_sep>"],
        *body,
        ids["<empty_output>"],
        *encode("So", False),
        IM_END,
    ]
    script = [Chunk((token,), "stop" if token == IM_END else None) for token in tokens]
    response = await post(ASKED, CHAT, FakeService(lambda _r: script), tool_format="hermes")
    content, ((_, name, arguments),), finish = answered(response.json()["choices"][0])
    assert (content, name, arguments, finish) == ("So", "get_weather", PARIS, "tool_calls")


async def test_the_configured_format_is_read():
    """The format that is configured is used for reading calls; every format can be configured."""
    text = f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}]'
    response = await post(ASKED, CHAT, saying(text), tool_format="mistral")
    ((call_id, name, arguments),) = answered(response.json()["choices"][0])[1]
    assert (name, arguments) == ("get_weather", PARIS)
    assert len(call_id) == 9 and call_id.isalnum()
    rule = attrs.fields(ModelConfig).tool_format.metadata["rule"]
    assert rule.known == ("auto", *CALL_FORMATS)


XML = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(("form", "text", "kept"), [
    ("mistral_args", f"I look.[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]get_time[ARGS]{{}}", "I look."),
    ("mistral_args", f"[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{PARIS}", ""), ("mistral_args", f"[TOOL_CALLS]get_weather[ARGS]{PARIS[:-4]}", ""),
    ("mistral_args", "[TOOL_CALLS]get_weather[ARGS]Paris", "[TOOL_CALLS]get_weather[ARGS]Paris"),
    ("qwen3_coder", f"I look.\n{XML}\n<tool_call>\n<function=get_time>\n</function>\n</tool_call>", "I look."), ("qwen3_coder", XML.partition("ris")[0], ""),
    ("qwen3_coder", "<tool_call>\n<function=get_weather>\nParis</function>", "<tool_call>\n<function=get_weather>\nParis</function>"),
])  # fmt: skip
async def test_calls_of_newer_models_are_the_same_in_a_stream(form, text, kept):
    """Whether a client streams would decide what it is to call."""
    asked = ASKED | {"stream": True}
    *events, _ = sse((await post(asked, CHAT, saying(text), tool_format=form)).text)
    chunks = [choice for event in events for choice in json.loads(event)["choices"]]
    response = await post(ASKED, CHAT, saying(text), tool_format=form)
    content, calls, finish = joined(chunks)
    whole_answer = answered(response.json()["choices"][0])
    assert whole_answer[0] == content
    assert [call[1:] for call in whole_answer[1]] == [call[1:] for call in calls]
    assert whole_answer[2] == finish
    assert content == kept
    assert finish == ("tool_calls" if calls and text[-1] in "}>" else "stop")
    if calls and finish == "tool_calls":
        assert calls[0][1:] == ["get_weather", PARIS]


def test_an_id_is_made_of_its_request():
    """The id of a call follows from its request, choice and number, and no two are equal."""
    places = [
        (request, choice, call)
        for request in ("r1", "r2", "r1 1")
        for choice in range(12)
        for call in range(12)
    ]
    for form in (HERMES, MISTRAL):
        ids = [form.call_id(*place) for place in places]
        assert len(set(ids)) == len(ids)
        assert ids == [form.call_id(*place) for place in places]


async def test_a_forced_call_reaches_the_worker_as_a_grammar():
    """A required or strict call reaches the worker as a grammar, and an optional one does not."""
    strict = WEATHER | {"function": WEATHER["function"] | {"strict": True}}
    for asked, bound in (
        ({}, False),
        ({"tool_choice": "auto"}, False),
        ({"tool_choice": "none"}, False),
        ({"tool_choice": "required"}, True),
        ({"tool_choice": NAMED}, True),
        ({"tools": [strict]}, True),
        ({"tools": [strict], "tool_choice": "none"}, False),
        ({"response_format": {"type": "json_object"}}, True),
    ):
        service = saying(CALL)
        await whole("", service, **asked)
        adjust = service.opened[0].params.sampling.adjust
        assert bool(adjust and "get_weather" in adjust.grammar) == bound, asked


async def test_tokenize_counts_tools():
    """/tokenize counts the tokens that tools add to the prompt."""
    service = saying("x")
    await whole("", service)
    response = await post(ASKED, "/tokenize")
    assert response.json()["tokens"] == service.opened[0].prompt
    without = await post({"messages": HI}, "/tokenize")
    assert response.json()["count"] > without.json()["count"] + 100


def test_formats_and_limits_are_documented_as_they_are():
    """docs/api.md lists the formats and limits that the code has."""
    page = DOCS.read_text().partition("\n## Tools\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", page.partition("**Formats.**")[2], re.M) == list(CALL_FORMATS)
    said = (
        f"{SCHEMAS_BYTES_MAX:,} bytes", f"{TOOLS_MAX} tools, and {CALLS_MAX} calls in a message", f"1 to {FORCED_CALLS_MAX} calls",
        f"at most {DEPTH_MAX} deep", "1 to 64 letters",
    )  # fmt: skip
    assert [one for one in said if one not in " ".join(page.split())] == []
    assert "{1,64}" in NAME_PATTERN
