"""Translates PTX instructions to C++ statements, which use the functions of ``rehearsal/warps.hpp``.

Only the part of the PTX ISA that FlashInfer's bfloat16 kernels use is covered; any other instruction is an
error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

TYPES = {
    **{f"{kind}{bits}": f"{kind}{bits}" for kind in "us" for bits in (8, 16, 32, 64)},
    **{f"b{bits}": f"u{bits}" for bits in (8, 16, 32, 64)},
    "f16": "f16", "f32": "f32", "f64": "f64", "pred": "bool", "bf16": "u16",
}  # fmt: skip
"""C++ type in which an instruction computes, by its PTX type."""
COMPARED = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}


class NotTranslated(Exception):
    """An instruction that is not supported."""


class Names(Protocol):
    """Gives the C++ of an instruction's operands, as they are named at its place in the kernel."""

    def name(self, name: str) -> str:
        """C++ name of a register."""

    def value(self, text: str, kind: str) -> str:
        """C++ of any operand, converted to the C++ type ``kind``."""

    def put(self, target: str, value: str) -> str:
        """C++ statement that assigns a value to a register."""

    def address(self, text: str) -> tuple[str, bool]:
        """C++ of the address in brackets, and whether it is a parameter's."""


def split(text: str) -> list[str]:
    """Split operands at the commas outside braces and brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "{[") - (char in "}]")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts] if text.strip() else []


Instruction = Callable[[Names, list[str], list[str]], str]


def _vector(text: str) -> list[str]:
    return split(text.strip()[1:-1]) if text.strip().startswith("{") else [text]


# ---- arithmetic --------------------------------------------------------------------------------------------------


def _of(expression: str) -> Instruction:
    """An instruction that computes a C++ expression.

    In it ``{a}``, ``{b}``, ``{c}`` and ``{d}`` are the operands, in the instruction's type ``{T}``.
    """

    def make(function: Names, parts: list[str], given: list[str]) -> str:
        kind = TYPES[parts[-1]]
        named = {letter: function.value(text, kind) for letter, text in zip("abcd", given[1:], strict=False)}
        return function.put(given[0], f"{kind}({expression.format(T=kind, **named)})")

    return make


def _wide(kind: str) -> str:
    return f"{kind[0]}{int(kind[1:]) * 2}"


def _multiply(function: Names, parts: list[str], given: list[str]) -> str:
    kind = TYPES[parts[-1]]
    a, b = (function.value(text, kind) for text in given[1:3])
    added = (
        f" + {function.value(given[3], _wide(kind) if 'wide' in parts else kind)}"
        if parts[0] == "mad"
        else ""
    )
    if "wide" in parts:
        return function.put(given[0], f"{_wide(kind)}({_wide(kind)}({a}) * {b}{added})")
    if "hi" in parts:
        return function.put(given[0], f"{kind}(({_wide(kind)}({a}) * {b}) >> {kind[1:]})")
    return function.put(given[0], f"{kind}({a} * {b}{added})")


def _shift(function: Names, parts: list[str], given: list[str]) -> str:
    kind = TYPES[parts[-1]]
    side = "left" if parts[0] == "shl" else "right"
    return function.put(
        given[0], f"shift_{side}<{kind}>({function.value(given[1], kind)}, {function.value(given[2], 'u32')})"
    )


def _compare(function: Names, parts: list[str], given: list[str]) -> str:
    kind = TYPES[parts[-1]]
    a, b = (function.value(text, kind) for text in given[1:3])
    how = parts[1]
    found = f"{a} {COMPARED[UNORDERED.get(how, how)]} {b}"
    if how in UNORDERED:
        found = f"{found} || {a} != {a} || {b} != {b}"
    if len(given) > 3:
        joined = {"and": "&&", "or": "||", "xor": "!="}[parts[2]]
        found = f"({found}) {joined} {function.value(given[3], 'bool')}"
    return function.put(given[0], f"bool({found})")


def _not(function: Names, parts: list[str], given: list[str]) -> str:
    sign, kind = ("!" if parts[-1] == "pred" else "~"), TYPES[parts[-1]]
    return function.put(given[0], f"{kind}({sign}{function.value(given[1], kind)})")


def _select(function: Names, parts: list[str], given: list[str]) -> str:
    a, b = (function.value(text, TYPES[parts[-1]]) for text in given[1:3])
    return function.put(given[0], f"{function.value(given[3], 'bool')} ? {a} : {b}")


def _move(function: Names, parts: list[str], given: list[str]) -> str:
    kind = TYPES[parts[-1]]
    to, source = _vector(given[0]), _vector(given[1])
    if len(to) == len(source) == 1:
        return function.put(to[0], function.value(source[0], kind))
    many = max(len(to), len(source))
    bits = int(kind[1:]) // many
    if len(to) > 1:
        return " ".join(
            function.put(one, f"u{bits}({function.value(source[0], kind)} >> {bits * i})")
            for i, one in enumerate(to)
        )
    parts_of = (f"({kind}({function.value(one, f'u{bits}')}) << {bits * i})" for i, one in enumerate(source))
    return function.put(to[0], f"{kind}({' | '.join(parts_of)})")


def _convert(function: Names, parts: list[str], given: list[str]) -> str:
    to, source = parts[-2], parts[-1]
    if to == "bf16x2" and source == "f32":
        high, low = (f"to_bf16({function.value(text, 'f32')})" for text in given[1:3])
        return function.put(given[0], f"u32({low} | u32({high}) << 16)")
    if to == "bf16" and source == "f32":
        return function.put(given[0], f"to_bf16({function.value(given[1], 'f32')})")
    if to == "f32" and source == "bf16":
        return function.put(given[0], f"from_bf16({function.value(given[1], 'u16')})")
    if source.startswith(("f", "bf")) and not to.startswith("f"):
        raise ValueError("a float to an integer")
    value = function.value(given[1], TYPES[source])
    return function.put(given[0], f"static_cast<{TYPES[to]}>({value})")


# ---- memory --------------------------------------------------------------------------------------------------------


def _place(function: Names, parts: list[str], address: str, size: int) -> str:
    where, of_param = function.address(address)
    if "param" in parts and of_param:
        return f"reinterpret_cast<char *>({where})"
    space = "shared" if any(part.startswith("shared") for part in parts) else "global"
    if "local" in parts:
        return f"reinterpret_cast<char *>({where})"
    return f"in_{space}({where}, {size})"


def _load(function: Names, parts: list[str], given: list[str]) -> str:
    to, kind = _vector(given[0]), TYPES[parts[-1]]
    width = int(kind[1:]) // 8
    lines = [function.put(one, f"load<{kind}>(at + {width * i})") for i, one in enumerate(to)]
    return f"{{ const char *at = {_place(function, parts, given[1], width * len(to))}; {' '.join(lines)} }}"


def _store(function: Names, parts: list[str], given: list[str]) -> str:
    values, kind = _vector(given[1]), TYPES[parts[-1]]
    width = int(kind[1:]) // 8
    lines = [f"store(at + {width * i}, {function.value(one, kind)});" for i, one in enumerate(values)]
    step = "" if any(part.startswith(("shared", "local")) for part in parts) else "in_step(); "
    return (
        f"{{ {step}char *at = {_place(function, parts, given[0], width * len(values))}; {' '.join(lines)} }}"
    )


def _generic(function: Names, parts: list[str], given: list[str]) -> str:
    """cvta: only addresses of shared memory differ from generic addresses."""
    value = function.value(given[1], "u64")
    if not any(part.startswith("shared") for part in parts):
        return function.put(given[0], value)
    base = "reinterpret_cast<u64>(shared_memory)"
    return function.put(given[0], f"{value} {'-' if 'to' in parts else '+'} {base}")


def _copy_async(function: Names, parts: list[str], given: list[str]) -> str:
    (to, _), (source, _) = function.address(given[0]), function.address(given[1])
    size = function.value(given[2], "u32")
    return (
        f"copy_async({to}, {source}, {size}, {function.value(given[3], 'u32') if len(given) > 3 else size});"
    )


def _copy_box(function: Names, parts: list[str], given: list[str]) -> str:
    source = re.fullmatch(r"\[\s*(%\w+)\s*,\s*\{(.*)\}\s*\]", given[1])
    if not source or parts[3] != "tensor":
        raise ValueError("another kind of copy")
    at = ", ".join(function.value(one, "s32") for one in split(source[2]))
    (to, _), (phases, _) = function.address(given[0]), function.address(given[2])
    return f"{{ const s32 from[] = {{{at}}}; copy_box({to}, {function.value(source[1], 'u64')}, from, {phases}); }}"


# ---- threads that meet ---------------------------------------------------------------------------------------------


def _shuffle(function: Names, parts: list[str], given: list[str]) -> str:
    to, _, inside = given[0].partition("|")
    value, by, clamp, members = (function.value(text, "u32") for text in given[1:5])
    lines = function.put(to, "made.found") + (function.put(inside, "made.inside") if inside else "")
    return (
        f"{{ const Shuffle made = shuffle(t, '{parts[2][0]}', {value}, {by}, {clamp}, {members}); {lines} }}"
    )


def _elect(function: Names, parts: list[str], given: list[str]) -> str:
    to, _, chosen = given[0].partition("|")
    return function.put(to, "u32(0)") + function.put(chosen, "t.lane == 0")


def _matrices(function: Names, parts: list[str], given: list[str]) -> str:
    stored = parts[0] == "stmatrix"
    address, registers = (given[0], given[1]) if stored else (given[1], given[0])
    where, _ = function.address(address)
    of = _vector(registers)
    held = ", ".join(function.value(one, "u32") for one in of) if stored else ""
    found = "" if stored else " ".join(function.put(one, f"mine.part[{i}]") for i, one in enumerate(of))
    flags = f"{'true' if 'trans' in parts else 'false'}, {'true' if stored else 'false'}"
    return f"{{ Matrices mine{{u32({where}), {len(of)}, {flags}, {{{held}}}}}; matrices(t, mine); {found} }}"


def _product(function: Names, parts: list[str], given: list[str]) -> str:
    if parts[3:] != ["m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"]:
        raise ValueError("another shape")
    d, a, b, c = map(_vector, given)
    held = [
        ", ".join(function.value(one, kind) for one in part)
        for part, kind in ((a, "u32"), (b, "u32"), (c, "f32"))
    ]
    lines = " ".join(function.put(one, f"mine.d[{i}]") for i, one in enumerate(d))
    return (
        f"{{ Product mine{{{{}}, {{{held[0]}}}, {{{held[1]}}}, {{{held[2]}}}}}; product(t, mine); {lines} }}"
    )


def _wide_product(function: Names, parts: list[str], given: list[str]) -> str:
    shape = re.fullmatch(r"m64n(\d+)k16", parts[4])
    if not shape or parts[5:] != ["f32", "bf16", "bf16"]:
        raise ValueError("another shape")
    d, a = ([function.name(one) for one in _vector(given[0])], _vector(given[1]))
    in_registers = len(a) > 1
    held = ", ".join(function.value(one, "u32") for one in a) if in_registers else ""
    a_at = "0" if in_registers else function.value(a[0], "u64")
    add, sign_a, sign_b, *transposed = given[3:]
    flags = ["0", *transposed] if in_registers else transposed
    return (
        f"{{ WideProduct<{shape[1]}> mine{{{{{', '.join('&' + one for one in d)}}}, {str(in_registers).lower()}, {{{held}}}, {a_at}, "
        f"{function.value(given[2], 'u64')}, {function.value(add, 'bool')}, {sign_a}, {sign_b}, bool({flags[0]}), bool({flags[1]})}}; "
        f"wide_product(t, mine); }}"
    )


def _barrier(function: Names, parts: list[str], given: list[str]) -> str:
    numbers = ", ".join(function.value(one, "u32") for one in given)
    return f"barrier{'_arrive' if 'arrive' in parts else ''}({numbers});"


def _phases(function: Names, parts: list[str], given: list[str]) -> str:
    if parts[1] == "init":
        return f"phases_begin({function.address(given[0])[0]}, {function.value(given[1], 'u32')});"
    if parts[1] == "try_wait":
        where, parity = function.address(given[1])[0], function.value(given[2], "u32")
        return function.put(given[0], f"phases_passed({where}, {parity})")
    if parts[1] == "arrive" and "expect_tx" in parts:
        return f"phases_expect({function.address(given[-2])[0]}, {function.value(given[-1], 'u32')});"
    if parts[1] == "arrive" and "noinc" not in parts:
        return f"phases_arrive({function.address(given[-1])[0]});"
    raise ValueError("another operation of an mbarrier")


def _of_this_block(function: Names, parts: list[str], given: list[str]) -> str:
    """mapa: a cluster has only one block here, so any other rank fails."""
    check = f'if ({function.value(given[2], "u32")}) fail("another block of a cluster");'
    return f"{check} {function.put(given[0], function.value(given[1], 'u32'))}"


WHOLE: dict[str, Instruction] = {
    "cp.async.bulk": _copy_box, "cp.async.c": _copy_async, "mma.sync": _product, "wgmma.mma_async": _wide_product,
    "shfl.sync": _shuffle, "elect.sync": _elect, "mbarrier": _phases, "mapa": _of_this_block,
}  # fmt: skip
BY_NAME: dict[str, Instruction] = {
    "add": _of("{a} + {b}"), "sub": _of("{a} - {b}"), "div": _of("{a} / {b}"), "rem": _of("{a} % {b}"), "neg": _of("-{a}"), "not": _not,
    "mul": _multiply, "mad": _multiply, "fma": _of("std::fma({a}, {b}, {c})"), "and": _of("{a} & {b}"), "or": _of("{a} | {b}"),
    "xor": _of("{a} ^ {b}"), "shl": _shift, "shr": _shift, "min": _of("least({a}, {b})"), "max": _of("most({a}, {b})"),
    "setp": _compare, "selp": _select, "mov": _move, "cvt": _convert, "bfi": _of("insert_bits({a}, {b}, {c}, {d})"),
    "ex2": _of("std::exp2({a})"), "lg2": _of("std::log2({a})"), "rcp": _of("1 / {a}"), "rsqrt": _of("1 / std::sqrt({a})"),
    "sqrt": _of("std::sqrt({a})"), "sin": _of("std::sin({a})"), "cos": _of("std::cos({a})"), "abs": _of("std::fabs({a})"),
    "ld": _load, "st": _store, "cvta": _generic, "ldmatrix": _matrices, "stmatrix": _matrices, "bar": _barrier, "barrier": _barrier,
}  # fmt: skip
