"""The options of `memserve sim`; the command line is made from this class."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import attrs
from cyclopts import Parameter


def _option(text: str, *names: str) -> Parameter:
    return Parameter(help=text, name=names or None, negative=())


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class SimOptions:
    """The options of one call. Nothing is checked here."""

    config: Annotated[
        tuple[str, ...], _option("A configuration; given several times, they are compared.", "--config", "-c")
    ] = ("demo",)
    overrides: Annotated[
        tuple[str, ...],
        _option(
            "KEY=VALUE overrides the files' value, such as pool.page_tokens=32; may be repeated.", "--set"
        ),
    ] = ()
    policy: Annotated[
        str,
        _option("Used instead of the configuration's policy; several, separated by commas, are compared."),
    ] = ""
    trace: Annotated[Path | None, _option("A trace in Mooncake's format: JSON lines, may be gzipped.")] = None
    workload: Annotated[
        str, _option("A generated workload instead of a trace: sharegpt, loogle, react or shifting.")
    ] = ""
    rate: Annotated[float, _option("Average requests a second of a --workload.")] = 4.0
    requests: Annotated[
        int | None,
        _option(
            "Number of requests of a --workload (300 unless set), or to take from a --trace (all unless set)."
        ),
    ] = None
    scale: Annotated[
        float,
        _option(
            "Factor for the length of a --trace's prompts and answers: 0.03125 makes its blocks 16 tokens long."
        ),
    ] = 1.0
    speed: Annotated[float, _option("Factor for the rate at which a --trace's requests arrive.")] = 1.0
    seed: Annotated[
        int, _option("Seed of all random numbers: the same seed gives the same run, byte for byte.")
    ] = 0
    faults: Annotated[
        str,
        _option(
            "Faults to inject: all, none, or a list of delay, loss, duplication, partition, crash, pause, slow, damage, cancel, tear."
        ),
    ] = "none"
    pages: Annotated[
        int | None, _option("Number of pages of each shard, instead of as many as fit in its memory.")
    ] = None
    costs: Annotated[
        Path | None,
        _option("A TOML table of step costs on the machine to plan for; unset: a 13B model on two H800."),
    ] = None
    error: Annotated[
        float,
        _option("Share by which the cost of each worker's steps may differ from what the scheduler assumes."),
    ] = 0.0
    sites: Annotated[
        int | None,
        _option(
            "Number of sites (the cores of a host, or a GPU) over which workers are spread in turn; "
            "workers of one site slow one another down. Unset: each worker has its own."
        ),
    ] = None
    slo: Annotated[
        str,
        _option(
            "Limits of 99th percentiles in seconds, such as ttft=0.5,tpot=0.05: the report "
            "says which layouts keep them."
        ),
    ] = ""
    checked: Annotated[
        bool, _option("Keep the content of every page and check every core during the run; slower.")
    ] = False
    serial: Annotated[
        bool, _option("Play sessions one after another, which shows how much could be reused.")
    ] = False
    runs: Annotated[
        int | None,
        _option(
            "Simulate this many small clusters with --faults, one per seed from --seed on, instead of a "
            "configuration; exit status 1 if one fails."
        ),
    ] = None
    jobs: Annotated[int, _option("Number of processes for --runs.")] = 1
    json: Annotated[bool, _option("Print JSON: one object per run.")] = False
