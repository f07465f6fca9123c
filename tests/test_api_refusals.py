"""How the HTTP API refuses requests: every error names its field and has OpenAI's shape."""

from __future__ import annotations

import re

import pytest
import trio

from api_client import CHAT, HI, asking, post
from fake_service import (
    FakeService,
    says,
)
from memserve.api.bodies import COMPLETIONS_ALONE, REFUSED
from memserve.errors import RequestFailed
from memserve.messages import Change
from memserve.scheduling.view import Health
from memserve.scopes import scope_of_key

# ---- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refused_request_has_its_status_and_retry_after(stream):
    """A refused request has the status of the refusal, and Retry-After in whole seconds, rounded up."""
    service = FakeService(lambda _r: [], RequestFailed("overloaded", "Too many requests", 429, 1.5))
    response = await post({"prompt": "x", "stream": stream}, service=service)

    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    assert response.json() == {
        "error": {
            "message": "Too many requests",
            "type": "rate_limit_error",
            "param": None,
            "code": "overloaded",
        }
    }


async def test_one_failed_answer_ends_them_all():
    """When one of n answers fails, the request fails and the others are cancelled."""
    service = FakeService(
        lambda request: [RequestFailed("boom", "no", 500)] if request.params.sampling.seed == 1 else [60.0]
    )
    with trio.fail_after(5):
        response = await post({"prompt": "x", "n": 3, "seed": 0}, service=service)

    assert response.status_code == 500
    assert response.headers["x-request-id"], "its history tells why"
    assert sorted(request.outcome for request in service.opened) == ["cancelled", "cancelled", "failed"]


BAD = [
    ({}, "prompt", "prompt: this field is required"),
    ({"prompt": []}, "prompt", "none of them empty"),
    ({"prompt": ""}, "prompt", "none of them empty"),
    ({"prompt": ["a", 1]}, "prompt", "prompt: expected text"),
    ({"prompt": [1, 49152]}, "prompt", r"prompt\[1\]: expected a token id from 0 to 49151, got 49152"),
    ({"prompt": [[1], [True]]}, "prompt", r"prompt\[1\]\[0\]: expected a token id"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens", "max_tokens: expected int >= 1, or 0 with echo, .*; got 0"),
    ({"prompt": "x", "max_tokens": -1, "echo": True}, "max_tokens", "max_tokens: expected int >= 0, got -1"),
    ({"prompt": "x", "max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens", "the answer has at most 0"),
    ({"prompt": "x", "prompt_logprobs": 21}, "prompt_logprobs", "prompt_logprobs: expected int <= 20, got 21"),
    ({"prompt": "x", "prompt_logprobs": -1}, "prompt_logprobs", "prompt_logprobs: expected int >= 0, got -1"),
    ({"prompt": [[1] * 8000] * 64, "prompt_logprobs": 20}, "prompt", "512000 tokens with 20 of the likeliest each are over 4000000"),
    ({"prompt": "x", "max_tokens": "9"}, "max_tokens", 'max_tokens: expected int, got "9"'),
    ({"prompt": "x", "max_tokens": 8192}, "max_tokens", "8192 asked for, but a prompt of 1 tokens leaves 8191 of 8192"),
    ({"prompt": [1] * 8192}, "prompt", "prompt has 8192 tokens, and the context of 8192"),
    ({"prompt": "x" * 700_000}, "prompt", r"at least 8641 tokens"),
    ({"prompt": "1" * 700_000, "truncate_prompt_tokens": 9}, "prompt", r"at least 8641 tokens"),  # no cheap work either
    ({"prompt": "x", "temperature": 2.5}, "temperature", "temperature: expected float <= 2.0, got 2.5"),
    ({"prompt": "x", "top_p": -0.1}, "top_p", "top_p: expected float >= 0"),
    ({"prompt": "x", "priority": 101}, "priority", "priority: expected int <= 100, got 101"),
    ({"prompt": "x", "priority": 0.5}, "priority", "priority: expected int, got 0.5"),
    ({"prompt": "x", "n": 65}, "n", "n: expected int <= 64, got 65"),
    ({"prompt": "x", "n": 2, "best_of": 3}, "best_of", "than n = 2, got 3; leave it out"),
    ({"prompt": "x", "best_of": 0}, "best_of", "than n = 1, got 0"),
    ({"prompt": ["x"] * 5, "n": 13}, "prompt", "5 prompts times n = 13 is over 64 answers"),
    ({"prompt": "x", "stop": [""]}, "stop", "stop string 0 is empty"),
    ({"prompt": "x", "stop": ["a"] * 17}, "stop", "at most 16 stop strings, got 17"),
    ({"prompt": "x", "stop": ["a", 5]}, "stop[1]", r"stop\[1\]: expected str, got 5"),
    ({"prompt": "x", "stop_token_ids": [49152]}, "stop_token_ids[0]", "from 0 to 49151, got 49152"),
    ({"prompt": "x", "stream_options": {}}, "stream_options", "only allowed when stream is true"),
    ({"prompt": "x", "logprobs": 6}, "logprobs", "logprobs: expected int <= 5, got 6"),
    ({"prompt": "x", "logprobs": True}, "logprobs", "logprobs: expected int, got true"),
    ({"prompt": "x", "logprobs": 6, "echo": True}, "logprobs", "logprobs: expected int <= 5, got 6"),
    ({"prompt": "x", "top_logprobs": 1}, "top_logprobs", "top_logprobs is not supported"),
    ({"prompt": "x", "min_p": 1.5}, "min_p", "min_p: expected float <= 1.0, got 1.5"),
    ({"prompt": "x", "presence_penalty": -3}, "presence_penalty", "expected float >= -2.0, got -3"),
    ({"prompt": "x", "frequency_penalty": "1"}, "frequency_penalty", 'expected float, got "1"'),
    ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty", "expected float >= 0.01, got 0"),
    ({"prompt": "x", "min_tokens": -1}, "min_tokens", "min_tokens: expected int >= 0, got -1"),
    ({"prompt": "x", "min_tokens": 17}, "min_tokens", r"17 asked for, but the answer has at most 16 \(max_tokens\)"),
    ({"prompt": "x", "stop_token_ids": [*range(1025)]}, "stop_token_ids", "expected array of length <= 1024, got"),
    ({"prompt": "x", "logit_bias": [1]}, "logit_bias", r"logit_bias: expected object, got \[1\]"),
    ({"prompt": "x", "logit_bias": {"49152": 1}}, "logit_bias", "token ids from 0 to 49151 as names, got 49152"),
    ({"prompt": "x", "logit_bias": {"07": 1}}, "logit_bias", "as names, got 07"),
    ({"prompt": "x", "logit_bias": {"7": 101}}, "logit_bias.7", "logit_bias.7: expected a number from -100 to 100, got 101"),
    ({"prompt": "x", "logit_bias": {"7": True}}, "logit_bias.7", "expected a number from -100 to 100, got True"),
    ({"prompt": "x", "logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", "at most 300 tokens, got 301"),
    ({"prompt": "x", "continue_final_message": True}, "continue_final_message", "not supported"),
    ({"prompt": "x", "suffix": "y"}, "suffix", "suffix is not supported"),
    ({"prompt": "x", "return_tokens_as_token_ids": True}, "return_tokens_as_token_ids", "is not supported"),
    ({"prompt": "x", "tools": [{}]}, "tools", "tools is not supported"),
]  # fmt: skip


def schema(found: dict[str, object]) -> dict[str, object]:
    """A response_format with this JSON schema."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": found}}


BAD_CHATS = [
    ({"messages": []}, "messages", "length >= 1"),
    ({"messages": "x"}, "messages", 'messages: expected array, got "x"'),
    ({"messages": HI * 10_001}, "messages", "messages: expected array of length <= 10000, got"),
    ({"messages": HI, "echo": True}, "echo", "echo is not supported"),
    ({"messages": HI, "guided_json": {}}, "guided_json", "guided_json is not supported by this server; send structured_outputs.json$"),
    ({"messages": HI, "functions": [{"name": "f"}]}, "functions", "send tools$"),
    ({"messages": HI, "add_special_tokens": True}, "add_special_tokens", "add_special_tokens is not supported"),
    ({"messages": HI, "skip_special_tokens": 0}, "skip_special_tokens", "expected bool, got 0"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "this field is required"),
    ({"messages": [{"role": "root", "content": "x"}]}, "messages[0].role", "system, developer, user, assistant, tool, got"),
    ({"messages": [*HI, {"role": "user"}]}, "messages[1].content", "this field is required"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", r"expected str \| array, got null$"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", "one of text"),
    ({"messages": HI, "response_format": {"type": "xml"}}, "response_format.type", "expected one of text, json_object, json_schema"),
    ({"messages": HI, "response_format": {"type": "json_schema"}}, "response_format.json_schema", "this field is required"),
    ({"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema", "required"),
    ({"messages": HI, "response_format": {"type": "json_object", "schema": {"not": {}}}}, "response_format.schema", "Unimplemented keys"),
    ({"messages": HI, "response_format": schema({"not": {}})}, "response_format.json_schema.schema", "Unimplemented keys"),
    ({"messages": HI, "response_format": schema({"description": "x" * 70_000})}, "response_format.json_schema.schema", "at most 65536 bytes"),
    ({"messages": HI, "response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens", "not beside response_format"),
    ({"messages": HI, "response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "not beside response_format"),
    ({"messages": HI, "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "x"}}, "structured_outputs", "not beside"),
    ({"messages": HI, "structured_outputs": {}}, "structured_outputs", "expected one of json, regex, choice, grammar and json_object, got 0"),
    ({"messages": HI, "structured_outputs": {"regex": "x", "choice": ["x"]}}, "structured_outputs", "got 2"),
    ({"messages": HI, "structured_outputs": {"regex": "(x"}}, "structured_outputs.regex", "unclosed group"),
    ({"messages": HI, "structured_outputs": {"json": "{"}}, "structured_outputs.json", "truncated"),
    ({"messages": HI, "structured_outputs": {"grammar": "root: x ::="}}, "structured_outputs.grammar", "Expected ::="),
    ({"messages": HI, "structured_outputs": {"grammar": "root ::= other"}}, "structured_outputs.grammar", "Rule 'other' not found"),
    ({"messages": HI, "structured_outputs": {"grammar": 'other ::= "x"'}}, "structured_outputs.grammar", "No 'root' rule found"),
    ({"messages": HI, "structured_outputs": {"grammar": 'root ::= "\\'}}, "structured_outputs.grammar", "structured_outputs.grammar: "),
    ({"messages": HI, "structured_outputs": {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}}, "structured_outputs.grammar", "nested too deeply"),
    ({"messages": HI, "structured_outputs": {"json": {"minimum": "é" * 99}}}, "structured_outputs.json", "a library failed over it"),  # a panic of the library
    ({"messages": HI, "tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f", "parameters": {"required": "é" * 99}}}]}, "tools[0].function.parameters", "a library failed over it"),
    ({"messages": HI, "structured_outputs": {"json": '{"items":' * 5000 + "{}" + "}" * 5000}}, "structured_outputs.json", "nested too deeply"),
    ({"messages": HI, "structured_outputs": {"grammar": "root ::= " + '"a" ' * 20_000}}, "structured_outputs.grammar", "at most 65536 bytes, got 80009"),
    ({"messages": HI, "structured_outputs": {"choice": []}}, "structured_outputs.choice", "length >= 1"),
    ({"messages": HI, "logprobs": 1}, "logprobs", "logprobs: expected bool, got 1"),
    ({"messages": HI, "max_tokens": 0}, "max_tokens", "max_tokens: expected int >= 1, got 0"),
    ({"messages": HI, "prompt_logprobs": True}, "prompt_logprobs", "prompt_logprobs: expected int, got true"),
    ({"messages": HI, "top_logprobs": 3}, "top_logprobs", "only allowed when logprobs is true"),
    ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "expected int <= 20, got 21"),
    ({"messages": HI, "guided_choice": ["yes", "no"]}, "guided_choice", "not supported"),
    ({"messages": HI, "add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", "not together"),
    ({"messages": HI, "add_generation_prompt": "no"}, "add_generation_prompt", "expected bool"),
    ({"messages": HI, "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "expected int >= 1, got 0"),
    ({"messages": HI, "allowed_token_ids": []}, "allowed_token_ids", "length >= 1"),
    ({"messages": HI, "allowed_token_ids": [5, 49152]}, "allowed_token_ids", r"allowed_token_ids\[1\]: expected a token id from 0 to 49151"),
    ({"messages": HI, "response_format": {"type": "json_object"}, "allowed_token_ids": [5]}, "allowed_token_ids", "not beside response_format"),
    ({"messages": HI, "allowed_token_ids": [2, 5], "stop_token_ids": [5], "min_tokens": 1}, "min_tokens", "names all that may be drawn"),
    ({"messages": HI, "max_completion_tokens": 9000}, "max_completion_tokens", "9000 asked for"),
    ({"messages": [{"role": "user", "content": "x y " * 5000}]}, "messages", "must hold it"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param", "text"), [
    *(("/v1/completions", *bad) for bad in BAD), *((CHAT, *bad) for bad in BAD_CHATS),
])  # fmt: skip
async def test_bad_fields_are_named(path, body, param, text):
    """A wrong field is refused with 400 and an error that names it; nothing is opened at the service."""
    service = FakeService(lambda _r: says("x"))
    response = await post(body, path, service)

    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert re.search(text, error["message"]), error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] is not None
    assert service.opened == []


async def test_values_that_ask_for_nothing_pass():
    """Unsupported fields are accepted when they hold null or a value that changes nothing."""
    refused = REFUSED | COMPLETIONS_ALONE
    neutral = {name: values[0] for name, values in refused.items() if values}
    nulls = dict.fromkeys(REFUSED, None)

    assert (await post({"messages": HI, "user": "me", "store": False} | neutral, CHAT)).status_code == 200
    assert (await post({"messages": HI} | nulls, CHAT)).status_code == 200
    for more in ({"best_of": 1}, {"n": 2, "best_of": 2}):
        assert (await post({"prompt": "x"} | more)).status_code == 200


async def test_unknown_fields_are_ignored_at_any_depth():
    """What other servers know and this one does not is ignored, in the body as well as in the objects within it."""
    tool = {
        "type": "function",
        "cache_control": None,
        "function": {"name": "f", "x": 1, "parameters": {"x-y": 1}},
    }
    call = {"id": "c", "index": 0, "type": "function", "function": {"name": "f", "arguments": "{}", "x": 1}}
    body = {
        "stream": True, "stream_options": {"include_usage": True, "include_obfuscation": True, "x": 1}, "x": {"y": 1},
        "response_format": {"type": "text", "x": 1}, "tools": [tool], "safety_identifier": "s",
        "tool_choice": "none", "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}], "x": 1},
            {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "", "x": 1},
        ],
    }  # fmt: skip
    answer = await post(body, CHAT)
    assert answer.status_code == 200, answer.text
    assert '"usage":{' in answer.text and "obfuscation" not in answer.text


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"prompt": "\\ud800"}', b"\xff", b"[" * 100_000])
async def test_what_is_not_json_is_refused(data):
    """A body that is not a JSON object in UTF-8 is refused with 400."""
    async with asking() as client:
        response = await client.post("/v1/completions", content=data)

    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"
    if not data:
        assert response.json()["error"]["message"] == "The body is empty; it must be a JSON object"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
    ],
)
async def test_unknown_paths_methods_and_models_have_openais_error_shape(method, path, status, code):
    """Unknown paths, methods and models are answered with errors of OpenAI's shape."""
    async with asking() as client:
        response = await client.request(method, path)

    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert status != 405 or response.headers["allow"]


async def test_an_unknown_model_is_not_served_by_another():
    """A request for a model that is not served gets 404."""
    response = await post({"prompt": "x", "model": "gpt-4"})

    assert response.status_code == 404
    assert response.json()["error"]["param"] == "model"


class PanicException(BaseException):
    """Like the exception that pyo3 raises when a library in Rust panics: not an Exception."""


@pytest.mark.parametrize("bug", [ZeroDivisionError("division by zero"), PanicException("out of bounds")])
async def test_a_bug_is_a_500_in_the_same_shape(bug):
    """An exception inside the service is answered with 500 in OpenAI's error shape."""

    def fails(_request):
        raise bug

    async with asking(FakeService(fails)) as client:
        response = await client.post("/v1/completions", json={"prompt": "x"})

    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"


# ---- keys, health, cluster -----------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "Basic k1", "k1"])
async def test_without_a_key_nothing_but_health_and_metrics_answers(header):
    """Without a valid API key every path but /health and /metrics answers 401."""
    headers = {"authorization": header} if header else {}
    async with asking(api_keys=("k1", "k2")) as client:
        for method, path in (
            ("POST", "/v1/completions"),
            ("GET", "/v1/models"),
            ("GET", "/cluster"),
            ("POST", "/cluster/p0"),
            ("GET", "/x"),
        ):
            response = await client.request(method, path, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        for path in ("/health", "/metrics"):
            assert (await client.get(path, headers=headers)).status_code == 200


async def test_each_key_has_a_cache_of_its_own():
    """Each API key has its own cache scope, which does not contain the key; without keys it is empty."""
    service = FakeService(lambda _r: says("x"))
    async with asking(service, api_keys=("k1", "k2")) as client:
        for key in ("k1", "k2", "k1"):
            headers = {"authorization": f"Bearer {key}"}
            assert (
                await client.post("/v1/completions", json={"prompt": "x"}, headers=headers)
            ).status_code == 200
    await post({"prompt": "x"}, service=service)
    first, second, again, without = (request.scope for request in service.opened)

    assert first == again == scope_of_key("k1")
    assert second == scope_of_key("k2") != first
    assert "k1" not in first
    assert without == ""


async def test_priority_and_deadline_reach_the_scheduler():
    """Priority and TTFT deadline of each request are passed on, with defaults where they are left out."""
    service = FakeService(lambda _r: says("x"))
    async with asking(service, ttft_ms=5000.0) as client:
        for body, headers in (
            ({}, {}),
            ({"priority": -3}, {"x-slo-ttft-ms": "250"}),
            ({"priority": None}, {"X-SLO-TTFT-MS": "0.5"}),
        ):
            answer = await client.post("/v1/completions", json={"prompt": "x", **body}, headers=headers)
            assert answer.status_code == 200
        chat = await client.post(CHAT, json={"messages": HI, "priority": 7})
        assert chat.status_code == 200
    wishes = [(one.params.priority, one.params.ttft_s) for one in service.opened]
    assert wishes == [(0, 5.0), (-3, 0.25), (0, 0.0005), (7, 5.0)]


@pytest.mark.parametrize("header", ["soon", "0", "-1", "nan", "inf", "86400001", ""])
async def test_a_deadline_that_is_none_is_refused(header):
    """A value of X-SLO-TTFT-MS that is not a sensible number of milliseconds is refused."""
    async with asking() as client:
        answer = await client.post("/v1/completions", json={"prompt": "x"}, headers={"x-slo-ttft-ms": header})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-slo-ttft-ms"
    assert "milliseconds" in answer.json()["error"]["message"]


async def test_keys_have_the_rights_that_they_were_given():
    """Only administrators' keys may change workers, and only priority keys may ask for a priority below 0."""
    service = FakeService(lambda _r: says("x"))
    keys = {"api_keys": ("user", "boss", "fast"), "admin_keys": ("boss",), "priority_keys": ("fast",)}
    async with asking(service, **keys) as client:

        async def status(key, path, body) -> tuple[int, str]:
            answer = await client.post(path, json=body, headers={"authorization": f"Bearer {key}"})
            return answer.status_code, answer.json().get("error", {}).get("code", "")

        for key in ("user", "fast"):
            assert await status(key, "/cluster/d0", {"drain": True}) == (403, "not_an_administrator")
        assert await status("boss", "/cluster/d0", {"drain": True}) == (200, "")
        for key in ("user", "boss"):
            assert await status(key, "/v1/completions", {"prompt": "x", "priority": -1}) == (
                403,
                "priority_not_allowed",
            )
            assert await status(key, "/v1/completions", {"prompt": "x", "priority": 1}) == (200, "")
        assert await status("fast", "/v1/completions", {"prompt": "x", "priority": -1}) == (200, "")
    assert len(service.changes) == 1
    assert [one.params.priority for one in service.opened] == [1, 1, -1]


async def test_health_models_metrics_and_cluster():
    """/health, /v1/models, /metrics and /cluster answer what the service says, with the right status codes."""
    service = FakeService(lambda _r: [])
    async with asking(service) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/health")).json() == {"status": "ok"}
        service.says_health = Health("degraded", "d1 is starting")
        degraded = await client.get("/health")
        assert (degraded.status_code, degraded.json()) == (
            200,
            {"status": "degraded", "reason": "d1 is starting"},
        )
        service.says_health = Health("unavailable", "no decode worker is ready")
        assert (await client.get("/health")).status_code == 503
        (card,) = (await client.get("/v1/models")).json()["data"]
        assert (await client.get("/v1/models/demo")).json() == card
        assert card["id"] == "demo"
        assert card["max_model_len"] == 8192
        metrics = await client.get("/metrics")
        assert metrics.text == "memserve_up 1\n"
        assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
        (member,) = (await client.get("/cluster")).json()["members"]
        assert member["id"] == "d0.0011aabb"
        assert member["load"] == {"running": 1.0}


async def test_changes_of_workers():
    """A change of a worker is passed on; wrong bodies, wrong content types and unknown workers are refused."""
    service = FakeService(lambda _r: [])
    async with asking(service) as client:
        done = await client.post("/cluster/d0", json={"role": "both"})
        assert (done.status_code, done.json()) == (200, {"worker": "d0", "role": "both", "drain": False})
        assert (await client.post("/cluster/d0", json={"drain": True})).status_code == 200
        assert service.changes == [Change("both"), Change("", drain=True)]
        wrong = (
            {},
            {"role": "boss"},
            {"drain": True, "role": "both"},
            {"drains": True},
            [],
            {"drain": False},
        )
        for body in wrong:
            assert (await client.post("/cluster/d0", json=body)).status_code == 400, body
        for garbled in (b'{"role": "\xff"}', b'{"role": ' + b"[" * 100_000):
            answer = await client.post(
                "/cluster/d0", content=garbled, headers={"content-type": "application/json"}
            )
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
        plain = await client.post(
            "/cluster/d0", content='{"drain": true}', headers={"content-type": "text/plain"}
        )
        assert plain.status_code == 415
        unknown = await client.post("/cluster/x9", json={"drain": True})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "worker_not_found")
        assert len(service.changes) == 2
