"""The JSON of responses: OpenAI's objects for completions and chats, with vLLM's token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import attrs
import msgspec

from memserve.api.bodies import StreamOptions
from memserve.api.call_formats import HERMES, CallFormat
from memserve.api.calls import call_deltas, whole_calls
from memserve.api.choices import Choice, Delta
from memserve.api.errors import ApiError
from memserve.api.logprobs import Piece, chat_logprobs, completion_logprobs
from memserve.api.prompt_logprobs import behind_echo
from memserve.api.prompts import Prompt

DONE = b"data: [DONE]\n\n"
PING = b": waiting\n\n"


_NO_OPTIONS = StreamOptions()


@attrs.frozen
class Head:
    """Fields that all objects of one response share."""

    id: str
    created: int
    """Unix time in seconds."""
    model: str


class EventStream(Protocol):
    """One response as server-sent events. It may hold state: each delta is shown once, in order."""

    def events(self, choice: Choice, delta: Delta) -> bytes:
        """The events for what is new in one of the answers; may be empty."""

    def ending(self) -> bytes:
        """The events after the last delta of the last answer."""

    def failure(self, error: ApiError) -> bytes:
        """The events that end the response if it fails instead."""


class Wire(Protocol):
    """One of OpenAI's response formats."""

    def whole(self, head: Head, answers: Sequence[tuple[Choice, Delta]]) -> dict[str, Any]:
        """A response that is not streamed."""

    def stream(self, head: Head, choices: Sequence[Choice]) -> EventStream:
        """A response that is streamed."""


class ChunkWire(Protocol):
    """A format whose streams consist of chunks: objects of one shape for everything that is new."""

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The prompts of the request."""

    @property
    def options(self) -> StreamOptions:
        """What the client wants to know of its usage."""

    @property
    def per_token(self) -> bool:
        """Whether the client asked for more about each token than its text: ids or log probabilities."""

    def opening(self, head: Head, choice: Choice) -> dict[str, Any] | None:
        """The chunk that opens a choice's stream, if any."""

    def chunk(self, head: Head, choice: Choice, delta: Delta) -> dict[str, Any]:
        """A chunk of a choice's stream."""

    def last(self, head: Head) -> dict[str, Any]:
        """The chunk without choices that carries a stream's usage."""


@attrs.frozen
class CompletionWire:
    """/v1/completions."""

    prompts: Sequence[Prompt]
    token_ids: bool
    piece: Piece | None = None
    """Set if log probabilities are requested."""
    options: StreamOptions = _NO_OPTIONS

    @property
    def per_token(self) -> bool:
        return self.token_ids or self.piece is not None

    def opening(self, head: Head, choice: Choice) -> dict[str, Any] | None:
        """The echoed prompt, its ids and its log probabilities, each if requested."""
        prompt = self.prompts[choice.prompt]
        if not prompt.echo and not self.token_ids and choice.about is None:
            return None
        return self._object(head, [self._with_prompt(choice, Delta())])

    def chunk(self, head: Head, choice: Choice, delta: Delta) -> dict[str, Any]:
        return self._object(head, [self._choice(choice, delta)])

    def whole(self, head: Head, answers: Sequence[tuple[Choice, Delta]]) -> dict[str, Any]:
        whole = self._object(head, [self._with_prompt(choice, delta) for choice, delta in answers])
        return whole | {"usage": usage(self.prompts, [choice for choice, _ in answers])}

    def stream(self, head: Head, choices: Sequence[Choice]) -> EventStream:
        return ChunkStream(self, head, choices)

    def last(self, head: Head) -> dict[str, Any]:
        return self._object(head, [])

    def _with_prompt(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        prompt, about = self.prompts[choice.prompt], choice.about
        answer = self._choice(choice, attrs.evolve(delta, text=prompt.echo + delta.text))
        answer["logprobs"] = behind_echo(about, answer["logprobs"])
        if self.token_ids:
            answer["prompt_token_ids"] = prompt.tokens
        if about is not None and about.listing is not None:
            answer["prompt_logprobs"] = about.listing
        return answer

    def _choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        echoed = 0 if choice.about is None else choice.about.characters
        logprobs = (
            completion_logprobs(delta.logprobs, self.piece, echoed) if self.piece and delta.logprobs else None
        )
        answer = {
            "index": choice.index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish,
        }
        return answer | {"token_ids": delta.tokens} if self.token_ids else answer

    def _object(self, head: Head, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"cmpl-{head.id}",
            "object": "text_completion",
            "created": head.created,
            "model": head.model,
            "choices": choices,
        }


@attrs.frozen
class ChatWire:
    """/v1/chat/completions."""

    prompt: Prompt
    token_ids: bool
    piece: Piece | None = None
    """Set if log probabilities are requested."""
    calls: CallFormat = HERMES
    """Format in which the model writes tool calls; it determines what their ids look like."""
    options: StreamOptions = _NO_OPTIONS

    @property
    def prompts(self) -> Sequence[Prompt]:
        return (self.prompt,)

    @property
    def per_token(self) -> bool:
        return self.token_ids or self.piece is not None

    def opening(self, head: Head, choice: Choice) -> dict[str, Any] | None:
        """The role; for the first choice also the prompt's ids and log probabilities, each if requested."""
        answer = {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        opening = self._object(head, "chat.completion.chunk", [answer])
        return opening if choice.index else opening | self._of_prompt(choice)

    def chunk(self, head: Head, choice: Choice, delta: Delta) -> dict[str, Any]:
        said: dict[str, Any] = {"reasoning_content": delta.thought} if delta.thought else {}
        if delta.text or not (delta.finish or delta.calls or delta.thought):
            said["content"] = delta.text
        if delta.calls:
            said["tool_calls"] = call_deltas(delta.calls, partial(self.calls.call_id, head.id, choice.index))
        answer = {"index": choice.index, "delta": said, "finish_reason": delta.finish}
        return self._object(head, "chat.completion.chunk", [answer | self._details(delta)])

    def whole(self, head: Head, answers: Sequence[tuple[Choice, Delta]]) -> dict[str, Any]:
        choices = []
        for choice, delta in answers:
            message: dict[str, Any] = {"role": "assistant", "content": delta.text, "refusal": None}
            if delta.thought:
                message["reasoning_content"] = delta.thought
            if delta.calls:
                call_id = partial(self.calls.call_id, head.id, choice.index)
                message |= {"content": delta.text or None, "tool_calls": whole_calls(delta.calls, call_id)}
            answer = {"index": choice.index, "message": message, "finish_reason": delta.finish}
            choices.append(answer | self._details(delta))
        whole = self._object(head, "chat.completion", choices) | self._of_prompt(answers[0][0])
        return whole | {"usage": usage(self.prompts, [choice for choice, _ in answers])}

    def stream(self, head: Head, choices: Sequence[Choice]) -> EventStream:
        return ChunkStream(self, head, choices)

    def last(self, head: Head) -> dict[str, Any]:
        return self._object(head, "chat.completion.chunk", [])

    def _of_prompt(self, choice: Choice) -> dict[str, Any]:
        """Fields of a response about its prompt, each if requested."""
        said: dict[str, Any] = {"prompt_token_ids": self.prompt.tokens} if self.token_ids else {}
        if choice.about is not None:
            said["prompt_logprobs"] = choice.about.listing
        return said

    def _details(self, delta: Delta) -> dict[str, Any]:
        """Fields of a choice about its tokens, each if requested."""
        details: dict[str, Any] = {"token_ids": delta.tokens} if self.token_ids else {}
        if self.piece is not None:
            details["logprobs"] = chat_logprobs(delta.logprobs, self.piece) if delta.logprobs else None
        return details

    def _object(self, head: Head, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{head.id}",
            "object": kind,
            "created": head.created,
            "model": head.model,
            "choices": choices,
        }


class ChunkStream:
    """The stream of a completion or a chat."""

    def __init__(self, wire: ChunkWire, head: Head, choices: Sequence[Choice]) -> None:
        self._wire, self._head, self._choices = wire, head, choices
        self._counted = bool(wire.options.include_usage)
        self._counted_so_far = self._counted and bool(wire.options.continuous_usage_stats)
        self._changing = wire.per_token or self._counted_so_far
        """Whether more than the text changes from one event to the next."""
        self._moulds: dict[int, Mould] = {}
        """Event templates by choice, for choices whose first event was written."""

    def events(self, choice: Choice, delta: Delta) -> bytes:
        if choice.index not in self._moulds:
            return self._opening(choice) + self.events(choice, delta)
        if not delta.pieces:
            return self._event(choice, delta)
        return b"".join([self._event(choice, part) for part in delta.parts])

    def ending(self) -> bytes:
        if not self._counted:
            return DONE
        last = self._wire.last(self._head) | {"usage": usage(self._wire.prompts, self._choices)}
        return event(last) + DONE

    def failure(self, error: ApiError) -> bytes:
        return error_event(error.body())

    def _event(self, choice: Choice, delta: Delta) -> bytes:
        """The event for ``delta``.

        Empty if its text is held back: half a character, or what may begin a stop string or a call.
        """
        if delta.finish or delta.calls or delta.thought or self._changing:
            return event(self._chunk(choice, delta))
        return self._moulds[choice.index].event(delta.text) if delta.text else b""

    def _opening(self, choice: Choice) -> bytes:
        """The event that opens a choice's stream; may be empty."""
        self._moulds[choice.index] = Mould.of(lambda text: self._chunk(choice, Delta(text)))
        opening = self._wire.opening(self._head, choice)
        return b"" if opening is None else event(opening | self._usage_yet(choice, 0))

    def _chunk(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        return self._wire.chunk(self._head, choice, delta) | self._usage_yet(choice, choice.output_tokens)

    def _usage_yet(self, choice: Choice, tokens: int) -> dict[str, Any]:
        """A chunk's usage, if requested: unknown, or that of the choice after ``tokens`` tokens."""
        if not self._counted:
            return {}
        if not self._counted_so_far:
            return {"usage": None}
        prompt = self._wire.prompts[choice.prompt]
        return {"usage": token_counts(len(prompt.tokens), tokens, choice.cached_tokens)}


def usage(prompts: Sequence[Prompt], choices: Sequence[Choice]) -> dict[str, Any]:
    """Token counts of a whole response. Each prompt counts once, however many answers it has."""
    prompt_tokens = sum(len(prompt.tokens) for prompt in prompts)
    output_tokens = sum(choice.output_tokens for choice in choices)
    # A prompt's second answer hits what the first has just cached; the minimum is what was cached before.
    cached = 0
    for index in range(len(prompts)):
        cached += min(choice.cached_tokens for choice in choices if choice.prompt == index)
    return token_counts(prompt_tokens, output_tokens, cached)


def token_counts(prompt: int, output: int, cached: int) -> dict[str, Any]:
    """``usage``, given the numbers of tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def event(document: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


_MARK = "\0text"
"""Placeholder that occurs in no model name and no id."""


@attrs.frozen
class Mould:
    """A template for events in which only the text changes from one token to the next."""

    before: bytes
    after: bytes

    @classmethod
    def of(cls, document: Callable[[str], dict[str, Any]]) -> Mould:
        """Make the template; ``document`` returns the event's document for a given text."""
        before, _, after = event(document(_MARK)).partition(msgspec.json.encode(_MARK))
        return cls(before, after)

    def event(self, text: str) -> bytes:
        """The result of :func:`event` for the document with this text."""
        return self.before + msgspec.json.encode(text) + self.after


def error_event(body: bytes) -> bytes:
    """The event that ends a failed stream; no [DONE] follows it."""
    return b"event: error\ndata: " + body + b"\n\n"
