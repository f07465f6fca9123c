"""What a worker's core has to say since the last ``take()``: messages, log lines, counts, and tokens by Frontend."""

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
    """Shared by the parts of one core."""

    counters: dict[str, float] = attrs.field(factory=dict)
    """Running totals since start."""
    _actions: list[Action] = attrs.field(factory=list)
    _updates: dict[ActorId, list[TokenUpdate]] = attrs.field(factory=dict)

    def add(self, action: Action) -> None:
        """Any action."""
        self._actions.append(action)

    def first(self, action: Action) -> None:
        """One that goes before all others: the engine need not wait until what the last step made is sent."""
        self._actions.insert(0, action)

    def send(self, to: ActorId, message: Message) -> None:
        """One message."""
        self._actions.append(Send(to, message))

    def update(self, frontend: ActorId, update: TokenUpdate) -> None:
        """New tokens; all that one step makes for a Frontend leave as one message."""
        self._updates.setdefault(frontend, []).append(update)

    def tell(self, sequences: tuple[Sequence, ...], prompts: Mapping[int, PromptLogprobs]) -> None:
        """What a step has told of its rows' prompts, while ``computed`` is still where each row began. It goes before all tokens."""
        for row, told in prompts.items():
            one = sequences[row]
            if not one.dropped:
                self.send(one.request.frontend, PromptScores(*one.key, one.computed + 1, told))

    def log(self, event: str, one: Sequence, *, level: str = "info", **data: object) -> None:
        """A line about a request."""
        self._actions.append(
            Log(level, event, {"request": one.request.id, "attempt": one.request.attempt, **data})
        )

    def count(self, name: str, amount: float = 1.0) -> None:
        """Add to a counter."""
        self.counters[name] = self.counters.get(name, 0.0) + amount

    def take(self) -> list[Action]:
        """Everything, once: tokens behind what is reported of prompts, and before the sequences that leave with them.

        A Handoff that left first could bring the Frontend a second token before the first, which it takes for a lost one.
        """
        actions, self._actions = self._actions, []
        tokens = [Send(to, Tokens(tuple(updates))) for to, updates in self._updates.items()]
        self._updates.clear()
        return [
            *(one for one in actions if not _hands_over(one)),
            *tokens,
            *(one for one in actions if _hands_over(one)),
        ]


def _hands_over(action: Action) -> bool:
    return isinstance(action, Send) and isinstance(action.message, Handoff)
