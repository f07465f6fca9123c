"""Builds values from options: the workload, its arrivals, the style of prompts, the objectives."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import orjson

from loadgen import generated
from loadgen.arrivals import Arrivals
from loadgen.content import Filler, TokenizerRuler
from loadgen.conversation import Style
from loadgen.errors import LoadgenError
from loadgen.formats import agent, chat, files, longdoc, traces
from loadgen.options import FROM_FILES, ArrivalOptions, Kind, RunOptions, WorkloadOptions
from loadgen.workload import Limits, Ruler, Session, Workload, limited

FORMATS = {
    "chat": chat.FORMATS, "longdoc": longdoc.FORMATS, "agent": agent.FORMATS, "trace": traces.FORMATS
}  # fmt: skip
SHARE_OUTPUT_TOKENS = 200
PREFIXES_NAME = "react_prefixes.json"
LEAST = {
    "sessions": 1, "turns": 1, "groups": 1, "group_size": 1, "prefix_tokens": 0, "question_tokens": 0, "prompt_tokens": 1,
    "block_tokens": 1, "output_tokens": 1, "output_tokens_max": 1, "document_tokens": 1, "questions": 1,
}  # fmt: skip
"""The least values of counts, by option."""


def workload(kind: Kind, given: WorkloadOptions) -> Workload:
    """The workload.

    Raises LoadgenError for files that cannot be read, and for options that exclude each other.
    """
    _check(kind, given)
    ruler = _ruler(given.tokenizer)
    sessions = _from_files(kind, given, ruler) if kind in FROM_FILES else _generated(kind, given)
    limits = Limits(
        sessions=given.sessions if kind in FROM_FILES else None,
        turns=given.turns,
        context_tokens=given.context_tokens,
        output_tokens=given.output_tokens_max,
    )
    kept = limited(sessions, limits, ruler)
    if not kept:
        raise LoadgenError(f"{kind}: no session is left; the limits (--context-tokens, --turns) exclude all")
    kept = _thinking(_dealt(kept, given), given)
    name = kind if not given.data else f"{kind} {'+'.join(files.stem(path) for path in given.data)}"
    return Workload(name, kept, _described(given))


def _check(kind: Kind, given: WorkloadOptions) -> None:
    if kind in FROM_FILES and not given.data:
        raise LoadgenError(f"--data: {kind} needs a file; see docs/benchmarking.md for the formats")
    if kind not in FROM_FILES and given.data:
        raise LoadgenError(f"--data: {kind} is generated and reads no file; leave it out")
    if given.corpus and given.prompts != "text":
        raise LoadgenError("--corpus: is words, so it needs --prompts text")
    for name, least in LEAST.items():
        value = getattr(given, name)
        if value is not None and value < least:
            raise LoadgenError(f"--{name.replace('_', '-')}: must be {least} or more, not {value}")
    if not given.scale > 0:
        raise LoadgenError(f"--scale: must be above 0, not {given.scale}")


def _ruler(tokenizer: Path | None) -> Ruler:
    if tokenizer is None:
        return Ruler()
    from tokenizers import Tokenizer

    try:
        return TokenizerRuler(Tokenizer.from_file(str(tokenizer)))
    except Exception as error:  # the library raises plain Exception
        raise LoadgenError(f"--tokenizer {tokenizer}: cannot be read: {error}") from None


def _from_files(kind: Kind, given: WorkloadOptions, ruler: Ruler) -> list[Session]:
    settings = files.Settings(
        ruler=ruler,
        output_tokens=given.output_tokens or files.Settings().output_tokens,
        think_s=given.think_s,
        document_tokens=given.document_tokens,
        questions=given.questions,
        trial=given.trial,
        prefixes=_prefixes(given) if kind == "agent" else {},
        prefix=given.prefix,
        block_tokens=given.block_tokens,
        scale=given.scale,
    )
    names = distinct([files.stem(path) for path in given.data])
    found = [
        one
        for path, name in zip(given.data, names, strict=True)
        for one in files.read(path, FORMATS[kind], settings, name)
    ]
    return [
        attrs.evolve(one, id=id) for one, id in zip(found, distinct([one.id for one in found]), strict=True)
    ]


def distinct(names: Sequence[str]) -> list[str]:
    """``names``, with ``~2``, ``~3``, ... behind each that came before."""
    taken, counts, made = set(names), dict[str, int](), []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        new = name
        while counts[name] > 1 and new in taken:
            new = f"{name}~{counts[name]}"
            counts[name] += new in taken
        taken.add(new)
        made.append(new)
    return made


def _prefixes(given: WorkloadOptions) -> dict[str, str]:
    path = given.prefixes or given.data[0].parent / PREFIXES_NAME
    if given.prefixes is None and not path.exists():
        return {}
    try:
        found = orjson.loads(files.text_of(path))
    except orjson.JSONDecodeError as error:
        raise LoadgenError(f"--prefixes {path}: is not JSON: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise LoadgenError(f"--prefixes {path}: must be a JSON object of name: text")
    return found


def _generated(kind: Kind, given: WorkloadOptions) -> list[Session]:
    if kind == "shared-prefix":
        shared = generated.Shared(
            groups=given.groups,
            group_size=given.group_size,
            prefix_tokens=given.prefix_tokens,
            question_tokens=given.question_tokens,
            output_tokens=given.output_tokens or generated.Shared().output_tokens,
            turns=given.turns or 1,
            think_s=given.think_s,
        )
        return generated.shared_prefix(shared, given.seed)[: given.sessions]
    if kind == "prefix-share":
        output = given.output_tokens or SHARE_OUTPUT_TOKENS
        return generated.prefix_share(given.sessions or 200, given.prompt_tokens, output, given.share)
    return generated.paper_shape(kind, given.sessions or 100, given.scale, given.think_s, given.seed)


def _dealt(sessions: Sequence[Session], given: WorkloadOptions) -> tuple[Session, ...]:
    """Assign tenants to sessions at random; the same seed gives the same assignment."""
    names = [one.partition("=")[0] for one in given.tenants]
    if len(set(names)) < len(names) or "" in names:
        raise LoadgenError(f"--tenant: names must be given and differ: {', '.join(names)}")
    if not names:
        return tuple(sessions)
    picks = np.random.default_rng([given.seed, 2]).integers(len(names), size=len(sessions))
    return tuple(attrs.evolve(one, tenant=names[i]) for one, i in zip(sessions, picks, strict=True))


def _thinking(sessions: tuple[Session, ...], given: WorkloadOptions) -> tuple[Session, ...]:
    if given.think == "constant" or not given.think_s:
        return sessions
    rng = np.random.default_rng([given.seed, 3])
    return tuple(
        attrs.evolve(
            one,
            turns=tuple(
                attrs.evolve(turn, think_s=float(rng.exponential(given.think_s)) if turn.think_s else 0.0)
                for turn in one.turns
            ),
        )
        for one in sessions
    )


def _described(given: WorkloadOptions) -> dict[str, Any]:
    """The options that differ from their defaults, without the tenants' keys."""
    chosen = attrs.asdict(given, filter=lambda field, value: value != field.default)
    chosen["tenants"] = [one.partition("=")[0] for one in given.tenants]
    return {name: [str(one) for one in value] if isinstance(value, list | tuple) else
            str(value) if isinstance(value, Path) else value
            for name, value in chosen.items() if value or value == 0}  # fmt: skip


def keys(given: WorkloadOptions) -> dict[str, str]:
    """The API keys of the tenants that have one. Raises LoadgenError for a missing environment variable."""
    found = {}
    for one in given.tenants:
        name, _, key = one.partition("=")
        if key.startswith("env:"):
            variable = key.removeprefix("env:")
            if variable not in os.environ:
                raise LoadgenError(f"--tenant {name}: the environment has no {variable}")
            key = os.environ[variable]
        if key:
            found[name] = key
    return found


def filler(given: WorkloadOptions) -> Filler:
    """The generator of content."""
    low, _, high = given.vocabulary.partition(":")
    if not (low.isdigit() and high.isdigit() and int(low) < int(high)):
        raise LoadgenError(f"--vocabulary: must be LOW:HIGH with LOW below HIGH, not {given.vocabulary!r}")
    words = files.text_of(given.corpus).split() if given.corpus else ()
    return Filler(given.seed, given.salt, int(low), int(high), words)


def style(options: RunOptions) -> Style:
    """How prompts are written."""
    given = options.workload
    return Style(options.server.endpoint, given.prompts, given.answers, given.salt)


def arrivals(given: ArrivalOptions, work: Workload, seed: int) -> Arrivals:
    """When sessions begin. Raises LoadgenError if the options do not say, or contradict each other."""
    if given.rate is not None and given.clients is not None:
        raise LoadgenError(
            "--rate and --clients exclude each other: one is an open loop, the other a closed one"
        )
    kind = given.arrival or (
        "closed" if given.clients is not None else "poisson" if given.rate is not None else None
    )
    if kind is None:
        raise LoadgenError("say how sessions begin: --rate, --clients or --arrival trace")
    if kind in ("poisson", "constant", "gamma") and given.rate is None:
        raise LoadgenError(f"--arrival {kind}: needs --rate")
    if kind == "closed" and given.clients is None:
        raise LoadgenError("--arrival closed: needs --clients")
    rate = given.rate or 0.0
    if given.per == "requests":
        rate /= work.requests / len(work.sessions)
    return Arrivals(kind, rate, given.burstiness, given.clients or 0, given.time_factor, seed)


def objectives(given: Sequence[str]) -> dict[str, float]:
    """The SLOs in milliseconds, by measure."""
    found = {}
    for one in given:
        name, _, limit = one.partition("=")
        try:
            found[name] = float(limit)
        except ValueError:
            found[name] = 0.0
        if name not in ("ttft", "tpot", "jct", "gap") or not found[name] > 0:
            raise LoadgenError(f"--slo: must be ttft, tpot, jct or gap = milliseconds, not {one!r}")
    return found


def extra_body(given: Sequence[str]) -> dict[str, Any]:
    """The fields to put into every body."""
    found = {}
    for one in given:
        name, sign, value = one.partition("=")
        try:
            found[name] = orjson.loads(value)
        except orjson.JSONDecodeError:
            sign = ""
        if not (name and sign):
            raise LoadgenError(f"--body: must be FIELD=JSON, such as top_k=1, not {one!r}")
    return found
