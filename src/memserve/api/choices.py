"""One answer on its way to a client: tokens in, text and tool calls out, up to its end or a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from memserve.api.call_parser import CallParser, CallPart, Found
from memserve.api.logprobs import TokenLogprobs, token_text
from memserve.api.prompt_logprobs import PromptReport
from memserve.api.service import Chunk
from memserve.api.thoughts import Thought, ThoughtParser
from memserve.drawing import Logprobs
from memserve.engine.detokenizer import Detokenizer, StopScanner


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

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens or self.finish or self.calls or self.thought)

    @property
    def parts(self) -> list[Delta]:
        """This delta, split in the order in which streams send it: thought, text, pieces of calls, end."""
        if not self.calls and not self.thought:
            return [self]
        parts = [Delta(thought=self.thought)] if self.thought else []
        parts += [Delta(self.text)] if self.text else []
        parts += [Delta(calls=[call]) for call in self.calls]
        if self.finish:
            parts.append(Delta(finish=self.finish))
        parts[-1].tokens, parts[-1].logprobs = self.tokens, self.logprobs
        return parts

    def add(self, part: CallPart) -> None:
        """Append a piece of a call; consecutive pieces of its arguments are merged into one."""
        last = self.calls[-1] if self.calls else None
        if last is not None and last.name is None and part.name is None:
            part = attrs.evolve(last, arguments=last.arguments + part.arguments)
            self.calls.pop()
        self.calls.append(part)


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
        self._reported_characters = 0
        # Not taken yet. Bounded by max_tokens: a slow reader costs no more than one that does not stream.
        self._new = Delta()
        self._texts: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string or the last wanted call ended the answer: the service need not continue."""
        return self._scanner.matched is not None or (self._calls is not None and self._calls.enough)

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
                self._new.thought += one.text
            else:
                self._answer(one)

    def _answer(self, text: str) -> None:
        if self._calls is None:
            self._texts.append(text)
        elif text:
            self._sort(self._calls.push(text))

    def _sort(self, found: Sequence[Found]) -> None:
        """Separate text from calls."""
        for one in found:
            if isinstance(one, CallPart):
                self._new.add(one)
            else:
                self._texts.append(one)

    def _report(self, token: int, logprobs: Logprobs) -> None:
        self._new.logprobs.append(TokenLogprobs(token, self._reported_characters, logprobs))
        self._reported_characters += len(token_text(token, self._piece))

    def take(self) -> Delta:
        """Everything new since the last ``take``."""
        delta, self._new = self._new, Delta()
        delta.text = "".join(self._texts)
        self._texts.clear()
        return delta

    def _end(self, finish: str) -> None:
        if self._thoughts is not None:
            self._think(self._thoughts.finish())
        if self._calls is not None:
            self._sort(self._calls.finish())
            whole = finish == "stop" and self._calls.calls and not self._calls.cut
            finish = self._finish_of_calls if whole else finish
        self.finish = self._new.finish = finish
