"""Plays sessions on a running server through the load generator, for benchmarks that make their sessions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loadgen.arrivals import Arrivals
from loadgen.client import Client
from loadgen.content import Filler
from loadgen.conversation import Style
from loadgen.records import Record
from loadgen.runner import Manner, Player
from loadgen.workload import Workload

TIMEOUT_S = 120.0
"""Timeout of one request: a server that takes longer for a benchmark's request has failed."""


async def ask(
    url: str,
    work: Workload,
    arrivals: Arrivals,
    *,
    form: str,
    body: Mapping[str, Any],
    model: str | None = None,
    seed: int = 0,
) -> list[Record]:
    """Play the workload and return one record per request, answers included.

    Turns are completions that repeat the model's own answers, because those are what a server's cache holds.
    ``form``: the form of prompts, ``text`` or ``ids``. ``body``: further fields of every request. ``model``:
    by default, the first that the server lists. A different ``seed`` gives every piece different words.
    Raises LoadgenError when the server cannot be asked.
    """
    client = Client(url)
    try:
        model = model or str((await client.get_json("/v1/models"))["data"][0]["id"])
        style = Style("completions", form, "own")
        manner = Manner(model, style, dict(body), timeout_s=TIMEOUT_S, keep_answers=True)
        records: list[Record] = []
        await Player(work, arrivals, manner, client, Filler(seed), records.append).play()
        return records
    finally:
        await client.aclose()
