"""What the HTTP surface needs from a service. The Frontend actor provides one; the tests have another."""

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
    """How to generate one answer."""

    sampling: Sampling
    max_tokens: int
    """Most tokens of the answer, at least 1; prompt and answer together fit the context."""
    stop_tokens: tuple[int, ...]
    """Ids of tokens that end the answer. With ignore_eos the model's end tokens are not among them."""
    priority: int = 0
    """Lower values are served earlier, as in vLLM's API."""
    ttft_s: float | None = None
    """Deadline for the first token, in seconds from now; None: no deadline."""


@attrs.frozen
class Chunk:
    """New tokens of one answer, in order."""

    tokens: tuple[int, ...]
    finish: str | None = None
    """How the answer ended, in the last chunk: ``stop`` or ``length``."""
    cached_tokens: int = 0
    """Number of prompt tokens whose KV was found in the pool."""
    logprobs: tuple[Logprobs, ...] = ()
    """Log probabilities at each token, if requested."""
    prompt: tuple[PromptLogprobs, ...] = ()
    """Log probabilities of all prompt tokens except the first, if requested; only in the first chunk."""


Take = Callable[[Chunk], bool]
"""Takes new tokens in; returns whether more are wanted: not after a stop string or the last wanted call."""


class Stream(Protocol):
    """One answer while it is generated."""

    id: str
    """The request's id, as in the logs."""

    async def listen(self, take: Take) -> None:
        """Have ``take`` called with each chunk, until one has ``finish`` or ``take`` returns False.

        ``take`` is called in the middle of the turn that brings the tokens, and must not block. What it
        raises is raised here. Raises RequestFailed when the request fails. The caller must leave the context
        next.
        """


class Service(Protocol):
    """Generates answers, and knows the cluster."""

    def open(
        self, prompt: bytes, params: GenerationParams, scope: str
    ) -> AbstractAsyncContextManager[Stream]:
        """Submit packed prompt tokens. Entering raises RequestFailed if the request is refused (429, 503).

        Leaving the context before the stream has ended cancels the request. ``scope`` is the root of its
        cache.
        """

    def health(self) -> Health:
        """Whether a request sent now could be served, and what is missing."""

    def cluster(self) -> list[Member]:
        """All known actors."""

    async def change(self, worker: str, change: Change) -> None:
        """Change the named worker; returns once that is in force. Raises RequestFailed (404, 409, 504)."""

    def metrics(self) -> bytes:
        """The metrics of the cluster in Prometheus' text format."""


@attrs.frozen(kw_only=True)
class ApiSettings:
    """The HTTP surface's settings, from the configuration."""

    model: str
    """The model's name in requests and in /v1/models."""
    max_context: int
    """Most tokens of prompt and answer together."""
    api_keys: tuple[str, ...] = ()
    """Accepted bearer keys; empty: no key is required."""
    admin_keys: tuple[str, ...] = ()
    """Keys that may change workers; empty: all."""
    priority_keys: tuple[str, ...] = ()
    """Keys that may ask for a priority below 0; empty: all."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the server from a browser; "*": any; empty: none but its own."""
    ttft_ms: float | None = None
    """Deadline for the first token of a request that does not set one, in milliseconds; None: no deadline."""
    tool_format: str = "auto"
    """Format in which the model writes tool calls; ``auto``: detected from its chat template."""
    reasoning: str = "text"
    """``apart``: what the model thinks first is not part of its answer's text."""
    body_bytes_max: int = 8 << 20
    body_timeout_s: float = 30.0
    """Most seconds from the head of a request to the end of its body."""
    ping_s: float = 15.0
    """Interval of comments on a silent stream, so that proxies keep it open and a dead client is noticed."""
