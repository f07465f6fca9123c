"""The kinds of tokenizers that models have, each compared with its definition or with the library's result."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, pre_tokenizers, processors
from tokenizers import Tokenizer as Built

from memserve.engine.detokenizer import Detokenizer
from memserve.engine.gguf_tokenizer import build_tokenizer
from memserve.engine.tokenizer import SPACE, Tokenizer, _bytes_of_characters
from memserve.errors import UserError

WORDS = ("a", "b", "c", SPACE, "ab", "bc", "abc", "ca", SPACE + "a", SPACE + "ab", "cab", "bca", "aa", "aaa")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
TEXTS = ("<unk>", "<s>", "</s>", *BYTES, *WORDS)
SCORES = [0.0] * (3 + 256) + [-float(5 * at % len(WORDS)) for at in range(len(WORDS))]
SPM = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": list(TEXTS),
    "tokenizer.ggml.scores": SCORES,
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(WORDS)],
    "tokenizer.ggml.bos_token_id": 1,
}


def sentencepiece(text: str) -> list[str]:
    """SentencePiece by its definition: join the neighbours that make the token with the highest score until there are
    none."""
    parts = list(SPACE + text.replace(" ", SPACE))
    score = dict(zip(TEXTS, SCORES, strict=True))
    while ways := [(score[a + b], -at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in WORDS]:
        at = -max(ways)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    known = [[part] if part in WORDS else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts]
    return [one for part in known for one in part]


@given(st.text("abc é日", min_size=1, max_size=30))
def test_scores_give_sentencepieces_tokens(text):
    """A tokenizer with scores gives SentencePiece's tokens."""
    tokenizer = Tokenizer(build_tokenizer(SPM))
    tokens = tokenizer.encode(text, allow_special=True)

    assert [TEXTS[token] for token in tokens] == sentencepiece(text)
    assert tokenizer.decode(tokens) == " " + text


def test_sentencepieces_pieces_are_bytes_and_bos_is_wanted():
    """Byte tokens are decoded to their bytes, and the begin token is known."""
    tokenizer = Tokenizer(build_tokenizer(SPM))
    tokens = tokenizer.encode("a日", allow_special=True)

    assert tokenizer.bos == (1,)
    assert [tokenizer.piece(token) for token in tokens[-3:]] == [b"\xe6", b"\x97", b"\xa5"]
    assert tokenizer.piece(TEXTS.index(SPACE + "a")) == b" a"
    assert tokenizer.piece(1) == b""
    stream = Detokenizer(tokenizer.piece)
    assert "".join(stream.push(token) for token in tokens) == " a日"


def test_a_blank_comes_before_the_text_only_where_the_model_has_it_so():
    """A blank before the text, or after control tokens, is added only as the model's scheme says."""
    model = build_tokenizer(SPM).model
    for scheme in ("first", "always", "never"):
        built = Built(model)
        built.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
        built.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(SPACE, scheme)])
        built.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
        library = Built.from_str(built.to_str())
        tokenizer = Tokenizer(built)
        for text in ("ab", "ab c</s>ab", "</s>ab</s> c", " a"):
            assert tokenizer.encode(text, True) == library.encode(text, add_special_tokens=False).ids, (
                scheme,
                text,
            )


@pytest.mark.parametrize(("left", "right"), [(True, True), (False, True), (True, False)])
def test_a_special_token_takes_the_blanks_that_are_its_own(left, right):
    """Phi, which has such tokens, would read line breaks that it never saw in training."""
    built = Built(build_tokenizer(SPM).model)
    built.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "never", split=False)
    own = AddedToken("</s>", special=True, lstrip=left, rstrip=right, normalized=False)
    built.add_special_tokens([AddedToken("<s>", special=True), own])
    library = Built.from_str(built.to_str())
    tokenizer = Tokenizer(built)
    for text in ("ab</s>\n c", "</s>", " </s> </s> ", "ab \n</s>c a</s>", "<s> a </s>  <s> b"):
        known = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, True) == known, text


ALPHABET = sorted(_bytes_of_characters())


def byte_level_metadata(pre: str, words: tuple[str, ...], merges: tuple[str, ...]) -> dict[str, object]:
    """The metadata of a GGUF byte-level tokenizer of all bytes and some words."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*ALPHABET, *words, "<|bos|>"],
        "tokenizer.ggml.token_type": [*[1] * (256 + len(words)), 3],
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": 256 + len(words),
    }


def byte_level(pre: str, words: tuple[str, ...], merges: tuple[str, ...], **more: object) -> Tokenizer:
    """The tokenizer of ``byte_level_metadata``, with ``more`` metadata."""
    return Tokenizer(build_tokenizer(byte_level_metadata(pre, words, merges) | more))


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """The texts of a text's tokens."""
    return [tokenizer.piece(token).decode() for token in tokenizer.encode(text, True)]


DIGITS = (("12", "123", "1234"), ("1 2", "12 3", "123 4"))


def test_llama3_keeps_three_digits_together_and_qwen_none():
    """Llama 3 keeps three digits together, Qwen cuts them all."""
    assert pieces(byte_level("llama-bpe", *DIGITS), "12345") == ["123", "4", "5"]
    assert pieces(byte_level("qwen2", *DIGITS), "1234") == ["1", "2", "3", "4"]


def test_llama3_prefers_whole_words_and_wants_bos():
    """Llama 3 uses whole words without merges and has a begin token; Qwen has neither."""
    llama = byte_level("llama-bpe", ("abc",), ())
    assert pieces(llama, "abc") == ["abc"]
    assert llama.bos == (257,)
    assert byte_level("llama-bpe", ("abc",), (), **{"tokenizer.ggml.add_bos_token": False}).bos == ()
    qwen = byte_level("qwen2", ("abc",), ())
    assert pieces(qwen, "abc") == ["a", "b", "c"]
    assert qwen.bos == ()


TEKKEN = (
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
    "|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*"
    "|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
"""The rule in the tokenizer.json of Mistral Nemo."""


@given(
    st.lists(
        st.sampled_from(
            ["aB", "Ba", "ǅ", "日本", "e\u0301", "'s", " ", "  ", "12", "/", "\n", "\r\n", "://", "_", "ʰ"]
        )
    ).map("".join)
)
def test_tekken_splits_as_mistrals_own_tokenizer(text):
    """Mistral Nemo and Small from GGUF would read other tokens than they were trained on."""
    split = pre_tokenizers.Split(Regex(TEKKEN), behavior="isolated")
    found = build_tokenizer(byte_level_metadata("tekken", (), ())).pre_tokenizer.pre_tokenize_str(text)
    assert [place for _, place in found] == [place for _, place in split.pre_tokenize_str(text)]


def test_tekken_splits_before_capitals_and_at_every_digit():
    """Identifiers and numbers would be read as other tokens than in training."""
    built = build_tokenizer(byte_level_metadata("tekken", (), ()))
    words = [word for word, _ in built.pre_tokenizer.pre_tokenize_str("getHTMLPage don't 2024 x/\n")]
    assert words == ["get", "HTMLPage", "Ġdon", "'t", "Ġ", "2", "0", "2", "4", "Ġx", "/Ċ"]
    tekken = byte_level("tekken", ("abc",), ())
    assert pieces(tekken, "abc") == ["abc"]
    assert tekken.bos == (257,)


@pytest.mark.parametrize("name", ["llama3", "llama-v3"])
def test_other_names_of_llama3s_rule_are_known(name):
    """Early conversions of Llama 3 name it differently, and would be refused."""
    other, usual = (byte_level_metadata(one, *DIGITS) for one in (name, "llama-bpe"))
    assert build_tokenizer(other).to_str() == build_tokenizer(usual).to_str()


def test_qwen_composes_accents():
    """Qwen's tokenizer composes accents before it encodes."""
    assert byte_level("qwen2", (), ()).encode("e\u0301", True) == byte_level("qwen2", (), ()).encode(
        "é", True
    )


def test_what_a_post_processor_puts_behind_a_text_is_no_bos():
    """Only tokens that the post-processor puts before a text count as begin tokens."""
    built = build_tokenizer(SPM)
    built.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert Tokenizer(built).bos == (1,)


def test_scores_must_be_complete():
    """Scores of another number than the tokens are refused."""
    with pytest.raises(UserError, match="1 scores and 273 types for 273 tokens"):
        build_tokenizer(SPM | {"tokenizer.ggml.scores": [0.0]})
