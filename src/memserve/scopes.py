"""Scopes: the roots of prefix indexes. What two requests with different scopes have computed is never shared.

A tenant's scope is derived from its API key and has no "/". A request with a ``cache_salt`` has a scope of its
own below its tenant's: "TENANT/SALT". Both parts are hashes of a fixed length, so that keys and salts of any
length and any characters fit into messages and logs and cannot be read there, and no two pairs give one scope.
"""

from __future__ import annotations

import hashlib

_SALTED = "/"
"""Between the tenant's scope and the salt."""


def scope_of_key(key: str) -> str:
    """The scope of an API key's tenant: a hash, which is the same in every Frontend and does not reveal the key."""
    return _digest(key, b"memserve-scope")


def salted(scope: str, salt: str | None) -> str:
    """The scope of a tenant's requests with this ``cache_salt``; that of the tenant if there is none."""
    return scope if salt is None else f"{scope}{_SALTED}{_digest(salt, b'memserve-salt')}"


def tenant_of(scope: str) -> str:
    """The scope of the tenant: fair shares and limits are per tenant, whatever salts it uses."""
    return scope.partition(_SALTED)[0]


def _digest(text: str, person: bytes) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16, person=person).hexdigest()
