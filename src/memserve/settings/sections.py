"""The tables of a configuration file: every setting with its type, default, unit, rule and meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from memserve.settings.rules import (
    GIB,
    Rule,
    a_host,
    a_host_port,
    a_name,
    a_reachable_host,
    between,
    each_an_origin,
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
    """One key of the file. ``parse`` turns a TOML value into the field's type; secrets are not shown."""
    metadata = {"help": help, "unit": unit, "rule": rule, "parse": parse, "secret": secret}
    return attrs.field(default=default, validator=rule, metadata=metadata)


@attrs.frozen(kw_only=True)
class ModelConfig:
    """``[model]``: the model that is served."""

    path: str = setting(
        rule=matching(".+", "not be empty"),
        help="a .gguf file or a Hugging Face directory; package:MODULE/FILE finds either in an installed Python package",
    )
    dtype: str = setting(
        "bfloat16",
        rule=one_of("bfloat16", "float32"),
        help="data type of weights, activations and KV; float32 reproduces the tokens of the reference run exactly",
    )
    weights: str = setting(
        "dtype",
        rule=one_of("dtype", "int8"),
        help="how weight matrices are stored; dtype: in the type that dtype sets; int8: in half the memory of bfloat16, slightly less exact",
    )
    max_context: int | None = setting(
        None,
        unit="tokens",
        rule=between(16, 1 << 24),
        help="most tokens of prompt and answer together; unset: the most that the model supports",
    )
    tool_format: str = setting(
        "auto",
        rule=one_of("auto", "hermes", "qwen3_coder", "llama3_json", "mistral", "mistral_args"),
        help="how the model writes tool calls; auto: as its chat template shows, or hermes if that shows no format",
    )
    reasoning: str = setting(
        "text",
        rule=one_of("text", "apart"),
        help="where a chat answer has what the model thinks first; text: in its text, as the model wrote it; apart: separately, as reasoning_content",
    )

    @property
    def stored(self) -> str:
        """The type in which matrices are stored, one of STORED_BYTES."""
        return self.dtype if self.weights == "dtype" else self.weights


@attrs.frozen(kw_only=True)
class PoolConfig:
    """``[pool]``: how every shard manages its pages."""

    page_tokens: int = setting(
        16,
        unit="tokens",
        rule=one_of(8, 16, 32, 64, 128),
        help="tokens per page, the unit of allocation, sharing and matching",
    )
    lease_s: float = setting(
        10.0,
        unit="seconds",
        rule=between(2, 3600),
        help="a worker that is silent for longer loses its pages; heartbeats come every second",
    )
    host_bytes: int = setting(
        0,
        unit="bytes",
        parse=parse_size,
        rule=between(0, 1 << 50),
        help="host memory of each shard, in addition to its arena, for cached pages that leave the arena; taken at start; 0: none",
    )
    disk_bytes: int = setting(
        0,
        unit="bytes",
        parse=parse_size,
        rule=between(0, 1 << 50),
        help="size of each shard's file for cached pages that leave its memory; taken at start; 0: none",
    )
    disk_path: str = setting("", help="directory of these files; unset: `[logging] dir`")
    swap_low: float = setting(
        0.05,
        rule=between(0, 1),
        help="cached pages begin to leave a tier when less than this share of it is free",
    )
    swap_high: float = setting(
        0.1,
        rule=between(0, 1),
        help="they leave the tier until this share of it is free; must not be below swap_low",
    )


@attrs.frozen(kw_only=True)
class ShardConfig:
    """``[[shard]]``: one MemPoolShard, the owner of one memory domain."""

    name: str = setting(
        rule=a_name, help="the shard's name in logs, in memserve status and in [[worker]] shard"
    )
    device: str = setting(
        "cpu",
        rule=matching("cpu|cuda:[0-9]{1,2}", "be cpu, or cuda:N for the GPU of that number"),
        help="where the shard's pages are and its workers compute: the host's memory and cores, or a GPU",
    )
    memory: int | None = setting(
        None,
        unit="bytes",
        parse=parse_size,
        rule=between(1 << 20, 1 << 50),
        help='size of the arena, taken at start: "512MiB", "2GiB" or bytes; unset: 1 GiB on cpu; on a GPU, what weights and workers leave',
    )

    @property
    def host_memory(self) -> int:
        """Bytes of host memory that the arena takes."""
        return 0 if self.on_gpu else self.memory or GIB

    @property
    def on_gpu(self) -> bool:
        """Whether the shard's pages are on a GPU."""
        return self.device != "cpu"


@attrs.frozen(kw_only=True)
class WorkerConfig:
    """``[[worker]]``: one worker process, an instance."""

    name: str = setting(rule=a_name, help="the worker's name in logs and in memserve status")
    role: str = setting(
        "both",
        rule=one_of("prefill", "decode", "both"),
        help="prefill: runs prompts and hands them over; decode: continues them; both: runs prompts and continues them itself",
    )
    shard: str = setting("", help="the [[shard]] whose pages the worker maps; unset: the only one")
    threads: int | None = setting(
        None,
        unit="threads",
        rule=between(1, 1024),
        help="most cores that one step of the worker may take; unset: all, shared with other workers while these are idle",
    )


@attrs.frozen(kw_only=True)
class SchedulerConfig:
    """``[scheduler]``: which workers get a request."""

    policy: str = setting(
        "cost",
        rule=one_of("cost", "longest_prefix", "session", "least_load", "round_robin"),
        help="how workers are chosen; cost: the lowest predicted cost; longest_prefix: the most cached tokens; session: a chat stays where it began; least_load: the worker with the least waiting work; round_robin: each in turn",
    )
    roles: str = setting(
        "fixed",
        rule=one_of("fixed", "auto"),
        help="fixed: as configured, or as given by memserve role; auto: a worker that prefills or decodes does both while the load requires it",
    )
    index: str = setting(
        "events",
        rule=one_of("events", "ttl"),
        help="how the scheduler knows what is cached where; events: the shards report it; ttl: it assumes that a placed prompt stays cached for a while",
    )
    index_ttl_s: float = setting(
        300.0, unit="seconds", rule=between(1, 86_400), help='how long it assumes this, with `index = "ttl"`'
    )
    ttft_weight: float = setting(
        3.0,
        rule=between(0, 1000),
        help="policy cost: weight of a second before a request's first token, relative to one after it",
    )
    others_weight: float = setting(
        1.0,
        rule=between(0, 1000),
        help="policy cost: weight of a second that other streams lose, relative to one that the request waits",
    )
    handoff_margin_ms: float = setting(
        20.0,
        unit="milliseconds",
        rule=between(0, 60_000),
        help="policy cost: the least that a handoff to another worker must save",
    )
    hold_back_s: float = setting(
        1.0,
        unit="seconds",
        rule=between(0, 3600),
        help="requests wait in the scheduler, by priority and in fair shares, while every worker's queued prompts take longer than this to run",
    )
    held_max: int = setting(
        2048,
        unit="requests",
        rule=between(1, 1 << 20),
        help="most requests that wait in one scheduler; beyond it 503, and 429 for a key that has as many waiting as places are free",
    )
    count: int = setting(1, unit="processes", rule=between(1, 16), help="number of GlobalSchedulers")


@attrs.frozen(kw_only=True)
class CacheConfig:
    """``[cache]``: which pages of finished requests are kept."""

    mode: str = setting(
        "3",
        parse=parse_mode,
        rule=one_of("off", "1", "2", "3"),
        help="off: nothing; 1: prompts; 2: also answers, on the shard where they were decoded; 3: also answers, which return to the prefill worker's shard",
    )


@attrs.frozen(kw_only=True)
class TransferConfig:
    """``[transfer]``: how pages move from one shard to another."""

    path: str = setting(
        "auto",
        rule=one_of("auto", "mapped", "cuda", "tcp", "nixl"),
        help="auto: the fastest that both shards support; mapped: copies within a host; cuda: copies between its GPUs; tcp: TCP, within or between hosts; nixl: RDMA",
    )
    host: str = setting(
        "",
        rule=or_unset(a_reachable_host),
        help="address at which tcp listens and other shards reach this host; unset: its address in [cluster], or 127.0.0.1",
    )
    granularity: str = setting(
        "by_request_agg",
        rule=one_of("by_request_agg", "by_request", "by_layer"),
        help="by_request_agg: whole pages; by_request: each layer's K and V separately; by_layer: layer by layer",
    )
    deadline_s: float = setting(
        5.0,
        unit="seconds",
        rule=between(0.05, 600),
        help="how long a request waits for pages of another shard before they are computed instead",
    )
    ahead: bool = setting(
        True,
        help="send a prompt's full pages to its decode worker's shard while the rest is still being computed (cache modes 2 and 3)",
    )


@attrs.frozen(kw_only=True)
class BatchConfig:
    """``[batch]``: what one model step may hold."""

    chunk_tokens: int = setting(
        256,
        unit="tokens",
        rule=between(1, 1 << 16),
        help="most prompt tokens in a step with running streams, twice as many without; a smaller value delays streams less",
    )
    rows: int = setting(
        64,
        unit="sequences",
        rule=between(1, 1024),
        help="most sequences in one step; further ones wait their turn",
    )
    draft: int = setting(
        8,
        unit="tokens",
        rule=between(0, 64),
        help="most draft tokens per step for one stream, guessed from earlier text; 0: no drafts",
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
        help="accepted bearer keys, each with a cache of its own; empty: no key is required",
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
        help="those of api_keys that may request a priority below 0, ahead of all others; empty: all of them",
    )
    cors_origins: tuple[str, ...] = setting(
        (),
        rule=each_an_origin,
        help='web pages of these origins may call the server from a browser ("*": of all), but change no workers',
    )
    ttft_ms: float | None = setting(
        None,
        unit="milliseconds",
        rule=between(1, 86_400_000),
        help="deadline for the first token of a request without x-slo-ttft-ms; unset: none",
    )
    count: int = setting(
        1, unit="processes", rule=between(1, 16), help="number of Frontends, all on the same port"
    )
    max_requests: int = setting(
        1024,
        unit="requests",
        rule=between(1, 1 << 20),
        help="most requests in flight in one Frontend; beyond it, 429",
    )
    drain_s: float = setting(
        30.0, unit="seconds", rule=between(0, 86_400), help="how long a stop waits for requests in flight"
    )


@attrs.frozen(kw_only=True)
class LoggingConfig:
    """``[logging]``: where each run writes its JSON lines."""

    dir: str = setting(
        "logs",
        rule=matching(".+", "not be empty"),
        help="each run makes a directory in it; clusters with the same dir cannot run at the same time",
    )
    level: str = setting(
        "info",
        rule=one_of("debug", "info", "warning", "error"),
        help="lines below this level are not written",
    )


@attrs.frozen(kw_only=True)
class ClusterConfig:
    """``[cluster]``: the other hosts of the cluster, if any."""

    listen: str = setting(
        "",
        rule=or_unset(a_host_port),
        help="on the scheduler's host: its own address and port, at which other hosts join",
    )
    join: str = setting(
        "", rule=or_unset(a_host_port), help="on all other hosts: listen of the scheduler's host"
    )
    address: str = setting(
        "",
        rule=or_unset(a_reachable_host),
        help="with join: this host's own address, at which other hosts reach it",
    )
    key: str = setting(
        "",
        help="file of the key that all hosts share, made by memserve key; whoever has it is in the cluster",
    )

    @property
    def networked(self) -> bool:
        """Whether the cluster has other hosts."""
        return bool(self.listen or self.join)


DEFAULT_SHARDS = (ShardConfig(name="s0"),)
DEFAULT_WORKERS = (WorkerConfig(name="w0", shard="s0"),)
