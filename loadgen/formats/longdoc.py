"""Readers of long documents with several questions each: LooGLE, QMSum."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from loadgen.formats.files import Format, Record, Settings, grouped
from loadgen.workload import Message, Session, Turn


def _document(id: str, text: str, pairs: Sequence[tuple[str, str]], settings: Settings) -> Session:
    """A session of one document's questions; each prompt is the document and one question."""
    if settings.document_tokens is not None:
        text = settings.ruler.cut(text, settings.document_tokens)
    turns = [
        Turn(
            (Message("user", f"{text}\n\nQuestion: {question}\nAnswer: "),),
            settings.answer_tokens(answer),
            answer or None,
            settings.think_s if i else 0.0,
            fresh=True,
        )
        for i, (question, answer) in enumerate(pairs[: settings.questions])
    ]
    return Session(id, tuple(turns), plain=True)


def _plain(rows: Sequence[Record], settings: Settings, name: str) -> list[Session]:
    return [
        _document(row["doc_id"], row["text"], [(one["q"], one["a"]) for one in row["questions"]], settings)
        for row in rows
    ]


def _loogle(rows: Sequence[Record], settings: Settings, name: str) -> list[Session]:
    sessions = []
    for i, row in enumerate(rows):
        pairs = row["qa_pairs"]
        if isinstance(pairs, str) and pairs != "none":
            # The copy on Hugging Face has the list as a Python literal in a string.
            pairs = ast.literal_eval(pairs)
        if pairs != "none":
            asked = [(one["Q"], str(one["A"])) for one in pairs]
            sessions.append(_document(f"{name}-{i}", row["input"], asked, settings))
    return sessions


def _loogle_rows(rows: Sequence[Record], settings: Settings, name: str) -> list[Session]:
    return [
        _document(
            f"{name}-{id}",
            group[0]["context"],
            [(one["question"], str(one["answer"])) for one in group],
            settings,
        )
        for id, group in grouped(rows, "doc_id")
    ]


def _qmsum(rows: Sequence[Record], settings: Settings, name: str) -> list[Session]:
    sessions = []
    for i, row in enumerate(rows):
        text = "\n".join(f"{one['speaker']}: {one['content']}" for one in row["meeting_transcripts"])
        queries = row["general_query_list"] + row["specific_query_list"]
        asked = [(one["query"], one["answer"]) for one in queries]
        sessions.append(_document(f"{name}-{i}", text, asked, settings))
    return sessions


FORMATS = (
    Format("documents", frozenset({"doc_id", "text", "questions"}), _plain),
    Format("LooGLE", frozenset({"input", "qa_pairs"}), _loogle),
    Format(
        "LooGLE, one question a row", frozenset({"context", "question", "answer", "doc_id"}), _loogle_rows
    ),
    Format("QMSum", frozenset({"meeting_transcripts"}), _qmsum),
)
