"""What POST /v1/responses is asked for: conversations, which are those of chats, and what is refused."""

from __future__ import annotations

import re

import attrs
import pytest

import api_client
from api_client import CHAT, HI, post
from fake_service import demo_tokenizer
from memserve.api.bodies import LONG_BODY
from memserve.api.responses import REFUSED, ResponseBody
from test_logprobs import service as scored
from test_responses import FLAT, RESPONSES, saying
from test_tools import PARIS, TIME, WEATHER

# ---- conversations -------------------------------------------------------------------------------------------

CALLED = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": PARIS}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "18 degrees"}
TOOL_CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": PARIS}}


def said(text, **more):
    return {
        "type": "message",
        "role": "assistant",
        "id": "msg_1",
        "status": "completed",
        "content": [{"type": "output_text", "text": text, "annotations": []}],
        **more,
    }


def thought(text, **more):
    return {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}],
        **more,
    }


USER = {"role": "user", "content": "And?"}
CONVERSATIONS = [
    ({"input": "Hi"}, {"messages": HI}),
    ({"input": "Hi", "instructions": "Be brief"}, {"messages": [{"role": "system", "content": "Be brief"}, *HI]}),
    ({"input": [{"type": "message", "role": "developer", "content": "Be brief"}, *HI]}, {"messages": [{"role": "system", "content": "Be brief"}, *HI]}),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}]},
     {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}),
    ({"input": [*HI, said("Hello"), USER]}, {"messages": [*HI, {"role": "assistant", "content": "Hello"}, USER]}),
    ({"input": [*HI, said("one"), said("two"), USER]}, {"messages": [*HI, {"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"}, USER]}),
    ({"input": [*HI, thought("A fox."), said("I look."), CALLED, RESULT], "tools": FLAT},
     {"messages": [*HI, {"role": "assistant", "content": "I look.", "reasoning_content": "A fox.", "tool_calls": [TOOL_CALL]},
                   {"role": "tool", "tool_call_id": "c1", "content": "18 degrees"}], "tools": [WEATHER, TIME]}),
    ({"input": [*HI, said("I "), CALLED, said("look."), RESULT], "tools": FLAT},
     {"messages": [*HI, {"role": "assistant", "content": "I look.", "tool_calls": [TOOL_CALL]},
                   {"role": "tool", "tool_call_id": "c1", "content": "18 degrees"}], "tools": [WEATHER, TIME]}),
    ({"input": [*HI, CALLED, {**CALLED, "call_id": "c2"}, RESULT, {**RESULT, "call_id": "c2", "output": [{"type": "input_text", "text": "x"}]}], "tools": FLAT},
     {"messages": [*HI, {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL, {**TOOL_CALL, "id": "c2"}]},
                   {"role": "tool", "tool_call_id": "c1", "content": "18 degrees"}, {"role": "tool", "tool_call_id": "c2", "content": "x"}], "tools": [WEATHER, TIME]}),
    ({"input": [*HI, thought("", content=None, encrypted_content="x"), said("Hello"), USER]}, {"messages": [*HI, {"role": "assistant", "content": "Hello"}, USER]}),
    ({"input": [*HI, thought("", content=None, summary=[{"type": "summary_text", "text": "A fox."}]), said("Hello"), USER]},
     {"messages": [*HI, {"role": "assistant", "content": "Hello", "reasoning_content": "A fox."}, USER]}),
    ({"input": "Hi", "tools": FLAT, "tool_choice": "none"}, {"messages": HI, "tools": [WEATHER, TIME], "tool_choice": "none"}),
    ({"input": "Hi", "tools": FLAT, "tool_choice": {"type": "function", "name": "get_time"}, "parallel_tool_calls": False},
     {"messages": HI, "tools": [WEATHER, TIME], "tool_choice": {"type": "function", "function": {"name": "get_time"}}}),
    ({"input": "Hi", "tools": FLAT, "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_time"}]}},
     {"messages": HI, "tools": [WEATHER, TIME], "tool_choice": {"type": "allowed_tools", "allowed_tools": {
         "mode": "required", "tools": [{"type": "function", "function": {"name": "get_time"}}]}}}),
    ({"input": "Hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}}},
     {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}}),
    ({"input": "Hi", "text": {"format": {"type": "json_object"}}}, {"messages": HI, "response_format": {"type": "json_object"}}),
    ({"input": "Hi", "max_output_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop": "x", "min_tokens": 2, "cache_salt": "s", "logit_bias": {"5": 1}},
     {"messages": HI, "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop": "x", "min_tokens": 2, "cache_salt": "s", "logit_bias": {"5": 1}}),
    ({"input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 3}, {"messages": HI, "logprobs": True, "top_logprobs": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("response", "chat"), CONVERSATIONS)
@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}[{{ m.role }}|{{ m.reasoning_content }}|{{ m.content }}|{{ m.tool_calls | default(none) | tojson }}|{{ m.tool_call_id }}]{% endfor %}{{ tools | default(none) | tojson }}",
    ],
)
async def test_the_same_conversation_is_the_same_request(response, chat, template, monkeypatch):
    """Sent as a response or as a chat, a conversation has the same prompt tokens, parameters, scope and text."""
    spec = api_client.demo_spec()
    changed = spec if template is None else attrs.evolve(spec, chat_template=template)
    monkeypatch.setattr(api_client, "demo_spec", lambda: changed)
    service = scored() if "include" in response else saying("Hello there")
    first = await post(response | {"seed": 3}, RESPONSES, service)
    second = await post(chat | {"seed": 3}, CHAT, service)
    assert (first.status_code, second.status_code) == (200, 200), (first.text, second.text)
    one, other = service.opened
    assert (one.prompt, one.params, one.scope) == (other.prompt, other.params, other.scope)
    text = second.json()["choices"][0]["message"]["content"]
    assert "".join(part["text"] for item in first.json()["output"] for part in item["content"]) == text


async def test_efforts_and_arguments_reach_the_template(monkeypatch):
    """reasoning.effort and chat_template_kwargs are variables of the template, as in chats; a refusal names the field."""
    template = "{{ reasoning_effort }} {{ x }}{% if reasoning_effort == 'huge' %}{{ raise_exception('no') }}{% endif %}"
    spec = attrs.evolve(api_client.demo_spec(), chat_template=template)
    monkeypatch.setattr(api_client, "demo_spec", lambda: spec)
    service = saying("x")
    asked = {
        "input": "Hi",
        "reasoning": {"effort": "low", "summary": "auto"},
        "chat_template_kwargs": {"x": 5},
    }
    assert (await post(asked, RESPONSES, service)).json()["reasoning"] == {"effort": "low", "summary": None}
    assert demo_tokenizer().decode(service.opened[0].prompt) == "low 5"
    answer = await post({"input": "Hi", "reasoning": {"effort": "huge"}}, RESPONSES, service)
    assert answer.json()["error"]["param"] == "reasoning.effort"


# ---- refusals ------------------------------------------------------------------------------------------------


def tool(**changes):
    return {"type": "function", "name": "f", "parameters": {"type": "object"}} | changes


BAD = [
    ({}, "input", "this field is required"),
    ({"input": []}, "input", "length >= 1"),
    ({"input": 5}, "input", "expected str | array"),
    ({"input": ["x"]}, "input[0]", "expected object"),
    ({"input": [{"content": "x"}]}, "input[0].type", "this field is required"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "expected one of system, developer, user, assistant"),
    ({"input": [{"role": "user"}]}, "input[0].content", "this field is required"),
    ({"input": [*HI, {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[1].content[0].type", "expected one of input_text, output_text"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]}, "input[0].content[0].text", "expected str, got 5"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type", "nothing is stored: send the item itself"),
    ({"input": [{"type": "web_search_call", "id": "w"}]}, "input[0].type", "expected one of message, function_call, function_call_output, reasoning"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": ""}]}, "input[0].call_id", "this field is required"),
    ({"input": [{**CALLED, "arguments": '{"a":' * 70 + "1" + "}" * 70}]}, "input[0].arguments", "nested too deeply"),
    ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output", "this field is required"),
    ({"input": [{"type": "reasoning", "id": "r", "summary": []}]}, "input", "expected a message"),
    ({"input": "x y " * 5000}, "input", "^input: the prompt has .* tokens"),
    ({"max_output_tokens": 0}, "max_output_tokens", "expected int >= 1, got 0"),
    ({"max_output_tokens": 9000}, "max_output_tokens", "^max_output_tokens: 9000 asked for"),
    ({"max_output_tokens": 2, "min_tokens": 3}, "min_tokens", r"at most 2 \(max_output_tokens\)"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored: send the whole conversation in input"),
    ({"conversation": "conv_1"}, "conversation", "send the whole conversation in input"),
    ({"background": True}, "background", "keep the connection open"),
    ({"prompt": {"id": "p"}}, "prompt", "send instructions and input"),
    ({"messages": HI}, "messages", "send input"),
    ({"max_tokens": 5}, "max_tokens", "send max_output_tokens"),
    ({"response_format": {"type": "json_object"}}, "response_format", "send text.format"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "send reasoning.effort"),
    ({"logprobs": True}, "logprobs", "send include"),
    ({"n": 2}, "n", "send several requests"),
    ({"context_management": [{"type": "compaction"}]}, "context_management", "leave it out"),
    ({"include": ["x"]}, "include[0]", "expected one of message.output_text.logprobs"),
    ({"top_logprobs": 2}, "top_logprobs", "only allowed when include has"),
    ({"truncation": "some"}, "truncation", "expected one of disabled, auto"),
    ({"metadata": {"a": 1}}, "metadata[...]", "expected str"),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "not supported"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type", "expected one of text, json_object, json_schema"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "this field is required"),
    ({"text": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "text.format.schema", "^text.format.schema: .*Unimplemented keys"),
    ({"text": {"format": {"type": "json_object"}}, "ignore_eos": True}, "ignore_eos", "not beside text.format,"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options", "only allowed when stream is true"),
    *(({"tools": [tool(), {"type": kind}]}, "tools[1].type", f"{kind} is not supported by this server; offer a tool of type function")
      for kind in ("web_search", "file_search", "code_interpreter", "mcp", "image_generation", "custom", "local_shell")),
    ({"tools": [tool(name="a b")]}, "tools[0].name", "matching regex"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name", "this field is required"),
    ({"tools": [tool(), tool()]}, "tools[1].name", "^tools.1..name: expected another name"),
    ({"tools": [tool(strict=True, parameters={"not": {}})]}, "tools[0].parameters", "^tools.0..parameters: "),
    ({"tools": [tool()], "tool_choice": {"type": "file_search"}}, "tool_choice.type", "file_search is not supported"),
    ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice.name", "this field is required"),
    ({"tools": [tool()], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name", "^tool_choice.name: expected the name of one of tools"),
    ({"tools": [tool()], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]}}, "tool_choice.tools[0].name", "one of tools"),
    ({"tool_choice": "required"}, "tool_choice", "only none and auto without tools"),
    ({"tools": [tool()], "tool_choice": "required", "text": {"format": {"type": "json_object"}}}, "tool_choice", "not beside text.format or"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "text"), BAD)
async def test_bad_fields_are_named(body, param, text):
    """A field that is wrong or not supported gets one 400 that names it as this API calls it, with the remedy."""
    service = saying("x")
    answer = await post(({"input": "Hi"} if body else {}) | body, RESPONSES, service)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), answer.text
    assert re.search(text, error["message"]), error["message"]
    assert error["code"] is not None and service.opened == []


@pytest.mark.parametrize("body", [
    {field.name: None for field in attrs.fields(ResponseBody) if field.name != "input"},
    dict.fromkeys(REFUSED),
    {name: values[0] for name, values in REFUSED.items() if values},
    # what Codex and the Agents SDK send
    {"tools": FLAT, "tool_choice": "auto", "parallel_tool_calls": False, "reasoning": {"effort": "medium", "summary": "auto"}, "store": False, "stream": True,
     "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k", "text": {"verbosity": "medium"}, "service_tier": "auto"},
    {"truncation": "auto", "user": "u", "safety_identifier": "s", "max_tool_calls": 3, "stream_options": {"include_obfuscation": True}, "stream": True, "x": {"y": 1}},
    {"tools": [], "tool_choice": "none", "text": {"format": {"type": "text"}}, "top_logprobs": 0, "metadata": {}, "include": []},
])  # fmt: skip
async def test_what_clients_send_is_served(body):
    """Null and whatever else requests nothing is accepted in every field, as are fields of OpenAI's servers alone."""
    answer = await post({"input": "Hi"} | body, RESPONSES)
    assert answer.status_code == 200, answer.text


async def test_long_input_is_refused_while_streams_go_on():
    """A body of megabytes is read in a thread, and refused before it is tokenized."""
    answer = await post({"input": [{"role": "user", "content": "x" * LONG_BODY}]}, RESPONSES)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")


async def test_keys_and_priorities_are_those_of_chats():
    """A key is needed where keys are set, and priorities and deadlines are read."""
    assert (await post({"input": "Hi"}, RESPONSES, api_keys=("k",))).status_code == 401
    service = saying("x")
    await post({"input": "Hi", "priority": 3}, RESPONSES, service, ttft_ms=500.0)
    assert (service.opened[0].params.priority, service.opened[0].params.ttft_s) == (3, 0.5)
