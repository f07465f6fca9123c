"""What a simulated cluster is made of, and what its parts cost beside the steps."""

from __future__ import annotations

import attrs

from memserve.costs import Site
from memserve.scheduling.pricing import Weights

RETIRE = {"off": "none", "1": "prompt", "2": "all", "3": "all"}
"""Which pages each caching mode gives to the index, as for real workers."""


@attrs.frozen
class ShardPlan:
    """One MemPoolShard; pages of each tier."""

    name: str
    pages: int
    host_pages: int = 0
    disk_pages: int = 0


@attrs.frozen
class WorkerPlan:
    """One worker."""

    name: str
    role: str
    """prefill, decode or both."""
    shard: str
    site: Site | None = None
    """Whose cores its steps run on. None: its own."""


@attrs.frozen(kw_only=True)
class Layout:
    """A cluster, as a configuration describes it."""

    name: str = "cluster"
    shards: tuple[ShardPlan, ...]
    workers: tuple[WorkerPlan, ...]
    frontends: int = 1
    schedulers: int = 1
    policy: str = "cost"
    roles: str = "fixed"
    """Or ``auto``: see ``[scheduler] roles``."""
    caching: str = "3"
    """off, 1, 2 or 3."""
    page_tokens: int = 16
    page_bytes: int = 2
    """KV of one page, for the bytes moved."""
    path: str = "mapped"
    """How pages go from one shard to another: ``mapped``, ``tcp`` or ``nixl``."""
    fetch_s: float = 5.0
    """How long a request waits for pages of another shard."""
    chunk_tokens: int = 512
    rows: int = 256
    max_context: int = 1 << 20
    weights: Weights = Weights()
    """Of the policy ``cost``."""
    hold_back_s: float = 1.0
    held_max: int = 2_048
    lease_s: float = 10.0
    requests_max: int = 100_000
    """Open at once in one Frontend."""
    swap_low: float = 0.05
    swap_high: float = 0.1

    @property
    def scheduler_names(self) -> tuple[str, ...]:
        """As in a configuration."""
        return tuple(f"scheduler-{i}" for i in range(self.schedulers))

    @property
    def frontend_names(self) -> tuple[str, ...]:
        """As in a configuration."""
        return tuple(f"frontend-{i}" for i in range(self.frontends))


@attrs.frozen
class Times:
    """How long things take beside steps and messages. Seconds."""

    shard_start_s: float = 0.5
    worker_start_s: float = 1.5
    frontend_start_s: float = 0.3
    death_told_s: float = 0.002
    """Until the supervisor has told a scheduler of a death."""
    copy_page_s: float = 1e-5
    """Copying a page between the device and host tiers."""
    disk_page_s: float = 1e-4
    copy_fixed_s: float = 1e-4


FAST = Times(
    shard_start_s=0.02, worker_start_s=0.05, frontend_start_s=0.01, copy_page_s=0.005, disk_page_s=0.01
)
"""For small clusters in which things go wrong: little time passes between a death and the return."""


def fixed(kind: str, instances: int, *, pages: int, shared: bool = False, **settings: object) -> Layout:
    """A layout by its short name: ``colocated``, or such as ``1P3D``. ``shared``: one shard for all instances."""
    roles = _roles(kind, instances)
    total = pages * instances if shared else pages
    shards = tuple(ShardPlan(f"s{i}", total) for i in range(1 if shared else instances))
    workers = tuple(
        WorkerPlan(f"{role[0] if role != 'both' else 'w'}{i}", role, "s0" if shared else f"s{i}")
        for i, role in enumerate(roles)
    )
    return Layout(name=kind, shards=shards, workers=workers, **settings)  # type: ignore[arg-type]


def on_sites(layout: Layout, sites: int) -> Layout:
    """The layout with its workers in turn on so many sites; 0 leaves each worker its own."""
    if not sites:
        return layout
    workers = tuple(attrs.evolve(one, site=Site(f"site-{i % sites}")) for i, one in enumerate(layout.workers))
    return attrs.evolve(layout, workers=workers)


def _roles(kind: str, instances: int) -> list[str]:
    """Roles of a short name, repeated until there are enough instances."""
    if kind == "colocated":
        return ["both"] * instances
    prefills, _, decodes = kind.removesuffix("D").partition("P")
    unit = ["prefill"] * int(prefills) + ["decode"] * int(decodes)
    assert instances % len(unit) == 0, f"{instances} instances are no multiple of {kind}"
    return unit * (instances // len(unit))
