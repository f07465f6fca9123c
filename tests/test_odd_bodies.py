"""Odd but legal bodies, as clients of OpenAI's and vLLM's APIs send them: each is served, and none changes what it must not."""

from __future__ import annotations

import attrs
import pytest

from api_client import CHAT, HI, post
from fake_service import FakeService, says
from memserve.api.bodies import ChatBody, CompletionBody

COMPLETIONS = "/v1/completions"
USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "description": None, "parameters": {}, "strict": False}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}, "index": 0}


def nulls(kind: type, *but: str) -> dict[str, None]:
    """Null for every field but these."""
    return {field.name: None for field in attrs.fields(kind) if field.name not in but}


@pytest.mark.parametrize(("path", "body"), [
    (COMPLETIONS, {"prompt": "x", **nulls(CompletionBody, "prompt")}),
    (CHAT, {"messages": HI, **nulls(ChatBody, "messages")}),
    # LangChain's completions, and OpenAI's fields that matter to OpenAI alone
    (COMPLETIONS, {"prompt": ["x"], "best_of": 1, "n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "top_p": 1, "suffix": None}),
    (CHAT, {
        "messages": HI, "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "user": "u", "reasoning_effort": "low", "verbosity": "low",
        "prediction": {"type": "content", "content": "x"}, "prompt_cache_key": "k", "modalities": ["text"], "function_call": "none", "functions": [],
    }),
    # what vLLM's users send as it is the default
    (CHAT, {
        "messages": HI, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "stop_token_ids": [], "min_tokens": 0,
        "ignore_eos": False, "skip_special_tokens": True, "spaces_between_special_tokens": True, "echo": False, "add_special_tokens": False,
        "documents": None, "chat_template": None, "chat_template_kwargs": {}, "bad_words": [], "use_beam_search": False, "priority": 0, "request_id": "r",
        "mm_processor_kwargs": None, "kv_transfer_params": None, "add_generation_prompt": True, "continue_final_message": False,
    }),
    *((CHAT, {"messages": HI, "stop": stop}) for stop in ([], "a", ["a", "b", "c", "d"])),
    *((CHAT, {"messages": HI, "seed": seed}) for seed in (0, -1, 2**63 - 1, -(2**63))),
    *((CHAT, {"messages": HI, "tools": tools, "tool_choice": choice, "parallel_tool_calls": several})
      for tools in ([], None) for choice in ("auto", "none", None) for several in (True, None)),
    (CHAT, {"messages": [{"role": "developer", "content": "d"}, {**USER, "name": None}], "tools": [TOOL], "tool_choice": "auto"}),
    (CHAT, {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL], "function_call": None, "refusal": None, "audio": None},
                         {"role": "tool", "tool_call_id": "c", "name": "f", "content": [{"type": "text", "text": ""}]}], "tools": [TOOL]}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "logit_bias": {"5": 1}}),
    (CHAT, {"messages": HI, "logprobs": False, "top_logprobs": 0, "max_tokens": 3, "max_completion_tokens": 5}),
])  # fmt: skip
async def test_what_clients_send_is_served(path, body):
    """Null and whatever else requests nothing is accepted in every field, and so are fields that matter elsewhere alone."""
    answer = await post(body, path)
    assert answer.status_code == 200, answer.text


async def test_a_share_of_nothing_leaves_the_likeliest_token():
    """OpenAI permits top_p 0; with it, every draw is the likeliest token."""
    service = FakeService(lambda _r: says("x"))
    assert (await post({"messages": HI, "top_p": 0}, CHAT, service)).status_code == 200
    assert 0 < service.opened[0].params.sampling.top_p <= 1e-9


async def test_a_schema_may_be_beside_json_object():
    """A schema where llama.cpp and others have it is followed, not dropped."""
    service, schema = FakeService(lambda _r: says("x")), {"type": "object", "properties": {"a": {"const": 1}}}
    for form in (
        {"type": "json_object", "schema": schema},
        {"type": "json_schema", "json_schema": {"schema": schema}},
        {"type": "json_object", "schema": None},
        {"type": "json_object"},
    ):
        assert (await post({"messages": HI, "response_format": form}, CHAT, service)).status_code == 200
    first, second, third, fourth = (one.params.sampling.adjust.grammar for one in service.opened)
    assert first == second != third == fourth
