"""Calls the HTTP API around a scripted service, without a network."""

from __future__ import annotations

from contextlib import asynccontextmanager

import httpx

from fake_service import (
    FakeService,
    demo_spec,
    demo_tokenizer,
    says,
    settings,
)
from memserve.api.app import build_app


@asynccontextmanager
async def asking(service=None, **changes):
    """A client that calls the application without a network."""
    service = service or FakeService(lambda _request: says("Hello there"))
    app = build_app(service, demo_tokenizer(), demo_spec(), settings(**changes))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def post(body, path="/v1/completions", service=None, **changes):
    async with asking(service, **changes) as client:
        return await client.post(path, json=body)


CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
