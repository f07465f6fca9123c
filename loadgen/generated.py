"""Workloads that need no data: shared prefixes, prefix shares, and the shapes of the paper's workloads.

The shapes follow figure 7 of the MemServe paper (arXiv 2406.17565): how long prompts and answers are, and how
much of a prompt was in an earlier one. Lengths are drawn from the quantiles below, with straight lines
between them.
"""

from __future__ import annotations

import attrs
import numpy as np
from numpy.typing import NDArray

from loadgen.errors import LoadgenError
from loadgen.workload import Message, Piece, Session, Turn

Rng = np.random.Generator


@attrs.frozen
class Shared:
    """Groups of sessions; the sessions of a group share a prefix."""

    groups: int = 64
    group_size: int = 16
    prefix_tokens: int = 2048
    question_tokens: int = 128
    output_tokens: int = 256
    turns: int = 1
    think_s: float = 0.0


def _user(*pieces: Piece) -> tuple[Message, ...]:
    return (Message("user", tuple(piece for piece in pieces if piece.tokens > 0)),)


def shared_prefix(given: Shared, seed: int) -> list[Session]:
    """``groups`` x ``group_size`` sessions in random order; each later turn adds a question."""
    sessions = []
    for group in range(given.groups):
        prefix = Piece(f"prefix/{group}", given.prefix_tokens)
        for member in range(given.group_size):
            id = f"g{group}-{member}"
            turns = [
                Turn(
                    _user(
                        *([prefix] if turn == 0 else []),
                        Piece(f"question/{id}/{turn}", given.question_tokens),
                    ),
                    given.output_tokens,
                    (Piece(f"answer/{id}/{turn}", given.output_tokens),),
                    given.think_s if turn else 0.0,
                )
                for turn in range(given.turns)
            ]
            sessions.append(Session(id, tuple(turns), plain=True))
    order = np.random.default_rng(seed).permutation(len(sessions))
    return [sessions[i] for i in order]


def prefix_share(requests: int, prompt_tokens: int, output_tokens: int, share: float) -> list[Session]:
    """Single requests of one length whose first ``share`` (0 to 1) is the same in all."""
    if not 0 <= share <= 1:
        raise LoadgenError(f"--share: must be from 0 to 1, not {share}")
    common = round(prompt_tokens * share)
    return [
        Session(
            f"r{i}",
            (
                Turn(
                    _user(Piece("common", common), Piece(f"own/{i}", prompt_tokens - common)),
                    output_tokens,
                    (Piece(f"answer/{i}", output_tokens),),
                ),
            ),
            plain=True,
        )
        for i in range(requests)
    ]


# ---- the paper's workloads -----------------------------------------------------------------------------------


@attrs.frozen
class Curve:
    """A distribution given by its quantiles: ``at`` from 0 to 1, and the token counts there."""

    at: tuple[float, ...]
    tokens: tuple[float, ...]

    def draw(self, rng: Rng, size: int) -> NDArray[np.float64]:
        """Random values, drawn by inversion, float64 [size]."""
        return np.interp(rng.random(size), self.at, self.tokens)


@attrs.frozen
class Shape:
    """A workload of the paper."""

    prompt: Curve
    output: Curve
    turns: tuple[float, ...]
    """Probabilities that a session has 1, 2, 3, ... requests."""
    answer_share: float = 0.0
    """Share of what a prompt adds to the previous one that is the previous answer; fitted to the paper's
    sharing curve."""
    document_share: float | None = None
    """If set, prompts are a document and a question, with the document this share of a typical prompt; None:
    prompts grow from turn to turn."""


QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
SHAPES = {
    "sharegpt-like": Shape(
        Curve(QUANTILES, (4, 27, 633, 1852, 2281, 3157)),
        Curve(QUANTILES, (2, 69, 293, 636, 980, 1043)),
        (0.25, 0.2, 0.15, 0.15, 0.1, 0.1, 0.05),
        answer_share=0.09,
    ),
    "loogle-like": Shape(
        Curve(QUANTILES, (1338, 1586, 1762, 2013, 2741, 2900)),
        Curve(QUANTILES, (1, 10, 21, 43, 73, 99)),
        (0.0, 0.0, 0.0, 0.0, 0.15, 0.7, 0.15),
        document_share=0.98,
    ),
    "react-like": Shape(
        Curve(QUANTILES, (1905, 1917, 2214, 2560, 2867, 3051)),
        Curve(QUANTILES, (10, 59, 131, 316, 459, 538)),
        (0.05, 0.15, 0.2, 0.2, 0.2, 0.1, 0.1),
    ),
}
"""In figure 7 a quarter of ReAct's prompts share nothing: the first call of each session, whose examples are
its own."""


def paper_shape(kind: str, sessions: int, scale: float, think_s: float, seed: int) -> list[Session]:
    """Sessions of one of ``SHAPES``, all lengths times ``scale``."""
    shape, rng = SHAPES[kind], np.random.default_rng(seed)
    counts = rng.choice(np.arange(1, len(shape.turns) + 1), size=sessions, p=shape.turns)
    make = _growing if shape.document_share is None else _document
    return [make(f"{kind}-{i}", int(n), shape, scale, think_s, rng) for i, n in enumerate(counts)]


def _lengths(curve: Curve, rng: Rng, size: int, scale: float) -> list[int]:
    return [max(1, round(one * scale)) for one in curve.draw(rng, size)]


def _growing(id: str, turns: int, shape: Shape, scale: float, think_s: float, rng: Rng) -> Session:
    """A session with prompts of the drawn lengths, shortest first.

    Each prompt is the previous prompt, a part of its answer, and new content. Sorting within a session leaves
    the distribution of all sessions' lengths as drawn.
    """
    prompts = sorted(_lengths(shape.prompt, rng, turns, scale))
    outputs = _lengths(shape.output, rng, turns, scale)
    made: list[Turn] = []
    context = 0
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        new = max(1, prompt - context)
        gap = prompts[i + 1] - prompt if i + 1 < turns else 0
        kept = min(output, int(gap * shape.answer_share))
        answer = (Piece(f"{id}/answer/{i}", kept),) if kept else ()
        made.append(Turn(_user(Piece(f"{id}/{i}", new)), output, answer, think_s if i else 0.0))
        context += new + kept
    return Session(id, tuple(made), plain=True)


def _document(id: str, turns: int, shape: Shape, scale: float, think_s: float, rng: Rng) -> Session:
    """A session of questions about one document, which is all but a few tokens of every prompt."""
    assert shape.document_share is not None
    typical = float(shape.prompt.draw(rng, 1)[0]) * scale
    document = max(1, round(typical * shape.document_share))
    spread = typical * (1 - shape.document_share)
    made = [
        Turn(
            _user(
                Piece(f"{id}/document", document),
                Piece(f"{id}/{i}", max(1, round(spread * (0.5 + rng.random())))),
            ),
            output,
            (Piece(f"{id}/answer/{i}", output),),
            think_s if i else 0.0,
            fresh=True,
        )
        for i, output in enumerate(_lengths(shape.output, rng, turns, scale))
    ]
    return Session(id, tuple(made), plain=True)


def shares(sessions: list[Session]) -> tuple[list[int], list[float]]:
    """For each request: its prompt's tokens, and their share that the previous prompt or answer contains."""
    lengths: list[int] = []
    known: list[float] = []
    for session in sessions:
        context = 0
        for i, turn in enumerate(session.turns):
            pieces = [
                piece for message in turn.messages for piece in message.content if isinstance(piece, Piece)
            ]
            new = sum(piece.tokens for piece in pieces)
            length = new if turn.fresh else context + new
            lengths.append(length)
            known.append((pieces[0].tokens if i else 0) / length if turn.fresh else context / length)
            answer = turn.answer if isinstance(turn.answer, tuple) else ()
            context = length + sum(piece.tokens for piece in answer)
    return lengths, known
