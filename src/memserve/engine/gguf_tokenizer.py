"""Builds the tokenizer in a GGUF file's metadata for the ``tokenizers`` library, equal to llama.cpp's.

There are two kinds. Byte-level BPE (``gpt2``: Llama 3, Qwen, SmolLM, newer Mistral) has its merges in the file, and names a
rule for splitting text before BPE. SentencePiece (``llama``: Llama 2, Mistral 7B) has scores, from which the
merges follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from memserve.engine.text_cuts import CL100K, TEKKEN
from memserve.engine.tokenizer import SPACE
from memserve.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Token types of GGUF; control and user-defined tokens are matched in the text before BPE runs."""

MODELS = ("gpt2", "llama")
"""Supported values of ``tokenizer.ggml.model``."""


def _smollm() -> pre_tokenizers.PreTokenizer:
    # llama.cpp splits at \p{N} first and then by GPT-2's rule, which ByteLevel implements.
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _words(rule: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rule), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@attrs.frozen
class _Cut:
    """A pre-tokenizer: how text is split before BPE, and the settings that come with its name."""

    rule: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool = False
    """A word that is in the vocabulary becomes that token, whatever the merges say."""
    bos: bool = False
    """Whether BOS is added if the file does not say."""
    normalizer: normalizers.Normalizer | None = None


_QWEN2 = _Cut(lambda: _words(CL100K % r"\p{N}"), normalizer=normalizers.NFC())
_LLAMA3 = _Cut(lambda: _words(CL100K % r"\p{N}{1,3}"), ignore_merges=True, bos=True)
PRE_TOKENIZERS = {
    "smollm": _Cut(_smollm),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "tekken": _Cut(lambda: _words(TEKKEN), ignore_merges=True, bos=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""Pre-tokenizers by ``tokenizer.ggml.pre``.

The rules are those of the models' own tokenizer.json; smollm's was compared with llama.cpp.
"""


def build_tokenizer(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer in a GGUF file's metadata; its ``save(path)`` writes what ``Tokenizer.load`` reads.

    Raises UserError when the metadata is damaged, a key is missing, or the tokenizer is not supported.
    """
    kind = _supported(metadata, "tokenizer.ggml.model", MODELS)
    texts: list[str] = list(_needed(metadata, "tokenizer.ggml.tokens"))
    types: list[int] = list(metadata.get("tokenizer.ggml.token_type", ()))
    vocabulary = {text: token for token, text in enumerate(texts)}
    if len(vocabulary) != len(texts) or (types and len(types) != len(texts)):
        raise UserError(
            f"tokenizer.ggml.tokens: {len(texts)} tokens, {len(vocabulary)} of them distinct, {len(types)} "
            "types; the three must agree: the model file is damaged"
        )
    if kind == "gpt2":
        built, wants_bos = _byte_level(metadata, vocabulary)
    else:
        built, wants_bos = _sentencepiece(metadata, vocabulary, types), True
    # add_tokens finds the text in the vocabulary and keeps its id.
    for text, type_ in zip(texts, types, strict=False):
        if type_ == CONTROL and len(text) < 2:
            raise UserError(
                f"tokenizer.ggml.tokens: control token {text!r} must have at least two characters"
            )
        if type_ == CONTROL:
            built.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        elif type_ == USER_DEFINED:
            built.add_tokens([AddedToken(text, normalized=False)])
    if metadata.get("tokenizer.ggml.add_bos_token", wants_bos):
        _add_bos(built, metadata, texts)
    return built


def _byte_level(metadata: dict[str, Any], vocabulary: dict[str, int]) -> tuple[tokenizers.Tokenizer, bool]:
    cut = PRE_TOKENIZERS[_supported(metadata, "tokenizer.ggml.pre", tuple(PRE_TOKENIZERS))]
    merges = [_merge(merge) for merge in _needed(metadata, "tokenizer.ggml.merges")]
    built = tokenizers.Tokenizer(_bpe(vocabulary, merges, ignore_merges=cut.ignore_merges))
    built.pre_tokenizer = cut.rule()
    built.decoder = decoders.ByteLevel()
    if cut.normalizer is not None:
        built.normalizer = cut.normalizer
    return built, cut.bos


def _sentencepiece(
    metadata: dict[str, Any], vocabulary: dict[str, int], types: list[int]
) -> tokenizers.Tokenizer:
    scores: list[float] = list(_needed(metadata, "tokenizer.ggml.scores"))
    if len(scores) != len(vocabulary) or len(types) != len(vocabulary):
        raise UserError(
            f"tokenizer.ggml.scores: {len(scores)} scores and {len(types)} types for {len(vocabulary)} tokens; "
            "the three must agree: the model file is damaged"
        )
    words = {text: token for text, token in vocabulary.items() if types[token] in (NORMAL, USER_DEFINED)}
    unknown = next((text for text, token in vocabulary.items() if types[token] == UNKNOWN), None)
    model = _bpe(vocabulary, _merges_of(words, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    built = tokenizers.Tokenizer(model)
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(SPACE))
    built.normalizer = normalizers.Sequence(steps)
    built.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return built


def _merges_of(words: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """BPE merges that follow from SentencePiece's scores.

    SentencePiece joins the two neighbours that make the token of highest score. So the merges are all pairs
    that make a token, by falling score of that token.
    """
    ways = [
        (-scores[token], words[text[:cut]], words[text[cut:]], text[:cut], text[cut:])
        for text, token in words.items()
        for cut in range(1, len(text))
        if text[:cut] in words and text[cut:] in words
    ]
    return [(left, right) for *_, left, right in sorted(ways)]


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocabulary, merges, **options)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer.ggml.merges: {error}: the model file is damaged") from error


def _add_bos(built: tokenizers.Tokenizer, metadata: dict[str, Any], texts: list[str]) -> None:
    token = _needed(metadata, "tokenizer.ggml.bos_token_id")
    if not 0 <= token < len(texts):
        raise UserError(f"tokenizer.ggml.bos_token_id: {token} is outside the vocabulary of {len(texts)}")
    bos = texts[token]
    built.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, token)])


def _merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _needed(metadata: dict[str, Any], key: str) -> Any:
    if key not in metadata:
        raise UserError(f"{key}: missing in the model file; it holds no usable tokenizer")
    return metadata[key]


def _supported(metadata: dict[str, Any], key: str, known: tuple[str, ...]) -> str:
    value = _needed(metadata, key)
    if value not in known:
        raise UserError(f"{key}: {value!r} is not supported; supported: {', '.join(known)}")
    return str(value)
