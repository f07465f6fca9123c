"""Checks and tokenizes what a request asks for: the step between a body and the service."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import attrs
import trio

from memserve import tokens as packed
from memserve.api.bodies import CHOICES_MAX, SEED_BITS, ChatBody, CompletionBody, Conversation
from memserve.api.call_formats import CallFormat, format_named
from memserve.api.call_grammars import call_grammar
from memserve.api.chat import ChatTemplate, Rendered
from memserve.api.errors import ApiError
from memserve.api.formats import grammar_of
from memserve.api.logprobs import Piece
from memserve.api.sampling import sampling_of
from memserve.api.service import ApiSettings, GenerationParams
from memserve.api.thoughts import begins_in_thought
from memserve.api.tools import Offer
from memserve.engine.spec import ModelSpec
from memserve.engine.tokenizer import LONG_TEXT, Tokenizer

Found = TypeVar("Found")
COMPLETION_TOKENS = 16
"""Default ``max_tokens`` of a completion, as OpenAI's."""
SCORES_MAX = 4_000_000
"""Most log probabilities of prompts in one response; each takes about 60 bytes of JSON, all of it in memory."""


@attrs.frozen
class Model:
    """The served model, with what is needed to make prompts for it."""

    spec: ModelSpec
    tokenizer: Tokenizer
    template: ChatTemplate
    settings: ApiSettings
    encoders: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(1))
    """Limits long work to one call at a time, see :meth:`aside`."""

    @property
    def call_format(self) -> CallFormat:
        """The format in which the model writes tool calls."""
        return format_named(self.settings.tool_format, self.spec.chat_template)

    async def aside(self, long: bool, call: Callable[[], Found]) -> Found:
        """The result of ``call``; if it takes ``long``, in a thread, so that streams continue meanwhile."""
        return await trio.to_thread.run_sync(call, limiter=self.encoders) if long else call()

    def with_marks(self, marks: Iterable[str], skip_special: bool = True) -> Piece:
        """How to show tokens in an answer that is searched for ``marks``.

        With ``skip_special``, control tokens are shown only if they are among ``marks``.
        """
        if not skip_special:
            return partial(self.tokenizer.piece, skip_special=False)
        shown = {self.tokenizer.specials[mark] for mark in marks if mark in self.tokenizer.specials}
        piece = self.tokenizer.piece
        return (lambda token: piece(token, skip_special=token not in shown)) if shown else piece


@attrs.frozen
class Prompt:
    """One prompt, ready to be submitted."""

    tokens: tuple[int, ...]
    params: GenerationParams
    echo: str = ""
    """Text that the answer's text begins with."""
    thinking: bool = False
    """Whether the answer begins within a thought."""

    @property
    def packed(self) -> bytes:
        """The tokens, packed as messages carry them."""
        return packed.pack(self.tokens)


async def completion_prompts(
    body: CompletionBody, model: Model, scope: str, draw: Callable[[], int]
) -> list[Prompt]:
    """The prompts of a completion for the tenant ``scope``. Raises ApiError (400).

    ``draw`` supplies a seed if the body has none.
    """
    items, single = _items(body.prompt)
    if len(items) * (body.n or 1) > CHOICES_MAX:
        message = f"prompt: {len(items)} prompts times n = {body.n or 1} is over {CHOICES_MAX} answers"
        raise ApiError(message, "prompt", code="invalid_value")
    grammar = await _grammar(body, model)
    prompts = []
    for index, item in enumerate(items):
        name = "prompt" if single else f"prompt[{index}]"
        tokens = await _tokens_of(item, name, body, model, scope)
        left = _left(tokens, name, model.settings.max_context)
        max_tokens = _answer(body.max_tokens, "max_tokens", left, COMPLETION_TOKENS, model)
        params = _params(body, model, max_tokens, draw, grammar)
        echo = _echo(item, tokens, body, model.tokenizer) if body.echo else ""
        prompts.append(Prompt(tuple(tokens), params, echo))
    _check_scores(body, sum(len(one.tokens) for one in prompts))
    return prompts


def _check_scores(body: CompletionBody, tokens: int) -> None:
    """``tokens``: number of all prompts' tokens. Raises ApiError (400) if too much is asked about them."""
    asked = [count for count in (body.prompt_logprobs, body.scores_of_echo) if count is not None]
    if asked and tokens * (1 + max(asked)) > SCORES_MAX:
        message = (
            f"prompt: {tokens} tokens with {max(asked)} of the likeliest each are over {SCORES_MAX} log "
            "probabilities in one response; send fewer prompts at once"
        )
        raise ApiError(message, "prompt", code="invalid_value")


async def _tokens_of(
    item: str | list[int], name: str, body: CompletionBody, model: Model, scope: str
) -> list[int]:
    """The tokens of one of a completion's prompts. Raises ApiError (400)."""
    most = body.truncate_prompt_tokens
    if not isinstance(item, str):
        return _truncated(token_ids(item, name, model.spec.vocab), most)
    tokens = await text_tokens(item, name, model, scope)
    bos = _bos(body, model.tokenizer)
    return _truncated([*bos, *tokens], most, bos)


def _bos(body: CompletionBody, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that the server writes before a completion's text."""
    return () if body.add_special_tokens is False else tokenizer.bos


def _truncated(tokens: list[int], most: int | None, first: Sequence[int] = ()) -> list[int]:
    """The last ``most`` tokens, or all if that is None. If ``first`` begins them, it is kept, and counts."""
    if most is None or len(tokens) <= most:
        return tokens
    head = [*first] if tokens[: len(first)] == [*first] else []
    return [*head, *tokens[len(tokens) - max(most - len(head), 0) :]]


async def chat_prompt(
    body: ChatBody, model: Model, scope: str, draw: Callable[[], int], long: bool = False
) -> Prompt:
    """The prompt of a chat for the tenant ``scope``. Raises ApiError (400).

    ``draw`` supplies a seed if the body has none. ``long``: whether the body is.
    """
    most = body.truncate_prompt_tokens
    rendered = await model.aside(long, partial(_rendered, body, model))
    tokens = _truncated(await _encoded(rendered, model, scope), most, model.tokenizer.bos)
    left = _left(tokens, "messages", model.settings.max_context)
    name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    params = _params(body, model, _answer(asked, name, left, left, model), draw, await _grammar(body, model))
    continued = body.messages[-1].text if body.ending == "open" else ""
    return Prompt(tuple(tokens), params, thinking=begins_in_thought(rendered.text, continued))


async def chat_tokens(body: Conversation, model: Model, scope: str, long: bool = False) -> list[int]:
    """The tokens of the conversation as the model's template writes it. Raises ApiError (400).

    ``long``: whether the body is.
    """
    return await _encoded(await model.aside(long, partial(_rendered, body, model)), model, scope)


def _rendered(body: Conversation, model: Model) -> Rendered:
    tools = () if body.offer is None else body.offer.tools
    rendered = model.template.render(body.messages, body.template_arguments, body.ending, tools)
    _not_hopeless(rendered.text, "messages", model)
    return rendered


async def _encoded(rendered: Rendered, model: Model, scope: str) -> list[int]:
    encode = partial(model.template.encode, rendered, scope)
    return await model.aside(len(rendered.text) >= LONG_TEXT, encode)


async def text_tokens(text: str, name: str, model: Model, scope: str) -> list[int]:
    """A text's tokens, without BOS; special tokens written in the text are recognised.

    Raises ApiError (400) that calls the text ``name``.
    """
    _not_hopeless(text, name, model)
    encode = partial(model.tokenizer.encode, text, allow_special=True, scope=scope)
    return await model.aside(len(text) >= LONG_TEXT, encode)


def _items(prompt: Any) -> tuple[list[Any], bool]:
    """The individual prompts in ``prompt``, and whether ``prompt`` itself is one. Raises ApiError (400)."""
    if isinstance(prompt, str):
        return [prompt], True
    if not isinstance(prompt, list) or not prompt:
        raise _prompt_error("prompt")
    if type(prompt[0]) is int:
        return [prompt], True
    kind = type(prompt[0])
    if kind not in (str, list) or any(type(item) is not kind for item in prompt):
        raise _prompt_error("prompt")
    return prompt, False


def _prompt_error(name: str) -> ApiError:
    rule = "expected text, a list of texts, a list of token ids, or a list of such lists; none of them empty"
    return ApiError(f"{name}: {rule}", "prompt", code="invalid_value")


def token_ids(item: Sequence[Any], name: str, vocabulary: int) -> list[int]:
    """``item`` as a list, after a check that each element is a token id. Raises ApiError (400)."""
    for index, token in enumerate(item):
        if type(token) is not int or not 0 <= token < vocabulary:
            rule = f"expected a token id from 0 to {vocabulary - 1}"
            raise ApiError(
                f"{name}[{index}]: {rule}, got {str(token)[:60]}",
                name.partition("[")[0],
                code="invalid_value",
            )
    return list(item)


def _not_hopeless(text: str, name: str, model: Model) -> None:
    """Refuse a text that is too long however it tokenizes, before seconds are spent on tokenizing it."""
    fewest = len(text) // model.tokenizer.piece_bytes_max
    if fewest > model.settings.max_context:
        raise _too_long(name, f"at least {fewest}", model.settings.max_context)


def _left(tokens: list[int], name: str, context: int) -> int:
    """How many tokens the context leaves for an answer. Raises ApiError (400) if it leaves none."""
    if not tokens:
        raise _prompt_error(name)
    if len(tokens) >= context:
        raise _too_long(name, str(len(tokens)), context)
    return context - len(tokens)


def _too_long(name: str, tokens: str, context: int) -> ApiError:
    message = (
        f"{name}: the prompt has {tokens} tokens, and the context of {context} must hold it and at least "
        "one token of the answer; shorten it"
    )
    return ApiError(message, name.partition("[")[0], code="context_length_exceeded")


def _answer(asked: int | None, name: str, left: int, default: int, model: Model) -> int:
    """How many tokens the answer may have. Raises ApiError (400) if more are asked for than are left."""
    if asked is None:
        return min(default, left)
    if asked > left:
        context = model.settings.max_context
        message = (
            f"{name}: {asked} asked for, but a prompt of {context - left} tokens leaves {left} of {context}"
        )
        raise ApiError(message, name, code="context_length_exceeded")
    return asked


async def _grammar(body: CompletionBody | ChatBody, model: Model) -> str:
    """The grammar that the answer must follow; empty: none. Raises ApiError (400)."""
    offer = body.offer if isinstance(body, ChatBody) else None
    formed = body.response_format is not None or body.structured_outputs is not None
    if not formed and not (offer is not None and offer.followed):
        return ""
    grammar = await model.aside(True, partial(_made, body, offer, model))
    if not grammar:
        return ""
    field = _asking(body)
    if not model.spec.eos:
        raise ApiError(f"{field}: this model has no token that ends an answer", field, code="invalid_value")
    for name in ("min_tokens", "ignore_eos", "allowed_token_ids"):
        if getattr(body, name):
            message = f"{name}: not beside {field}, which says where the answer ends"
            raise ApiError(message, name, code="invalid_value")
    return grammar


def _made(body: CompletionBody | ChatBody, offer: Offer | None, model: Model) -> str:
    """Make the grammar; this can take a second."""
    grammar = grammar_of(body.response_format, body.structured_outputs)
    if offer is None:
        return grammar
    return call_grammar(offer, model.call_format, model.tokenizer.specials, grammar)


def _asking(body: CompletionBody | ChatBody) -> str:
    """The field that asks for the grammar."""
    if body.structured_outputs is not None:
        return "structured_outputs"
    return "tools" if body.response_format is None else "response_format"


def _params(
    body: CompletionBody | ChatBody, model: Model, max_tokens: int, draw: Callable[[], int], grammar: str
) -> GenerationParams:
    allowed = frozenset(token_ids(body.allowed_token_ids or (), "allowed_token_ids", model.spec.vocab))
    for index, token in enumerate(body.stop_token_ids or ()):
        if not 0 <= token < model.spec.vocab:
            name = f"stop_token_ids[{index}]"
            message = f"{name}: expected a token id from 0 to {model.spec.vocab - 1}, got {token}"
            raise ApiError(message, name, code="invalid_value")
    ends = () if body.ignore_eos else model.spec.eos
    stops = tuple(dict.fromkeys((*ends, *(body.stop_token_ids or ()))))
    others = len(allowed.difference(stops)) if allowed else model.spec.vocab - len(stops)
    _check_min_tokens(body.min_tokens or 0, max_tokens, others)
    # Even if only the prompt is wanted, one token is drawn (and dropped): a request ends with its last token.
    return GenerationParams(sampling_of(body, model.spec.vocab, draw, grammar), max(max_tokens, 1), stops)


def _check_min_tokens(least: int, most: int, others: int) -> None:
    """``others``: number of tokens that can be drawn and do not end the answer."""
    if least > most:
        message = f"min_tokens: {least} asked for, but the answer has at most {most} (max_tokens)"
        raise ApiError(message, "min_tokens", code="invalid_value")
    if least and not others:
        message = "min_tokens: expected a token that does not end the answer, but stop_token_ids names all that may be drawn"
        raise ApiError(message, "min_tokens", code="invalid_value")


def of_choice(params: GenerationParams, number: int) -> GenerationParams:
    """The parameters of a prompt's answer ``number``. Each has its own seed, or all answers would be equal.

    Only the first answer carries the prompt's log probabilities.
    """
    seed = (params.sampling.seed + number) % 2**SEED_BITS
    count = None if number else params.sampling.prompt_logprobs
    return attrs.evolve(params, sampling=attrs.evolve(params.sampling, seed=seed, prompt_logprobs=count))


def _echo(item: str | list[int], tokens: list[int], body: CompletionBody, tokenizer: Tokenizer) -> str:
    """The text of a prompt ``item`` of these ``tokens``, without what the server writes before it."""
    if not isinstance(item, str):
        return tokenizer.decode(tokens, skip_special=False)
    if body.truncate_prompt_tokens is None or len(tokens) < body.truncate_prompt_tokens:
        return item
    return tokenizer.decode(tokens[len(_bos(body, tokenizer)) :], skip_special=False)
