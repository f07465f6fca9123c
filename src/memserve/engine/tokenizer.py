"""Text to token ids and back: byte-level BPE built from GGUF metadata, equal to llama.cpp's tokenizer.

Special tokens (``<|im_end|>``) are recognised here and nowhere else: the ``tokenizers`` library is told to leave
them alone, and this wrapper splits the text at them only where the caller vouches for it. What a chat template
writes is vouched for; what a user wrote inside a message is not (:mod:`memserve.api.chat`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from memserve.errors import UserError

CONTROL, USER_DEFINED = 3, 4
"""Token types of GGUF that are matched in the text before BPE sees it."""

LONG_TEXT = 16_384
"""Characters from which encoding takes milliseconds: call it from a thread then; the others go on."""

MODELS = ("gpt2",)
"""Values of ``tokenizer.ggml.model`` that can be built."""


def _smollm() -> pre_tokenizers.PreTokenizer:
    # llama.cpp splits at \p{N} and then by GPT-2's rule; ByteLevel holds the latter.
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


PRE_TOKENIZERS = {"smollm": _smollm}
"""How text is cut before BPE, by ``tokenizer.ggml.pre``. Each was held against llama.cpp first."""


def build_tokenizer(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer in a GGUF file's metadata; its ``save(path)`` writes what :meth:`Tokenizer.load` reads.

    Raises UserError when the metadata lacks a key or names a tokenizer that is not supported.
    """
    _supported(metadata, "tokenizer.ggml.model", MODELS)
    pre = _supported(metadata, "tokenizer.ggml.pre", tuple(PRE_TOKENIZERS))
    texts: list[str] = list(_needed(metadata, "tokenizer.ggml.tokens"))
    types: list[int] = list(metadata.get("tokenizer.ggml.token_type", ()))
    merges = [_merge(merge) for merge in _needed(metadata, "tokenizer.ggml.merges")]
    vocabulary = {text: token for token, text in enumerate(texts)}
    if len(vocabulary) != len(texts) or (types and len(types) != len(texts)):
        raise UserError(
            f"tokenizer.ggml.tokens: {len(texts)} tokens, {len(vocabulary)} of them distinct, {len(types)} "
            "types; the three must agree: the model file is damaged"
        )
    built = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    built.pre_tokenizer = PRE_TOKENIZERS[pre]()
    built.decoder = decoders.ByteLevel()
    # add_tokens finds the text in the vocabulary and keeps its id.
    for text, kind in zip(texts, types, strict=False):
        if kind == CONTROL and len(text) < 2:
            raise UserError(
                f"tokenizer.ggml.tokens: control token {text!r} must have at least two characters"
            )
        if kind == CONTROL:
            built.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            built.add_tokens([AddedToken(text, normalized=False)])
    _add_bos(built, metadata, texts)
    return built


def _add_bos(built: tokenizers.Tokenizer, metadata: dict[str, Any], texts: list[str]) -> None:
    if not metadata.get("tokenizer.ggml.add_bos_token", False):
        return
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


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTES = _bytes_of_characters()


class Tokenizer:
    """A loaded tokenizer. It never changes, so threads may share it."""

    def __init__(self, built: tokenizers.Tokenizer) -> None:
        # From here on the library never sees a special token; encode() below finds them.
        built.encode_special_tokens = True
        self._built = built
        self._added = dict(built.get_added_tokens_decoder())
        self._specials = {token.content: id for id, token in self._added.items() if token.special}
        self._split = _alternation(self._specials)
        self._edges = _Edges.of(self._specials)
        self._pieces: dict[int, bytes] = {}
        self.vocabulary = built.get_vocab_size()
        """Ids run from 0 to below this."""
        self.bos: tuple[int, ...] = tuple(built.encode("", add_special_tokens=True).ids)
        """What this model wants before every prompt: one id, or none."""
        self.piece_bytes_max = max(len(self._piece(token)) for token in range(self.vocabulary))
        """No token stands for more bytes, so a text of n bytes has at least n / piece_bytes_max tokens."""

    @classmethod
    def load(cls, tokenizer_json: Path) -> Tokenizer:
        """Read a ``tokenizer.json``. Raises UserError when it cannot be read as one."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(tokenizer_json)))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{tokenizer_json}: not a readable tokenizer.json: {error}") from error

    @property
    def specials(self) -> dict[str, int]:
        """Ids of the special tokens by their text."""
        return self._specials

    def encode(self, text: str, allow_special: bool, mark: str = "") -> list[int]:
        """Token ids of ``text``, without BOS. With ``allow_special``, special tokens written in it count.

        ``mark`` is the character that :meth:`disarm` put into parts of the text; it is taken out again.
        """
        parts = self._split.split(text) if allow_special else [text]
        tokens: list[int] = []
        for index, part in enumerate(parts):
            if index % 2:
                tokens.append(self._specials[part])
            elif part:
                tokens.extend(self._encode_plain(part.replace(mark, "") if mark else part))
        return tokens

    def disarm(self, text: str, mark: str) -> str:
        """``text`` with ``mark`` put in so that no special token can be read in it, nor across its edges.

        What surrounds it may be anything. ``mark`` is one character that occurs in neither.
        """
        # Breaking one token may uncover another that overlapped it. "in" is 20 times as fast as the regex.
        while any(special in text for special in self._specials):
            text = self._split.sub(lambda match: match[0][0] + mark + match[0][1:], text)
        return self._edges.disarm(text, mark)

    def _encode_plain(self, text: str) -> list[int]:
        if len(text) < LONG_TEXT:
            ids: list[int] = self._built.encode(text, add_special_tokens=False).ids
        else:
            # Only the batch call lets other threads run meanwhile.
            ids = self._built.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def decode(self, tokens: Iterable[int], skip_special: bool = True) -> str:
        """The text of ``tokens``; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.piece(token, skip_special) for token in tokens).decode("utf-8", "replace")

    def piece(self, token: int, skip_special: bool = True) -> bytes:
        """The bytes that ``token`` stands for: perhaps a part of a character, nothing for a special token."""
        if (added := self._added.get(token)) is not None:
            return b"" if added.special and skip_special else added.content.encode()
        if (piece := self._pieces.get(token)) is None:
            piece = self._pieces[token] = self._piece(token)
        return piece

    def _piece(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].content.encode()
        text = self._built.id_to_token(token) if token >= 0 else None
        # Models pad their vocabulary: an id without a text can be drawn, and says nothing.
        return b"" if text is None else bytes(_BYTES[character] for character in text)


def _alternation(specials: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(specials, key=len, reverse=True)
    # Without specials the pattern must match nothing at all, the empty string neither.
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "((?!))")


@attrs.frozen
class _Edges:
    """Parts of special tokens that a text may begin or end with: its surroundings could complete them."""

    heads: frozenset[str]
    tails: frozenset[str]
    wholes: tuple[str, ...]
    longest: int

    @classmethod
    def of(cls, specials: Iterable[str]) -> _Edges:
        wholes = tuple(specials)
        heads = frozenset(whole[:cut] for whole in wholes for cut in range(1, len(whole)))
        tails = frozenset(whole[cut:] for whole in wholes for cut in range(1, len(whole)))
        return cls(heads, tails, wholes, max(map(len, wholes), default=0))

    def disarm(self, text: str, mark: str) -> str:
        lengths = range(1, min(len(text), self.longest - 1) + 1)
        begins = any(text[:length] in self.tails for length in lengths)
        ends = any(text[-length:] in self.heads for length in lengths)
        inside = 0 < len(text) <= self.longest and any(text in whole for whole in self.wholes)
        return (mark if begins else "") + text + (mark if ends or inside else "")
