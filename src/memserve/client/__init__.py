"""The pool for any trio program: ``from memserve.client import open_pool``; ``docs/mempool.md`` shows it at work."""

from memserve.client.pool import MemPool, open_pool

__all__ = ["MemPool", "open_pool"]
