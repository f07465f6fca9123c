"""What the commands of :mod:`memserve.cli` do and print."""
