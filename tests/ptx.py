"""PTX as C++: a kernel becomes a function that a thread of it runs as a fiber (``warps.hpp``).

Of the PTX ISA there is what FlashInfer's kernels for bfloat16 use; anything else is an error that names the instruction.
Copies and products that a GPU does asynchronously are done when they are issued, and hints are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

TYPES = {
    **{f"{kind}{bits}": f"{kind}{bits}" for kind in "us" for bits in (8, 16, 32, 64)},
    **{f"b{bits}": f"u{bits}" for bits in (8, 16, 32, 64)},
    "f16": "f16", "f32": "f32", "f64": "f64", "pred": "bool", "bf16": "u16",
}  # fmt: skip
"""The C++ type in which an instruction of a PTX type computes."""
STORED = {**TYPES, **{f"s{bits}": f"u{bits}" for bits in (8, 16, 32, 64)}, "f16": "u16"}
"""The C++ type of a register."""
SPECIAL = {
    **{f"%tid.{axis}": f"t.tid.{axis}" for axis in "xyz"},
    **{f"%ntid.{axis}": f"block.dim.{axis}" for axis in "xyz"},
    **{f"%ctaid.{axis}": f"block.at.{axis}" for axis in "xyz"},
    **{f"%nctaid.{axis}": f"block.grid.{axis}" for axis in "xyz"},
    "%laneid": "t.lane", "%cluster_ctarank": "u32(0)",
}  # fmt: skip
COMPARED = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}
WAITED_AT_ONCE = (
    "cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all", "wgmma.fence", "wgmma.commit_group",
    "wgmma.wait_group", "fence.", "membar", "griddepcontrol", "setmaxnreg", "prefetch", "cp.async.mbarrier.arrive.shared",
)  # fmt: skip
"""What orders or hints what is done at once. A thread's arrival at an mbarrier for its copies is counted and taken back at once."""


class NotTranslated(Exception):
    """An instruction that is not known here."""


def entries(module: str) -> dict[str, str]:
    """The text of each entry of a module, by name."""
    found = list(re.finditer(r"^(?:\.visible |\.weak )?\.entry (\w+)\(", module, re.MULTILINE))
    ends = [match.start() for match in found[1:]] + [len(module)]
    # Braces at the start of a line are inline assembly's too: an entry ends with the last one before the next entry.
    return {
        match[1]: module[match.start() : module.rindex("\n}", 0, end) + 2]
        for match, end in zip(found, ends, strict=True)
    }


def variables(module: str) -> dict[str, str]:
    """C++ of the constants and variables outside entries, by name."""
    pattern = r"^(?:\.visible )?\.(?:const|global) (?:\.align \d+ )?\.(\w+) (\w+)(?:\[(\d+)\])?(?: = \{?([^;}]*)\}?)?;"
    return {
        name: f"alignas(16) static {TYPES[kind]} {name}[{size or 1}] = {{{values or '0'}}};"
        for kind, name, size, values in re.findall(pattern, module, re.MULTILINE)
    }


def translate(module: str, name: str) -> str:
    """C++ of one of a module's entries, which offers ``run(grid, block, bytes of dynamic shared memory, arguments, holds)``.

    Raises NotTranslated, naming the first instruction that is not known.
    """
    text = entries(module)[name]
    head, _, body = text.partition("{")
    given = re.findall(r"\.param (?:\.align (\d+) )?\.(\w+) (\w+)(?:\[(\d+)\])?", head)
    params, offset, sizes = {}, 0, []
    for align, kind, param, many in given:
        width = int(re.sub(r"\D", "", kind)) // 8
        size = width * int(many or 1)
        offset = -(-offset // int(align or width)) * int(align or width)
        params[param] = offset
        sizes.append((offset, size))
        offset += size
    function = _Function(params, re.findall(r"^\.extern \.shared .*?(\w+)\[\];", module, re.MULTILINE))
    lines = "\n".join(function.statements(body[: body.rindex("}")]))
    outside = "\n".join(code for one, code in variables(module).items() if re.search(rf"\b{re.escape(one)}\b", lines))
    copies = " ".join(f"std::memcpy(params + {at}, given[{i}], {size});" for i, (at, size) in enumerate(sizes))
    return _SOURCE.format(
        outside=outside,
        declared="\n".join(function.declared()),
        lines=lines,
        copies=copies,
        dynamic=-(-function.fixed_shared // 16) * 16,
    )


_SOURCE = """#include "warps.hpp"
constexpr u32 DYNAMIC = {dynamic};
{outside}
static void body(Thread &t) {{
{declared}
{lines}
}}
extern "C" const char *run(Dim grid, Dim dim, size_t shared, void **given, bool (*holds)(const void *, size_t)) {{
    alignas(128) static char params[4096];
    {copies}
    if (shared + DYNAMIC > SHARED_ROOM) return "more shared memory than there is";
    return run_kernel(body, grid, dim, params, holds);
}}
"""


def _split(text: str) -> list[str]:
    """Operands, at the commas that are in no braces or brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "{[") - (char in "}]")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts] if text.strip() else []


def _tokens(body: str) -> Iterator[str]:
    """``{``, ``}``, ``label:`` and instructions."""
    body = re.sub(r"//[^\n]*", "", body)
    held, depth = "", 0
    for char in body:
        if char in "{}" and not held.strip():
            yield char
        elif char == ";":
            yield held.strip()
            held = ""
        else:
            held += char
            depth += (char == "{") - (char == "}")
            if char == ":" and not depth and re.fullmatch(r"\s*[$\w]+:", held):
                yield held.strip()
                held = ""


class _Function:
    """What is known of an entry while its statements are read in order."""

    def __init__(self, params: dict[str, int], dynamic_shared: list[str]) -> None:
        self._params, self._dynamic = params, dynamic_shared
        self._registers: dict[str, str] = {}
        self._scopes: list[dict[str, str]] = [{}]
        self._blocks = 0
        self._shared: dict[str, int] = {}
        self._local: dict[str, str] = {}
        self.fixed_shared = 0

    def declared(self) -> Iterator[str]:
        """C++ of all registers, of which each has its own name, and of local memory."""
        for name, kind in self._registers.items():
            yield f"{kind} {name};"
        yield from self._local.values()

    def statements(self, body: str) -> Iterator[str]:
        """C++, a line a statement."""
        for token in _tokens(body):
            if token == "{":
                self._blocks += 1
                self._scopes.append({"": f"_{self._blocks}"})
            elif token == "}":
                self._scopes.pop()
            elif token.endswith(":"):
                yield f"{self._label(token[:-1])}: ;"
            elif token.startswith("."):
                self._declare(token)
            elif token:
                yield self._guarded(token)

    # ---- names ----

    def _declare(self, token: str) -> None:
        if match := re.match(r"\.reg \.(\w+)\s+(.*)", token, re.DOTALL):
            for name in _split(match[2]):
                many = re.fullmatch(r"(%\w+?)<(\d+)>", name)
                if many:
                    self._scopes[-1][many[1] + "<"] = STORED[match[1]]
                else:
                    self._register(name, STORED[match[1]])
        elif match := re.match(r"\.shared (?:\.align (\d+) )?\.(\w+) (\w+)(?:\[(\d+)\])?", token):
            align, size = int(match[1] or 16), int(re.sub(r"\D", "", match[2])) // 8 * int(match[4] or 1)
            self._shared[match[3]] = -(-self.fixed_shared // align) * align
            self.fixed_shared = self._shared[match[3]] + size
        elif match := re.match(r"\.local (?:\.align \d+ )?\.b8 (\w+)\[(\d+)\]", token):
            self._local[match[1]] = f"alignas(16) char {match[1]}[{match[2]}];"
        elif not token.startswith((".pragma", ".loc")):
            raise NotTranslated(token)

    def _register(self, name: str, kind: str) -> str:
        made = "r_" + re.sub(r"\W", "", name) + self._scopes[-1].get("", "")
        self._scopes[-1][name] = made
        self._registers[made] = kind
        return made

    def _name(self, name: str) -> str:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        family = re.match(r"%[a-z]+", name)
        for scope in reversed(self._scopes):
            if family and family[0] + "<" in scope:
                made = "r_" + name[1:]
                self._registers[made] = scope[family[0] + "<"]
                return made
        raise NotTranslated(f"the name {name}")

    def _label(self, name: str) -> str:
        # Labels of a block, which inline assembly repeats, are its own; the compiler's own begin with $ and are the function's.
        suffix = "" if name.startswith("$") else self._scopes[-1].get("", "")
        return "l_" + re.sub(r"\W", "_", name) + suffix

    def value(self, text: str, kind: str) -> str:
        """An operand as this C++ type."""
        text = text.strip()
        if text in SPECIAL:
            return f"as<{kind}>({SPECIAL[text]})"
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return f"as<{kind}>(std::bit_cast<f32>(0x{text[2:]}u))"
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return f"as<{kind}>(std::bit_cast<f64>(0x{text[2:]}ull))"
        if re.fullmatch(r"-?\d+\.\d*", text):
            return f"as<{kind}>(f32({text}))"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            return f"as<{kind}>({text.rstrip('U')}ll)"
        if text in self._params:
            return f"as<{kind}>(reinterpret_cast<u64>(block.params) + {self._params[text]})"
        if text in self._shared:
            return f"as<{kind}>(u64(SHARED_FIRST + {self._shared[text]}))"
        if text in self._dynamic:
            return f"as<{kind}>(u64(SHARED_FIRST + DYNAMIC))"
        if text in self._local or (text[0].isalpha() or text[0] == "_") and not self._known(text):
            return f"as<{kind}>(reinterpret_cast<u64>(&{text}[0]))"
        if text.startswith("!"):
            return f"!{self.value(text[1:], kind)}"
        return f"as<{kind}>({self._name(text)})"

    def _known(self, name: str) -> bool:
        return any(name in scope for scope in self._scopes)

    def put(self, target: str, value: str) -> str:
        """A statement that gives a register a value."""
        return "" if target == "_" else f"put({self._name(target)}, {value});"

    def address(self, text: str) -> tuple[str, bool]:
        """Of ``[register+offset]`` or ``[parameter+offset]``; and whether it is a parameter's."""
        match = re.fullmatch(r"\[\s*([$%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", text.strip())
        if not match:
            raise NotTranslated(f"the address {text}")
        return f"{self.value(match[1], 'u64')} + {match[2] or 0}", match[1] in self._params

    # ---- statements ----

    def _guarded(self, token: str) -> str:
        match = re.match(r"@(!?)([%\w]+)\s+(.*)", token, re.DOTALL)
        if not match:
            return self._instruction(token)
        return f"if ({match[1]}{self._name(match[2])}) {{ {self._instruction(match[3])} }}"

    def _instruction(self, token: str) -> str:
        name, _, rest = re.sub(r"\s+", " ", token).partition(" ")
        if name in ("ret", "exit"):
            return "return;"
        if name in ("bra", "bra.uni"):
            return f"goto {self._label(rest.strip())};"
        if name.startswith(WAITED_AT_ONCE) and "noinc" not in name:
            return ";"
        parts, given = name.split("."), _split(rest)
        make = next((made for start, made in _WHOLE.items() if name.startswith(start)), _BY_NAME.get(parts[0]))
        if not make:
            raise NotTranslated(token)
        try:
            return make(self, parts, given)
        except (KeyError, ValueError, IndexError) as why:
            raise NotTranslated(f"{token}: {why!r}") from why


Instruction = Callable[[_Function, list[str], list[str]], str]


def _vector(text: str) -> list[str]:
    return _split(text.strip()[1:-1]) if text.strip().startswith("{") else [text]


# ---- arithmetic --------------------------------------------------------------------------------------------------


def _of(expression: str) -> Instruction:
    """``{a}``, ``{b}``, ``{c}`` and ``{d}`` are operands in the instruction's type, ``{T}``."""

    def make(function: _Function, parts: list[str], given: list[str]) -> str:
        kind = TYPES[parts[-1]]
        named = {letter: function.value(text, kind) for letter, text in zip("abcd", given[1:], strict=False)}
        return function.put(given[0], f"{kind}({expression.format(T=kind, **named)})")

    return make


def _wide(kind: str) -> str:
    return f"{kind[0]}{int(kind[1:]) * 2}"


def _multiply(function: _Function, parts: list[str], given: list[str]) -> str:
    kind = TYPES[parts[-1]]
    a, b = (function.value(text, kind) for text in given[1:3])
    added = f" + {function.value(given[3], _wide(kind) if 'wide' in parts else kind)}" if parts[0] == "mad" else ""
    if "wide" in parts:
        return function.put(given[0], f"{_wide(kind)}({_wide(kind)}({a}) * {b}{added})")
    if "hi" in parts:
        return function.put(given[0], f"{kind}(({_wide(kind)}({a}) * {b}) >> {kind[1:]})")
    return function.put(given[0], f"{kind}({a} * {b}{added})")


def _shift(function: _Function, parts: list[str], given: list[str]) -> str:
    kind = TYPES[parts[-1]]
    side = "left" if parts[0] == "shl" else "right"
    return function.put(given[0], f"shift_{side}<{kind}>({function.value(given[1], kind)}, {function.value(given[2], 'u32')})")


def _compare(function: _Function, parts: list[str], given: list[str]) -> str:
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


def _select(function: _Function, parts: list[str], given: list[str]) -> str:
    a, b = (function.value(text, TYPES[parts[-1]]) for text in given[1:3])
    return function.put(given[0], f"{function.value(given[3], 'bool')} ? {a} : {b}")


def _move(function: _Function, parts: list[str], given: list[str]) -> str:
    kind = TYPES[parts[-1]]
    to, source = _vector(given[0]), _vector(given[1])
    if len(to) == len(source) == 1:
        return function.put(to[0], function.value(source[0], kind))
    many = max(len(to), len(source))
    bits = int(kind[1:]) // many
    if len(to) > 1:
        return " ".join(
            function.put(one, f"u{bits}({function.value(source[0], kind)} >> {bits * i})") for i, one in enumerate(to)
        )
    parts_of = (f"({kind}({function.value(one, f'u{bits}')}) << {bits * i})" for i, one in enumerate(source))
    return function.put(to[0], f"{kind}({' | '.join(parts_of)})")


def _convert(function: _Function, parts: list[str], given: list[str]) -> str:
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


def _place(function: _Function, parts: list[str], address: str, size: int) -> str:
    where, of_param = function.address(address)
    if "param" in parts and of_param:
        return f"reinterpret_cast<char *>({where})"
    space = "shared" if any(part.startswith("shared") for part in parts) else "global"
    if "local" in parts:
        return f"reinterpret_cast<char *>({where})"
    return f"in_{space}({where}, {size})"


def _load(function: _Function, parts: list[str], given: list[str]) -> str:
    to, kind = _vector(given[0]), TYPES[parts[-1]]
    width = int(kind[1:]) // 8
    lines = [function.put(one, f"load<{kind}>(at + {width * i})") for i, one in enumerate(to)]
    return f"{{ const char *at = {_place(function, parts, given[1], width * len(to))}; {' '.join(lines)} }}"


def _store(function: _Function, parts: list[str], given: list[str]) -> str:
    values, kind = _vector(given[1]), TYPES[parts[-1]]
    width = int(kind[1:]) // 8
    lines = [f"store(at + {width * i}, {function.value(one, kind)});" for i, one in enumerate(values)]
    step = "" if any(part.startswith(("shared", "local")) for part in parts) else "in_step(); "
    return f"{{ {step}char *at = {_place(function, parts, given[0], width * len(values))}; {' '.join(lines)} }}"


def _generic(function: _Function, parts: list[str], given: list[str]) -> str:
    """cvta: an address of shared memory differs from the generic one, all others do not."""
    value = function.value(given[1], "u64")
    if not any(part.startswith("shared") for part in parts):
        return function.put(given[0], value)
    base = "reinterpret_cast<u64>(shared_memory)"
    return function.put(given[0], f"{value} {'-' if 'to' in parts else '+'} {base}")


def _copy_async(function: _Function, parts: list[str], given: list[str]) -> str:
    (to, _), (source, _) = function.address(given[0]), function.address(given[1])
    size = function.value(given[2], "u32")
    return f"copy_async({to}, {source}, {size}, {function.value(given[3], 'u32') if len(given) > 3 else size});"


def _copy_box(function: _Function, parts: list[str], given: list[str]) -> str:
    source = re.fullmatch(r"\[\s*(%\w+)\s*,\s*\{(.*)\}\s*\]", given[1])
    if not source or parts[3] != "tensor":
        raise ValueError("another kind of copy")
    at = ", ".join(function.value(one, "s32") for one in _split(source[2]))
    (to, _), (phases, _) = function.address(given[0]), function.address(given[2])
    return f"{{ const s32 from[] = {{{at}}}; copy_box({to}, {function.value(source[1], 'u64')}, from, {phases}); }}"


# ---- threads that meet ---------------------------------------------------------------------------------------------


def _shuffle(function: _Function, parts: list[str], given: list[str]) -> str:
    to, _, inside = given[0].partition("|")
    value, by, clamp, members = (function.value(text, "u32") for text in given[1:5])
    lines = function.put(to, "made.found") + (function.put(inside, "made.inside") if inside else "")
    return f"{{ const Shuffle made = shuffle(t, '{parts[2][0]}', {value}, {by}, {clamp}, {members}); {lines} }}"


def _elect(function: _Function, parts: list[str], given: list[str]) -> str:
    to, _, chosen = given[0].partition("|")
    return function.put(to, "u32(0)") + function.put(chosen, "t.lane == 0")


def _matrices(function: _Function, parts: list[str], given: list[str]) -> str:
    stored = parts[0] == "stmatrix"
    address, registers = (given[0], given[1]) if stored else (given[1], given[0])
    where, _ = function.address(address)
    of = _vector(registers)
    held = ", ".join(function.value(one, "u32") for one in of) if stored else ""
    found = "" if stored else " ".join(function.put(one, f"mine.part[{i}]") for i, one in enumerate(of))
    flags = f"{'true' if 'trans' in parts else 'false'}, {'true' if stored else 'false'}"
    return f"{{ Matrices mine{{u32({where}), {len(of)}, {flags}, {{{held}}}}}; matrices(t, mine); {found} }}"


def _product(function: _Function, parts: list[str], given: list[str]) -> str:
    if parts[3:] != ["m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"]:
        raise ValueError("another shape")
    d, a, b, c = map(_vector, given)
    held = [", ".join(function.value(one, kind) for one in part) for part, kind in ((a, "u32"), (b, "u32"), (c, "f32"))]
    lines = " ".join(function.put(one, f"mine.d[{i}]") for i, one in enumerate(d))
    return f"{{ Product mine{{{{}}, {{{held[0]}}}, {{{held[1]}}}, {{{held[2]}}}}}; product(t, mine); {lines} }}"


def _wide_product(function: _Function, parts: list[str], given: list[str]) -> str:
    shape = re.fullmatch(r"m64n(\d+)k16", parts[4])
    if not shape or parts[5:] != ["f32", "bf16", "bf16"]:
        raise ValueError("another shape")
    d, a = ([function._name(one) for one in _vector(given[0])], _vector(given[1]))
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


def _barrier(function: _Function, parts: list[str], given: list[str]) -> str:
    numbers = ", ".join(function.value(one, "u32") for one in given)
    return f"barrier{'_arrive' if 'arrive' in parts else ''}({numbers});"


def _phases(function: _Function, parts: list[str], given: list[str]) -> str:
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


def _of_this_block(function: _Function, parts: list[str], given: list[str]) -> str:
    """mapa: clusters are of one block."""
    check = f"if ({function.value(given[2], 'u32')}) fail(\"another block of a cluster\");"
    return f"{check} {function.put(given[0], function.value(given[1], 'u32'))}"


_WHOLE: dict[str, Instruction] = {
    "cp.async.bulk": _copy_box, "cp.async.c": _copy_async, "mma.sync": _product, "wgmma.mma_async": _wide_product,
    "shfl.sync": _shuffle, "elect.sync": _elect, "mbarrier": _phases, "mapa": _of_this_block,
}  # fmt: skip
_BY_NAME: dict[str, Instruction] = {
    "add": _of("{a} + {b}"), "sub": _of("{a} - {b}"), "div": _of("{a} / {b}"), "rem": _of("{a} % {b}"), "neg": _of("-{a}"),
    "mul": _multiply, "mad": _multiply, "fma": _of("std::fma({a}, {b}, {c})"), "and": _of("{a} & {b}"), "or": _of("{a} | {b}"),
    "xor": _of("{a} ^ {b}"), "shl": _shift, "shr": _shift, "min": _of("least({a}, {b})"), "max": _of("most({a}, {b})"),
    "setp": _compare, "selp": _select, "mov": _move, "cvt": _convert, "bfi": _of("insert_bits({a}, {b}, {c}, {d})"),
    "ex2": _of("std::exp2({a})"), "lg2": _of("std::log2({a})"), "rcp": _of("1 / {a}"), "rsqrt": _of("1 / std::sqrt({a})"),
    "sqrt": _of("std::sqrt({a})"), "sin": _of("std::sin({a})"), "cos": _of("std::cos({a})"), "abs": _of("std::fabs({a})"),
    "ld": _load, "st": _store, "cvta": _generic, "ldmatrix": _matrices, "stmatrix": _matrices, "bar": _barrier, "barrier": _barrier,
}  # fmt: skip


def _not(function: _Function, parts: list[str], given: list[str]) -> str:
    sign, kind = ("!" if parts[-1] == "pred" else "~"), TYPES[parts[-1]]
    return function.put(given[0], f"{kind}({sign}{function.value(given[1], kind)})")


_BY_NAME["not"] = _not
