"""All options. The command line is made from these classes, so programs and people use the same options.

The text in a field's annotation is its help text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import attrs
from cyclopts import Parameter

Kind = Literal[
    "chat",
    "longdoc",
    "agent",
    "trace",
    "shared-prefix",
    "prefix-share",
    "sharegpt-like",
    "loogle-like",
    "react-like",
]
FROM_FILES = ("chat", "longdoc", "agent", "trace")


def _option(text: str, name: str | None = None) -> Parameter:
    return Parameter(help=text, name=name, negative=())


@Parameter(name="*", group="Workload")
@attrs.frozen(kw_only=True)
class WorkloadOptions:
    """What is asked."""

    data: Annotated[
        tuple[Path, ...],
        _option(
            "A file of the workload, as published, plain or gzipped; may be repeated. For chat, longdoc, agent and trace."
        ),
    ] = ()
    sessions: Annotated[
        int | None,
        _option(
            "Take this many sessions of the files; make this many of the paper's shapes (default 100) or requests of prefix-share (default 200)."
        ),
    ] = None
    turns: Annotated[
        int | None, _option("Turns of a session: at most, of files; exactly, of shared-prefix (default 1).")
    ] = None
    think_s: Annotated[float, _option("Seconds between an answer and the next turn's request.")] = 0.0
    think: Annotated[
        Literal["constant", "exponential"],
        _option("Whether all think times are --think-s, or drawn with that mean."),
    ] = "constant"
    answers: Annotated[
        Literal["recorded", "own"],
        _option(
            "What stands in the conversation as the answer: the recorded one, or the model's own of the recorded length."
        ),
    ] = "recorded"
    output_tokens: Annotated[
        int | None, _option("Length of answers where the workload has none: 256, for prefix-share 200.")
    ] = None
    output_tokens_max: Annotated[int | None, _option("Ask for this many tokens at most.")] = None
    context_tokens: Annotated[
        int | None,
        _option("End a session before the turn whose prompt and answer would be longer than this."),
    ] = None
    document_tokens: Annotated[int | None, _option("longdoc: take only the beginning of each document.")] = (
        None
    )
    questions: Annotated[int | None, _option("longdoc: take only the first questions of each document.")] = (
        None
    )
    prefixes: Annotated[
        Path | None,
        _option(
            "agent: JSON file with the few-shot prefixes, name: text. Default: react_prefixes.json beside the data."
        ),
    ] = None
    prefix: Annotated[
        str, _option("agent: which of the prefixes, where the file's records name none; default the first.")
    ] = ""
    trial: Annotated[
        int | None, _option("agent: only this trial of ReAct trajectories; questions repeat over trials.")
    ] = None
    block_tokens: Annotated[
        int,
        _option("trace with block ids: tokens of a block, 512 in the trace; 16 divides all lengths by 32."),
    ] = 512
    scale: Annotated[
        float, _option("Multiply lengths: of traces without block ids, and of the paper's shapes.")
    ] = 1.0
    groups: Annotated[int, _option("shared-prefix: how many prefixes.")] = 64
    group_size: Annotated[int, _option("shared-prefix: sessions with the same prefix.")] = 16
    prefix_tokens: Annotated[int, _option("shared-prefix: length of a prefix.")] = 2048
    question_tokens: Annotated[int, _option("shared-prefix: length of what each turn adds.")] = 128
    share: Annotated[float, _option("prefix-share: the part of a prompt that all share, 0 to 1.")] = 0.5
    prompt_tokens: Annotated[int, _option("prefix-share: length of a prompt.")] = 14_000
    prompts: Annotated[
        Literal["ids", "text"],
        _option(
            "Send generated content as token ids (exact, for servers whose /v1/completions takes them), or as words of about a token each."
        ),
    ] = "ids"
    vocabulary: Annotated[
        str, _option("LOW:HIGH, the token ids that are used (HIGH excluded); keep special tokens out.")
    ] = "1000:30000"
    corpus: Annotated[
        Path | None,
        _option(
            "A text; generated content is stretches of it instead of random words. Needs --prompts text."
        ),
    ] = None
    tokenizer: Annotated[
        Path | None,
        _option(
            "A tokenizer.json, to know the lengths of recorded texts; without it, a token is taken for 4 characters."
        ),
    ] = None
    tenants: Annotated[
        tuple[str, ...],
        _option(
            "NAME or NAME=KEY, or NAME=env:VARIABLE for a key in the environment; may be repeated. Sessions are dealt out at random.",
            "--tenant",
        ),
    ] = ()
    seed: Annotated[int, _option("Of everything that is drawn: content, order, arrivals, tenants.")] = 0
    salt: Annotated[
        str,
        _option(
            "Changes the beginning of every prompt, so that a server that has seen the workload has not cached it."
        ),
    ] = ""


@Parameter(name="*", group="Arrivals")
@attrs.frozen(kw_only=True)
class ArrivalOptions:
    """When it is asked."""

    arrival: Annotated[
        Literal["poisson", "constant", "gamma", "trace", "closed"] | None,
        _option("How sessions begin. Default: poisson with --rate, closed with --clients."),
    ] = None
    rate: Annotated[
        float | None, _option("Open loop: sessions a second; or requests, with --per requests.")
    ] = None
    per: Annotated[
        Literal["sessions", "requests"],
        _option("What --rate counts; requests a second are over the mean number of turns."),
    ] = "sessions"
    burstiness: Annotated[
        float, _option("gamma: coefficient of variation of the gaps; 1 is poisson, more is burstier.")
    ] = 1.0
    clients: Annotated[int | None, _option("Closed loop: sessions under way at a time.")] = None
    time_factor: Annotated[float, _option("trace: multiply its times; 2 plays it at half the rate.")] = 1.0
    duration_s: Annotated[
        float | None, _option("Send nothing after this time; default: until the workload is played.")
    ] = None
    warmup_s: Annotated[float, _option("Leave the requests of the first seconds out of the measures.")] = 0.0
    drain_s: Annotated[
        float, _option("Wait this long for answers after --duration-s; then they count as unfinished.")
    ] = 60.0
    in_flight_max: Annotated[
        int,
        _option(
            "Open loop: sessions under way at most; one that arrives above it is not played, and counted."
        ),
    ] = 4096


@Parameter(name="*", group="Server")
@attrs.frozen(kw_only=True)
class ServerOptions:
    """Which server to ask, and how."""

    url: Annotated[str, _option("The server's address, with or without /v1.")] = "http://127.0.0.1:8080"
    model: Annotated[str, _option("The model; default: the first that the server lists.")] = ""
    api_key: Annotated[
        str,
        Parameter(help="The key; better from the environment.", env_var="OPENAI_API_KEY", show_default=False),
    ] = attrs.field(default="", repr=False)
    endpoint: Annotated[
        Literal["completions", "chat"], _option("Which of the two endpoints; chat always gets text.")
    ] = "completions"
    temperature: Annotated[float, _option("0 is greedy.")] = 0.0
    ignore_eos: Annotated[
        bool,
        Parameter(
            help="Ask for answers of exactly the wanted length. OpenAI's own servers refuse the field."
        ),
    ] = True
    token_ids: Annotated[
        bool, Parameter(help="Ask for the answers' token ids, as vLLM and memserve send them.", negative=())
    ] = False
    body: Annotated[
        tuple[str, ...], _option("FIELD=JSON to put into every request's body; may be repeated.")
    ] = ()
    timeout_s: Annotated[float, _option("Give a request up after this time.")] = 600.0


@Parameter(name="*", group="Measures")
@attrs.frozen(kw_only=True)
class MeasureOptions:
    """How the run is judged and reported."""

    slo: Annotated[
        tuple[str, ...],
        _option(
            "MEASURE=MS, with ttft, tpot, jct or gap (the longest); may be repeated. Goodput counts requests that keep all."
        ),
    ] = ()
    stall_s: Annotated[
        float, _option("A stream that was silent for longer, after its first token, has stalled.")
    ] = 5.0
    lag_limit_ms: Annotated[
        float,
        _option(
            "The run says that its generator fell behind when the 99th percentile of its send lag is above this."
        ),
    ] = 50.0
    keep_answers: Annotated[
        bool, Parameter(help="Write the answers' text into requests.jsonl.", negative=())
    ] = False
    reference: Annotated[
        Path | None, _option("A run's directory: check every answer against that run's.")
    ] = None
    label: Annotated[str, _option("A name for this run in reports; default the directory's.")] = ""


@attrs.frozen(kw_only=True)
class RunOptions:
    """All options of one run."""

    kind: Kind
    workload: WorkloadOptions = WorkloadOptions()
    arrivals: ArrivalOptions = ArrivalOptions()
    server: ServerOptions = ServerOptions()
    measures: MeasureOptions = MeasureOptions()
