"""/tokenize, /detokenize and /version, as clients of vLLM's server use them."""

from __future__ import annotations

import attrs
import pytest

from api_client import HI, asking, post
from fake_service import FakeService, demo_tokenizer, says
from memserve import __version__
from memserve.api.bodies import ChatBody, CompletionBody
from memserve.api.tokenizing import DetokenizeBody, TokenizeBody, TokenizeChatBody
from test_api import DOCS, documented

TEXT = "The capital of France is <|im_end|>"


async def tokenize(**body):
    """The answer of /tokenize, which must be no error."""
    response = await post(body, "/tokenize")
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    "body", [{"prompt": TEXT}, {"messages": HI}, {"messages": HI, "add_generation_prompt": False}]
)
async def test_tokens_are_those_that_a_request_would_have(body):
    """/tokenize gives the tokens that a request with the same text has."""
    service = FakeService(lambda _r: says("x"))
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    await post({**body, "max_tokens": 1}, path, service)
    found = await tokenize(**body)
    assert found["tokens"] == list(service.opened[0].prompt)
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 8192)
    assert found["token_strs"] is None


async def test_tokens_are_shown_as_the_vocabulary_has_them_and_turned_back():
    """Tokens are shown as in the vocabulary, and /detokenize gives the text back."""
    found = await tokenize(prompt=TEXT, return_token_strs=True)
    assert found["token_strs"][:2] + found["token_strs"][-1:] == ["The", "\u0120capital", "<|im_end|>"]
    back = await post({"tokens": found["tokens"]}, "/detokenize")
    assert back.json() == {"prompt": TEXT}


async def test_bos_is_left_out_on_demand(monkeypatch):
    """The begin token is left out with add_special_tokens = false."""
    monkeypatch.setattr(demo_tokenizer(), "bos", (1,))
    assert (await tokenize(prompt="x"))["count"] == 2
    assert (await tokenize(prompt="x", add_special_tokens=False))["count"] == 1


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HI}, "prompt"),
        ("/tokenize", {"prompt": "x" * 700_000}, "prompt"),
        ("/tokenize", {"messages": HI, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": HI, "tools": [{}]}, "tools[0].type"),
        ("/tokenize", {"messages": HI, "add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"prompt": "x", "model": "other"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [49152]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1] * 8193}, "tokens"),  # 8 MiB of long tokens would make 200 MB of text
        ("/detokenize", {"tokens": [1], "model": "other"}, "model"),
    ],
)  # fmt: skip
async def test_bad_fields_are_named(path, body, param):
    """A wrong field is refused with an error that names it."""
    response = await post(body, path)
    assert response.status_code == (404 if param == "model" else 400), response.text
    assert response.json()["error"]["param"] == param


async def test_the_version_is_reported():
    """/version reports the version."""
    async with asking() as client:
        assert (await client.get("/version")).json() == {"version": __version__}


def test_every_field_is_documented():
    """docs/api.md lists exactly the fields of these endpoints."""
    kinds = (TokenizeBody, TokenizeChatBody, DetokenizeBody)
    served = {field.name for kind in kinds for field in attrs.fields(kind)}
    elsewhere = {field.name for kind in (ChatBody, CompletionBody) for field in attrs.fields(kind)}
    assert documented("Tokens of a text") == served - elsewhere
    text = DOCS.read_text().partition("## Tokens of a text")[2].partition("\n## ")[0]
    assert all(f"`{name}`" in text for name in served & elsewhere)
