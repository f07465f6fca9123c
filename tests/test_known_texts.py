"""Texts that were encoded before: the same tokens, in bounded memory, and separate for each tenant."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_service import demo_spec, demo_tokenizer
from memserve.api.chat import ChatTemplate
from memserve.api.messages import ChatMessage
from memserve.engine import tokenizer as tokenizers
from memserve.engine.known_texts import ENTRY_CHARACTERS, KnownTexts
from memserve.engine.text_cuts import PART_CHARACTERS
from memserve.engine.tokenizer import Tokenizer

LONG = "What are the three states of matter, and how does one turn into another? "


def fresh() -> Tokenizer:
    """The demo model's tokenizer, which remembers nothing yet."""
    return Tokenizer(demo_tokenizer()._built)


@attrs.define
class Encoder:
    """Records the texts that are really encoded."""

    texts: list[str] = attrs.field(factory=list)

    def __call__(self, text: str) -> list[int]:
        self.texts.append(text)
        return list(map(ord, text))


def size(keys) -> int:
    """How much these entries count."""
    return sum(len(text) + ENTRY_CHARACTERS for _, _, text in keys)


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The texts that tokenizers have encoded so far."""
    texts: list[str] = []
    encode_plain = tokenizers._encode_plain

    def counted(built, in_a_thread, text):
        texts.append(text)
        return encode_plain(built, in_a_thread, text)

    monkeypatch.setattr(tokenizers, "_encode_plain", counted)
    return texts


def test_the_turns_of_a_chat_have_the_tokens_they_always_had(encoded):
    """Each turn of a chat encodes only the new message, with the same tokens, and not faster for another tenant."""
    messages: list[ChatMessage] = []
    chat = ChatTemplate.of(demo_spec(), fresh())
    for turn in range(4):
        role = ("user", "assistant")[turn % 2]
        messages.append(ChatMessage(role=role, content=f"{turn}: {LONG * 8}<|im_end|> \n"))
        rendered = chat.render(messages)
        plain = fresh().encode(rendered.text, allow_special=True, mark=rendered.mark)
        encoded.clear()
        assert chat.encode(rendered, "tenant") == plain
        assert 0 < sum(map(len, encoded)) < 700, "more than the new message"
    encoded.clear()
    assert chat.encode(chat.render(messages), "tenant") == plain
    assert not encoded
    chat.encode(chat.render(messages), "another")
    assert sum(map(len, encoded)) > 700, "one tenant's messages are quick for another"


def test_a_prompt_that_continues_another_is_encoded_from_there(encoded):
    """A text that continues an earlier one is encoded from its last part on."""
    tokenizer, text = fresh(), LONG * 20
    for _ in range(3):
        assert tokenizer.encode(text, True, scope="") == fresh().encode(text, True)
        encoded.clear()
        text += LONG
        tokenizer.encode(text, True, scope="")
        assert sum(map(len, encoded)) <= PART_CHARACTERS + len(LONG) + 20


def test_first_and_later_parts_are_remembered_separately():
    """The first part of a text and later ones are remembered separately: some tokenizers put a blank before the first."""
    known, encode = KnownTexts(), Encoder()
    for later in (False, True, False):
        assert known.tokens("", later, LONG, encode) is not None
    assert encode.texts == [LONG, LONG]


def test_a_text_that_is_too_long_is_not_kept():
    """A text that would take most of the memory is not kept."""
    known, encode = KnownTexts(characters_max=1000), Encoder()
    for _ in range(2):
        assert list(known.tokens("", False, "y" * 950, encode)) == [ord("y")] * 950
    assert len(encode.texts) == 2
    assert known._characters == 0


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 400), st.booleans()), max_size=40))
def test_memory_is_bounded_and_the_least_recently_used_go_first(uses):
    """Memory is limited, and the least recently used texts are dropped first."""
    known, model = KnownTexts(characters_max=1000), []
    for scope, length, later in uses:
        key, encode = (scope, later, "z" * length), Encoder()
        assert list(known.tokens(scope, later, key[2], encode)) == [ord("z")] * length
        assert bool(encode.texts) == (key not in model)
        model = [one for one in model if one != key] + [key]
        while size(model) > 1000:
            model.pop(0)
        assert list(known._tokens) == model
        assert known._characters == size(model)


def test_threads_may_share_it():
    """Several threads may use it at the same time."""
    known = KnownTexts(characters_max=2000)
    texts = [chr(65 + number) * 300 for number in range(20)]

    def work(shift: int) -> bool:
        order = texts[shift:] + texts[:shift]
        return all(
            list(known.tokens("", False, text, Encoder())) == list(map(ord, text))
            for _ in range(50)
            for text in order
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(0, 20, 5)))
    assert known._characters == size(known._tokens) <= 2000
