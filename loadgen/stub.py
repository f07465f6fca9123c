"""A server without a model: it answers with words, after configurable delays and with configurable faults.

It serves to test the load generator and to try its options: ``python -m loadgen.stub --port 8123``. Its
answers depend only on the prompt (and a fixed seed), and it simulates a prefix cache, so that correctness and
cached shares can be checked.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import attrs
import h11
import orjson
import trio

from loadgen.content import WORDS

BODY_MAX = 64 * 1024 * 1024


@attrs.frozen
class Behaviour:
    """How the stub answers. If a ``*_every`` is n, every n-th request gets that fault; 0 means never."""

    ttft_s: float = 0.0
    prompt_token_s: float = 0.0
    """Added to the first token's time for each prompt token that is not cached."""
    token_s: float = 0.0
    tokens_per_event: int = 1
    page_tokens: int = 16
    api_keys: tuple[str, ...] = ()
    model: str = "stub"
    refuse_every: int = 0
    """Fault: answer 429."""
    cut_every: int = 0
    """Fault: close the connection in the middle of an answer."""
    error_every: int = 0
    """Fault: send an error event in the middle of an answer."""
    stall_every: int = 0
    """Fault: be silent for ``stall_s`` in the middle of an answer."""
    stall_s: float = 1.0
    answer_seed: int = 0


@attrs.define
class Stub:
    """The server and its state: the prefix cache, and the number of requests so far."""

    behaviour: Behaviour = Behaviour()
    requests: int = 0
    bodies: list[dict[str, Any]] = attrs.field(factory=list)
    """The bodies of the last thousand requests, for tests."""
    _cached: set[bytes] = attrs.field(factory=set, init=False)

    async def listen(
        self, port: int = 0, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve on loopback until cancelled; the start value is the port."""
        listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
        async with trio.open_nursery() as nursery:
            serve = partial(trio.serve_listeners, self.converse, listeners, handler_nursery=nursery)
            nursery.start_soon(serve)
            task_status.started(listeners[0].socket.getsockname()[1])

    async def converse(self, stream: trio.abc.Stream) -> None:
        """Answer the requests of one connection until it ends."""
        connection = h11.Connection(h11.SERVER)
        async with stream:
            try:
                while await self._one(stream, connection):
                    connection.start_next_cycle()
            except (trio.BrokenResourceError, h11.RemoteProtocolError):
                pass  # the client has left

    async def _one(self, stream: trio.abc.Stream, connection: h11.Connection) -> bool:
        request, body = await _request(stream, connection)
        if request is None:
            return False
        wire = _Wire(stream, connection)
        path = request.target.decode()
        key = dict(request.headers).get(b"authorization", b"").decode().removeprefix("Bearer ")
        if self.behaviour.api_keys and key not in self.behaviour.api_keys:
            await wire.document(401, {"error": {"message": "wrong key"}})
        elif path.endswith("/v1/models"):
            await wire.document(200, {"object": "list", "data": [{"id": self.behaviour.model}]})
        elif path.endswith("/completions"):
            return await self._generate(wire, orjson.loads(body), key)
        else:
            await wire.document(404, {"error": {"message": f"no {path}"}})
        return True

    async def _generate(self, wire: _Wire, asked: dict[str, Any], key: str) -> bool:
        self.requests += 1
        self.bodies = [*self.bodies[-999:], asked]
        if self._now(self.behaviour.refuse_every):
            await wire.document(429, {"error": {"message": "too much to do"}})
            return True
        # Decided before the first await: other connections' requests advance the count in the meantime.
        faults = {
            name: self._now(getattr(self.behaviour, f"{name}_every")) for name in ("cut", "error", "stall")
        }
        return await self._stream(wire, asked, key, faults)

    def _now(self, every: int) -> bool:
        return every > 0 and self.requests % every == 0

    async def _stream(self, wire: _Wire, asked: dict[str, Any], key: str, faults: dict[str, bool]) -> bool:
        behaviour = self.behaviour
        tokens, count = tokens_of(asked), int(asked.get("max_tokens", 16))
        cached = self._match(key, tokens)
        answer = words(tokens, count, behaviour.answer_seed)
        await wire.open()
        await trio.sleep(behaviour.ttft_s + (len(tokens) - cached) * behaviour.prompt_token_s)
        self._insert(key, tokens)
        for start in range(0, count, behaviour.tokens_per_event):
            part = answer[start : start + behaviour.tokens_per_event]
            if start:
                await trio.sleep(behaviour.token_s * len(part))
            if start >= count // 2:
                if faults["cut"]:
                    return False
                if faults["error"]:
                    await wire.event({"error": {"message": "the worker is gone"}}, b"event: error\n")
                    return False
                await trio.sleep(behaviour.stall_s * faults.pop("stall", False))
            chunk = self._chunk(asked, part, start + len(part) >= count)
            if (asked.get("stream_options") or {}).get("continuous_usage_stats"):
                chunk["usage"] = _usage(len(tokens), cached, start + len(part))
            await wire.event(chunk)
        self._insert(key, [*tokens, *answer])
        await wire.event({"choices": [], "usage": _usage(len(tokens), cached, count)})
        await wire.close()
        return True

    def _chunk(self, asked: dict[str, Any], part: Sequence[str], last: bool) -> dict[str, Any]:
        text = "".join(part)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if last else None}
        choice |= {"delta": {"content": text}} if "messages" in asked else {"text": text}
        if asked.get("return_token_ids"):
            choice["token_ids"] = [WORDS.index(word.strip()) for word in part]
        return {"id": "stub", "object": "completion", "model": self.behaviour.model, "choices": [choice]}

    def _pages(self, key: str, tokens: Sequence[Any]) -> list[bytes]:
        """Digests of a prompt's whole pages, each chained to the one before."""
        pages, digest = [], key.encode()
        size = self.behaviour.page_tokens
        for end in range(size, len(tokens) + 1, size):
            digest = hashlib.sha256(digest + repr(tokens[end - size : end]).encode()).digest()
            pages.append(digest)
        return pages

    def _match(self, key: str, tokens: Sequence[Any]) -> int:
        hit = 0
        for page in self._pages(key, tokens):
            if page not in self._cached:
                break
            hit += 1
        return hit * self.behaviour.page_tokens

    def _insert(self, key: str, tokens: Sequence[Any]) -> None:
        self._cached.update(self._pages(key, tokens))


@attrs.frozen
class _Wire:
    """Writes answers on a connection."""

    stream: trio.abc.Stream
    connection: h11.Connection

    async def document(self, status: int, body: dict[str, Any]) -> None:
        data = orjson.dumps(body)
        headers = [("content-type", "application/json"), ("content-length", str(len(data)))]
        await self._send(
            h11.Response(status_code=status, headers=headers), h11.Data(data=data), h11.EndOfMessage()
        )

    async def open(self) -> None:
        headers = [
            ("content-type", "text/event-stream"),
            ("transfer-encoding", "chunked"),
            ("x-request-id", "stub"),
        ]
        await self._send(h11.Response(status_code=200, headers=headers))

    async def event(self, document: dict[str, Any], name: bytes = b"") -> None:
        await self._send(h11.Data(data=name + b"data: " + orjson.dumps(document) + b"\n\n"))

    async def close(self) -> None:
        await self._send(h11.Data(data=b"data: [DONE]\n\n"), h11.EndOfMessage())

    async def _send(self, *events: h11.Event) -> None:
        await self.stream.send_all(b"".join(self.connection.send(event) or b"" for event in events))


async def _request(stream: trio.abc.Stream, connection: h11.Connection) -> tuple[h11.Request | None, bytes]:
    request, body = None, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some(65_536)))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > BODY_MAX:
                return None, b""
        elif isinstance(event, h11.EndOfMessage):
            return request, bytes(body)
        else:
            return None, b""


def tokens_of(asked: dict[str, Any]) -> list[Any]:
    """The prompt's tokens: ids as they are, or the words of a text."""
    if "messages" in asked:
        return [f"{one['role']}:{word}" for one in asked["messages"] for word in one["content"].split()]
    prompt = asked["prompt"]
    return prompt.split() if isinstance(prompt, str) else list(prompt)


def words(tokens: Sequence[Any], count: int, seed: int) -> list[str]:
    """The answer to a prompt: words that are a function of the prompt and the seed."""
    start = int.from_bytes(hashlib.sha256(f"{seed}{tokens!r}".encode()).digest()[:4], "little")
    return [f" {WORDS[(start + i * 7) % len(WORDS)]}" for i in range(count)]


def _usage(prompt: int, cached: int, count: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": count,
        "total_tokens": prompt + count,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m loadgen.stub", description=__doc__)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--ttft-s", type=float, default=0.05, help="seconds until the first token")
    parser.add_argument(
        "--prompt-token-s", type=float, default=0.0001, help="more, for each prompt token not cached"
    )
    parser.add_argument("--token-s", type=float, default=0.01, help="seconds between tokens")
    given = parser.parse_args()
    behaviour = Behaviour(ttft_s=given.ttft_s, prompt_token_s=given.prompt_token_s, token_s=given.token_s)
    print(f"http://127.0.0.1:{given.port}", flush=True)
    try:
        trio.run(Stub(behaviour).listen, given.port)
    except KeyboardInterrupt:
        pass
    except OSError as error:
        parser.error(f"--port {given.port}: {error.strerror}")


if __name__ == "__main__":
    main()
