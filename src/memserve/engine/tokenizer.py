"""Text to token ids and back, by a tokenizer.json: BPE, byte-level or with byte fallback (SentencePiece's).

Special tokens (``<|im_end|>``) are recognised here and nowhere else. The ``tokenizers`` library is configured
not to recognise them, and this wrapper splits the text at them only where the caller trusts the text. A chat
template's own text is trusted; what a user wrote inside a message is not (:mod:`memserve.api.chat`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path

import attrs
import tokenizers
from tokenizers import models, pre_tokenizers

from memserve.engine import text_cuts
from memserve.engine.known_texts import KnownTexts
from memserve.errors import UserError

LONG_TEXT = 16_384
"""Characters from which encoding takes milliseconds: call it from a thread then, and others keep running."""


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTES = _bytes_of_characters()
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
SPACE = "\u2581"
"""SentencePiece's stand-in for a space."""


class Tokenizer:
    """A loaded tokenizer. Threads may share it: only its caches ever change."""

    def __init__(self, built: tokenizers.Tokenizer) -> None:
        # From here on the library never sees a special token; encode() below finds them.
        built.encode_special_tokens = True
        self._built = built
        self._later = _without_prefix(built)
        self._byte_fallback: bool = built.model.byte_fallback
        self._added = dict(built.get_added_tokens_decoder())
        self._specials = {token.content: id for id, token in self._added.items() if token.special}
        self._take_blanks = any(
            token.lstrip or token.rstrip for token in self._added.values() if token.special
        )
        """Whether blanks beside some special tokens belong to these, as in Phi's tokenizers."""
        self._split = _alternation(self._specials)
        self._firsts = {special[0] for special in self._specials}
        self._edges = _Edges.of(self._specials)
        self._pieces: dict[int, bytes] = {}
        self._known = KnownTexts()
        self._may_be_cut = text_cuts.may_be_cut(built)
        # Not the number of tokens: some tokenizers have gaps in their ids.
        self.vocabulary = 1 + max(built.get_vocab().values(), default=-1)
        """One more than the largest token id."""
        self.bos: tuple[int, ...] = _before_text(built)
        """The ids that this model expects before every prompt: one or none."""
        self.piece_bytes_max = max(len(self._piece(token)) for token in range(self.vocabulary))
        """Longest token in bytes: a text of n bytes has at least n / piece_bytes_max tokens."""

    @classmethod
    def load(cls, tokenizer_json: Path) -> Tokenizer:
        """Load a ``tokenizer.json``. Raises UserError when it is unreadable or not a BPE tokenizer."""
        try:
            built = tokenizers.Tokenizer.from_file(str(tokenizer_json))
            if not isinstance(built.model, models.BPE):
                raise UserError(
                    f"{tokenizer_json}: a tokenizer of type {type(built.model).__name__} is not supported; supported: "
                    "BPE, byte-level or with byte fallback"
                )
            return cls(built)
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{tokenizer_json}: not a readable tokenizer.json: {error}") from error

    @property
    def specials(self) -> dict[str, int]:
        """Special tokens: text to id."""
        return self._specials

    def pieces(self) -> list[bytes]:
        """The bytes of each id; empty for an id without a text."""
        return [self._piece(token) for token in range(self.vocabulary)]

    def encode(self, text: str, allow_special: bool, mark: str = "", scope: str | None = None) -> list[int]:
        """Token ids of ``text``, without BOS. With ``allow_special``, special tokens in it are recognised.

        ``mark`` is the character that :meth:`disarm` inserted into parts of the text; it is removed again.
        With a tenant's ``scope``, the text between special tokens is cached in parts for that tenant's next
        prompts.
        """
        parts = self._split.split(text) if allow_special else [text]
        if self._take_blanks:
            self._drop_blanks(parts)
        tokens: list[int] = []
        for index, part in enumerate(parts):
            if index % 2:
                tokens.append(self._specials[part])
            elif part:
                plain = part.replace(mark, "") if mark else part
                tokens.extend(self._encode_part(plain, index > 0, scope))
        return tokens

    def _drop_blanks(self, parts: list[str]) -> None:
        """Drop the blanks that belong to a special token beside them. Odd parts are special tokens."""
        for at in range(1, len(parts), 2):
            token = self._added[self._specials[parts[at]]]
            parts[at - 1] = parts[at - 1].rstrip() if token.lstrip else parts[at - 1]
            parts[at + 1] = parts[at + 1].lstrip() if token.rstrip else parts[at + 1]

    def _encode_part(self, text: str, later: bool, scope: str | None) -> Iterable[int]:
        encode = partial(_encode_plain, self._later if later else self._built, len(text) >= LONG_TEXT)
        if scope is None:
            return encode(text)
        parts = text_cuts.parts(text) if self._may_be_cut else (text,)
        return chain.from_iterable(self._known.tokens(scope, later, part, encode) for part in parts)

    def disarm(self, text: str, mark: str) -> str:
        """``text`` with ``mark`` inserted so that no special token is recognised in it or across its edges.

        The surrounding text is arbitrary. ``mark`` is one character that occurs neither in it nor in
        ``text``.
        """
        # Breaking one token may uncover another that overlapped it.
        while self._has_special(text):
            text = self._split.sub(lambda match: match[0][0] + mark + match[0][1:], text)
        return self._edges.disarm(text, mark)

    def _has_special(self, text: str) -> bool:
        # "in" is 20 times as fast as the regex. Most texts have not even a special token's first character,
        # mostly "<".
        may = any(first in text for first in self._firsts)
        return may and any(special in text for special in self._specials)

    def decode(self, tokens: Iterable[int], skip_special: bool = True) -> str:
        """The text of ``tokens``; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.piece(token, skip_special) for token in tokens).decode("utf-8", "replace")

    def piece(self, token: int, skip_special: bool = True) -> bytes:
        """The bytes of ``token``, perhaps part of a character; empty for a special token that is skipped."""
        if (added := self._added.get(token)) is not None:
            return b"" if added.special and skip_special else added.content.encode()
        if (piece := self._pieces.get(token)) is None:
            piece = self._pieces[token] = self._piece(token)
        return piece

    def written(self, token: int) -> str:
        """``token`` as the vocabulary spells it: a space may be ``\u0120``; empty for an id without text."""
        return self._built.id_to_token(token) or ""

    def _piece(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].content.encode()
        text = self._built.id_to_token(token) if token >= 0 else None
        # Models pad their vocabulary: an id without a text can be drawn, and decodes to nothing.
        if text is None:
            return b""
        if not self._byte_fallback:
            return bytes(_BYTES[character] for character in text)
        byte = _BYTE_TOKEN.fullmatch(text)
        return bytes([int(byte[1], 16)]) if byte else text.replace(SPACE, " ").encode()


def _encode_plain(built: tokenizers.Tokenizer, in_a_thread: bool, text: str) -> list[int]:
    if not in_a_thread:
        ids: list[int] = built.encode(text, add_special_tokens=False).ids
    else:
        # Only the batch call lets other threads run at the same time.
        ids = built.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def _before_text(built: tokenizers.Tokenizer) -> tuple[int, ...]:
    plain = built.encode("a", add_special_tokens=False).ids
    whole = built.encode("a", add_special_tokens=True).ids
    starts = (at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return tuple(whole[: next(starts, 0)])


def _without_prefix(built: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer for text after a special token: some prepend a space only at the very start of a text."""
    cut = built.pre_tokenizer
    if not isinstance(cut, pre_tokenizers.Metaspace) or cut.prepend_scheme != "first":
        return built
    later = tokenizers.Tokenizer.from_str(built.to_str())
    later.encode_special_tokens = True
    later.pre_tokenizer = pre_tokenizers.Metaspace(cut.replacement, "never", cut.split)
    return later


def _alternation(specials: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(specials, key=len, reverse=True)
    # Without specials the pattern must never match, not even the empty string.
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "((?!))")


@attrs.frozen
class _Edges:
    """Parts of special tokens that the surroundings of a text could complete."""

    heads: frozenset[str]
    tails: frozenset[str]
    wholes: str
    """All special tokens, joined by a character that occurs in none of them."""
    longest: int

    @classmethod
    def of(cls, specials: Iterable[str]) -> _Edges:
        wholes = tuple(specials)
        heads = frozenset(whole[:cut] for whole in wholes for cut in range(1, len(whole)))
        tails = frozenset(whole[cut:] for whole in wholes for cut in range(1, len(whole)))
        return cls(heads, tails, "\0".join(wholes), max(map(len, wholes), default=0))

    def disarm(self, text: str, mark: str) -> str:
        lengths = range(1, min(len(text), self.longest - 1) + 1)
        begins = any(text[:length] in self.tails for length in lengths)
        ends = any(text[-length:] in self.heads for length in lengths)
        inside = 0 < len(text) <= self.longest and text in self.wholes
        return (mark if begins else "") + text + (mark if ends or inside else "")
