"""Readers of agent workloads: few-shot prefixes, and contexts that grow with every call."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from loadgen.errors import LoadgenError
from loadgen.formats import chat
from loadgen.formats.files import Format, Record, Settings, grouped
from loadgen.workload import Message, Session, Turn

TRIAL = re.compile(r"BEGIN TRIAL (\d+)")
BLOCK = re.compile(r"^(?:Question|Claim):", re.M)
STEP = re.compile(r"^Observation \d+:", re.M)


def few_shot(settings: Settings, name: str) -> str:
    """The few-shot prefix of this name. Raises LoadgenError if --prefixes does not have it."""
    if name in settings.prefixes:
        return settings.prefixes[name]
    have = ", ".join(settings.prefixes) or "none"
    raise LoadgenError(f"--prefixes: has no prefix {name!r}; it has {have}. Give a JSON file of name: text")


def _react(id: str, opening: str, steps: Sequence[tuple[str, str]], settings: Settings) -> Session:
    """The calls of a ReAct agent: prefix and task, then after each call its output and the observation."""
    turns, add = [], opening
    for i, (output, observation) in enumerate(steps):
        turns.append(
            Turn(
                (Message("user", add),),
                settings.answer_tokens(output),
                output,
                settings.think_s if i else 0.0,
            )
        )
        add = f"\n{observation}\n"
    return Session(id, tuple(turns), plain=True)


def _trajectories(rows: Sequence[Record], settings: Settings, name: str) -> list[Session]:
    sessions = []
    for i, row in enumerate(rows):
        if settings.trial is None or row.get("trial") == settings.trial:
            opening = f"{few_shot(settings, row['prefix'])}{row['task']}\n"
            steps = [(one["output"], one["observation"] or "") for one in row["steps"]]
            sessions.append(_react(str(row.get("session", f"{name}-{i}")), opening, steps, settings))
    return sessions


def _tasks(rows: Sequence[Record], settings: Settings, name: str) -> list[Session]:
    sessions = []
    for i, row in enumerate(rows):
        turn = Turn(
            (Message("user", f"{few_shot(settings, row['prefix'])}{row['task']}\n"),), settings.output_tokens
        )
        sessions.append(Session(f"{name}-{i}", (turn,), plain=True))
    return sessions


def _reflexion(rows: Sequence[Record], settings: Settings, name: str) -> list[Session]:
    """Transcripts of reflexion's runs: blocks of Question or Claim, Thought, Action and Observation lines."""
    prefix = ""
    if settings.prefixes:
        prefix = few_shot(settings, settings.prefix or next(iter(settings.prefixes)))
    parts = TRIAL.split(rows[0]["transcript"])
    if len(parts) < 3:
        raise ValueError("no 'BEGIN TRIAL'")
    sessions = []
    for trial, text in zip(parts[1::2], parts[2::2], strict=True):
        if settings.trial is not None and int(trial) != settings.trial:
            continue
        starts = [*(found.start() for found in BLOCK.finditer(text)), len(text)]
        for i, (start, end) in enumerate(pairwise(starts)):
            task, _, said = text[start:end].partition("\n")
            steps = _steps(said)
            if steps:
                sessions.append(_react(f"{name}-t{trial}-{i}", f"{prefix}{task}\n", steps, settings))
    return sessions


def _steps(said: str) -> list[tuple[str, str]]:
    """Pairs of what the model wrote and what it then observed."""
    steps = []
    starts = [found.start() for found in STEP.finditer(said)]
    begin = 0
    for start, following in zip(starts, [*starts[1:], len(said)], strict=True):
        thought = re.compile(r"^Thought \d+:", re.M).search(said, start)
        end = thought.start() if thought and thought.start() < following else following
        steps.append((said[begin:start].strip(), said[start:end].strip()))
        begin = end
    return [one for one in steps if one[0]]


def _calls(rows: Sequence[Record], settings: Settings, name: str) -> list[Session]:
    """Logged calls, where each prompt is a prefix of an earlier prompt plus new text."""
    sessions = []
    for i, row in enumerate(rows):
        prompts: list[str] = []
        turns = []
        for number, call in enumerate(row["calls"]):
            base = prompts[call["base"]][: call["keep"]] if call["base"] >= 0 else ""
            prompts.append(base + call["add"])
            turns.append(_logged(prompts[-1], call["output"], number, settings))
        sessions.append(Session(str(row.get("session", f"{name}-{i}")), tuple(turns), plain=True))
    return sessions


def _logged(prompt: str, output: str, number: int, settings: Settings) -> Turn:
    think_s = settings.think_s if number else 0.0
    return Turn(
        (Message("user", prompt),), settings.answer_tokens(output), output or None, think_s, fresh=True
    )


def _logs(rows: Sequence[Record], settings: Settings, name: str) -> list[Session]:
    """LMCache's agent traces: one line per call, with its whole input."""
    sessions = []
    for id, group in grouped(rows, "session_id"):
        calls = sorted(group, key=lambda row: float(row["timestamp"]))
        turns = [_logged(row["input"], row["output"], i, settings) for i, row in enumerate(calls)]
        sessions.append(Session(id, tuple(turns), plain=True))
    return sessions


FORMATS = (
    Format("tau-bench", frozenset({"traj"}), chat.messages),
    Format("OpenAI messages", frozenset({"messages"}), chat.messages),
    Format("ReAct trajectories", frozenset({"prefix", "task", "steps"}), _trajectories),
    Format("ReAct tasks", frozenset({"prefix", "task"}), _tasks),
    Format("reflexion transcripts", frozenset({"transcript"}), _reflexion),
    Format("calls", frozenset({"calls"}), _calls),
    Format("LMCache agent traces", frozenset({"session_id", "input", "output", "timestamp"}), _logs),
)
