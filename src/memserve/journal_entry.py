"""What a Frontend records of one request: all it takes to continue the request on another worker."""

from __future__ import annotations

import attrs

from memserve.accounts import Origins, Timings
from memserve.identity import ActorId
from memserve.messages import Plan, Request, TokenUpdate
from memserve.tokens import count

SUBMIT_REPEAT_S = 1.0
"""How long a Submit may stay unanswered before it is sent again, to the next scheduler if any."""
STALL_S = 3.0
"""How long an attempt may be silent before its worker is asked whether it still holds it."""
OVERTAKEN_S = 0.5
"""How long tokens may be missing before later ones.

Long enough for TCP to resend a packet, and far shorter than another attempt.
"""


@attrs.define
class JournalEntry:
    """The journal's entry for one request."""

    request: Request
    """The request as first submitted: ``tokens`` is the prompt."""
    received_at: float
    sent: bytes = b""
    """Tokens delivered to the client."""
    scored: int = 1
    """Prompt tokens whose log probabilities were delivered, if wanted. The first token has none."""
    attempt: int = 0
    plan: Plan | None = None
    holder: ActorId | None = None
    """The scheduler at which the request waits for a worker."""
    held: bool = False
    """The request was admitted once, by the holder or by a scheduler that is gone."""
    planned_at: float | None = None
    """When the first attempt was planned."""
    asked_at: float = 0.0
    """When the last Submit was sent, or the last Inquire once there is a plan or a holder."""
    heard_at: float = 0.0
    """When the attempt, or its holder, last showed a sign of life."""
    cached_tokens: int = 0
    early: list[tuple[float, TokenUpdate]] = attrs.field(factory=list)
    """Tokens that arrived before those they follow, and when.

    A decode worker's tokens come by another connection than its prefill worker's first one.
    """
    fed_by_decode: bool = False
    """The decode worker of this attempt has sent tokens."""
    first_token_at: float | None = None
    first_tokens: int = 0
    """Tokens that came at that time: several, if a worker guessed ahead."""
    last_token_at: float | None = None
    timings: Timings = Timings()
    origins: Origins = attrs.field(factory=Origins)

    @property
    def due(self) -> float:
        """When the Frontend must ask again, or give up."""
        if self.plan is None and self.holder is None:
            return min(self.asked_at + SUBMIT_REPEAT_S, self.given_up_at, self.gap_ends)
        return min(max(self.asked_at, self.heard_at) + STALL_S, self.given_up_at, self.gap_ends)

    @property
    def gap_ends(self) -> float:
        """When the tokens missing before early ones must have arrived."""
        return self.early[0][0] + OVERTAKEN_S if self.early else float("inf")

    def missing(self, position: int) -> str:
        """A description of what should have arrived before tokens at ``position``."""
        if self.unscored:
            end = min(position, self.request.prompt_tokens)
            return f"log probabilities of the prompt's tokens {self.scored} to {end}"
        return f"tokens {self.request.prompt_tokens + count(self.sent)} to {position}"

    @property
    def given_up_at(self) -> float:
        """When a request without a plan has missed its deadline.

        A scheduler that hears of the request refuses it earlier.
        """
        waits = self.plan is None and not self.attempt and not self.sent
        ttft_s = self.request.ttft_s if waits else None
        return float("inf") if ttft_s is None else self.received_at + ttft_s + SUBMIT_REPEAT_S

    @property
    def unscored(self) -> bool:
        """Log probabilities of the prompt are still missing."""
        wanted = self.request.sampling.prompt_logprobs is not None
        return wanted and self.scored < self.request.prompt_tokens

    def current(self) -> Request:
        """The request as the current attempt carries it.

        Once all log probabilities of the prompt are delivered, it asks for none.
        """
        sampling = self.request.sampling
        if sampling.prompt_logprobs is not None and not self.unscored:
            sampling = attrs.evolve(sampling, prompt_logprobs=None)
        tokens = self.request.tokens + self.sent
        return attrs.evolve(self.request, attempt=self.attempt, tokens=tokens, sampling=sampling)

    def needed(self) -> set[ActorId]:
        """The actors without which the current attempt cannot continue.

        A stream that its decode worker feeds no longer needs the prefill worker.
        """
        if self.plan is None:
            return set()
        needed = {self.plan.decode, self.plan.shard}
        return needed if self.fed_by_decode else needed | {self.plan.prefill}

    def canonical(self, now: float) -> dict[str, object]:
        """Everything about a finished request, for its one log line."""
        first, last, output = self.first_token_at, self.last_token_at, count(self.sent)
        later = output - self.first_tokens
        between = None if first is None or last is None or not later else (last - first) * 1e3 / later
        return {
            "prompt_tokens": self.request.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": output,
            "held_ms": None if self.planned_at is None else (self.planned_at - self.received_at) * 1e3,
            "ttft_ms": None if first is None else (first - self.received_at) * 1e3,
            "tpot_ms": between,
            "total_ms": (now - self.received_at) * 1e3,
            **attrs.asdict(self.timings),
            **attrs.asdict(self.origins),
            "attempts": self.attempt + 1,
            "prefill": self.plan.prefill if self.plan else None,
            "decode": self.plan.decode if self.plan else None,
        }
