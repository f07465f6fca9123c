"""Every published file format is read, from small files that are made here in that format."""

from __future__ import annotations

import gzip
import json

import pytest

from loadgen import build
from loadgen.content import Filler
from loadgen.conversation import Conversation, Own, Style
from loadgen.errors import LoadgenError
from loadgen.options import WorkloadOptions
from loadgen.workload import Session


def lines(*records) -> str:
    """JSON lines of the records."""
    return "".join(json.dumps(one) + "\n" for one in records)


def read(tmp_path, kind: str, text: str, name: str = "file.jsonl", **chosen) -> tuple[Session, ...]:
    """The sessions of a file with this text."""
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return build.workload(kind, WorkloadOptions(data=(path,), **chosen)).sessions


def prompts(session: Session, **style) -> list:
    """What is sent at each turn, with the recorded answers, or ``own`` where there are none."""
    conversation = Conversation(session, Style(**style), Filler())
    found = []
    for turn in session.turns:
        found.append(next(iter(conversation.prompt(turn).values())))
        conversation.answered(turn, Own("own"))
    return found


CHATS = {
    "ShareGPT": json.dumps(
        [
            {
                "id": "a",
                "conversations": [
                    {"from": "gpt", "value": "an answer that nobody asked for"},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                    {"from": "human", "value": "Bye"},
                    {"from": "gpt", "value": "See you"},
                    {"from": "human", "value": "never answered"},
                ],
            }
        ]
    ),
    "user and assistant": lines(
        {
            "session": "a",
            "turns": [{"user": "Hi", "assistant": "Hello"}, {"user": "Bye", "assistant": "See you"}],
        }
    ),
    "MT-Bench-101": lines(
        {
            "task": "CM",
            "id": 1,
            "history": [{"user": "Hi", "bot": "Hello"}, {"user": "Bye", "bot": "See you"}],
        }
    ),
    "MT-Bench": lines(
        {"question_id": 81, "category": "writing", "turns": ["Hi", "Bye"], "reference": ["Hello", "See you"]}
    ),
    "Schema-Guided Dialogue": json.dumps(
        [
            {
                "dialogue_id": "1_0",
                "services": ["Buses_1"],
                "turns": [
                    {"speaker": "USER", "utterance": "Hi", "frames": []},
                    {"speaker": "SYSTEM", "utterance": "Hello", "frames": []},
                    {"speaker": "USER", "utterance": "Bye", "frames": []},
                    {"speaker": "SYSTEM", "utterance": "See you", "frames": []},
                ],
            }
        ]
    ),
    "OpenAI messages": lines(
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "Bye"},
                {"role": "assistant", "content": "See you"},
            ]
        }
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_chats_are_read_as_they_are_published(tmp_path, name):
    """Each format of chats gives the same conversation, as a completion prompt and as chat messages."""
    suffix = "json" if CHATS[name].startswith("[") else "jsonl.gz"
    (session,) = read(tmp_path, "chat", CHATS[name], f"chats.{suffix}")
    assert prompts(session) == [
        "User: Hi\nAssistant: ",
        "User: Hi\nAssistant: Hello\nUser: Bye\nAssistant: ",
    ]
    assert prompts(session, endpoint="chat")[1] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    assert prompts(session, answers="own")[1] == "User: Hi\nAssistant: own\nUser: Bye\nAssistant: "
    assert [turn.output_tokens for turn in session.turns] == [1, 2]


def test_questions_without_answers_get_the_length_that_is_asked_for(tmp_path):
    """Questions without recorded answers get answers of the chosen length."""
    text = lines({"question_id": 81, "turns": ["Hi", "Bye"]})
    (session,) = read(tmp_path, "chat", text, output_tokens=33)
    assert [turn.output_tokens for turn in session.turns] == [33, 33]
    assert prompts(session)[1] == "User: Hi\nAssistant: own\nUser: Bye\nAssistant: "


def test_growing_prompts_and_single_prompts(tmp_path):
    """Records whose rounds add to one prompt, and records of a single prompt, are read with their lengths."""
    text = lines(
        {"session": "a", "rounds": [{"add": "one", "output_length": 3}, {"add": " two", "output_length": 4}]}
    )
    (session,) = read(tmp_path, "chat", text)
    assert prompts(session) == ["one", "one two"]
    assert [turn.output_tokens for turn in session.turns] == [3, 4]
    text = lines({"id": "x", "t_ms": 46, "prompt": "p", "output": "o", "input_toks": 1, "output_toks": 77})
    (session,) = read(tmp_path, "chat", text)
    assert session.at_s == 0.046 and session.turns[0].output_tokens == 77


QA = [{"Q": "Who?", "A": "He", "S": ["evidence"]}, {"Q": "When?", "A": "Then", "S": []}]
DOCUMENTS = {
    "sample": lines(
        {
            "doc_id": "d",
            "text": "A: text.",
            "questions": [{"q": "Who?", "a": "He"}, {"q": "When?", "a": "Then"}],
        }
    ),
    "LooGLE": lines({"input": "A: text.", "title": "T", "qa_pairs": QA, "output": "none"}),
    "LooGLE on Hugging Face": lines(
        {"input": "A: text.", "title": "T", "qa_pairs": str(QA), "output": "none"}
    ),
    "LooGLE by rows": lines(
        {"context": "A: text.", "question": "Who?", "answer": "He", "doc_id": "d"},
        {"context": "A: text.", "question": "When?", "answer": "Then", "doc_id": "d"},
    ),
    "QMSum": lines(
        {
            "topic_list": [],
            "general_query_list": [{"query": "Who?", "answer": "He"}],
            "specific_query_list": [{"query": "When?", "answer": "Then", "relevant_text_span": [["0", "1"]]}],
            "meeting_transcripts": [{"speaker": "A", "content": "text."}],
        }
    ),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_are_read_as_they_are_published(tmp_path, name):
    """Each format of documents gives prompts that share the document and differ in the question."""
    (session,) = read(tmp_path, "longdoc", DOCUMENTS[name])
    assert prompts(session) == [
        "A: text.\n\nQuestion: Who?\nAnswer: ",
        "A: text.\n\nQuestion: When?\nAnswer: ",
    ]
    (session,) = read(tmp_path, "longdoc", DOCUMENTS[name], document_tokens=1, questions=1)
    assert prompts(session) == ["A: t\n\nQuestion: Who?\nAnswer: "]


REFLEXION = """
########################################
BEGIN TRIAL 1
Trial summary: Correct: 1, Incorrect: 0, Halted: 0
#######################################
------------- BEGIN CORRECT AGENTS -------------

Question: Who?
Thought 1: I search.
Action 1: Search[him]
Observation 1: He is
a person.
Thought 2: I know.
Action 2: Finish[He]
Observation 2: Answer is CORRECT
Correct answer: He

########################################
BEGIN TRIAL 2
Question: When?
Thought 1: Now.
Action 1: Finish[now]
Observation 1: Answer is INCORRECT
"""


def test_reflexion_transcripts(tmp_path):
    """Transcripts of Reflexion, which the MemServe paper's ReAct workload replays, are read with their few-shot prefix."""
    (tmp_path / "react_prefixes.json").write_text(json.dumps({"six": "Examples.\n"}))
    (session,) = read(tmp_path, "agent", REFLEXION, "100_questions.txt", trial=1)
    first, second = prompts(session)
    assert first == "Examples.\nQuestion: Who?\n"
    assert second == first + "Thought 1: I search.\nAction 1: Search[him]\nObservation 1: He is\na person.\n"
    assert len(read(tmp_path, "agent", REFLEXION, "100_questions.txt")) == 2


def test_react_trajectories_and_tasks(tmp_path):
    """Agents' trajectories and tasks begin with their few-shot prefix; a missing prefix is an error."""
    prefixes = tmp_path / "p.json"
    prefixes.write_text(json.dumps({"six": "Examples.\n"}))
    steps = [{"output": "T1", "observation": "O1"}, {"output": "T2", "observation": "O2"}]
    text = lines({"session": "s", "prefix": "six", "task": "Question: Who?", "trial": 1, "steps": steps})
    (session,) = read(tmp_path, "agent", text, prefixes=prefixes)
    assert prompts(session) == ["Examples.\nQuestion: Who?\n", "Examples.\nQuestion: Who?\nT1\nO1\n"]
    text = lines({"prefix": "six", "task": "Claim: It is.", "answer": "yes"})
    (session,) = read(tmp_path, "agent", text, prefixes=prefixes)
    assert prompts(session) == ["Examples.\nClaim: It is.\n"]
    with pytest.raises(LoadgenError, match="has no prefix 'six'; it has none"):
        read(tmp_path, "agent", text)


def test_tool_calls_stand_in_the_conversation(tmp_path):
    """Tool calls and their results appear in the conversation."""
    call = {"function": {"name": "find", "arguments": '{"id":1}'}, "id": "c", "type": "function"}
    messages = [
        {"role": "system", "content": "Policy."},
        {"role": "user", "content": "Book."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "found", "name": "find", "tool_call_id": "c"},
        {"role": "assistant", "content": "Done."},
    ]
    (session,) = read(
        tmp_path, "agent", json.dumps([{"task_id": 3, "trial": 0, "reward": 1.0, "traj": messages}])
    )
    assert session.id == "file-3-0"
    expected = 'Policy.\nUser: Book.\nAssistant: find({"id":1})\nTool: found\nAssistant: '
    assert prompts(session)[1] == expected
    assert [one["role"] for one in prompts(session, endpoint="chat")[1]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    glaive = lines(
        {
            "tools": "[]",
            "messages": [
                {"role": "user", "content": "Play"},
                {"role": "assistant_tool_call", "content": "{}"},
            ],
        }
    )
    (session,) = read(tmp_path, "agent", glaive)
    assert prompts(session) == ["[]\nUser: Play\nAssistant: "]


def test_logged_calls(tmp_path):
    """Logged calls that keep part of an earlier context are sent with that part only, in order of time."""
    calls = [
        {"t_ms": 0, "base": -1, "keep": 0, "add": "abc", "output": "x"},
        {"t_ms": 9, "base": 0, "keep": 2, "add": "Z", "output": "y"},
    ]
    (session,) = read(tmp_path, "agent", lines({"session": "s", "calls": calls}))
    assert prompts(session) == ["abc", "abZ"]
    rows = [
        {"timestamp": 2_000_000, "input": "abc def", "output": "y", "session_id": "s"},
        {"timestamp": 1_000_000, "input": "abc", "output": "x", "session_id": "s"},
    ]
    (session,) = read(tmp_path, "agent", lines(*rows))
    assert prompts(session) == ["abc", "abc def"]


MOONCAKE = lines(
    {"timestamp": 1000, "input_length": 1100, "output_length": 64, "hash_ids": [0, 1, 2]},
    {"timestamp": 4000, "input_length": 1024, "output_length": 10, "hash_ids": [0, 1]},
)


def test_block_ids_become_tokens(tmp_path):
    """Equal block ids of a trace become equal tokens, and blocks of other traces differ."""
    first, second = read(tmp_path, "trace", MOONCAKE, "conv.jsonl.gz")
    (one,), (other,) = prompts(first, form="ids"), prompts(second, form="ids")
    assert (len(one), len(other)) == (1100, 1024)
    assert one[:1024] == other
    assert len(set(one)) > 1000, "a block has full-entropy tokens"
    assert (first.at_s, second.at_s) == (1.0, 4.0)
    small, _ = read(tmp_path, "trace", MOONCAKE, "conv.jsonl.gz", block_tokens=16)
    assert len(prompts(small, form="ids")[0]) == 32 + 76 * 16 // 512
    assert small.turns[0].output_tokens == 2
    (longer,), _ = (prompts(one, form="ids") for one in read(tmp_path, "trace", MOONCAKE, "other.jsonl"))
    assert longer[:512] != one[:512], "traces share no blocks by accident"


def test_a_trace_with_other_blocks_is_refused(tmp_path):
    """A trace whose block size differs from the one assumed is refused."""
    text = lines({"timestamp": 0, "input_length": 64, "output_length": 1, "hash_ids": [0, 1, 2, 3]})
    with pytest.raises(LoadgenError, match="4 ids for 64 tokens, expected 1"):
        read(tmp_path, "trace", text)


LENGTHS = {
    "lengths": ("t.jsonl", lines({"timestamp": 0, "input_length": 400, "output_length": 40},
                                 {"timestamp": 2500, "input_length": 10, "output_length": 1})),
    "Azure": ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,400,40\n"
                       "2023-11-16 18:15:49.1805900,10,1\n"),
    "BurstGPT": ("t.csv", "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
                          "5,ChatGPT,400,40,440,Conversation log\n6,ChatGPT,9,0,9,Conversation log\n"
                          "7.5,GPT-4,10,1,11,API log\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", LENGTHS)
def test_traces_of_lengths(tmp_path, name):
    """Traces with lengths only (Azure, BurstGPT) become random prompts of these lengths, optionally scaled."""
    file, text = LENGTHS[name]
    sessions = read(tmp_path, "trace", text, file, scale=0.5)
    assert [len(prompts(one, form="ids")[0]) for one in sessions] == [200, 5]
    assert [one.turns[0].output_tokens for one in sessions] == [20, 1]
    assert sessions[1].at_s - sessions[0].at_s == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no records"),
        ("[1, 2]", "holds no records"),
        ('{"conversations": 1', "is not JSON"),
        ('{"turns": [{"user": "a", "assistant": "b"}]}\n{"turns"', "line 2 is not JSON"),
        ('{"what": 1}', "has the fields what; known are ShareGPT: conversations"),
        (
            '{"conversations": [{"from": "nobody", "value": ""}]}',
            "is not ShareGPT as published: KeyError 'nobody'",
        ),
    ],
)
def test_damaged_files_are_explained(tmp_path, text, complaint):
    """A damaged file gives an error that says what is wrong and where."""
    with pytest.raises(LoadgenError, match=complaint):
        read(tmp_path, "chat", text)


def test_limits_shorten_a_workload(tmp_path):
    """Limits on sessions, turns, context and answers shorten the workload, so that a small model can run it."""
    turns = [{"user": "x" * 40, "assistant": "y" * 40} for _ in range(5)]
    text = lines(*({"session": str(i), "turns": turns} for i in range(4)))
    sessions = read(tmp_path, "chat", text, sessions=3, turns=4, context_tokens=50, output_tokens_max=5)
    assert len(sessions) == 3
    # Turns of 10 tokens and answers of 5: the fourth would end at 60.
    assert [turn.output_tokens for turn in sessions[0].turns] == [5, 5, 5]
    with pytest.raises(LoadgenError, match="no session is left"):
        read(tmp_path, "chat", text, context_tokens=5)


@pytest.mark.parametrize(("kind", "row"), [
    ("chat", {"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
    ("trace", {"timestamp": 0, "input_length": 600, "output_length": 2, "hash_ids": [1, 2]}),
])  # fmt: skip
def test_sessions_of_several_files_stay_apart(tmp_path, kind, row):
    """Sessions of files with equal ids or equal names have distinct ids, and requests of two traces share no content."""
    paths = [tmp_path / folder / "file.jsonl" for folder in ("one", "two")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(lines(row, row))
    alone, both = (
        build.workload(kind, WorkloadOptions(data=tuple(given))).sessions for given in (paths[:1], paths)
    )
    assert [one.id for one in both[:2]] == [one.id for one in alone]
    assert len({one.id for one in both}) == 4
    if kind == "trace":
        first, second = (prompts(one) for one in (both[0], both[2]))
        assert first != second and prompts(both[1]) == first


def test_distinct_names_are_distinct():
    """Names that repeat get a number behind them, whatever the other names are."""
    assert build.distinct(["a", "a~2", "a", "b", "a"]) == ["a", "a~2", "a~3", "b", "a~4"]
