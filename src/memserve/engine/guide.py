"""Fills in, before a step or a late draw, which tokens the grammars of its rows allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import attrs

from memserve.engine.plans import BatchPlan, Row


class GrammarMasks(Protocol):
    """A follower of grammars, see :class:`~memserve.engine.grammars.Grammars`."""

    def allowed(self, grammar: str, output: bytes) -> bytes:
        """Bit mask of the tokens that may come after ``output``; at least one bit is set."""

    def ahead(
        self, grammar: str, output: bytes, allowed: bytes, guess: bytes, most: int
    ) -> tuple[bytes, tuple[bytes, ...]]:
        """At most ``most`` tokens after ``output``, forced or rightly guessed, and the mask after each."""


@attrs.define
class Guide:
    """One worker's grammar masks. The follower is created for the first row with a grammar."""

    _make: Callable[[], GrammarMasks]
    _made: GrammarMasks | None = None

    def filled(self, plan: BatchPlan) -> BatchPlan:
        """The plan with masks for rows that follow grammars, and drafts of the tokens that these force.

        Rows that draw late are left as they are until their tokens are known: see :meth:`filled_late`.
        """
        if not any(_grammar(row) for row in plan.rows):
            return plan
        return attrs.evolve(plan, rows=tuple(map(self._row, plan.rows)))

    def filled_late(self, plan: BatchPlan, before: Sequence[int | None]) -> dict[int, Row]:
        """The :meth:`~memserve.engine.plans.BatchPlan.late_rows` of the plan, with masks like ``filled``."""
        return {number: self._row(row) for number, row in plan.late_rows(before).items()}

    def _row(self, row: Row) -> Row:
        grammar, past = _grammar(row), row.past
        if not grammar or past is None or row.late:
            return row
        if self._made is None:
            self._made = self._make()
        grammars = self._made
        allowed = grammars.allowed(grammar, past.output)
        draft, then = grammars.ahead(grammar, past.output, allowed, row.draft, row.draft_most)
        return attrs.evolve(row, draft=draft, past=attrs.evolve(past, allowed=allowed, then=then))


def _grammar(row: Row) -> str:
    return row.sample.adjust.grammar if row.sample is not None and row.sample.adjust is not None else ""
