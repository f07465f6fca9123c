"""The tokenizer compared with its rules, and messages that try to contain control tokens."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_service import IM_END, IM_START, MODEL_PATH, demo_tokenizer
from memserve.engine.gguf import read_gguf
from memserve.engine.gguf_tokenizer import build_tokenizer
from memserve.engine.spec import find_model
from memserve.engine.tokenizer import Tokenizer
from memserve.errors import UserError

MARK = chr(0xF0000)
UNKNOWN_BYTES = {4, 6, 19, 20, 22, 29, *range(0xF1, 0xF4)}
"""Bytes that occur in UTF-8 and for which the demo model has no token: llama.cpp drops them, and so do we."""


@cache
def metadata():
    with read_gguf(find_model(MODEL_PATH)) as file:
        return dict(file.metadata)


def reference_bpe(words):
    """Byte-pair encoding by its definition: merge the pair of lowest rank until there is none."""
    ids = {text: id for id, text in enumerate(metadata()["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata()["tokenizer.ggml.merges"])}
    for word in words:
        parts = [stand_in(byte) for byte in word.encode()]
        while True:
            pairs = {ranks[pair]: at for at, pair in enumerate(itertools.pairwise(parts)) if pair in ranks}
            if not pairs:
                break
            rank = min(pairs)
            at = next(i for i, pair in enumerate(itertools.pairwise(parts)) if ranks.get(pair) == rank)
            parts[at : at + 2] = ["".join(parts[at : at + 2])]
        yield from (ids[part] for part in parts)


def stand_in(byte):
    """GPT-2's character for a byte: itself if printable, otherwise the n-th from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [other for other in range(256) if other not in printable]
    return chr(byte) if byte in printable else chr(256 + others.index(byte))


@pytest.mark.parametrize(
    "words",
    [
        ["1", "2", "3", "4"],
        ["The", " ", "3", " cats", "'ll", " go"],
        ["Licence", "\n\n   ", "1", ".", " Definitions", "."],
        ["日本語の", "2", "0", "2", "6", "年"],
        ["Grüße", ",", " naïve", " café", "!"],
        ["def", " f", "(", "x", "):", "\n   ", " return", " x", "²"],
    ],
)
def test_words_are_cut_by_smollms_rules_and_merged_by_rank(words):
    """Text is cut by SmolLM's rules and merged by rank, as a plain implementation does."""
    assert demo_tokenizer().encode("".join(words), allow_special=False) == list(reference_bpe(words))


def test_digits_are_single_tokens_and_blanks_before_them_stay_whole():
    """Each digit is one token, and blanks before a digit stay together."""
    tokenizer = demo_tokenizer()

    assert [tokenizer.piece(token) for token in tokenizer.encode("a 1234", False)] == [
        b"a", b" ", b"1", b"2", b"3", b"4",
    ]  # fmt: skip
    blanks = [tokenizer.piece(token) for token in tokenizer.encode("\n\n   1.", False)]
    assert blanks[-2:] == [b"1", b"."]
    assert tokenizer.encode("\n\n   1.", False)[:-2] == list(reference_bpe(["\n\n   "]))


def test_special_tokens_count_only_where_they_may():
    """Control tokens are recognised only where they are allowed, and otherwise encoded as text."""
    tokenizer = demo_tokenizer()

    assert tokenizer.encode("<|im_start|>hi<|im_end|>", True) == [
        IM_START,
        *tokenizer.encode("hi", False),
        IM_END,
    ]
    plain = tokenizer.encode("<|im_end|>", False)
    assert IM_END not in plain
    assert tokenizer.decode(plain) == "<|im_end|>"
    assert tokenizer.decode([IM_START, *plain, IM_END]) == "<|im_end|>"
    assert tokenizer.decode([IM_END], skip_special=False) == "<|im_end|>"


def known(text):
    return not UNKNOWN_BYTES & set(text.encode())


@given(st.text().filter(known))
def test_text_survives_a_round_trip(text):
    """Decoding an encoded text gives the text back."""
    tokenizer = demo_tokenizer()

    assert tokenizer.decode(tokenizer.encode(text, allow_special=False)) == text


def test_long_text_is_encoded_like_short():
    """Long texts, which are encoded on another path, get the same tokens as short ones."""
    tokenizer = demo_tokenizer()
    text = "It was 1984. " * 2000

    assert tokenizer.encode(text, True) == tokenizer.encode("It was 1984. ", True)[:-1] + tokenizer.encode(
        " It was 1984." * 1999 + " ", True
    )


fragments = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_", "<|", "end|>", "|>", "<", ">", "im_end", "start", " ", "\n", "a", "1"]
    ),
    max_size=6,
).map("".join)


@given(fragments, fragments.filter(bool), fragments)
def test_no_special_token_is_read_in_disarmed_text_nor_across_its_edges(before, content, after):
    """No control token is read within a disarmed text or across its borders, and the text stays the same."""
    tokenizer = demo_tokenizer()

    tokens = tokenizer.encode(before + tokenizer.disarm(content, MARK) + after, allow_special=True, mark=MARK)

    specials = set(tokenizer.specials.values())
    vouched_for = [t for part in (before, after) for t in tokenizer.encode(part, True) if t in specials]
    assert [token for token in tokens if token in specials] == vouched_for
    assert tokenizer.decode(tokens, skip_special=False) == before + content + after


def test_harmless_text_is_not_touched_by_disarming():
    """Text without parts of control tokens is not changed by disarming."""
    tokenizer = demo_tokenizer()

    for text in ("Hello there.", "x < y", "if a > b: pass", "", " 12 "):
        assert tokenizer.disarm(text, MARK) == text


def with_changes(**changes):
    return build_tokenizer(metadata() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()})


def test_bos_is_known_where_the_model_wants_one():
    """The begin token is known for models that want one, and encode does not add it."""
    assert demo_tokenizer().bos == ()
    with_bos = Tokenizer(with_changes(add_bos_token=True))
    assert with_bos.bos == (IM_START,)
    assert with_bos.encode("hi", True) == demo_tokenizer().encode("hi", True)


def test_user_defined_tokens_are_one_token_wherever_they_are_written():
    """User-defined tokens such as <think> are one token wherever they are written."""
    types = list(metadata()["tokenizer.ggml.token_type"])
    texts = list(metadata()["tokenizer.ggml.tokens"])
    types[100], texts[100] = 4, "<think>"
    tokenizer = Tokenizer(with_changes(token_type=types, tokens=texts, merges=[]))

    assert tokenizer.encode("<think>", allow_special=False) == [100]
    assert tokenizer.piece(100) == b"<think>"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model: 't5' is not supported; supported: gpt2, llama"),
        ({"pre": "gpt-4o"}, "tokenizer.ggml.pre: 'gpt-4o' is not supported; supported: smollm"),
        ({"model": "llama"}, "tokenizer.ggml.scores: missing"),
        ({"merges": ["a nonsense"]}, "tokenizer.ggml.merges: .* damaged"),
        ({"tokens": ["a", "a"]}, "tokenizer.ggml.tokens: 2 tokens, 1 of them distinct"),
        ({"tokens": ["a"], "token_type": [3], "merges": []}, "at least two characters"),
        ({"add_bos_token": True, "bos_token_id": 10**6}, "outside the vocabulary"),
    ],
)
def test_metadata_that_cannot_be_served_is_refused_by_name(changes, text):
    """Unsupported or damaged tokenizer metadata is refused with its key."""
    with pytest.raises(UserError, match=text):
        with_changes(**changes)


def test_missing_metadata_and_a_file_that_is_none_are_refused(tmp_path):
    """Missing metadata, or a file that is no tokenizer, is refused."""
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.model: missing"):
        build_tokenizer({})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a readable tokenizer\.json"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_saved_tokenizer_loads_as_the_same(tmp_path):
    """A saved tokenizer loads with the same behaviour."""
    path = tmp_path / "tokenizer.json"
    with_changes(add_bos_token=True).save(str(path))
    loaded, text = Tokenizer.load(path), "<|im_start|>user 12 日本<|im_end|>"

    assert loaded.encode(text, True) == demo_tokenizer().encode(text, True)
    assert loaded.bos == (IM_START,)
    assert loaded.vocabulary == 49152
    assert loaded.piece(49152 + 5) == b""
    assert loaded.piece_bytes_max == 81
