"""What the owner of an arena says about its transfers: which paths they may take, and where TCP listens."""

from __future__ import annotations

import attrs

from memserve.settings.rules import a_reachable_host, one_of


@attrs.frozen(kw_only=True)
class TransferSettings:
    """Settings of :func:`memserve.transfer.shell.open_transfers`. Raises RuleError for a value that breaks its rule."""

    path: str = attrs.field(default="auto", validator=one_of("auto", "mapped", "cuda", "tcp", "nixl"))
    """auto: the fastest that both sides have; mapped: copies on one host, cuda: between its GPUs; tcp: any two; nixl: RDMA."""
    host: str = attrs.field(default="127.0.0.1", validator=a_reachable_host)
    """Address to listen on for tcp, without a port, and at which the others reach this side."""
