"""Compare the GPU backend's speed with the GPU's limits and the project's goals: ``make gpu-bench``.

    make gpu-bench ARGS="--only attention,steps-8b --seconds 300 --commit abc1234"

Each section is a separate process with a time limit. The note ``docs/measurements/<date>-gpu.md`` (copied to
``$OUT`` if that is set) is rewritten after each section, so that a run that is cut short keeps its results.
The ceilings are always measured first. Models have random weights in the shapes of Llama 3.2 1B and Llama 3.1
8B, except for the demo model, which is served.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import attrs
import torch

import gpu_compute
import gpu_moving
from gpu_parts import ASSUMED, DEVICE, FAILED, Ceilings, Figure
from notes import FOLDER, Note, commit, number, table

SECONDS = 540.0
"""Longest whole run: what is left of a command of ten minutes after wheels are installed."""
STOP_S = 10.0
"""Time for a section to end after SIGTERM; a section is not started with less time than this left."""
SAID = 1 << 20
"""Characters that are kept of what a section's process said."""
PACKAGES = ("torch", "flashinfer-python", "apache-tvm-ffi", "cupy-cuda13x", "memserve")


@attrs.frozen
class Section:
    """One part of the note."""

    run: Callable[[Ceilings], Iterator[Figure]]
    limit_s: float
    about: str


def _served(roof: Ceilings) -> Iterator[Figure]:
    from gpu_served import served  # needs the load generator's dependencies

    yield from served(roof)


SECTIONS = {
    "ceilings": Section(gpu_compute.ceilings, 60, "What the GPU and its link do at best; the others are compared with these."),
    "steps-8b": Section(partial(gpu_compute.steps, "8b"), 120, "Whole steps through the engine; the roofline counts weights and KV read once."),
    "handoff": Section(gpu_moving.handoff, 90, "From one worker process to another by page numbers, on pages shared by CUDA IPC; the two take turns on the GPU."),
    "attention": Section(gpu_compute.attention, 60, "Decode attention alone, eight layers of the 8B model's shape in a CUDA graph."),
    "served": Section(_served, 150, "A model of 135M parameters behind HTTP, prefill and decode worker on one GPU, under the load generator."),
    "alike": Section(gpu_compute.alike, 90, "Decode rows that begin with the same tokens and attend to them together; where a whole step does so, it must be faster for it."),
    "steps-1b": Section(partial(gpu_compute.steps, "1b"), 90, "Whole steps of the 1B model."),
    "swap": Section(gpu_moving.swap, 60, "Pages to the pinned host tier and back, 1 GiB at a time."),
    "shared": Section(gpu_moving.shared, 60, "One decode step on another process's pages and on one's own."),
    "ttft-8b": Section(partial(gpu_moving.ttft, "8b"), 60, "Figure 13 of the paper: first token by cached share, at the engine."),
    "ttft-1b": Section(partial(gpu_moving.ttft, "1b"), 60, "The same of the 1B model."),
}  # fmt: skip
"""Sections in the order of a run: what matters most comes first."""


# ---- a section, in its own process --------------------------------------------------------------------


def run_section(name: str, folder: Path) -> None:
    """Measure a section; each figure is appended to the section's file at once."""
    torch.cuda.set_device(DEVICE)
    roofs = folder / "ceilings.json"
    if name == "ceilings":
        Ceilings.measure().write(roofs)
    with (folder / f"{name}.jsonl").open("w") as out:
        failed = 0
        for figure in figures_of(name, Ceilings.read(roofs)):
            out.write(json.dumps(attrs.asdict(figure)) + "\n")
            out.flush()
            failed += figure.note.startswith(FAILED)
    if failed:
        raise SystemExit(f"{failed} figures could not be measured")


def figures_of(name: str, roof: Ceilings | None) -> Iterator[Figure]:
    """A section's figures; those of a data sheet are its ceilings if they could not be measured."""
    if roof is None:
        yield Figure("compared with an H100's data sheet: the ceilings were not measured", None, "")
    yield from SECTIONS[name].run(roof or ASSUMED)


# ---- the run -----------------------------------------------------------------------------------------------


@attrs.frozen
class Ran:
    """The result of a section's process."""

    name: str
    figures: tuple[Figure, ...]
    problem: str | None
    """Why the section failed or was stopped, in one line; None if it ended well."""
    took_s: float


def run_apart(command: Sequence[str], name: str, folder: Path, limit_s: float) -> Ran:
    """Run a section's process, and those that it starts, for at most ``limit_s``."""
    began, errors = time.monotonic(), folder / f"{name}.err"
    with errors.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        problem = _ended(process, limit_s)
    if problem and (said := errors.read_text().strip()):
        problem += f": {said.splitlines()[-1][:300]}"
        print(said[-3000:], file=sys.stderr)
    return Ran(name, _figures(folder / f"{name}.jsonl"), problem, time.monotonic() - began)


def _ended(process: subprocess.Popen[bytes], limit_s: float) -> str | None:
    """Wait for the process and return why it did not end well, or None."""
    try:
        status = process.wait(limit_s)
        return None if status == 0 else f"ended with status {status}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # it leads a process group: its workers end with it
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        return f"stopped after {limit_s:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _figures(path: Path) -> tuple[Figure, ...]:
    if not path.exists():
        return ()
    lines = path.read_text().splitlines(keepends=True)  # the last may be cut off
    return tuple(Figure(**json.loads(line)) for line in lines if line.endswith("\n"))


def device() -> str:
    """The GPU, its driver and the versions of ``PACKAGES``; makes no CUDA context."""
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    said = ""
    with suppress(OSError):
        said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    name, memory, driver = (*filter(None, map(str.strip, said.partition("\n")[0].split(","))), "?", "?", "?")[
        :3
    ]
    return f"GPU: {name}, {memory}, driver {driver}. CUDA {torch.version.cuda} of torch. {', '.join(map(_version, PACKAGES))}."


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} unknown" if find_spec(package.partition("-")[0]) else f"{package} not there"


def row(figure: Figure) -> list[str]:
    """A figure as a row of the note."""
    goal = "" if figure.goal is None else f"{'at most' if figure.at_most else 'at least'} {figure.goal:g}"
    verdict = {True: "met", False: "**missed**", None: "" if figure.goal is None else "not measured"}[
        figure.met
    ]
    value = "-" if figure.value is None else number(figure.value)
    return [figure.what, value, figure.unit, goal, verdict, figure.note]


def parts_of(ran: Ran) -> list[str]:
    """The paragraphs of one section of the note."""
    head = ["what", "figure", "unit", "goal", "", "more"]
    parts = [f"## {ran.name}", f"{SECTIONS[ran.name].about} {ran.took_s:.0f} s."]
    if ran.problem:
        parts.append(f"**Not whole: {ran.problem}**")
    return parts + ([table(head, [row(one) for one in ran.figures])] if ran.figures else [])


def write(note: Note, words: str, found: Sequence[Ran]) -> None:
    """Write the note from the sections so far.

    A copy goes to ``$OUT`` if that is set: a borrowed machine returns the files in it.
    """
    parts = [part for ran in found for part in parts_of(ran)]
    path = note.write("The GPU backend", f"make gpu-bench{words}", device(), *parts)
    out = os.environ.get("OUT")
    if out:
        shutil.copy(path, out)


def measure(names: Sequence[str], note: Note, words: str, seconds: float) -> list[Ran]:
    """Run the sections one after another for at most ``seconds``; the note is rewritten after each."""
    found: list[Ran] = []
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="memserve-gpu-bench-") as place:
        for name in names:
            limit = min(SECTIONS[name].limit_s, until - time.monotonic())
            command = [sys.executable, __file__, "--section", name, "--folder", place]
            late = Ran(name, (), f"not begun: {seconds:.0f} s are over", 0.0)
            found.append(run_apart(command, name, Path(place), limit) if limit > STOP_S else late)
            write(note, words, found)
            keep_output(name, Path(place, f"{name}.err"))
            print("\n\n".join(parts_of(found[-1])), flush=True)
    return found


def keep_output(name: str, said: Path) -> None:
    """Append the end of what a section's process said to one file in ``$OUT``, if that is set."""
    out = os.environ.get("OUT")
    if out and said.exists():
        with Path(out, "gpu-bench.log").open("a") as log:
            log.write(f"==== {name}\n{said.read_text(errors='replace')[-SAID:]}\n")


def options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole run, at most")
    parser.add_argument("--commit", default=None, help="for the note, where there is no git")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=gpu_moving.WORKERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.only.split(",")) - set(SECTIONS):
        parser.error(
            f"--only: there is no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}"
        )
    return given


def main() -> int:
    """Measure and write the note. The exit status is 1 if a section did not end well or a goal was missed."""
    given = options()
    if given.worker:
        torch.cuda.set_device(DEVICE)
        with torch.inference_mode():
            print(gpu_moving.WORKERS[given.worker](given.folder))
        return 0
    if given.section:
        with torch.inference_mode():
            run_section(given.section, given.folder)
        return 0
    if not torch.cuda.is_available():
        raise SystemExit(
            "gpu-bench needs an NVIDIA GPU and a torch built with CUDA; make bench-engine measures CPUs"
        )
    wanted = given.only.split(",")
    names = ["ceilings", *(name for name in SECTIONS if name in wanted and name != "ceilings")]
    note = Note("gpu", folder=FOLDER, commit=given.commit or commit())
    words = f' ARGS="{" ".join(sys.argv[1:])}"' if sys.argv[1:] else ""
    found = measure(names, note, words, given.seconds)
    missed = [one.what for ran in found for one in ran.figures if one.met is False]
    print(
        f"\n{note.path}: {len(missed)} goals missed, {sum(ran.problem is not None for ran in found)} sections not whole"
    )
    return 1 if missed or any(ran.problem for ran in found) else 0


if __name__ == "__main__":
    sys.exit(main())
