"""Step engines without a model: which tokens a step draws, and default costs of a step in virtual seconds.

:class:`PageEngine` has real pages: it writes a stand-in for each token's KV into the page that the plan
names, and draws the next token from what the pages hold for the whole sequence. A page that was freed too
early, shared wrongly or not filled therefore shows as a wrong token, as it would with a model.
:class:`DrawEngine` draws from the last token alone, for runs too large to track every page.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Protocol

import attrs

from memserve.costs import StepCosts
from memserve.engine.plans import BatchPlan, Row
from memserve.scheduling.cost_model import LINKS, CostModel, LinkModel
from memserve.sim.pages import Slots, content_of
from memserve.tokens import TOKEN_BYTES, count

FIRST_TOKEN = 2
"""Token ids below it are never drawn: tests use them as stop tokens."""
TOKENS = 50_000


PAPER = CostModel(
    StepCosts(
        dense=((1, 0.0113), (300, 0.0113), (10_300, 0.3613)), row_s=20e-6, read_s=0.12e-6, pair_s=2e-9, chunk_tokens=512,
        token_bytes=820_000,
    ),
    links={**LINKS, "mapped": LinkModel(0.001, 1 / 100e9)},
)  # fmt: skip
"""Costs of a 13B model on two H800, set from the paper's TTFT and TPOT at low load: reading the weights takes
as long as computing 300 tokens. Pages move over NVLink, at a quarter of its speed. The default if no other
costs are given."""


def shape(plan: BatchPlan) -> list[tuple[int, int]]:
    """The rows of a plan as :meth:`CostModel.step_s` takes them: (tokens, position of the first)."""
    return [(count(row.tokens), row.start) for row in plan.rows]


def next_token(content: bytes, seed: int) -> int:
    """The stand-in model's token after a sequence with this content (``pages.content_of``).

    Any change to the content changes the token.
    """
    digest = hashlib.blake2b(content, digest_size=4, salt=seed.to_bytes(8, "little")).digest()
    return FIRST_TOKEN + int.from_bytes(digest, "little") % TOKENS


def drawn_token(last: bytes, end: int, seed: int) -> int:
    """The next token as a function of the last token alone, its end position and the request's seed."""
    return FIRST_TOKEN + zlib.crc32(last + end.to_bytes(4, "little") + seed.to_bytes(8, "little")) % TOKENS


class Engine(Protocol):
    """Runs the rows of a step."""

    def draw(self, plan: BatchPlan) -> tuple[int | None, ...]:
        """The tokens of a step, one per row; None for a row that draws none."""


@attrs.define(eq=False)
class PageEngine:
    """Draws from the pages of one shard, which all of its workers share."""

    page_bytes: int
    arena: Slots

    def draw(self, plan: BatchPlan) -> tuple[int | None, ...]:
        return tuple(self._row(row) for row in plan.rows)

    def _row(self, row: Row) -> int | None:
        width, at, end = self.page_bytes, row.start * TOKEN_BYTES, row.end * TOKEN_BYTES
        source, content = 0, content_of(row.tokens, self._before(row))
        while at < end:
            inside = at % width
            piece = min(width - inside, end - at)
            page = self.arena[row.pages[at // width]]
            page[inside : inside + piece] = content[source : source + piece]
            at, source = at + piece, source + piece
        if row.sample is None:
            return None
        whole = b"".join(self.arena[page] for page in row.pages[: -(-end // width)])
        return next_token(whole[:end], row.sample.seed)

    def _before(self, row: Row) -> bytes:
        """What the pages hold for the token before a row's first; empty if there is none."""
        page, inside = divmod((row.start - 1) * TOKEN_BYTES, self.page_bytes)
        return bytes(self.arena[row.pages[page]][inside : inside + TOKEN_BYTES]) if row.start else b""


class DrawEngine:
    """Draws without pages."""

    def draw(self, plan: BatchPlan) -> tuple[int | None, ...]:
        return tuple(
            None if row.sample is None else drawn_token(row.tokens[-TOKEN_BYTES:], row.end, row.sample.seed)
            for row in plan.rows
        )
