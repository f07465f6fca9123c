"""``python -m loadgen`` and ``memserve-loadgen``."""

from __future__ import annotations

import sys


def main() -> int:
    """Run a command; returns the exit status."""
    from loadgen.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
