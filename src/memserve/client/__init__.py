"""The pool for any trio program: ``from memserve.client import open_pool``. See ``docs/mempool.md``."""

from memserve.client.pool import MemPool, open_pool

__all__ = ["MemPool", "open_pool"]
