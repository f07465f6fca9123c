"""POST /tokenize and POST /detokenize, as in vLLM: count or inspect tokens without running a request."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import attrs
from msgspec import Meta

from memserve.api.bodies import Conversation, read_fields, read_object
from memserve.api.errors import ApiError
from memserve.api.prompts import Model, chat_tokens, text_tokens, token_ids


@attrs.frozen(kw_only=True)
class TokenizeBody:
    """POST /tokenize of a text: the tokens that /v1/completions would make of it."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


@attrs.frozen(kw_only=True)
class TokenizeChatBody(Conversation):
    """POST /tokenize of a chat: the tokens that /v1/chat/completions would make of it."""

    model: str | None = None
    add_special_tokens: Literal[False] | None = None
    """True is refused: a chat has those that its template writes, and BOS if the model wants it."""
    return_token_strs: bool | None = None


@attrs.frozen(kw_only=True)
class DetokenizeBody:
    """POST /detokenize."""

    model: str | None = None
    tokens: tuple[Annotated[int, Meta(ge=0)], ...]


def read_tokenize(data: bytes) -> TokenizeBody | TokenizeChatBody:
    """Parse the body of POST /tokenize: a text or a chat. Raises ApiError (400)."""
    raw = read_object(data)
    if "messages" not in raw:
        return read_fields(raw, TokenizeBody)
    if "prompt" in raw:
        raise ApiError("prompt: leave it out beside messages", "prompt", code="invalid_value")
    return read_fields(raw, TokenizeChatBody)


def read_detokenize(data: bytes) -> DetokenizeBody:
    """Parse the body of POST /detokenize. Raises ApiError (400)."""
    return read_fields(read_object(data), DetokenizeBody)


async def tokenized(
    body: TokenizeBody | TokenizeChatBody, model: Model, scope: str, long: bool = False
) -> dict[str, Any]:
    """The response to POST /tokenize. Raises ApiError (400). ``long``: whether the body is."""
    if isinstance(body, TokenizeChatBody):
        tokens = await chat_tokens(body, model, scope, long)
    else:
        tokens = await text_tokens(body.prompt, "prompt", model, scope)
        if body.add_special_tokens is not False:
            tokens = [*model.tokenizer.bos, *tokens]
    written = [model.tokenizer.written(token) for token in tokens] if body.return_token_strs else None
    return {
        "count": len(tokens),
        "max_model_len": model.settings.max_context,
        "tokens": tokens,
        "token_strs": written,
    }


def detokenized(body: DetokenizeBody, model: Model) -> dict[str, Any]:
    """The response to POST /detokenize. Raises ApiError (400)."""
    if len(body.tokens) > (most := model.settings.max_context):
        message = f"tokens: expected at most {most}, the context, got {len(body.tokens)}"
        raise ApiError(message, "tokens", code="context_length_exceeded")
    tokens = token_ids(body.tokens, "tokens", model.spec.vocab)
    return {"prompt": model.tokenizer.decode(tokens, skip_special=False)}
