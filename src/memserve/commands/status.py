"""Asks a running cluster for its members, or to change its workers: `memserve status`, `role` and `drain`."""

from __future__ import annotations

import json
import time
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import attrs

from memserve.errors import UserError
from memserve.identity import actor_name

TIMEOUT_S = 15.0
"""Timeout of a request: longer than a Frontend waits for a worker to change."""
ANSWER_BYTES_MAX = 16 << 20


LEAVE_POLL_S = 0.2
"""Pause between two checks whether a drained worker has left."""


@attrs.frozen
class Target:
    """A cluster's address and a key for it."""

    url: str
    api_key: str | None

    @classmethod
    def find(cls, url: str | None, api_key: str | None, log_dir: Path) -> Target:
        """The cluster at ``url``, or the one that logs to ``log_dir``. Raises UserError."""
        if url is None:
            found, key = find(log_dir)
            return cls(found, api_key or key)
        try:
            scheme = urlsplit(url).scheme
        except ValueError as error:  # brackets that are not an IPv6 address's
            raise UserError(f"--url must be an address such as http://127.0.0.1:8080, not {url!r}") from error
        if scheme not in ("http", "https"):
            raise UserError(f"--url must begin with http:// or https://, not {url!r}")
        return cls(url, api_key)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The cluster's JSON answer to a GET, or to a POST of ``body``. Raises UserError with a remedy."""
        request = Request(f"{self.url.rstrip('/')}{path}")
        if self.api_key:
            request.add_header("Authorization", f"Bearer {self.api_key}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            # No proxy: a cluster is reached directly, and proxies break 127.0.0.1.
            with build_opener(ProxyHandler({})).open(request, timeout=TIMEOUT_S) as answer:
                found: dict[str, Any] = json.loads(answer.read(ANSWER_BYTES_MAX))
        except HTTPError as error:
            raise UserError(refusal(self.url, error.code, error.read(ANSWER_BYTES_MAX))) from error
        except (OSError, HTTPException) as error:
            raise UserError(f"no answer at {self.url}: {getattr(error, 'reason', error)}") from error
        except ValueError as error:
            raise UserError(f"the server at {self.url} is not memserve") from error
        return found

    def members(self) -> list[dict[str, Any]]:
        """Every actor of the cluster. Raises UserError."""
        try:
            members: list[dict[str, Any]] = self.ask("/cluster")["members"]
        except (KeyError, TypeError) as error:
            raise UserError(f"the server at {self.url} is not memserve") from error
        return members

    def change(self, worker: str, body: dict[str, Any]) -> None:
        """Change a worker; returns when the change is in force.

        Raises UserError with the cluster's reason.
        """
        self.ask(f"/cluster/{quote(worker, safe='')}", body)

    def wait_gone(self, worker: str) -> None:
        """Wait until no member has this name. Raises UserError when the cluster does not answer."""
        while any(actor_name(one["id"]) == worker for one in self.members()):
            time.sleep(LEAVE_POLL_S)


def find(log_dir: Path) -> tuple[str, str]:
    """The address of the cluster that logs to ``log_dir``, and a key for it.

    Raises UserError when none serves.
    """
    from memserve.processes.place import find_running

    running = find_running(log_dir)
    if running is None:
        raise UserError(f"no running memserve logs to {log_dir.resolve()}; give --log-dir or --url")
    if not running.get("url"):
        raise UserError(
            f"memserve runs here (pid {running['pid']}) but is not serving yet; try again in a moment"
        )
    frontend = running.get("resolved", {}).get("config", {}).get("frontend", {})
    keys = frontend.get("admin_keys") or frontend.get("api_keys") or [""]
    return running["url"], keys[0]


def refusal(url: str, code: int, body: bytes = b"") -> str:
    """Why a cluster refused, and what to do: in its own words if it gave any."""
    if code == 401:
        return f"{url} requires a key: give --api-key, or set MEMSERVE_API_KEY"
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        pass
    return f"{url} answered with HTTP status {code}; is it memserve?"
