"""The HTTP surface as one ASGI application. ``docs/api.md`` describes it for users."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import attrs
import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from memserve import __version__
from memserve.api import errors
from memserve.api.administration import read_change
from memserve.api.bodies import SEED_BITS, Body, ChatBody, CompletionBody, StreamOptions, is_long, read_body
from memserve.api.call_parser import CallParser
from memserve.api.chat import ChatTemplate
from memserve.api.choices import Choice
from memserve.api.cross_origin import open_to
from memserve.api.errors import ApiError, from_failure
from memserve.api.generation import Generation, GenerationOrder
from memserve.api.guard import CALLER, Caller, Guard
from memserve.api.logprobs import Piece
from memserve.api.prompt_logprobs import PromptReport
from memserve.api.prompts import Model, Prompt, chat_prompt, completion_prompts
from memserve.api.response_wire import ResponseWire
from memserve.api.responses import echoed, own_names, read_response
from memserve.api.service import ApiSettings, Service
from memserve.api.thoughts import MARKS, ThoughtParser
from memserve.api.tokenizing import detokenized, read_detokenize, read_tokenize, tokenized
from memserve.api.urgency import TTFT_HEADER, with_urgency
from memserve.api.wire import ChatWire, CompletionWire, Wire
from memserve.engine.spec import ModelSpec
from memserve.engine.tokenizer import Tokenizer
from memserve.errors import RequestFailed
from memserve.scopes import salted

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def build_app(service: Service, tokenizer: Tokenizer, spec: ModelSpec, settings: ApiSettings) -> ASGIApp:
    """Build the application. Raises UserError when the model's chat template does not compile."""
    api = Api(service, Model(spec, tokenizer, ChatTemplate.of(spec, tokenizer), settings))
    app = Starlette(
        routes=[
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/responses", api.responses, methods=["POST"]),
            Route("/tokenize", api.tokenize, methods=["POST"]),
            Route("/detokenize", api.detokenize, methods=["POST"]),
            Route("/v1/models", api.models),
            Route("/v1/models/{model:path}", api.model),
            Route("/version", api.version),
            Route("/health", api.health),
            Route("/metrics", api.metrics),
            Route("/cluster", api.cluster),
            Route("/cluster/{worker}", api.change, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, settings=settings)],
        exception_handlers=errors.handlers(),
    )
    app.router.redirect_slashes = False
    return open_to(app, settings.cors_origins)


class _Answer(Response):
    """Wraps a Generation so that an endpoint can return it: Starlette only ever calls a response."""

    def __init__(self, generation: Generation) -> None:
        super().__init__()
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generation(scope, receive, send)


@attrs.frozen
class Api:
    """The endpoints, one method each."""

    service: Service
    served: Model
    created: int = attrs.field(factory=lambda: int(time.time()))

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = await self._body(request, CompletionBody)
        prompts = await completion_prompts(body, self.served, _scope(request, body), _draw_seed)
        wire = CompletionWire(prompts, bool(body.return_token_ids), self._piece(body), _options(body))
        return self._generate(request, body, prompts, wire)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = await self._body(request, ChatBody)
        long = is_long(await request.body())
        prompt = await chat_prompt(body, self.served, _scope(request, body), _draw_seed, long)
        form = self.served.call_format
        wire = ChatWire(prompt, bool(body.return_token_ids), self._piece(body), form, _options(body))
        return self._generate(request, body, [prompt], wire)

    async def responses(self, request: Request) -> Response:
        """POST /v1/responses: a chat in another form."""
        data = await request.body()
        long = is_long(data)
        body, chat = await self.served.aside(long, partial(read_response, data))
        self._check_model(body.model)
        with own_names():
            prompt = await chat_prompt(chat, self.served, _scope(request, chat), _draw_seed, long)
        wire = ResponseWire(prompt, echoed(body), self._piece(chat), self.served.call_format)
        return self._generate(request, chat, [prompt], wire)

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        data = await request.body()
        long = is_long(data)
        body = await self.served.aside(long, partial(read_tokenize, data))
        self._check_model(body.model)
        caller: Caller = request.scope[CALLER]
        return _json(await tokenized(body, self.served, caller.tenant, long))

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        data = await request.body()
        long = is_long(data)
        body = await self.served.aside(long, partial(read_detokenize, data))
        self._check_model(body.model)
        return _json(await self.served.aside(long, partial(detokenized, body, self.served)))

    async def version(self, _request: Request) -> Response:
        """GET /version."""
        return _json({"version": __version__})

    async def models(self, _request: Request) -> Response:
        """GET /v1/models."""
        return _json({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{model}."""
        self._check_model(request.path_params["model"])
        return _json(self._model_card())

    async def health(self, _request: Request) -> Response:
        """GET /health: 200 only if a request sent now could be served. Says what is missing, if anything."""
        health = self.service.health()
        said = {"status": health.status} | ({"reason": health.reason} if health.reason else {})
        return _json(said, 200 if health.serves else 503)

    async def metrics(self, _request: Request) -> Response:
        """GET /metrics."""
        return Response(self.service.metrics(), media_type=_METRICS_TYPE)

    async def cluster(self, _request: Request) -> Response:
        """GET /cluster: every actor with its state and load."""
        return _json({"members": self.service.cluster()})

    async def change(self, request: Request) -> Response:
        """POST /cluster/{worker}: change a worker's role, or drain it; responds once that is in force."""
        caller: Caller = request.scope[CALLER]
        if not caller.may_administrate:
            message = "This key may not change workers; use one of frontend.admin_keys"
            raise ApiError(message, None, 403, "not_an_administrator")
        body = await read_change(request)
        try:
            await self.service.change(request.path_params["worker"], body)
        except RequestFailed as failure:
            raise from_failure(failure) from failure
        return _json({"worker": request.path_params["worker"], "role": body.role, "drain": body.drain})

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        data = await request.body()
        body = await self.served.aside(is_long(data), partial(read_body, data, kind))
        self._check_model(body.model)
        return body

    def _piece(self, body: CompletionBody | ChatBody) -> Piece | None:
        """How to show tokens next to their log probabilities; None if these are not requested."""
        return None if body.logprobs_wanted is None else self._shown

    @property
    def _shown(self) -> Piece:
        return partial(self.served.tokenizer.piece, skip_special=False)

    def _prompt_reports(
        self, body: CompletionBody | ChatBody, prompts: Sequence[Prompt]
    ) -> list[PromptReport]:
        """One report for each prompt if log probabilities of prompts are requested, otherwise none."""
        asked = body.scores_of_echo, body.prompt_logprobs
        return (
            []
            if asked == (None, None)
            else [PromptReport(one.tokens, self._shown, *asked) for one in prompts]
        )

    def _check_model(self, name: str | None) -> None:
        served = self.served.settings.model
        if name is not None and name != served:
            message = f"The model `{name[:100]}` does not exist; this server has `{served}`"
            raise ApiError(message, "model", 404, "model_not_found")

    def _generate(
        self, request: Request, body: CompletionBody | ChatBody, prompts: list[Prompt], wire: Wire
    ) -> Response:
        caller: Caller = request.scope[CALLER]
        asked = request.headers.get(TTFT_HEADER)
        order = GenerationOrder(
            prompts=with_urgency(prompts, body, asked, caller, self.served.settings.ttft_ms),
            n=body.n or 1,
            stops=body.stops,
            wire=wire,
            model=self.served.settings.model,
            stream=bool(body.stream),
            cache_scope=_scope(request, body),
            ping_s=self.served.settings.ping_s,
            prompt_reports=self._prompt_reports(body, prompts),
        )
        choices = [self._choice(index, order, body) for index in range(len(prompts) * order.n)]
        return _Answer(Generation(self.service, order, choices))

    def _choice(self, index: int, order: GenerationOrder, body: CompletionBody | ChatBody) -> Choice:
        """A new answer, with the parsers that its text needs."""
        at, marks = index // order.n, list[str]()
        offer, calls, thoughts = body.offer if isinstance(body, ChatBody) else None, None, None
        if self._apart(body, order.prompts[at]):
            thoughts = ThoughtParser(order.prompts[at].thinking)
            marks += MARKS
        if offer is not None:
            form = self.served.call_format
            several = offer.several and form.several
            free = not self._followed(order.prompts[at])
            calls = CallParser(form, offer.names, several, offer.schemas, unmarked=free)
            marks += form.marks
        piece = self.served.with_marks(marks, skip_special=body.skip_special_tokens is not False)
        return Choice(
            index, at, piece, order.stops, body.min_tokens or 0,
            thoughts=thoughts, calls=calls,
            finish_of_calls="tool_calls" if offer is None or offer.only is None else "stop",  # as OpenAI does
            about=order.prompt_reports[at] if order.prompt_reports else None, silent=body.max_tokens == 0,
            with_stop=bool(body.include_stop_str_in_output),
        )  # fmt: skip

    def _apart(self, body: CompletionBody | ChatBody, prompt: Prompt) -> bool:
        """Whether to report thoughts apart from the text. An answer of a given form has none.

        With strict tools an answer follows a grammar, which allows any text before a call.
        """
        if not isinstance(body, ChatBody) or self.served.settings.reasoning != "apart":
            return False
        return body.may_be_text or not self._followed(prompt)

    def _followed(self, prompt: Prompt) -> bool:
        """Whether the answer follows a grammar."""
        adjust = prompt.params.sampling.adjust
        return adjust is not None and bool(adjust.grammar)

    def _model_card(self) -> dict[str, Any]:
        settings = self.served.settings
        return {
            "id": settings.model,
            "object": "model",
            "created": self.created,
            "owned_by": "memserve",
            "max_model_len": settings.max_context,
        }


def _scope(request: Request, body: CompletionBody | ChatBody) -> str:
    """The scope of the request: what it computes is shared with requests of the same scope alone."""
    caller: Caller = request.scope[CALLER]
    return salted(caller.tenant, body.cache_salt)


def _options(body: CompletionBody | ChatBody) -> StreamOptions:
    return body.stream_options or StreamOptions()


def _draw_seed() -> int:
    return secrets.randbits(SEED_BITS)


def _json(document: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(document), status, media_type="application/json")
