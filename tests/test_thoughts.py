"""A model's thoughts, separated from its answer."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_client import CHAT, HI, post
from fake_service import FakeService, demo_tokenizer, says, sse
from memserve.api.chat import ChatTemplate
from memserve.api.messages import ChatMessage
from memserve.api.sandbox import environment
from memserve.api.thoughts import CLOSE, OPEN, Thought, ThoughtParser
from test_tools import CALL, PARIS, WEATHER

PIECES = st.lists(st.sampled_from([OPEN, CLOSE, " ", "\n", "<thi", "</thi", "nk>", "a", "<", ">", "bc d"]))


def parsed(pieces: list[str], begun: bool = False) -> tuple[str, str]:
    """The thought and the answer of a text that arrives in pieces."""
    parser = ThoughtParser(begun)
    found = [one for piece in pieces for one in parser.push(piece)] + parser.finish()
    thought = "".join(one.text for one in found if isinstance(one, Thought))
    return thought, "".join(one for one in found if isinstance(one, str))


@pytest.mark.parametrize(
    ("text", "begun", "thought", "answer"),
    [
        ("<think>\nA fox.\n</think>\n\nYes.", False, "A fox.", "Yes."),
        ("\n<think>A\n\nfox</think>Yes <think>no</think>.", False, "A\n\nfox", "Yes <think>no</think>."),
        ("A fox.</think>\nYes.\n", True, "A fox.", "Yes.\n"),
        ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
        ("Yes <think>A fox</think>", False, "", "Yes <think>A fox</think>"),
        ("  Yes.", False, "", "  Yes."),
        ("<think>A fox and </thin", False, "A fox and </thin", ""),
        ("A fox", True, "A fox", ""),
        ("<thi", False, "", "<thi"),
        ("<think>", False, "", ""),
        ("", False, "", ""),
    ],
)
def test_a_thought_is_what_its_marks_enclose_at_the_head(text, begun, thought, answer):
    """A thought is the text between its marks at the beginning of an answer."""
    assert parsed([text], begun) == (thought, answer)


@given(PIECES, st.booleans())
def test_cuts_change_nothing(pieces, begun):
    """Thought and answer do not depend on how the text is cut."""
    whole = parsed(["".join(pieces)], begun)
    assert parsed(pieces, begun) == parsed(list("".join(pieces)), begun) == whole


@given(PIECES)
def test_nothing_but_marks_and_blanks_is_lost(pieces):
    """No text is lost but marks and blanks."""
    text = "".join(pieces)
    thought, answer = parsed([text])
    squeezed = (
        "".join(text.replace(OPEN, "", 1).split()),
        "".join(text.replace(OPEN, "", 1).replace(CLOSE, "", 1).split()),
    )
    assert "".join((thought + answer).split()) in ("".join(text.split()), *squeezed)


# ---- at the HTTP surface --------------------------------------------------------------------------------------------


def thinking(text: str) -> FakeService:
    return FakeService(lambda _request: says(text))


async def asked(text: str, reasoning: str = "apart", **changes):
    """The response to a chat in which the model writes ``text``."""
    response = await post({"messages": HI} | changes, CHAT, thinking(text), reasoning=reasoning)
    assert response.status_code == 200, response.text
    return response


async def test_thoughts_are_reasoning_content_where_that_is_wanted():
    """Thoughts are reported as reasoning_content, or left in the text, as configured."""
    text = "<think>\nA fox.\n</think>\n\nYes."
    (choice,) = (await asked(text)).json()["choices"]
    assert choice["message"]["reasoning_content"] == "A fox." and choice["message"]["content"] == "Yes."
    (choice,) = (await asked(text, "text")).json()["choices"]
    assert choice["message"]["content"] == text and "reasoning_content" not in choice["message"]


async def test_a_stream_has_thoughts_before_the_answer_and_calls():
    """A stream has thoughts first, then the answer, then calls, and finds no call in a thought."""
    text = f"<think>\nI could say {CALL}\n</think>\n\nI look.\n{CALL}"
    *events, done = sse((await asked(text, tools=[WEATHER], stream=True)).text)
    assert done == "[DONE]"
    deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
    kinds = [next((name for name in delta if name != "role"), "") for delta in deltas[1:-1]]
    assert kinds == sorted(kinds, key=["reasoning_content", "content", "tool_calls"].index)
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == f"I could say {CALL}"
    assert "".join(delta.get("content") or "" for delta in deltas) == "I look."
    calls = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", ())]
    assert "".join(calls) == PARIS


async def test_strict_tools_leave_thoughts_apart():
    """Agents offer strict tools by default: their calls follow a grammar, but what comes before is still a thought and a text."""
    strict = WEATHER | {"function": WEATHER["function"] | {"strict": True}}
    text = f"<think>\nA fox.\n</think>\n\nI look.\n{CALL}"
    (choice,) = (await asked(text, tools=[strict])).json()["choices"]
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("A fox.", "I look.")
    assert message["tool_calls"][0]["function"]["arguments"] == PARIS
    (choice,) = (await asked(CALL, tools=[strict], tool_choice="required")).json()["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == PARIS


async def test_an_answer_may_continue_a_thought():
    """If it failed, the rest of a thought that a client began would be shown to users, with its closing mark."""
    begun = [*HI, {"role": "assistant", "content": "<think>\nA"}]
    (choice,) = (await asked(" fox.</think>Yes.", messages=begun, continue_final_message=True)).json()[
        "choices"
    ]
    assert choice["message"]["reasoning_content"] == "fox." and choice["message"]["content"] == "Yes."
    begun[-1] = {"role": "assistant", "content": "<think>A fox.</think> I"}
    (choice,) = (await asked(" say yes.", messages=begun, continue_final_message=True)).json()["choices"]
    assert choice["message"]["content"] == " say yes." and "reasoning_content" not in choice["message"]


async def test_an_answer_of_a_given_form_has_no_thoughts():
    """An answer with a response format is not searched for thoughts."""
    form = {"type": "json_object"}
    (choice,) = (await asked('{"a": "</think>"}', response_format=form)).json()["choices"]
    assert choice["message"]["content"] == '{"a": "</think>"}'


def test_templates_get_what_was_thought_before():
    """Templates get the reasoning_content of earlier messages, with control tokens disarmed."""
    tokenizer = demo_tokenizer()
    written = "{% for m in messages %}[{{ m.reasoning_content }}|{{ m.content }}]{% endfor %}"
    template = ChatTemplate(environment().from_string(written), tokenizer, {})
    message = ChatMessage(role="assistant", content="Yes.", reasoning_content="<|im_end|> A fox.")
    rendered = template.render([message], ending="closed")
    assert rendered.text.replace(rendered.mark, "") == "[<|im_end|> A fox.|Yes.]"
    assert rendered.mark in rendered.text, "a control token in a thought is disarmed"
