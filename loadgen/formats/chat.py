"""Readers of multi-turn chats: ShareGPT and similar formats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from loadgen.formats.files import Format, Record, Settings
from loadgen.workload import Message, Role, Session, Turn

ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant",
    "bing": "assistant", "assistant": "assistant", "bot": "assistant", "model": "assistant", "system": "system",
    "tool": "tool", "function": "tool", "observation": "tool", "assistant_tool_call": "assistant",
    "function_call": "assistant",
}  # fmt: skip
"""Roles, by the names that datasets give them."""


def dialogue(id: str, said: Iterable[tuple[Role, str]], settings: Settings) -> Session:
    """A session with a turn for every answer; messages after the last answer are dropped as unanswered."""
    turns: list[Turn] = []
    waiting: list[Message] = []
    for role, text in said:
        if role != "assistant":
            waiting.append(Message(role, text))
        elif waiting:
            think_s = settings.think_s if turns else 0.0
            turns.append(Turn(tuple(waiting), settings.answer_tokens(text), text or None, think_s))
            waiting = []
        elif turns:
            # Two answers in a row are one answer in two parts.
            whole = f"{turns[-1].answer}\n{text}"
            turns[-1] = attrs.evolve(turns[-1], answer=whole, output_tokens=settings.answer_tokens(whole))
    return Session(id, tuple(turns))


def asked(id: str, pairs: Sequence[tuple[str, str | None]], settings: Settings) -> Session:
    """A session of questions with answers, some of which may be unknown."""
    turns = [
        Turn(
            (Message("user", user),),
            settings.answer_tokens(answer),
            answer or None,
            settings.think_s if i else 0.0,
        )
        for i, (user, answer) in enumerate(pairs)
    ]
    return Session(id, tuple(turns))


def _sharegpt(rows: Sequence[Record], settings: Settings, name: str) -> list[Session]:
    return [
        dialogue(
            str(row.get("id", f"{name}-{i}")),
            [(ROLES[one["from"]], one["value"]) for one in row["conversations"]],
            settings,
        )
        for i, row in enumerate(rows)
    ]


def messages(rows: Sequence[Record], settings: Settings, name: str) -> list[Session]:
    """OpenAI's messages; tool calls become lines of ``name(arguments)`` after the message's text."""
    sessions = []
    for i, row in enumerate(rows):
        said: list[tuple[Role, str]] = [("system", row["tools"])] if row.get("tools") else []
        said += [(ROLES[one["role"]], _spoken(one)) for one in row.get("messages") or row["traj"]]
        sessions.append(dialogue(_id(row, name, i), said, settings))
    return sessions


def _id(row: Record, name: str, index: int) -> str:
    if "task_id" in row:
        return f"{name}-{row['task_id']}-{row.get('trial', index)}"
    return str(row.get("session", row.get("id", f"{name}-{index}")))


def _spoken(message: Record) -> str:
    # Some copies of the data sets leave out the ``function`` wrapper.
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    called = "\n".join(f"{one['name']}({one['arguments']})" for one in calls)
    return "\n".join(filter(None, (message.get("content"), called)))


def _turns(rows: Sequence[Record], settings: Settings, name: str) -> list[Session]:
    sessions = []
    for i, row in enumerate(rows):
        turns = row["turns"]
        id = str(row.get("session", row.get("dialogue_id", row.get("question_id", f"{name}-{i}"))))
        if isinstance(turns[0], str):
            # MT-Bench: questions, some with reference answers.
            known = (row.get("reference") or []) + [None] * len(turns)
            sessions.append(asked(id, list(zip(turns, known, strict=False)), settings))
        elif "utterance" in turns[0]:
            said: list[tuple[Role, str]] = [
                ("user" if one["speaker"] == "USER" else "assistant", one["utterance"]) for one in turns
            ]
            sessions.append(dialogue(id, said, settings))
        else:
            sessions.append(asked(id, [(one["user"], one["assistant"]) for one in turns], settings))
    return sessions


def _history(rows: Sequence[Record], settings: Settings, name: str) -> list[Session]:
    return [
        asked(f"{name}-{row.get('id', i)}", [(one["user"], one["bot"]) for one in row["history"]], settings)
        for i, row in enumerate(rows)
    ]


def _rounds(rows: Sequence[Record], settings: Settings, name: str) -> list[Session]:
    """Prompts that grow by ``add``, which includes the answers: the whole prompt of each round is known."""
    sessions = []
    for i, row in enumerate(rows):
        prompt, turns = "", []
        for number, one in enumerate(row["rounds"]):
            prompt += one["add"]
            think_s = settings.think_s if number else 0.0
            turns.append(
                Turn((Message("user", prompt),), int(one["output_length"]), think_s=think_s, fresh=True)
            )
        sessions.append(Session(str(row.get("session", f"{name}-{i}")), tuple(turns), plain=True))
    return sessions


def _single(rows: Sequence[Record], settings: Settings, name: str) -> list[Session]:
    sessions = []
    for i, row in enumerate(rows):
        length = int(row["output_toks"]) if "output_toks" in row else settings.answer_tokens(row["output"])
        turn = Turn((Message("user", row["prompt"]),), max(1, length), row["output"] or None)
        at_s = row["t_ms"] / 1000 if "t_ms" in row else None
        sessions.append(Session(str(row.get("id", f"{name}-{i}")), (turn,), plain=True, at_s=at_s))
    return sessions


FORMATS = (
    Format("ShareGPT", frozenset({"conversations"}), _sharegpt),
    Format("MT-Bench-101", frozenset({"history"}), _history),
    Format("growing prompts", frozenset({"rounds"}), _rounds),
    Format("turns (MT-Bench, Schema-Guided Dialogue, user and assistant)", frozenset({"turns"}), _turns),
    Format("OpenAI messages", frozenset({"messages"}), messages),
    Format("prompt and output", frozenset({"prompt", "output"}), _single),
)
