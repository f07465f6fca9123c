"""The native step: ``step.cpp`` and its headers, built on the machine it runs on, called through ctypes.

It is built at the first start, in 5 to 10 s, into the user's cache, keyed by sources and compiler. Without a
compiler or the instructions, ``open_step`` logs this once and the engine runs on torch: correct, but slower.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterator, Sequence
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    addressof,
    byref,
    c_char_p,
    c_float,
    c_int32,
    c_int64,
    c_void_p,
)
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any

import attrs
import numpy as np
import structlog
from numpy.typing import NDArray

from memserve.drawing import Adjustments, Logprobs, Sampling
from memserve.engine.plans import BatchPlan, Past, Row
from memserve.engine.rope import rope_table
from memserve.engine.spec import ModelSpec
from memserve.engine.weights import Bits, in_tiles
from memserve.kernels.native.pieces import MAX_ROWS, pieces
from memserve.kernels.native.prompt_logprobs import NativeLogprobs, Scoring
from memserve.kernels.native_build import NativeUnavailable, built_library, why_not
from memserve.tokens import TOKEN_BYTES, common_prefix, count, span, unpack

LONG_ROWS = 32
"""A step of more tokens asks after each layer how many threads run the next one.

A shorter step ends soon, and asking would slow it noticeably.
"""

THREADS_MAX = 255
"""Most threads of a step, however many cores there are; interface.hpp has the same constant."""

_NO_MEMORY = 2
_NOT_A_TOKEN = -1
_SEED_MASK = 2**64 - 1
_TOP_K_MAX = 2**63 - 1
_NOT_DRAWN = Sampling(temperature=0.0)

log = structlog.get_logger()


class _Config(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim")),
        *(
            (name, c_int32)
            for name in ("vocab", "max_context", "page_tokens", "max_rows", "max_threads", "amx")
        ),
        *((name, c_int32) for name in ("experts", "experts_used", "experts_normed", "window")),
        ("rms_eps", c_float),
    ]


class _Matrix(Structure):
    _fields_ = [("values", c_void_p), ("scales", c_void_p)]


_LAYER_FIELDS = (
    "attn_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "mlp_norm", "router", "gate_up", "down",
)  # fmt: skip
_MATRICES = {"qkv", "o", "router", "gate_up", "down"}
_OPTIONAL = {"router": "experts", "qkv_bias": "qkv_bias", "q_norm": "qk_norm", "k_norm": "qk_norm"}
"""Weights that only some models have, with the spec's field that says whether."""


class _Layer(Structure):
    _fields_ = [
        *((name, _Matrix if name in _MATRICES else c_void_p) for name in _LAYER_FIELDS),
        ("local", c_int32),
    ]


_Crew = CFUNCTYPE(c_int32, c_int32)
_NO_CREW_CALLBACK = _Crew()


class _Batch(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("rows", "wanted", "threads", "pages", "tables_length")),
        ("ids", c_char_p),
        *((name, c_void_p) for name in ("positions", "tables", "table_at", "wanted_at", "arena", "logits")),
        ("how", c_char_p),
        ("tokens", c_void_p),
        ("crew", _Crew),
    ]


class _Ids(Structure):
    _fields_ = [("ids", c_char_p), ("count", c_int64)]

    @classmethod
    def of(cls, packed: bytes) -> _Ids:
        return cls(packed, count(packed))


class NativeAdjustments(Structure):
    """``ms_adjustments``. Keeps the bytes that it points to alive."""

    _fields_ = [
        ("biased", _Ids),
        ("bias", c_char_p),
        *((name, _Ids) for name in ("prompt", "output", "forbidden", "allowed")),
        *((name, c_float) for name in ("repetition", "frequency", "presence")),
    ]

    @classmethod
    def of(cls, how: Adjustments, past: Past) -> NativeAdjustments:
        """The adjustments of a row's ``sample`` and ``past``."""
        allowed = past.allowed + bytes(-len(past.allowed) % TOKEN_BYTES)
        parts = [_Ids.of(part) for part in (past.prompt, past.output, past.forbidden, allowed)]
        return cls(_Ids.of(how.biased), how.bias, *parts, how.repetition, how.frequency, how.presence)


_pack_sampling = Struct("=ddQqdQQ").pack


def sampling_bytes(
    how: Sampling, adjust: NativeAdjustments | None = None, reported: NativeLogprobs | None = None
) -> bytes:
    """``ms_sampling``; ``adjust`` and ``reported`` must outlive it.

    top_k is clamped to the largest value that fits, which exceeds every vocabulary.
    """
    return _pack_sampling(
        how.temperature,
        how.top_p,
        how.seed & _SEED_MASK,
        min(how.top_k, _TOP_K_MAX),
        how.reach,
        addressof(adjust) if adjust is not None else 0,
        addressof(reported) if reported is not None else 0,
    )


class _Inputs:
    """The inputs of a step of ``rows``, laid out as in ``ms_batch``."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.ids = b"".join([row.tokens + row.draft for row in rows])
        self.positions, self.tables, self.table_at, self.wanted_at = (array("i") for _ in range(4))
        self.how: list[bytes] = []
        self.adjust: list[NativeAdjustments] = []
        self.reported: list[NativeLogprobs | None] = []
        for row in rows:
            drafted = count(row.draft)
            self.positions.extend(range(row.start, row.reach))
            self.table_at.extend([len(self.tables)] * (row.reach - row.start))
            self.tables.extend(row.pages)
            if (how := row.sample) is not None:
                end = len(self.positions)
                self.wanted_at.extend(range(end - 1 - drafted, end))
                reported = None if how.logprobs is None else NativeLogprobs.of_draw(how.logprobs)
                self.reported.append(reported)
                self.how += [self._sampling(how, row.past_at(i), reported) for i in range(1 + drafted)]

    def _sampling(self, how: Sampling, past: Past | None, reported: NativeLogprobs | None) -> bytes:
        adjust = None
        if how.adjust is not None and past is not None:
            adjust = NativeAdjustments.of(how.adjust, past)
            self.adjust.append(adjust)
        return sampling_bytes(how, adjust, reported)

    def kept(self, drawn: bytes) -> Iterator[bytes]:
        """The tokens that each sampling row keeps of ``drawn``, all draws of the step.

        These are its first draw, and one more for each accepted draft token.
        """
        at = 0
        for row in self.rows:
            if row.sample is not None:
                right = common_prefix(row.draft, span(drawn, at, at + count(row.draft))) if row.draft else 0
                yield span(drawn, at, at + 1 + right)
                at += 1 + count(row.draft)


@attrs.frozen(eq=False)
class ArenaPages:
    """The pages of an arena, as the native step needs them. Keeps their memory alive."""

    memory: NDArray[Any]
    """(pages, ...), contiguous, any type."""
    address: int = attrs.field(init=False)

    @address.default
    def _its_address(self) -> int:
        return address_of(self.memory)

    @property
    def count(self) -> int:
        """How many pages there are."""
        return len(self.memory)


def address_of(values: NDArray[Any]) -> int:
    """Where an array's first value lies."""
    return int(values.ctypes.data)


class NativeStep:
    """The model of ``engine/model.py`` in bfloat16. Runs one step at a time; owns its idle threads."""

    def __init__(
        self,
        library: ctypes.CDLL,
        spec: ModelSpec,
        weights: Bits,
        page_tokens: int,
        threads: int,
        amx: bool = True,
    ) -> None:
        """``weights``: matrices as rows, which are copied, or in tiles. ``amx``: use AMX if available.

        ``threads``: the most that a step runs, at most THREADS_MAX of them.
        """
        self._library, self._vocab, self._threads = library, spec.vocab, min(threads, THREADS_MAX)
        # The native side points to these, so they live as long as this object.
        self._weights = in_tiles(weights)
        self._rope = rope_table(spec)
        config = _Config(
            spec.layers, spec.hidden, spec.intermediate, spec.heads, spec.kv_heads, spec.head_dim,
            spec.vocab, spec.max_context, page_tokens, MAX_ROWS, self._threads, amx,
            spec.experts, spec.experts_used, spec.experts_normed, spec.sliding_window or 0, spec.rms_eps,
        )  # fmt: skip
        # A field without a value stays a null pointer, which means that the model has no such weight.
        absent = {name for name, field in _OPTIONAL.items() if not getattr(spec, field, False)}
        names = [name for name in _LAYER_FIELDS if name not in absent]
        layers = (_Layer * spec.layers)(
            *(
                _Layer(
                    **{name: self._at(f"{layer}.{name}") for name in names}, local=layer in spec.local_layers
                )
                for layer in range(spec.layers)
            )
        )
        embed, head = self._at("embed"), self._at("embed" if spec.tied_embeddings else "head")
        tables = [address_of(table) for table in self._rope]
        self._engine: int | None = library.ms_open(
            byref(config), layers, byref(embed), byref(head), self._at("norm"), *tables
        )
        if not self._engine:
            raise NativeUnavailable("no memory or no threads")

    @property
    def amx(self) -> bool:
        """Whether the step multiplies on AMX."""
        return bool(self._library.ms_amx(self._engine))

    def step(
        self,
        plan: BatchPlan,
        arena: ArenaPages,
        threads: int,
        crew: Callable[[int], int] | None = None,
        scoring: Scoring | None = None,
    ) -> tuple[list[bytes], list[Logprobs | None]]:
        """Like ``forward`` and then ``sampling.draw``: each sampling row's tokens and its log probabilities.

        Tokens are packed: a row gets one, and one more for each accepted draft token. Log probabilities are
        None for rows that do not ask for them.

        ``crew``: called between the layers and pieces of a long step with its number of threads; returns how
        many run the next. It must not raise. ``scoring``: receives the log probabilities of the rows'
        prompts, if any ask for them. Raises ValueError, computing nothing more, for a plan that reaches
        outside the arena or the model, and FloatingPointError, naming the row, when logits are not finite.
        """
        drawn: list[bytes] = []
        reports: list[Logprobs | None] = []
        for number, rows in enumerate(pieces(plan.rows)):
            if number and crew is not None:
                threads = crew(threads)
            inputs = _Inputs(rows)
            tokens = array("i", bytes(TOKEN_BYTES * len(inputs.wanted_at)))
            how, to = b"".join(inputs.how), tokens.buffer_info()[0]
            self._run(inputs, arena, threads, how=how, tokens=to, crew=crew)
            drawn += inputs.kept(tokens.tobytes())
            if scoring is not None:
                self._score(inputs, arena, threads, scoring)
            reports += [None if one is None else one.read() for one in inputs.reported]
        for number, tokens_of_row in enumerate(drawn):
            if _NOT_A_TOKEN in unpack(tokens_of_row):
                raise FloatingPointError(f"row {number}: the largest logit is not a finite number")
        return drawn, reports

    def _score(self, inputs: _Inputs, arena: ArenaPages, threads: int, scoring: Scoring) -> None:
        """Log probabilities of the prompts of the last step, whose final activations are still in place."""
        for places, about in scoring.questions(inputs.rows):
            inputs.wanted_at = places
            how = b"".join(sampling_bytes(_NOT_DRAWN, None, one) for one in about)
            tokens = array("i", bytes(TOKEN_BYTES * len(places)))
            self._run(inputs, arena, threads, how=how, tokens=tokens.buffer_info()[0], again=True)
            if _NOT_A_TOKEN in tokens:
                raise FloatingPointError("a row's prompt: the largest logit is not a finite number")

    def forward(self, plan: BatchPlan, arena: ArenaPages, threads: int) -> NDArray[np.float32]:
        """Like ``Llama.forward``: logits (wanted rows, vocab) float32, ignoring drafts.

        Raises as ``step``.
        """
        logits = np.empty((sum(row.sample is not None for row in plan.rows), self._vocab), np.float32)
        done = 0
        for rows in pieces([attrs.evolve(row, draft=b"") for row in plan.rows]):
            inputs = _Inputs(rows)
            self._run(inputs, arena, threads, logits=address_of(logits[done:]))
            done += len(inputs.wanted_at)
        return logits

    def _run(
        self,
        inputs: _Inputs,
        arena: ArenaPages,
        threads: int,
        logits: int = 0,
        how: bytes = b"",
        tokens: int = 0,
        crew: Callable[[int], int] | None = None,
        again: bool = False,
    ) -> None:
        """One native call of at most ``MAX_ROWS`` tokens.

        ``logits``, ``tokens``: addresses of the results; 0 for those not needed. ``again``: reuse the last
        run's activations, for other tokens of it.
        """
        batch = _Batch(
            len(inputs.positions),
            len(inputs.wanted_at),
            max(1, min(threads, self._threads)),
            arena.count,
            len(inputs.tables),
            inputs.ids,
            *(
                values.buffer_info()[0]
                for values in (inputs.positions, inputs.tables, inputs.table_at, inputs.wanted_at)
            ),
            arena.address,
            logits,
            how,
            tokens,
            _Crew(crew) if crew is not None and len(inputs.positions) > LONG_ROWS else _NO_CREW_CALLBACK,
        )
        run = self._library.ms_again if again else self._library.ms_step
        refused = run(self._engine, byref(batch))
        if refused == _NO_MEMORY:
            raise MemoryError("the native step")
        if refused:
            raise ValueError(
                f"a step of rows, token ids, positions or pages that are not there: {_outline(inputs.rows)}"
            )

    def close(self) -> None:
        """End the native side's threads and free its memory."""
        if self._engine:
            self._library.ms_close(self._engine)
            self._engine = None

    def _at(self, name: str) -> Any:
        """The native form of a weight: its address, for a matrix with that of its scales."""
        values = self._weights[name]
        assert values.flags.c_contiguous, name
        if values.ndim == 1:
            return address_of(values)
        scales = self._weights.get(f"{name}.scale")
        return _Matrix(address_of(values), None if scales is None else address_of(scales))


def _outline(rows: Sequence[Row]) -> str:
    return ", ".join(f"{count(row.tokens)} tokens at {row.start} on pages {row.pages}" for row in rows)


def open_step(
    spec: ModelSpec,
    weights: Bits,
    page_tokens: int,
    threads: int,
    cache_dir: Path,
) -> NativeStep | None:
    """The native step for a model, or None, after logging why there is none."""
    dtype = "float32" if weights["embed"].dtype == np.float32 else "bfloat16"
    try:
        if reason := why_not(spec, dtype):
            raise NativeUnavailable(reason)
        return NativeStep(load(cache_dir), spec, weights, page_tokens, threads)
    except NativeUnavailable as reason:
        log.warning(
            "native step unavailable", reason=str(reason), consequence="decoding runs on torch, slower"
        )
        return None


@cache
def load(cache_dir: Path) -> ctypes.CDLL:
    """Build the library if it does not exist, and load it. Raises NativeUnavailable."""
    try:
        library = ctypes.CDLL(str(built_library(cache_dir)))
    except OSError as error:
        raise NativeUnavailable(str(error)) from error
    library.ms_open.restype = c_void_p
    library.ms_open.argtypes = [
        POINTER(_Config),
        POINTER(_Layer),
        POINTER(_Matrix),
        POINTER(_Matrix),
        *[c_void_p] * 3,
    ]
    library.ms_step.restype = library.ms_again.restype = c_int32
    library.ms_close.restype = None
    library.ms_amx.restype = c_int32
    library.ms_amx.argtypes = [c_void_p]
    library.ms_step.argtypes = library.ms_again.argtypes = [c_void_p, POINTER(_Batch)]
    library.ms_close.argtypes = [c_void_p]
    return library
