"""Measure the speedup of speculative decoding: ``make bench-drafts``.

Two clusters of one configuration run at once, one with drafts and one without. They get the same requests in
turn, so that only one of them has work at any time. The prompts are questions, documents to summarise, code
to change, and requests for JSON of a given schema. Streams run alone or several at once, and prompts are new
or were asked before. The answers of both clusters must be identical to the letter; the program ends if any
differs.

Takes a quarter of an hour. TPOT is the time from a stream's first event with tokens to its last, divided by the
number of tokens after those of the first event; a table row has the medians of all streams.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs

from cluster import CLIENT, Running, cluster
from loadgen.answer import Answer
from notes import Note, table

ROOT = Path(__file__).parent.parent
ANSWER_TOKENS = 128
STREAMS = (1, 4, 8)
TEMPERATURES = (0.0, 0.7)

COUNTERS = ("drafted_tokens_total", "accepted_tokens_total", "forced_tokens_total", "generated_tokens_total")

QUESTIONS = (
    "What is virtual memory?",
    "Write a short story about a lighthouse keeper.",
    "Explain how bread is made.",
    "Why is the sky blue?",
    "List ten facts about whales.",
    "How do I cook rice?",
    "What are the benefits of exercise?",
    "What is the difference between TCP and UDP?",
)


PLACES = ("Paris", "the Sahara", "Mount Everest", "the Amazon", "Iceland", "Venice", "the Nile", "Tokyo")
PLACE = {
    "type": "object",
    "properties": {
        "name_of_the_place": {"type": "string", "maxLength": 40},
        "kind_of_place": {"enum": ["city", "river", "mountain", "country", "desert"]},
        "latitude_in_degrees": {"type": "number"},
        "longitude_in_degrees": {"type": "number"},
        "known_for": {
            "type": "array",
            "items": {"type": "string", "maxLength": 40},
            "minItems": 2,
            "maxItems": 4,
        },
    },
    "required": [
        "name_of_the_place",
        "kind_of_place",
        "latitude_in_degrees",
        "longitude_in_degrees",
        "known_for",
    ],
    "additionalProperties": False,
}
"""JSON schema of every answer of a case with ``form``."""


def documents() -> list[str]:
    """Prompts to summarise pages of this project's documentation."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = [page.read_text()[:4000] for page in pages[: max(STREAMS)]]
    return [f"Sum up this page in a few sentences, and quote from it:\n\n{text}" for text in texts]


def code() -> list[str]:
    """Prompts to change source files of this project."""
    files = sorted((ROOT / "src" / "memserve" / "engine").glob("*.py"), key=lambda one: one.stat().st_size)
    texts = [file.read_text()[:3000] for file in files[2 : 2 + max(STREAMS)]]
    return [f"Write this again with every docstring in capital letters:\n\n{text}" for text in texts]


@attrs.frozen
class Asked:
    """One answer."""

    text: str
    tpot_s: float


@attrs.frozen
class Case:
    """Prompts that are sent together, with the settings of their requests."""

    name: str
    prompts: tuple[str, ...]
    temperature: float
    streams: int
    again: bool = False
    """Whether every prompt was asked before."""
    form: bool = False
    """Whether answers must match ``PLACE``."""

    def numbered(self, place: int) -> Case:
        """This case with a number before each prompt, so that no prompt was asked before."""
        return attrs.evolve(self, prompts=tuple(f"No. {place}. {prompt}" for prompt in self.prompts))


def cases() -> list[Case]:
    """Every kind of prompt, greedy and sampled, alone and in company; then repeated questions and JSON."""
    kinds = {"questions": QUESTIONS, "documents": documents(), "code": code()}
    new = [
        Case(name, tuple(prompts), temperature, streams)
        for streams in STREAMS
        for name, prompts in kinds.items()
        for temperature in TEMPERATURES
    ]
    again = [Case("questions, asked again", QUESTIONS, 0.7, streams, again=True) for streams in STREAMS]
    places = tuple(f"Tell me about {place}, as JSON." for place in PLACES)
    return new + again + [Case("JSON of a schema", places, 0.7, streams, form=True) for streams in STREAMS]


HEAD = (
    "texts", "temperature", "streams", "TPOT without, ms", "with drafts, ms", "times as fast", "guessed tokens that were right",
    "forced ones", "tokens a stream and step",
)  # fmt: skip


def main() -> None:
    options = _options()
    note = Note("drafts")
    asked = [case for case in cases() if case.name.startswith(options.only)]
    draft = f"batch.draft={options.draft}"
    with cluster(options.config, draft) as guessing, cluster(options.config) as plain:
        rows = [_measured(case, place, guessing, plain, options.rounds) for place, case in enumerate(asked)]
    print(table(HEAD, rows))
    if not options.only:
        words = " ".join(sys.argv[1:])
        note.write(
            "Guessing ahead",
            f'make bench-drafts ARGS="{words}"' if words else "make bench-drafts",
            f"configs/{options.config}, the demo model, up to {ANSWER_TOKENS} tokens an answer, {options.rounds} rounds; medians "
            "of all streams (range). Both clusters gave the same text for every prompt.",
            table(HEAD, rows),
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="colocated.toml")
    parser.add_argument("--draft", type=int, default=8, help="tokens that a stream may guess ahead in a step")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="", help="cases whose name begins so; prints, and writes no note")
    return parser.parse_args()


def _measured(case: Case, place: int, guessing: Running, plain: Running, rounds: int) -> list[str]:
    took: dict[str, list[float]] = {guessing.url: [], plain.url: []}
    counted = [0.0] * len(COUNTERS)
    for turn in range(rounds):
        answers, new = {}, case.numbered(place * rounds + turn)
        for running in (guessing, plain) if turn % 2 else (plain, guessing):
            if case.again:
                _asked(running, new)
            before = _counters(running)
            asked = _asked(running, new)
            took[running.url] += [one.tpot_s * 1e3 for one in asked]
            answers[running.url] = [one.text for one in asked]
            if running is guessing:
                after = _counters(running)
                counted = [sum(one) - was for *one, was in zip(counted, after, before, strict=True)]
        if answers[guessing.url] != answers[plain.url]:
            sys.exit(f"{case.name}, temperature {case.temperature}: drafts changed an answer")
    with_drafts, without = took[guessing.url], took[plain.url]
    drafted, accepted, forced, tokens = counted
    return [
        case.name,
        f"{case.temperature:g}",
        str(case.streams),
        _with_range(without),
        _with_range(with_drafts),
        f"**{statistics.median(without) / statistics.median(with_drafts):.2f}**",
        f"{accepted:.0f} of {drafted:.0f}",
        f"{forced:.0f}",
        f"{tokens / (tokens - accepted - forced):.2f}",
    ]


def _asked(running: Running, case: Case) -> list[Asked]:
    with ThreadPoolExecutor(case.streams) as crew:
        return list(crew.map(lambda one: ask(running.url, one, case), case.prompts))


def ask(url: str, prompt: str, case: Case) -> Asked:
    """Ask for one answer, and time it."""
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": ANSWER_TOKENS, "stream": True}
    body |= {"temperature": case.temperature, "seed": 1}
    body |= {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    schema = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}}
    body |= {"response_format": schema} if case.form else {"ignore_eos": True}
    answer = Answer()
    with CLIENT.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: "):
                answer.receive("", line[6:].encode(), time.perf_counter())
    later = answer.output_tokens - (answer.first_tokens or 1)  # the first event may bring several
    return Asked(answer.text, (answer.event_s[-1] - answer.event_s[0]) / later)


def _counters(running: Running) -> tuple[float, ...]:
    time.sleep(1.5)  # until heartbeats have reported the counters
    loads = [one["load"] for one in running.members()]
    return tuple(sum(load.get(name, 0.0) for load in loads) for name in COUNTERS)


def _with_range(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
