"""``memserve`` and ``python -m memserve``.

Zygotes start here too, and so do actors: without the command line's parser and its memory.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import NoReturn


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["zygote"]:
        zygote(words[1:])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: no text may end a command
    from memserve.cli import run

    return run(words)


def zygote(words: Sequence[str]) -> NoReturn:
    """Be a zygote, and then each actor that it forks.

    A supervisor starts ``memserve zygote MODULE ... --runtime-dir DIR --orders FD``.
    """
    import argparse

    parser = argparse.ArgumentParser(
        prog="memserve zygote", description="Forks the actors of a cluster; `memserve up` starts it."
    )
    parser.add_argument("modules", nargs="*", help="modules to import before the first fork")
    parser.add_argument("--runtime-dir", required=True)
    parser.add_argument("--orders", type=int, required=True, help="descriptor of a socket to the supervisor")
    given = parser.parse_args(words)
    from memserve.processes.actor import run_actor
    from memserve.processes.zygote import end, serve

    name, lifeline = serve(given.runtime_dir, given.modules, given.orders)
    end(run_actor(name, given.runtime_dir, lifeline))


if __name__ == "__main__":
    sys.exit(main())
