"""``memserve`` and ``python -m memserve``.

Actors start here too, without the command line's parser and its memory.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["actor"]:
        return actor(words[1:])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: no text may end a command
    from memserve.cli import run

    return run(words)


def actor(words: Sequence[str]) -> int:
    """Run one actor; the supervisor starts ``actor NAME --runtime-dir DIR --lifeline FD``.

    The exit status.
    """
    import argparse

    parser = argparse.ArgumentParser(
        prog="memserve actor", description="One actor of a cluster; `memserve up` starts it."
    )
    parser.add_argument("name")
    parser.add_argument("--runtime-dir", required=True)
    parser.add_argument(
        "--lifeline", type=int, required=True, help="descriptor of a socket to the supervisor"
    )
    given = parser.parse_args(words)
    from memserve.processes.actor import run_actor

    return run_actor(given.name, given.runtime_dir, given.lifeline)


if __name__ == "__main__":
    sys.exit(main())
