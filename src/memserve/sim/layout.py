"""What a simulated cluster is made of, and how long everything but its steps takes."""

from __future__ import annotations

import attrs

from memserve.costs import Site
from memserve.scheduling.pricing import Weights

HOST_CORES = 2.0
"""Cores of a simulated host whose workers share them."""


@attrs.frozen
class ShardPlan:
    """One MemPoolShard, with its number of pages in each tier."""

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
    """The site whose cores its steps run on. None: cores of its own."""
    slower: float = 1.0
    """Factor on its steps' seconds, of which schedulers learn only by what the steps then take."""
    overrated: float = 1.0
    """Factor on the step costs that it measures at its start, beside other programs; above 1, they are rough."""


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
    """``fixed`` or ``auto``: see ``[scheduler] roles``."""
    caching: str = "3"
    """The caching mode: off, 1, 2 or 3."""
    page_tokens: int = 16
    page_bytes: int = 2
    """KV bytes of one page, to count the bytes that are moved."""
    path: str = "mapped"
    """How pages move between shards: ``mapped``, ``cuda``, ``tcp`` or ``nixl``."""
    fetch_s: float = 5.0
    """Seconds that a request waits for pages of another shard."""
    chunk_tokens: int = 512
    rows: int = 256
    max_context: int = 1 << 20
    weights: Weights = Weights()
    """Weights of the policy ``cost``."""
    hold_back_s: float = 1.0
    held_max: int = 2_048
    lease_s: float = 10.0
    requests_max: int = 100_000
    """Maximum number of requests open at once in one Frontend."""
    swap_low: float = 0.05
    swap_high: float = 0.1

    @property
    def scheduler_names(self) -> tuple[str, ...]:
        """The schedulers' names, as in a configuration."""
        return tuple(f"scheduler-{i}" for i in range(self.schedulers))

    @property
    def frontend_names(self) -> tuple[str, ...]:
        """The Frontends' names, as in a configuration."""
        return tuple(f"frontend-{i}" for i in range(self.frontends))


@attrs.frozen
class Times:
    """How long everything but steps and messages takes, in seconds."""

    shard_start_s: float = 0.5
    worker_start_s: float = 1.5
    frontend_start_s: float = 0.3
    death_told_s: float = 0.002
    """From a death until the supervisor has told a scheduler of it."""
    copy_page_s: float = 1e-5
    """Copying a page between the device and host tiers."""
    disk_page_s: float = 1e-4
    copy_fixed_s: float = 1e-4


FAST = Times(
    shard_start_s=0.02, worker_start_s=0.05, frontend_start_s=0.01, copy_page_s=0.005, disk_page_s=0.01
)
"""For small clusters in which things go wrong: little time passes between a death and the restart."""


def fixed(kind: str, instances: int, *, pages: int, shared: bool = False, **settings: object) -> Layout:
    """A layout by its short name: ``colocated``, or a form such as ``1P3D``.

    ``pages`` counts per instance. ``shared``: one shard for all instances, instead of one each.
    """
    roles = _roles(kind, instances)
    total = pages * instances if shared else pages
    shards = tuple(ShardPlan(f"s{i}", total) for i in range(1 if shared else instances))
    workers = tuple(
        WorkerPlan(f"{role[0] if role != 'both' else 'w'}{i}", role, "s0" if shared else f"s{i}")
        for i, role in enumerate(roles)
    )
    return Layout(name=kind, shards=shards, workers=workers, **settings)  # type: ignore[arg-type]


def on_sites(layout: Layout, sites: int, cores: float = 1.0) -> Layout:
    """The layout with its workers spread in turn over ``sites`` sites; 0 leaves each worker its own.

    ``cores``: how many each site has; a step that is alone there takes all of them. One stands for a GPU, whose
    time steps share without waiting for one another. Any larger number stands for a host.
    """
    if not sites:
        return layout
    workers = tuple(
        attrs.evolve(one, site=Site(f"site-{i % sites}", cores, cores))
        for i, one in enumerate(layout.workers)
    )
    return attrs.evolve(layout, workers=workers)


def _roles(kind: str, instances: int) -> list[str]:
    """The roles of a short name, repeated until there is one for every instance."""
    if kind == "colocated":
        return ["both"] * instances
    prefills, _, decodes = kind.removesuffix("D").partition("P")
    unit = ["prefill"] * int(prefills) + ["decode"] * int(decodes)
    assert instances % len(unit) == 0, f"{instances} instances are no multiple of {kind}"
    return unit * (instances // len(unit))
