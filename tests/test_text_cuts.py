"""Texts that are encoded in parts have the tokens of the whole; tokenizers for which that is not known are not cut."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Built

from fake_service import MODEL_PATH, demo_tokenizer
from memserve.engine import text_cuts
from memserve.engine.gguf import read_gguf
from memserve.engine.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer
from memserve.engine.spec import find_model
from memserve.engine.tokenizer import Tokenizer

PIECES = [
    "the", "it's", "IT'S", "we'll", "a", "I", "x1", "12345", "é", "e\u0301", "日本", "\u00a0", "\u3000", "'", "'s", "...", "?!",
    "\n", "\r\n", "\t", " ", "  ", "\n\n  ", "def f(x):", "_y", "ß", "ﬁ", "\ud7ff", "🙂", "end.", "\0", "A B", "z z z",
]  # fmt: skip
EXAMPLE = ["it's", "the", "  ", "A B", "\n", "'s"] * 5


def kinds() -> dict[str, Built]:
    """The demo model's vocabulary with each of the pre-tokenizers, as it would be built from a GGUF file."""
    with read_gguf(find_model(MODEL_PATH)) as file:
        return {
            name: build_tokenizer({**file.metadata, "tokenizer.ggml.pre": name}) for name in PRE_TOKENIZERS
        }


KINDS = kinds()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_have_the_tokens_of_the_whole(kind, monkeypatch):
    """The tokens of a text's parts are those of the whole text, for every pre-tokenizer."""
    built = KINDS[kind]
    assert text_cuts.may_be_cut(built)
    monkeypatch.setattr(text_cuts, "PART_CHARACTERS", 0)
    tokenizer = Tokenizer(built)
    assert len(list(text_cuts.parts(" ".join(EXAMPLE)))) > 10

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=30), st.sampled_from(["", " "]))
    @example(EXAMPLE, " ")
    def check(pieces, between):
        text = between.join(pieces)
        whole = built.encode(text, add_special_tokens=False).ids
        assert list(tokenizer._encode_part(text, False, "tenant")) == whole

    check()


@given(st.text("ab 1\n", max_size=60), st.text("ab 1\n", max_size=20), st.text("ab 1\n", max_size=20))
def test_texts_that_begin_alike_have_like_parts(start, one, other):
    """Texts that begin alike have the same parts up to where they differ, so that these are remembered."""
    size, text_cuts.PART_CHARACTERS = text_cuts.PART_CHARACTERS, 8
    try:
        ends = []
        for text in (start + one, start + other):
            found = list(text_cuts.parts(text))
            assert "".join(found) == text
            assert all(len(part) > 8 for part in found[:-1])
            ends.append([sum(map(len, found[: n + 1])) for n in range(len(found) - 1)])
        inside = [[end for end in one if end <= len(start) - 2] for one in ends]
        assert inside[0] == inside[1]
    finally:
        text_cuts.PART_CHARACTERS = size


def built_with(pre_tokenizer, normalizer=None) -> Built:
    built = Built(models.BPE({"a": 0, "b": 1}, []))
    if pre_tokenizer is not None:
        built.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        built.normalizer = normalizer
    return built


def test_only_what_is_known_to_cut_at_words_is_cut():
    """Texts are cut only for tokenizers that are known to cut at words."""
    level = pre_tokenizers.ByteLevel
    known = Regex(text_cuts.CL100K % r"\p{N}")
    assert text_cuts.may_be_cut(built_with(level(add_prefix_space=False), normalizers.NFC()))
    for one in (
        built_with(None),
        built_with(level(add_prefix_space=True)),
        built_with(level(add_prefix_space=False, use_regex=False)),
        built_with(level(add_prefix_space=False), normalizers.NFKC()),
        built_with(level(add_prefix_space=False), normalizers.Prepend("x")),
        built_with(pre_tokenizers.Metaspace()),
        built_with(pre_tokenizers.Split(Regex(r"(?<=a) b|\w+"), "isolated")),
        built_with(pre_tokenizers.Split(known, "removed")),
        built_with(pre_tokenizers.Split(known, "isolated", invert=True)),
        built_with(pre_tokenizers.Split("x", "isolated")),
        built_with(pre_tokenizers.Sequence([level(add_prefix_space=False), pre_tokenizers.Metaspace()])),
    ):
        assert not text_cuts.may_be_cut(one)
    added = built_with(level(add_prefix_space=False))
    added.add_tokens([AddedToken("a b", normalized=False)])
    assert not text_cuts.may_be_cut(added)


def test_the_demo_models_texts_are_cut():
    """Texts are cut for the demo model's tokenizer."""
    assert demo_tokenizer()._may_be_cut
