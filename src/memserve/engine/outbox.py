"""A worker core's output since the last ``take()``: messages, log lines, counters, and tokens by Frontend."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from memserve.actions import Action, Log, Send
from memserve.drawing import PromptLogprobs
from memserve.engine.sequence import Sequence
from memserve.identity import ActorId
from memserve.messages import Handoff, Message, PromptScores, Tokens, TokenUpdate


@attrs.define
class Outbox:
    """Collects the actions of one core; the core's parts share it."""

    counters: dict[str, float] = attrs.field(factory=dict)
    """Running totals since start."""
    _first: list[Action] = attrs.field(factory=list)
    _actions: list[Action] = attrs.field(factory=list)
    _updates: dict[ActorId, list[TokenUpdate]] = attrs.field(factory=dict)

    def add(self, action: Action) -> None:
        """Append an action of any kind."""
        self._actions.append(action)

    def first(self, action: Action) -> None:
        """Put an action before all others, so that the engine need not wait for the last step's messages.

        Several of them keep their order.
        """
        self._first.append(action)

    def send(self, to: ActorId, message: Message) -> None:
        """Append one message."""
        self._actions.append(Send(to, message))

    def update(self, frontend: ActorId, update: TokenUpdate) -> None:
        """Add new tokens; all updates of a step for one Frontend leave as one message."""
        self._updates.setdefault(frontend, []).append(update)

    def report_scores(self, sequences: tuple[Sequence, ...], prompts: Mapping[int, PromptLogprobs]) -> None:
        """Send the prompt log probabilities that a step reported; they leave before all tokens.

        Call it while each sequence's ``computed`` is still its row's start.
        """
        for row, scores in prompts.items():
            one = sequences[row]
            if not one.dropped:
                self.send(one.request.frontend, PromptScores(*one.key, one.computed + 1, scores))

    def log(self, event: str, one: Sequence, *, level: str = "info", **data: object) -> None:
        """Append a log line about a request."""
        self._actions.append(
            Log(level, event, {"request": one.request.id, "attempt": one.request.attempt, **data})
        )

    def count(self, name: str, amount: float = 1.0) -> None:
        """Add to a counter."""
        self.counters[name] = self.counters.get(name, 0.0) + amount

    def take(self) -> list[Action]:
        """All actions since the last call: tokens after reported log probabilities, and handoffs last.

        If a Handoff left before the first token, the decode worker's token could reach the Frontend first.
        """
        first, self._first = self._first, []
        actions, self._actions = self._actions, []
        tokens = [Send(to, Tokens(tuple(updates))) for to, updates in self._updates.items()]
        self._updates.clear()
        return [
            *first,
            *(one for one in actions if not _hands_over(one)),
            *tokens,
            *(one for one in actions if _hands_over(one)),
        ]


def _hands_over(action: Action) -> bool:
    return isinstance(action, Send) and isinstance(action.message, Handoff)
