"""An arena owner's settings for its transfers: which paths they may take, and where TCP listens."""

from __future__ import annotations

import attrs

from memserve.settings.rules import a_reachable_host, one_of


@attrs.frozen(kw_only=True)
class TransferSettings:
    """Settings of :func:`memserve.transfer.shell.open_transfers`.

    Raises RuleError for a value that breaks its rule.
    """

    path: str = attrs.field(default="auto", validator=one_of("auto", "mapped", "cuda", "tcp", "nixl"))
    """``auto``: the fastest path that both sides have; ``mapped``: copies on one host; ``cuda``: copies
    between its GPUs; ``tcp``: any two hosts; ``nixl``: RDMA."""
    host: str = attrs.field(default="127.0.0.1", validator=a_reachable_host)
    """Address, without a port, that tcp listens on and at which the other shards reach this one."""
