"""Prompts: what is sent of a conversation at each turn, as text, token ids or messages."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import attrs
import orjson

from loadgen.content import Filler
from loadgen.errors import LoadgenError
from loadgen.workload import Content, Message, Role, Session, Turn

Endpoint = Literal["completions", "chat"]
Form = Literal["ids", "text"]
Answers = Literal["recorded", "own"]

LABELS = {"system": "", "user": "User: ", "assistant": "Assistant: ", "tool": "Tool: "}


@attrs.frozen
class Style:
    """How prompts are written; part of what makes two runs comparable."""

    endpoint: Endpoint = "completions"
    form: Form = "text"
    """The form of generated content: token ids, where the server takes them, or words."""
    answers: Answers = "recorded"
    """Which answer a conversation continues with: the recorded one (prompts never vary) or the model's."""
    salt: str = ""
    """Text that changes the beginning of every session, so that a server that has seen the workload has not
    cached it."""


@attrs.frozen
class Own:
    """The model's own answer to a turn."""

    text: str
    ids: tuple[int, ...] | None = None


@attrs.define
class Conversation:
    """One session while it is played: for each turn call ``prompt``, then ``answered``."""

    session: Session
    style: Style
    filler: Filler
    _said: list[tuple[Role, Content | Own]] = attrs.field(factory=list, init=False)

    def prompt(self, turn: Turn) -> dict[str, Any]:
        """The body's ``prompt`` or ``messages`` for a turn; the turn becomes part of the conversation."""
        if turn.fresh:
            self._said.clear()
        self._said += [(message.role, message.content) for message in turn.messages]
        if self.style.endpoint == "chat":
            return {"messages": self._messages()}
        return {"prompt": self._ids() if self._takes_ids() else self._text()}

    def answered(self, turn: Turn, own: Own) -> None:
        """Append the answer: the recorded one if it is wanted and known, otherwise the model's own."""
        recorded = turn.answer if self.style.answers == "recorded" else None
        self._said.append(("assistant", own if recorded is None else recorded))

    def _takes_ids(self) -> bool:
        return self.style.form == "ids" and all(not isinstance(one, str) for _, one in self._said)

    def _ids(self) -> list[int]:
        ids: list[int] = []
        for _, content in self._said:
            if isinstance(content, Own):
                if content.ids is None:
                    raise LoadgenError(NO_IDS)
                ids += content.ids
            elif not isinstance(content, str):
                for piece in content:
                    ids += self.filler.ids(piece).tolist()
        return ids

    def _words(self, content: Content | Own) -> str:
        if isinstance(content, Own):
            return content.text
        if isinstance(content, str):
            return content
        return "".join(self.filler.text(piece) for piece in content)

    def _text(self) -> str:
        parts = [(role, text) for role, content in self._said if (text := self._words(content))]
        if self.session.plain:
            text = "".join(content for _, content in parts)
        else:
            text = "".join(f"{LABELS[role]}{content}\n" for role, content in parts) + LABELS["assistant"]
        return self._salted(text)

    def _salted(self, text: str) -> str:
        # Generated pieces are salted by the Filler.
        recorded = any(isinstance(one, str) for _, one in self._said)
        return f"[{self.style.salt}] {text}" if self.style.salt and recorded else text

    def _messages(self) -> list[dict[str, str]]:
        """Join adjacent messages of a role: servers' templates want user and assistant to alternate."""
        joined: list[dict[str, str]] = []
        for role, content in self._said:
            text = self._words(content)
            if not text:
                continue
            known = "user" if role == "tool" else role
            if joined and joined[-1]["role"] == known:
                joined[-1]["content"] += text if self.session.plain else f"\n{text}"
            else:
                joined.append({"role": known, "content": text})
        if not joined:
            joined.append({"role": "user", "content": ""})
        joined[0]["content"] = self._salted(joined[0]["content"])
        return joined


NO_IDS = (
    "the server sent no token ids with its answers, which --answers own needs where prompts are token ids: "
    "use --prompts text or --answers recorded"
)


def digest(prompt: dict[str, Any]) -> str:
    """A short digest of a prompt as it is sent, to check whether two runs asked the same."""
    return hashlib.sha256(orjson.dumps(prompt)).hexdigest()[:16]


def one_turn(id: str, content: Content, output_tokens: int, **more: Any) -> Session:
    """A session of one plain request."""
    return Session(id, (Turn((Message("user", content),), output_tokens),), plain=True, **more)
