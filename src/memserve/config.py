"""Every setting of a cluster: its name, type, default, unit, rule and meaning.

``Config`` is what the user wrote; ``Resolved`` is what was decided from it on one machine, and what the actors read
from ``cluster.json``. Neither is ever changed. :func:`load` and :func:`resolve`, for the supervisor alone, import
what reads TOML and looks at the machine when called: an actor that only reads its ``Resolved`` stays small.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import msgspec

from memserve.engine.spec import ModelSpec
from memserve.rules import (
    GIB,
    Rule,
    a_host,
    a_name,
    a_reachable_host,
    between,
    matching,
    one_of,
    parse_mode,
    parse_size,
    some_keys,
)

if TYPE_CHECKING:
    from memserve.resolve import Machine


# ---- settings ------------------------------------------------------------------------------------------------


def setting(
    default: Any = attrs.NOTHING,
    *,
    help: str,
    unit: str = "",
    rule: Rule | None = None,
    parse: Callable[[object], object] | None = None,
    secret: bool = False,
) -> Any:
    """One key of the file. ``parse`` turns what TOML gave into the field's type; a secret's value is never shown."""
    metadata = {"help": help, "unit": unit, "rule": rule, "parse": parse, "secret": secret}
    return attrs.field(default=default, validator=rule, metadata=metadata)


@attrs.frozen(kw_only=True)
class ModelConfig:
    """``[model]``: what is served."""

    path: str = setting(
        rule=matching(".+", "not be empty"),
        help="a .gguf file, a Hugging Face directory, or package:MODULE/FILE for either in an installed Python package",
    )
    dtype: str = setting(
        "bfloat16",
        rule=one_of("bfloat16", "float32"),
        help="type of weights, activations and KV; float32 gives the exact tokens of the reference run",
    )
    weights: str = setting(
        "dtype",
        rule=one_of("dtype", "int8"),
        help="how matrices are stored: dtype, in that type; int8, in half the memory of bfloat16, a little less exactly",
    )
    max_context: int | None = setting(
        None,
        unit="tokens",
        rule=between(16, 1 << 24),
        help="prompt and answer together, at most; unset: what the model was trained for",
    )

    @property
    def stored(self) -> str:
        """The type that matrices are stored in, one of STORED_BYTES."""
        return self.dtype if self.weights == "dtype" else self.weights


@attrs.frozen(kw_only=True)
class PoolConfig:
    """``[pool]``: how every shard manages its pages."""

    page_tokens: int = setting(
        16,
        unit="tokens",
        rule=one_of(8, 16, 32, 64, 128),
        help="tokens a page holds: the unit of allocation, sharing and matching",
    )
    lease_s: float = setting(
        10.0,
        unit="seconds",
        rule=between(2, 3600),
        help="a worker that is silent for so long loses its pages; heartbeats come each second",
    )
    host_bytes: int = setting(
        0,
        unit="bytes",
        parse=parse_size,
        rule=between(0, 1 << 50),
        help="memory beside each shard's arena for cached pages that leave it, taken at start; 0: none",
    )
    disk_bytes: int = setting(
        0,
        unit="bytes",
        parse=parse_size,
        rule=between(0, 1 << 50),
        help="size of each shard's file for cached pages that leave its memory, taken at start; 0: none",
    )
    disk_path: str = setting("", help="directory for these files; unset: `[logging] dir`")
    swap_low: float = setting(
        0.05,
        rule=between(0, 1),
        help="cached pages begin to leave a tier when less than this share of it is free",
    )
    swap_high: float = setting(
        0.1, rule=between(0, 1), help="and go on leaving until this share is free; not below swap_low"
    )


@attrs.frozen(kw_only=True)
class ShardConfig:
    """``[[shard]]``: one MemPoolShard, the owner of one memory domain."""

    name: str = setting(rule=a_name, help="its name in logs, status and [[worker]] shard")
    device: str = setting(
        "cpu",
        rule=matching("cpu|cuda:[0-9]{1,2}", "be cpu, or cuda:N for the GPU of that number"),
        help="where its pages live and its workers compute: the host's memory and cores, or a GPU",
    )
    memory: int | None = setting(
        None,
        unit="bytes",
        parse=parse_size,
        rule=between(1 << 20, 1 << 50),
        help='size of its arena, taken at start: "512MiB", "2GiB" or bytes; unset: 1 GiB on cpu, on a GPU what is left',
    )

    @property
    def host_memory(self) -> int:
        """Bytes of the host's memory that its arena takes."""
        return 0 if self.on_gpu else self.memory or GIB

    @property
    def on_gpu(self) -> bool:
        """Whether its pages live on a GPU."""
        return self.device != "cpu"


@attrs.frozen(kw_only=True)
class WorkerConfig:
    """``[[worker]]``: one worker process, an instance."""

    name: str = setting(rule=a_name, help="its name in logs and status")
    role: str = setting(
        "both",
        rule=one_of("prefill", "decode", "both"),
        help="prefill: runs prompts and hands them over; decode: continues them; both: keeps its requests",
    )
    shard: str = setting("", help="the [[shard]] whose pages it maps; unset: the only one")
    threads: int | None = setting(
        None,
        unit="threads",
        rule=between(1, 1024),
        help="most cores that one of its steps may take; unset: all, shared with the other workers as they fall idle",
    )


@attrs.frozen(kw_only=True)
class SchedulerConfig:
    """``[scheduler]``: who gets a request."""

    policy: str = setting(
        "cost",
        rule=one_of("cost", "longest_prefix", "session", "least_load", "round_robin"),
        help="cost: the least predicted cost; longest_prefix: where most is cached; session: a chat stays where it began; "
        "least_load: the worker with the least waiting work; round_robin: each in turn",
    )
    index: str = setting(
        "events",
        rule=one_of("events", "ttl"),
        help="how it is known what is cached where; events: the shards tell; ttl: it is assumed of every placement, for a while",
    )
    index_ttl_s: float = setting(
        300.0, unit="seconds", rule=between(1, 86_400), help='for how long, with `index = "ttl"`'
    )
    ttft_weight: float = setting(
        3.0,
        rule=between(0, 1000),
        help="policy cost: a second before a request's first token, against one after it",
    )
    others_weight: float = setting(
        0.3,
        rule=between(0, 1000),
        help="policy cost: a second that other streams lose, against one that the request waits",
    )
    handoff_margin_ms: float = setting(
        20.0,
        unit="milliseconds",
        rule=between(0, 60_000),
        help="policy cost: what a hand-over to another worker must save at least",
    )
    count: int = setting(1, unit="processes", rule=between(1, 16), help="GlobalSchedulers")


@attrs.frozen(kw_only=True)
class CacheConfig:
    """``[cache]``: what is kept of finished requests."""

    mode: str = setting(
        "3",
        parse=parse_mode,
        rule=one_of("off", "1", "2", "3"),
        help="off: nothing; 1: prompts; 2: answers too, where they were made; 3: answers too, for every worker",
    )


@attrs.frozen(kw_only=True)
class TransferConfig:
    """``[transfer]``: how pages move from one shard to another."""

    path: str = setting(
        "auto",
        rule=one_of("auto", "mapped", "tcp", "nixl"),
        help="auto: the fastest that both shards have; mapped: copies on one host; tcp: between any; nixl: RDMA",
    )
    host: str = setting(
        "127.0.0.1", rule=a_reachable_host, help="where tcp listens, and others reach this host"
    )
    granularity: str = setting(
        "by_request_agg",
        rule=one_of("by_request_agg", "by_request", "by_layer"),
        help="by_request_agg: whole pages; by_request: each layer's K and V by itself; by_layer: layer by layer",
    )
    deadline_s: float = setting(
        5.0,
        unit="seconds",
        rule=between(0.05, 600),
        help="how long a request waits for pages of another shard, before it computes them instead",
    )


@attrs.frozen(kw_only=True)
class BatchConfig:
    """``[batch]``: what one model step may hold."""

    chunk_tokens: int = setting(
        256,
        unit="tokens",
        rule=between(1, 1 << 16),
        help="prompt tokens in a step beside running streams, twice as many without; smaller keeps streams smoother",
    )
    rows: int = setting(
        64,
        unit="sequences",
        rule=between(1, 1024),
        help="sequences in one step, at most; more wait their turn",
    )


@attrs.frozen(kw_only=True)
class FrontendConfig:
    """``[frontend]``: the HTTP surface."""

    host: str = setting("127.0.0.1", rule=a_host, help="address to listen on; 0.0.0.0 for every interface")
    port: int = setting(8080, rule=between(0, 65535), help="TCP port; 0 takes any free one")
    api_keys: tuple[str, ...] = setting(
        (),
        rule=some_keys,
        secret=True,
        help="accepted bearer keys, each with a cache of its own; empty: no key is asked for",
    )
    count: int = setting(1, unit="processes", rule=between(1, 16), help="Frontends, all on the same port")
    max_requests: int = setting(
        1024, unit="requests", rule=between(1, 1 << 20), help="in flight in one Frontend; beyond it, 429"
    )
    drain_s: float = setting(
        30.0, unit="seconds", rule=between(0, 86_400), help="how long a stop waits for requests in flight"
    )


@attrs.frozen(kw_only=True)
class LoggingConfig:
    """``[logging]``: where each run leaves its JSON lines."""

    dir: str = setting(
        "logs",
        rule=matching(".+", "not be empty"),
        help="each run makes a directory in it; clusters with the same one cannot run at the same time",
    )
    level: str = setting(
        "info", rule=one_of("debug", "info", "warning", "error"), help="lines below it are not written"
    )


DEFAULT_SHARDS = (ShardConfig(name="s0"),)
DEFAULT_WORKERS = (WorkerConfig(name="w0", shard="s0"),)


@attrs.frozen(kw_only=True)
class Config:
    """A whole cluster, as written. Relative paths count from the directory memserve was started in."""

    model: ModelConfig = setting(help="what is served")
    pool: PoolConfig = setting(PoolConfig(), help="how every shard manages its pages")
    shard: tuple[ShardConfig, ...] = setting(DEFAULT_SHARDS, help="memory domains, one table each")
    worker: tuple[WorkerConfig, ...] = setting(DEFAULT_WORKERS, help="worker processes, one table each")
    scheduler: SchedulerConfig = setting(SchedulerConfig(), help="who gets a request")
    cache: CacheConfig = setting(CacheConfig(), help="what is kept of finished requests")
    transfer: TransferConfig = setting(TransferConfig(), help="how pages move between shards")
    batch: BatchConfig = setting(BatchConfig(), help="what one model step may hold")
    frontend: FrontendConfig = setting(FrontendConfig(), help="the HTTP surface")
    logging: LoggingConfig = setting(LoggingConfig(), help="where each run leaves its logs")

    @property
    def frontend_names(self) -> tuple[str, ...]:
        """Actor names of the Frontends."""
        return tuple(f"frontend-{i}" for i in range(self.frontend.count))

    @property
    def scheduler_names(self) -> tuple[str, ...]:
        """Actor names of the GlobalSchedulers."""
        return tuple(f"scheduler-{i}" for i in range(self.scheduler.count))


RESERVED_NAME = re.compile(r"(frontend|scheduler|supervisor)(-\d+)?")
"""Names that shards and workers may not have: they are other actors' log files and sockets."""


def section_types() -> dict[str, type[attrs.AttrsInstance]]:
    """The class behind each top-level table, in the order of the file."""
    return {
        "model": ModelConfig,
        "pool": PoolConfig,
        "shard": ShardConfig,
        "worker": WorkerConfig,
        "scheduler": SchedulerConfig,
        "cache": CacheConfig,
        "transfer": TransferConfig,
        "batch": BatchConfig,
        "frontend": FrontendConfig,
        "logging": LoggingConfig,
    }


def settings(config: Config) -> Iterator[tuple[str, Any, attrs.Attribute[Any]]]:
    """Every setting with its value: (path as errors write it, value, field)."""
    for section in section_types():
        value = getattr(config, section)
        labelled = (
            [(f"{section}[{i}]", v) for i, v in enumerate(value)]
            if isinstance(value, tuple)
            else [(section, value)]
        )
        for label, part in labelled:
            for field in attrs.fields(type(part)):
                yield f"{label}.{field.name}", getattr(part, field.name), field


# ---- what was decided ----------------------------------------------------------------------------------------


@attrs.frozen
class Reason:
    """One decision for `memserve check` to print."""

    key: str
    value: str
    why: str


@attrs.frozen(kw_only=True)
class Resolved:
    """A configuration on one machine. All paths are absolute; sizes are in bytes."""

    config: Config
    model_path: str
    """The .gguf file or the directory itself."""
    spec: ModelSpec
    max_context: int
    """Tokens, prompt and answer together."""
    page_bytes: int
    shard_pages: dict[str, int]
    """Pages in each shard's arena, by shard name."""
    threads: dict[str, int]
    """Most threads of a step, by worker name."""
    cores: int
    """Cores that this process may use."""
    run: str
    """Name of this run, unique within ``log_dir``."""
    log_dir: str
    """``[logging] dir``; each run has a directory in it."""
    runtime_dir: str
    """Sockets, lock and cluster.json; gone when the cluster is."""
    reasons: tuple[Reason, ...]
    gpu_worker_bytes: int = 0
    """What a worker may take of a GPU's memory, beside the weights and the pages that it shares."""
    host_pages: int = 0
    """Pages in each shard's host memory, beside its arena."""
    disk_pages: int = 0
    """Pages in each shard's file."""
    disk_dir: str = ""
    """Where those files are made."""

    def shard(self, name: str) -> ShardConfig:
        """The shard of that name."""
        return next(shard for shard in self.config.shard if shard.name == name)

    @property
    def on_gpus(self) -> bool:
        """Whether every shard is on a GPU, so that nothing needs the model in the form for CPUs."""
        return all(shard.on_gpu for shard in self.config.shard)

    @property
    def run_dir(self) -> str:
        """Where this run's log files are."""
        return f"{self.log_dir}/{self.run}"

    def to_json(self) -> bytes:
        """For ``cluster.json``. It holds the API keys: write it where only the owner can read."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> Resolved:
        """The inverse of :meth:`to_json`. Raises msgspec.MsgspecError on anything else."""
        return msgspec.json.decode(data, type=cls)


def load(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration: a TOML file, or the name of one that is shipped (``demo``), with ``key=value`` overrides.

    Raises ConfigError with every problem found, one a line.
    """
    from memserve.configfile import read

    return read(path, overrides)


def resolve(config: Config, machine: Machine | None = None) -> Resolved:
    """Decide everything that the configuration leaves open, on this machine unless another is given.

    Raises ConfigError with every problem found, one a line.
    """
    from memserve.resolve import Machine, decide

    return decide(config, machine or Machine.here(config.logging.dir))
