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
        _option("KEY=VALUE over the files', such as pool.page_tokens=32; may be repeated.", "--set"),
    ] = ()
    policy: Annotated[
        str, _option("Instead of the configuration's; several, with commas between them, are compared.")
    ] = ""
    trace: Annotated[Path | None, _option("A trace in Mooncake's format: JSON lines, or gzipped ones.")] = (
        None
    )
    workload: Annotated[
        str, _option("A generated workload instead: sharegpt, loogle, react or shifting.")
    ] = ""
    rate: Annotated[float, _option("Requests a second of a --workload, on average.")] = 4.0
    requests: Annotated[
        int | None,
        _option(
            "Requests of a --workload (300 unless set), or the first ones of a --trace (all unless set)."
        ),
    ] = None
    scale: Annotated[
        float,
        _option(
            "Length of a --trace's prompts and answers against what it says: 0.03125 makes blocks of 16 tokens."
        ),
    ] = 1.0
    speed: Annotated[float, _option("How many times faster than it says a --trace arrives.")] = 1.0
    seed: Annotated[
        int, _option("Decides everything that is drawn: the same one gives the same run, byte for byte.")
    ] = 0
    faults: Annotated[
        str,
        _option(
            "What goes wrong: all, none, or of delay, loss, duplication, partition, crash, pause, slow, damage, cancel, tear."
        ),
    ] = "none"
    pages: Annotated[int | None, _option("Pages of each shard, instead of what its memory holds.")] = None
    costs: Annotated[
        Path | None,
        _option(
            "A TOML table of what steps cost on the machine to plan for; unset: a 13B model on two H800."
        ),
    ] = None
    error: Annotated[
        float, _option("Share by which each worker's steps may differ from what the scheduler is told.")
    ] = 0.0
    sites: Annotated[
        int | None,
        _option(
            "Sites (cores of a host, or GPUs) that the workers share in turn: those of one site crowd one another. Unset: each has its own."
        ),
    ] = None
    slo: Annotated[
        str,
        _option("What 99th percentiles may be, in seconds, such as ttft=0.5,tpot=0.05: says who keeps it."),
    ] = ""
    checked: Annotated[
        bool, _option("Keep the content of every page and check every core as it goes: slower.")
    ] = False
    serial: Annotated[bool, _option("Sessions come one after another: how much could be reused.")] = False
    runs: Annotated[
        int | None,
        _option(
            "So many small clusters with --faults, one a seed from --seed on, instead of a configuration; "
            "exit status 1 if one fails."
        ),
    ] = None
    jobs: Annotated[int, _option("Processes for --runs.")] = 1
    json: Annotated[bool, _option("Print JSON: one object a run.")] = False
