"""Turns a body's sampling settings into those that travel with its request."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable

from memserve.api.bodies import SEED_BITS, ChatBody, CompletionBody
from memserve.api.errors import ApiError
from memserve.drawing import BIASES_MAX, Adjustments, Sampling
from memserve.tokens import pack

BIAS_MAX = 100.0
TOP_P_LEAST = 1e-9
"""Used in place of 0, which OpenAI's API permits: it leaves only the likeliest token, which alone reaches this share."""
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def sampling_of(
    body: CompletionBody | ChatBody, vocabulary: int, draw: Callable[[], int], grammar: str = ""
) -> Sampling:
    """The sampling settings that the body asks for. Raises ApiError (400).

    Its ``allowed_token_ids`` must be in the vocabulary.
    ``draw`` supplies a seed if the body has none. ``grammar``: the one that the answer must follow; empty:
    none.
    """
    asked = (body.prompt_logprobs, body.scores_of_echo)
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=min(max(body.top_k or 0, 0), vocabulary),  # messages carry no larger integers than 64 bits
        top_p=1.0 if body.top_p is None else max(body.top_p, TOP_P_LEAST),
        seed=(draw() if body.seed is None else body.seed) % 2**SEED_BITS,
        min_p=body.min_p or 0.0,
        adjust=_adjustments(body, vocabulary, grammar),
        logprobs=body.logprobs_wanted,
        prompt_logprobs=max((one for one in asked if one is not None), default=None),
    )


def _adjustments(body: CompletionBody | ChatBody, vocabulary: int, grammar: str) -> Adjustments | None:
    """None if the body asks for no adjustments: the request then carries none, and its rows cost no more."""
    bias = _biases(body.logit_bias or {}, vocabulary)
    asked = Adjustments(
        biased=pack(bias),
        bias=array("f", bias.values()).tobytes(),
        repetition=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        frequency=body.frequency_penalty or 0.0,
        presence=body.presence_penalty or 0.0,
        min_tokens=body.min_tokens or 0,
        allowed=_mask(body.allowed_token_ids, vocabulary) if body.allowed_token_ids else b"",
        grammar=grammar,
    )
    return None if asked == Adjustments() else asked


def _mask(tokens: Iterable[int], vocabulary: int) -> bytes:
    """A bit for each token of the vocabulary, set for ``tokens``, which must be in it."""
    made = bytearray(-(-vocabulary // 8))
    for token in tokens:
        made[token // 8] |= 1 << token % 8
    return bytes(made)


def _biases(given: dict[str, object], vocabulary: int) -> dict[int, float]:
    """``logit_bias`` by token id, without biases of 0. Raises ApiError (400)."""
    if len(given) > BIASES_MAX:
        raise _wrong("logit_bias", f"expected at most {BIASES_MAX} tokens", len(given))
    found = {}
    for name, value in given.items():
        # Each id has one accepted spelling: otherwise a token could be named twice, with two biases.
        if not _TOKEN_ID.fullmatch(name) or int(name) >= vocabulary:
            raise _wrong("logit_bias", f"expected token ids from 0 to {vocabulary - 1} as names", name[:60])
        if type(value) not in (int, float) or not -BIAS_MAX <= value <= BIAS_MAX:  # type: ignore[operator]
            rule = f"expected a number from {-BIAS_MAX:g} to {BIAS_MAX:g}"
            raise _wrong(f"logit_bias.{name}", rule, str(value)[:60])
        if value:
            found[int(name)] = float(value)  # type: ignore[arg-type]
    return found


def _wrong(field: str, rule: str, value: object) -> ApiError:
    return ApiError(f"{field}: {rule}, got {value}", field, code="invalid_value")
