"""What the HTTP surface needs from whoever answers requests. The Frontend actor is one; the tests have another."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import attrs

from memserve.drawing import Logprobs, PromptLogprobs, Sampling
from memserve.messages import Change, Member
from memserve.scheduling.view import Health


@attrs.frozen
class GenerationParams:
    """How one answer is to be generated."""

    sampling: Sampling
    max_tokens: int
    """At least 1; prompt and answer together fit the context."""
    stop_tokens: tuple[int, ...]
    """Ids that end the answer; empty with ignore_eos."""
    priority: int = 0
    """Lower is earlier, as in vLLM's API."""
    ttft_s: float | None = None
    """By when the first token is wanted, from now."""


@attrs.frozen
class Chunk:
    """New tokens of one answer, in order."""

    tokens: tuple[int, ...]
    finish: str | None = None
    """``stop`` or ``length`` on the last chunk."""
    cached_tokens: int = 0
    """Prompt tokens that were found in the pool."""
    logprobs: tuple[Logprobs, ...] = ()
    """One for each token, where they were asked for."""
    prompt: tuple[PromptLogprobs, ...] = ()
    """Of the first chunk: of all of the prompt's tokens but the first, where they were asked for."""


Take = Callable[[Chunk], bool]
"""Takes new tokens in; whether more are wanted. False: a stop string was found."""


class Stream(Protocol):
    """One answer on its way."""

    id: str
    """Of the request, as the logs have it."""

    async def listen(self, take: Take) -> None:
        """Have ``take`` called with each chunk, up to the one with ``finish`` or to the first of which it returns false.

        It is called by whoever has the tokens, in the middle of its turn, and must not block. What it raises is raised
        here. Raises RequestFailed when the request fails. The context is left next.
        """


class Service(Protocol):
    """Generates answers, and knows the cluster."""

    def open(
        self, prompt: bytes, params: GenerationParams, scope: str
    ) -> AbstractAsyncContextManager[Stream]:
        """Submit packed prompt tokens. Entering raises RequestFailed when refused (429, 503).

        Leaving the context before the stream has ended cancels the request. ``scope`` is its cache's root.
        """

    def health(self) -> Health:
        """Whether a request sent now could be served, and what is missing."""

    def cluster(self) -> list[Member]:
        """Every actor known."""

    async def change(self, worker: str, change: Change) -> None:
        """Change the worker of this name; returns when it is in force. Raises RequestFailed (404, 409, 504)."""

    def metrics(self) -> bytes:
        """The metrics of the cluster in Prometheus' text format."""


@attrs.frozen(kw_only=True)
class ApiSettings:
    """What the HTTP surface is told by the configuration."""

    model: str
    """The name that requests give and /v1/models shows."""
    max_context: int
    """Tokens, prompt and answer together."""
    api_keys: tuple[str, ...] = ()
    """Accepted bearer keys; empty: no key is asked for."""
    admin_keys: tuple[str, ...] = ()
    """Those that may change workers; empty: all."""
    priority_keys: tuple[str, ...] = ()
    """Those that may ask for a priority below 0; empty: all."""
    ttft_ms: float | None = None
    """By when the first token of a request that does not say is wanted."""
    tool_format: str = "auto"
    """How the model writes calls of tools; auto: as its chat template has it."""
    reasoning: str = "text"
    """``apart``: what it thinks first is not in its answer's text."""
    body_bytes_max: int = 8 << 20
    body_timeout_s: float = 30.0
    """From the head of a request to the end of its body."""
    ping_s: float = 15.0
    """A silent stream gets a comment so often, so that proxies keep it open and a dead client is noticed."""
