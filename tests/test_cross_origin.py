"""Web pages of other origins: who may call the server from a browser, and what browsers are told about it."""

from __future__ import annotations

import httpx
import pytest

from api_client import CHAT, HI, asking
from fake_service import FakeService, says, served
from memserve.errors import RequestFailed

PAGE = "http://localhost:3000"
OTHER = "https://elsewhere.example"
ASKS = {"origin": PAGE, "access-control-request-method": "POST"}


async def test_without_the_setting_no_page_is_told_anything():
    """By default, no response has headers for other origins, and a preflight is refused."""
    async with asking() as client:
        answer = await client.post(CHAT, json={"messages": HI}, headers={"origin": PAGE})
        assert answer.status_code == 200
        assert (await client.options(CHAT, headers=ASKS)).status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control") or name == "vary"]


@pytest.mark.parametrize(
    "path", [CHAT, "/v1/completions", "/tokenize", "/v1/models", "/health", "/v1/nothing"]
)
async def test_a_preflight_needs_no_key_and_permits_the_headers_that_clients_send(path):
    """The preflight of a page that may call is permitted, with Authorization and whatever else it asks for."""
    headers = "authorization,content-type,x-slo-ttft-ms,x-stainless-os"
    asks = ASKS | {
        "access-control-request-headers": headers,
        "access-control-request-private-network": "true",
    }
    async with asking(cors_origins=(PAGE,), api_keys=("k",)) as client:
        answer = await client.options(path, headers=asks)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
        assert answer.headers["access-control-allow-headers"] == headers
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-private-network"] == "true"
        assert "access-control-allow-credentials" not in answer.headers
        for wrong in ({"origin": OTHER}, {"access-control-request-method": "DELETE"}):
            assert (await client.options(path, headers=asks | wrong)).status_code == 400
        other = await client.options(path, headers=asks | {"origin": OTHER})
        assert "access-control-allow-origin" not in other.headers


def broken(_request):
    raise ValueError("a bug")


REFUSALS = [
    ("GET", "/v1/models", None, {}, 401),
    ("GET", "/v1/nothing", None, {"authorization": "Bearer k"}, 404),
    ("GET", CHAT, None, {"authorization": "Bearer k"}, 405),
    ("POST", CHAT, {"messages": []}, {"authorization": "Bearer k"}, 400),
    ("POST", CHAT, {"messages": HI}, {"authorization": "Bearer k"}, 500),
    ("GET", "/v1/models", None, {"authorization": "Bearer k"}, 200),
]


@pytest.mark.parametrize(("method", "path", "body", "headers", "status"), REFUSALS)
async def test_errors_can_be_read_too(method, path, body, headers, status):
    """Every response has the page's origin, errors included: a browser would hide them from the page otherwise."""
    async with asking(FakeService(broken), cors_origins=(OTHER, PAGE), api_keys=("k",)) as client:
        answer = await client.request(method, path, json=body, headers=headers | {"origin": PAGE})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, PAGE)
        assert answer.headers["access-control-expose-headers"] == "retry-after, x-request-id"
        assert "Origin" in answer.headers["vary"]
        stranger = await client.request(method, path, json=body, headers=headers | {"origin": "null"})
        assert (stranger.status_code, stranger.headers.get("access-control-allow-origin")) == (status, None)


async def test_any_origin_may_call_but_change_no_worker():
    """With "*" every page may call; the paths that change workers stay closed to pages of other origins."""
    service = FakeService(lambda _request: says("x"))
    async with asking(service, cors_origins=("*",)) as client:
        assert (await client.options(CHAT, headers=ASKS)).headers["access-control-allow-origin"] == "*"
        preflight = await client.options("/cluster/d0", headers=ASKS)
        assert preflight.status_code == 405
        assert "access-control-allow-origin" not in preflight.headers
        form = await client.post("/cluster/d0", content='{"drain": true}', headers={"origin": OTHER})
        assert (form.status_code, service.changes) == (415, [])
        assert "access-control-allow-origin" not in form.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_streams_come_as_fast_and_have_the_headers(stream):
    """Through a real server, answers and refusals have the headers, and the events of a stream come one by one."""
    service = FakeService(lambda _request: says("one two three four", delay_s=0.02))
    async with served(service, cors_origins=(PAGE,)) as url, httpx.AsyncClient(base_url=url) as client:
        body = {"messages": HI, "stream": stream}
        async with client.stream("POST", CHAT, json=body, headers={"origin": PAGE}) as answer:
            parts = [part async for part in answer.aiter_raw()]
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert len(parts) > 4 if stream else len(parts) == 1
        service.refuse = RequestFailed("overloaded", "Too many requests", 429, retry_after_s=2.0)
        refused = await client.post(CHAT, json=body, headers={"origin": PAGE})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
        assert refused.headers["access-control-allow-origin"] == PAGE
