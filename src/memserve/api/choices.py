"""One answer on its way to a client: tokens in, text and tool calls out, up to its end or a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import attrs

from memserve.api.call_parser import CallParser, CallPart
from memserve.api.logprobs import TokenLogprobs, token_text
from memserve.api.prompt_logprobs import PromptReport
from memserve.api.service import Chunk
from memserve.api.thoughts import Thought, ThoughtParser
from memserve.drawing import Logprobs
from memserve.engine.detokenizer import Detokenizer, StopScanner

Piece = str | Thought | CallPart
"""Text of an answer, of a thought before it, or of a call."""


@attrs.define
class Delta:
    """What is new in an answer since it was last taken."""

    text: str = ""
    tokens: list[int] = attrs.field(factory=list)
    finish: str | None = None
    logprobs: list[TokenLogprobs] = attrs.field(factory=list)
    """Log probabilities at each of ``tokens``, if requested."""
    calls: list[CallPart] = attrs.field(factory=list)
    thought: str = ""
    """What the model thinks, if that is reported apart from the text."""
    pieces: list[Piece | TokenLogprobs] = attrs.field(factory=list)
    """Thought, text and calls in the order in which the model wrote them, each token's log probabilities before
    what it completes; empty if there is nothing but text."""

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens or self.finish or self.calls or self.thought)

    @property
    def parts(self) -> list[Delta]:
        """This delta, split in the order in which streams send it: what the model wrote, then the end."""
        if not self.calls and not self.thought:
            return [self]
        parts = []
        for one in _joined([one for one in self.pieces if not isinstance(one, TokenLogprobs)]):
            match one:
                case Thought(text):
                    parts += [Delta(thought=text)] if text else []
                case CallPart():
                    parts.append(Delta(calls=[one]))
                case str():
                    parts += [Delta(one)] if one else []
        if self.finish:
            parts.append(Delta(finish=self.finish))
        parts[-1].tokens, parts[-1].logprobs = self.tokens, self.logprobs
        return parts

    def fill(self, pieces: Sequence[Piece | TokenLogprobs]) -> None:
        """Take the pieces that came, in order; those that continue one another are merged."""
        merged = _joined(pieces)
        if any(not isinstance(one, str) for one in merged):
            self.pieces = merged
        self.text = "".join(one for one in merged if isinstance(one, str))
        self.thought = "".join(one.text for one in merged if isinstance(one, Thought))
        self.calls = [one for one in merged if isinstance(one, CallPart)]


def _joined(pieces: Sequence[Piece | TokenLogprobs]) -> list[Piece | TokenLogprobs]:
    """The pieces, with those that continue one another merged."""
    if len(pieces) == 1:
        return list(pieces)
    return [one for _, group in groupby(pieces, _kind) for one in _merged(list(group))]


def _kind(piece: Piece | TokenLogprobs) -> object:
    """Equal for pieces that can be merged if they follow one another."""
    if isinstance(piece, CallPart):
        return piece.number, piece.name is not None
    return type(piece)


def _merged(group: list[Piece | TokenLogprobs]) -> list[Piece | TokenLogprobs]:
    """Consecutive pieces of one kind as one piece, where they can be merged."""
    match group[0]:
        case str():
            return ["".join(one for one in group if isinstance(one, str))]
        case Thought():
            return [Thought("".join(one.text for one in group if isinstance(one, Thought)))]
        case CallPart(number, name):
            return [
                CallPart(number, name, "".join(one.arguments for one in group if isinstance(one, CallPart)))
            ]
    return group


class Choice:
    """One answer: ``feed`` what the service delivers, ``take`` what the client is to get."""

    def __init__(
        self,
        index: int,
        prompt: int,
        piece: Callable[[int], bytes],
        stops: Sequence[str],
        min_tokens: int = 0,
        *,
        thoughts: ThoughtParser | None = None,
        calls: CallParser | None = None,
        finish_of_calls: str = "tool_calls",
        about: PromptReport | None = None,
        silent: bool = False,
        with_stop: bool = False,
    ) -> None:
        """``index`` is the choice's index in the response, ``prompt`` the index of its prompt.

        ``min_tokens``: stop strings are not looked for in the text of this many tokens, as in vLLM.
        ``thoughts``: separates what the model thinks first, if that is reported apart. ``calls``: finds tool
        calls, if there are tools; ``finish_of_calls`` is then the finish reason of an answer with calls.
        ``about``: log probabilities of its prompt, if requested. ``silent``: drop the one token that comes,
        as the client wants only the prompt. ``with_stop``: the text ends with the stop string or stop token.
        """
        self.index = index
        self.about = about
        self.prompt = prompt
        self.output_tokens = 0
        """Tokens of the answer, up to the end of a stop string if one was found."""
        self.cached_tokens = 0
        self.finish: str | None = None
        """How the answer ended, once it is complete: ``stop``, ``length`` or ``tool_calls``."""
        self._detokenizer = Detokenizer(piece)
        self._scanner = StopScanner(stops, with_stop)
        self._piece, self._min_tokens, self._silent, self._with_stop = piece, min_tokens, silent, with_stop
        self._thoughts, self._calls, self._finish_of_calls = thoughts, calls, finish_of_calls
        self._reported_characters, self._before_answer = 0, 0
        # Not taken yet. Bounded by max_tokens: a slow reader costs no more than one that does not stream.
        self._new = Delta()
        self._pieces: list[Piece | TokenLogprobs] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string or the last wanted call ended the answer: the service need not continue."""
        return self._scanner.matched is not None or (self._calls is not None and self._calls.enough)

    @property
    def thought_tokens(self) -> int:
        """Tokens of the thought with its marks, if there is one and thoughts are reported apart."""
        return self._before_answer if self._thoughts is not None and self._thoughts.began else 0

    @property
    def withheld(self) -> bool:
        """Whether nothing can be written yet because the prompt's log probabilities come first."""
        return self.about is not None and not self.about.shown

    def feed(self, chunk: Chunk) -> None:
        """Take tokens in. Text and tokens after the answer's end are dropped."""
        self.cached_tokens = chunk.cached_tokens
        if self.about is not None:
            self.about.take(chunk.prompt)
        if self._silent:
            chunk = attrs.evolve(chunk, tokens=(), finish=chunk.finish and "length")
        for number, token in enumerate(chunk.tokens):
            self.output_tokens += 1
            self._new.tokens.append(token)
            if chunk.logprobs:
                self._report(token, chunk.logprobs[number])
            if self._thoughts is not None and not self._thoughts.over:
                self._before_answer += 1
            if chunk.finish == "stop" and number + 1 == len(chunk.tokens) and not self._with_stop:
                break  # the token that ended the answer, which as in vLLM is not part of its text
            text = self._detokenizer.push(token)
            early = self.output_tokens <= self._min_tokens
            self._say(text if early else self._scanner.push(text))
            if self.stopped:
                return self._end("stop")
        if chunk.finish is not None:
            self._say(self._scanner.push(self._detokenizer.finish()))
            self._say(self._scanner.finish())
            self._end("stop" if self.stopped else chunk.finish)
        return None

    def _say(self, text: str) -> None:
        if self._thoughts is None:
            self._answer(text)
        elif text:
            self._think(self._thoughts.push(text))

    def _think(self, found: Sequence[Thought | str]) -> None:
        """Separate thoughts from the answer."""
        for one in found:
            if isinstance(one, Thought):
                self._pieces.append(one)
            else:
                self._answer(one)

    def _answer(self, text: str) -> None:
        if self._calls is None:
            self._pieces.append(text)
        elif text:
            self._pieces += self._calls.push(text)

    def _report(self, token: int, logprobs: Logprobs) -> None:
        report = TokenLogprobs(token, self._reported_characters, logprobs)
        self._new.logprobs.append(report)
        self._pieces.append(report)
        self._reported_characters += len(token_text(token, self._piece))

    def take(self) -> Delta:
        """Everything new since the last ``take``."""
        delta, self._new = self._new, Delta()
        pieces = self._pieces
        if self._thoughts is None and self._calls is None and not delta.logprobs:
            delta.text = "".join(pieces)  # type: ignore[arg-type]  # nothing but text
        elif len(pieces) == 1 and isinstance(pieces[0], str):
            delta.text = pieces[0]
        elif pieces:
            delta.fill(pieces)
        pieces.clear()
        return delta

    def _end(self, finish: str) -> None:
        if self._thoughts is not None:
            self._think(self._thoughts.finish())
        if self._calls is not None:
            self._pieces += self._calls.finish()
            whole = finish == "stop" and self._calls.calls and not self._calls.cut
            finish = self._finish_of_calls if whole else finish
        self.finish = self._new.finish = finish
