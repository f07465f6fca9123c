"""The rules that involve more than one table of a configuration, and how mistakes are worded."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from memserve.config import RESERVED_NAME
from memserve.settings.sections import DEFAULT_SHARDS, DEFAULT_WORKERS, PoolConfig, ShardConfig, WorkerConfig

Tree = dict[str, Any]


@attrs.frozen
class Problem:
    """One mistake: where it is, and what to say about it."""

    path: str
    text: str
    source: str = ""
    """The override that has the mistake; empty if the file has it."""

    def line(self, file: str) -> str:
        """The text that the user sees."""
        return f"{self.source or file}: {self.path} {self.text}"


def cross_check(tree: Tree) -> list[Problem]:
    """Check the rules that involve more than one table.

    Malformed values are skipped: they are reported already.
    """
    return [
        *check_names(tree),
        *check_shards(tree),
        *check_pool(tree),
        *check_keys(tree),
        *check_cluster(tree),
        *check_transfer(tree),
    ]


def check_cluster(tree: Tree) -> Iterator[Problem]:
    """A host must either have the scheduler or join the host that has it, with the keys that each needs."""
    if "cluster" not in tree or not isinstance(cluster := tree["cluster"], dict):
        return
    listens, joins = cluster.get("listen"), cluster.get("join")
    if not listens and not joins:
        yield Problem("cluster", "must have listen, on the host of the scheduler, or join, on the others")
    elif listens and joins:
        yield Problem(
            "cluster.join",
            "must be left out where listen is set: either this host has the scheduler or another one",
        )
    if not cluster.get("key"):
        yield Problem(
            "cluster.key", "is required: the file that `memserve key FILE` makes, the same on all hosts"
        )
    if joins and not cluster.get("address"):
        yield Problem("cluster.address", "is required with join: this host's own address")
    elif cluster.get("address") and not joins:
        yield Problem("cluster.address", "must be left out without join: listen has this host's address")
    if joins and "scheduler" in tree:
        yield Problem("scheduler", f"must be left out with cluster.join: the scheduler is at {show(joins)}")
    elif isinstance(scheduler := tree.get("scheduler"), dict) and scheduler.get("count", 1) != 1:
        yield Problem("scheduler.count", f"must be 1 with [cluster], not {show(scheduler['count'])}")
    if isinstance(transfer := tree.get("transfer"), dict) and transfer.get("path") in ("mapped", "cuda"):
        path = show(transfer["path"])
        yield Problem(
            "transfer.path", f"must be auto, tcp or nixl with [cluster], not {path}: hosts share no memory"
        )


def check_transfer(tree: Tree) -> Iterator[Problem]:
    """Pages must be able to move between the shards of one host: else every handoff would compute its prompt again."""
    transfer, shards = tree.get("transfer"), tables(tree, "shard")
    path = transfer.get("path", "auto") if isinstance(transfer, dict) else "auto"
    if len(shards) < 2 or networked(tree) or path == "auto":
        return
    gpus = sum(is_on_gpu(one) for one in shards)
    if path == "cuda" and not gpus:
        yield Problem(
            "transfer.path", 'must be auto, mapped, tcp or nixl, not "cuda": all shards are in host memory'
        )
    elif path in ("mapped", "tcp", "nixl") and gpus == len(shards):
        yield Problem("transfer.path", f"must be auto or cuda, not {show(path)}: all shards are on GPUs")


def networked(tree: Tree) -> bool:
    """Whether the cluster has other hosts."""
    cluster = tree.get("cluster")
    return isinstance(cluster, dict) and bool(cluster.get("listen") or cluster.get("join"))


def check_keys(tree: Tree) -> Iterator[Problem]:
    """Keys with special rights must be among the API keys. No key is shown."""
    frontend = tree.get("frontend")
    if not isinstance(frontend, dict):
        return
    known = frontend.get("api_keys")
    known = known if isinstance(known, list) else []
    for name in ("admin_keys", "priority_keys"):
        keys = frontend.get(name)
        unknown = [i for i, key in enumerate(keys) if key not in known] if isinstance(keys, list) else []
        for i in unknown:
            yield Problem(f"frontend.{name}[{i}]", "must be one of frontend.api_keys; add it there too")


def check_pool(tree: Tree) -> Iterator[Problem]:
    """``swap_high`` must not be below ``swap_low``."""
    pool = tree.get("pool")
    if not isinstance(pool, dict):
        return
    low, high = pool.get("swap_low", PoolConfig().swap_low), pool.get("swap_high", PoolConfig().swap_high)
    if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
        yield Problem("pool.swap_high", f"must not be below pool.swap_low ({show(low)}), not {show(high)}")


def check_names(tree: Tree) -> Iterator[Problem]:
    """Names must be unique and not reserved: each is used for an actor's sockets and log file."""
    seen: dict[str, str] = {}
    for section in ("shard", "worker"):
        for i, table in enumerate(tables(tree, section)):
            name, path = table.get("name"), f"{section}[{i}].name"
            if not isinstance(name, str):
                continue
            if RESERVED_NAME.fullmatch(name):
                yield Problem(path, f"must not be {show(name)}: the name of another actor")
            elif name in seen:
                yield Problem(path, f"must be unique, not {show(name)}: {seen[name]} has it already")
            seen.setdefault(name, path)


def check_shards(tree: Tree) -> Iterator[Problem]:
    """Every worker must have a shard, and there must be workers that prefill and workers that decode.

    Pages do not move between GPUs and host memory, so this holds for each of the two.
    """
    shards = tables(tree, "shard") or default_tables("shard")
    known = {one["name"]: one for one in shards if isinstance(one.get("name"), str)}
    roles: dict[bool, set[str]] = {}
    for i, worker in enumerate(tables(tree, "worker")):
        shard = worker.get("shard")
        if shard is None:
            yield Problem(
                f"worker[{i}].shard", f"is required with more than one shard; known: {', '.join(known)}"
            )
        elif isinstance(shard, str) and shard not in known:
            guess = f"; did you mean {show(hint)}?" if (hint := nearest(shard, list(known))) else ""
            yield Problem(
                f"worker[{i}].shard", f"must name a [[shard]] ({', '.join(known)}), not {show(shard)}{guess}"
            )
        elif isinstance(shard, str):
            roles.setdefault(is_on_gpu(known[shard]), set()).add(str(worker.get("role", "both")))
    for on_gpu, found in roles.items():
        if on_gpu or not networked(tree):  # another host's workers reach the host memory of this one
            where = "on a GPU" if on_gpu else "in host memory"
            yield from check_roles(found, where if len(roles) > 1 else "")


def check_roles(roles: set[str], where: str) -> Iterator[Problem]:
    """Both roles must be there. ``where``: the memory that is meant, if shards are in both kinds of it."""
    if len(roles) == 1 and roles <= {"prefill", "decode"}:
        (only,) = roles
        missing = "decode" if only == "prefill" else "prefill"
        place = f" {where}" if where else ""
        why = "pages do not move between GPUs and host memory, so " if where else ""
        remedy = f'{why}add a [[worker]] with role = "{missing}"{" there" if where else ""}'
        yield Problem("worker", f"must hold one that can {missing}{place}, not only {only}: {remedy}")


# ---- words and tables ------------------------------------------------------------------------------------------------


def show(value: Any, secret: bool = False) -> str:
    """A value as the user would write it, cut at 60 characters."""
    if secret:
        return "the given value (hidden)"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearest(word: str, known: Sequence[str]) -> str:
    """The entry of ``known`` that was probably meant, or an empty string."""
    lowered = {each.lower(): each for each in known}
    found = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.5)
    return lowered[found[0]] if found else ""


def tables(tree: Tree, key: str) -> list[Tree]:
    """The well-formed tables of ``[[key]]``; :func:`structure` reports the others."""
    value = tree.get(key)
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def is_on_gpu(shard: Tree) -> bool:
    """Whether a [[shard]] is on a GPU."""
    return str(shard.get("device", "cpu")) != "cpu"


def default_tables(key: str) -> list[Tree]:
    """The default of ``[[key]]`` as a file would have it, without what fill_in adds."""
    parts: tuple[ShardConfig, ...] | tuple[WorkerConfig, ...] = (
        DEFAULT_SHARDS if key == "shard" else DEFAULT_WORKERS
    )
    return [{k: v for k, v in attrs.asdict(p).items() if v is not None and k != "shard"} for p in parts]
