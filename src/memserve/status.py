"""Asks a running cluster who is in it, for `memserve status`."""

from __future__ import annotations

import json
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from memserve.errors import UserError

TIMEOUT_S = 5.0
ANSWER_BYTES_MAX = 16 << 20


def fetch(url: str | None, api_key: str | None, log_dir: Path) -> list[dict[str, Any]]:
    """The members of the cluster at ``url``, or of the one that logs to ``log_dir``. Raises UserError with a remedy."""
    if url is None:
        url, key = find(log_dir)
        api_key = api_key or key
    elif urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"--url must begin with http:// or https://, not {url!r}")
    request = Request(f"{url.rstrip('/')}/cluster")
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        # No proxy: a cluster is reached directly, and proxies break 127.0.0.1.
        with build_opener(ProxyHandler({})).open(request, timeout=TIMEOUT_S) as answer:
            members: list[dict[str, Any]] = json.loads(answer.read(ANSWER_BYTES_MAX))["members"]
    except HTTPError as error:
        raise UserError(refusal(url, error.code)) from error
    except (OSError, HTTPException) as error:
        raise UserError(f"nothing answers at {url}: {getattr(error, 'reason', error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"what answers at {url} is not memserve") from error
    return members


def find(log_dir: Path) -> tuple[str, str]:
    """Address and a key of the cluster that logs to ``log_dir``. Raises UserError when none serves."""
    from memserve.place import find_running

    running = find_running(log_dir)
    if running is None:
        raise UserError(f"no memserve runs that logs to {log_dir.resolve()}; give --log-dir or --url")
    if not running.get("url"):
        raise UserError(
            f"memserve runs here (pid {running['pid']}) but does not serve yet; try again in a moment"
        )
    keys = running.get("resolved", {}).get("config", {}).get("frontend", {}).get("api_keys") or [""]
    return running["url"], keys[0]


def refusal(url: str, code: int) -> str:
    """Why a cluster did not answer, and what to do."""
    if code in (401, 403):
        return f"{url} asks for a key: give --api-key, or set MEMSERVE_API_KEY"
    return f"{url} answered with HTTP status {code}; is it memserve?"
