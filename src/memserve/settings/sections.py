"""The tables of a configuration file: every setting with its type, default, unit, rule and meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from memserve.settings.rules import (
    GIB,
    Rule,
    a_host,
    a_name,
    a_place,
    a_reachable_host,
    between,
    matching,
    one_of,
    or_unset,
    parse_mode,
    parse_size,
    some_keys,
)


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
    tool_format: str = setting(
        "auto",
        rule=one_of("auto", "hermes", "llama3_json", "mistral"),
        help="how the model writes calls of tools; auto: as its chat template has it, or hermes where that does not say",
    )
    reasoning: str = setting(
        "text",
        rule=one_of("text", "apart"),
        help="where a chat's answer has what the model thinks first: in its text, as it wrote it, or apart from it, as reasoning_content",
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
    roles: str = setting(
        "fixed",
        rule=one_of("fixed", "auto"),
        help="fixed: as configured, or given by memserve role; auto: a worker that prefills or decodes does both while the load asks for it",
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
        1.0,
        rule=between(0, 1000),
        help="policy cost: a second that other streams lose, against one that the request waits",
    )
    handoff_margin_ms: float = setting(
        20.0,
        unit="milliseconds",
        rule=between(0, 60_000),
        help="policy cost: what a hand-over to another worker must save at least",
    )
    hold_back_s: float = setting(
        1.0,
        unit="seconds",
        rule=between(0, 3600),
        help="requests wait in the scheduler, by priority and fair shares, while every worker's prompts take longer to run",
    )
    held_max: int = setting(
        2048,
        unit="requests",
        rule=between(1, 1 << 20),
        help="that may wait in one scheduler; beyond it 503, and 429 for a key that has as many waiting as places are free",
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
        rule=one_of("auto", "mapped", "cuda", "tcp", "nixl"),
        help="auto: the fastest that both shards have; mapped: copies on one host, cuda: between its GPUs; tcp: any; nixl: RDMA",
    )
    host: str = setting(
        "",
        rule=or_unset(a_reachable_host),
        help="where tcp listens, and others reach this host; unset: its address in [cluster], or 127.0.0.1",
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
    ahead: bool = setting(
        True,
        help="send a prompt's full pages to its decode worker's shard while the rest is computed (cache modes 2 and 3)",
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
    draft: int = setting(
        8,
        unit="tokens",
        rule=between(0, 64),
        help="how far a stream may guess ahead in a step, from what was said before; 0: not at all",
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
    admin_keys: tuple[str, ...] = setting(
        (),
        rule=some_keys,
        secret=True,
        help="those of api_keys that may change workers (memserve role, memserve drain); empty: all of them",
    )
    priority_keys: tuple[str, ...] = setting(
        (),
        rule=some_keys,
        secret=True,
        help="those of api_keys that may ask for a priority below 0, before all others; empty: all of them",
    )
    ttft_ms: float | None = setting(
        None,
        unit="milliseconds",
        rule=between(1, 86_400_000),
        help="by when the first token of a request is wanted that has no x-slo-ttft-ms; unset: whenever it comes",
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


@attrs.frozen(kw_only=True)
class ClusterConfig:
    """``[cluster]``: the other hosts of the cluster, where there are any."""

    listen: str = setting(
        "",
        rule=or_unset(a_place),
        help="this host has the scheduler, at this address of its own; the other hosts join there",
    )
    join: str = setting(
        "", rule=or_unset(a_place), help="listen of the host that has the scheduler; this one has none"
    )
    address: str = setting(
        "",
        rule=or_unset(a_reachable_host),
        help="with join: this host's own address, at which the others reach it",
    )
    key: str = setting(
        "",
        help="file of the key that all hosts share, made by memserve key; whoever has it is in the cluster",
    )

    @property
    def networked(self) -> bool:
        """Whether there is more than this host."""
        return bool(self.listen or self.join)


DEFAULT_SHARDS = (ShardConfig(name="s0"),)
DEFAULT_WORKERS = (WorkerConfig(name="w0", shard="s0"),)
