"""memserve: LLM serving on an elastic pool of KV pages."""

__version__ = "0.1.0"
