"""Translates PTX to C++: a kernel becomes a function that each thread runs as a fiber (``warps.hpp``).

Copies and matrix products that are asynchronous on a GPU are done when they are issued. Hints are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ptx_instructions import BY_NAME, TYPES, WHOLE, NotTranslated, split

STORED = {**TYPES, **{f"s{bits}": f"u{bits}" for bits in (8, 16, 32, 64)}, "f16": "u16"}
"""The C++ type of a register."""
SPECIAL = {
    **{f"%tid.{axis}": f"t.tid.{axis}" for axis in "xyz"},
    **{f"%ntid.{axis}": f"block.dim.{axis}" for axis in "xyz"},
    **{f"%ctaid.{axis}": f"block.at.{axis}" for axis in "xyz"},
    **{f"%nctaid.{axis}": f"block.grid.{axis}" for axis in "xyz"},
    "%laneid": "t.lane", "%cluster_ctarank": "u32(0)",
}  # fmt: skip
WAITED_AT_ONCE = (
    "cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all", "wgmma.fence", "wgmma.commit_group",
    "wgmma.wait_group", "fence.", "membar", "griddepcontrol", "setmaxnreg", "prefetch", "cp.async.mbarrier.arrive.shared",
)  # fmt: skip
"""Instructions without effect here, as they order or hint work that is done when it is issued.

One is a thread's arrival at an mbarrier for its copies, which would be counted and taken back at once.
"""


def entries(module: str) -> dict[str, str]:
    """The text of each entry (kernel) of a module, by name."""
    found = list(re.finditer(r"^(?:\.visible |\.weak )?\.entry (\w+)\(", module, re.MULTILINE))
    ends = [match.start() for match in found[1:]] + [len(module)]
    # Inline assembly can also start a line with a brace: an entry ends with the last before the next.
    return {
        match[1]: module[match.start() : module.rindex("\n}", 0, end) + 2]
        for match, end in zip(found, ends, strict=True)
    }


def variables(module: str) -> dict[str, str]:
    """C++ declarations of the constants and variables outside entries, by name."""
    pattern = r"^(?:\.visible )?\.(?:const|global) (?:\.align \d+ )?\.(\w+) (\w+)(?:\[(\d+)\])?(?: = \{?([^;}]*)\}?)?;"
    return {
        name: f"alignas(16) static {TYPES[kind]} {name}[{size or 1}] = {{{values or '0'}}};"
        for kind, name, size, values in re.findall(pattern, module, re.MULTILINE)
    }


def translate(module: str, name: str) -> str:
    """C++ of one of a module's entries, with two functions.

    ``gather(arguments, 4096 bytes)`` copies a launch's arguments to where the kernel looks for them.
    ``run(grid, block, bytes of dynamic shared memory, those arguments, holds)`` runs the kernel and returns
    what went wrong. Raises NotTranslated, which names the first unknown instruction.
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
    outside = "\n".join(
        code for one, code in variables(module).items() if re.search(rf"\b{re.escape(one)}\b", lines)
    )
    copies = " ".join(
        f"std::memcpy(params + {at}, given[{i}], {size});" for i, (at, size) in enumerate(sizes)
    )
    return _SOURCE.format(
        outside=outside,
        declared="\n".join(function.declared()),
        lines=lines,
        copies=copies,
        dynamic=-(-function.fixed_shared // 16) * 16,
    )


_SOURCE = """#include "hopper.hpp"
constexpr u32 DYNAMIC = {dynamic};
{outside}
static void body(Thread &t) {{
{declared}
{lines}
}}
extern "C" void gather(void **given, char *params) {{ {copies} }}
extern "C" const char *run(Dim grid, Dim dim, size_t shared, const char *params, bool (*holds)(const void *, size_t)) {{
    if (shared + DYNAMIC > SHARED_ROOM) return "more shared memory than there is";
    return run_kernel(body, grid, dim, params, holds);
}}
"""


def _tokens(body: str) -> Iterator[str]:
    """Split an entry's body into ``{``, ``}``, ``label:`` and instructions."""
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


def _literal(text: str) -> str | None:
    """C++ of a PTX number; None if the text is not a number."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return f"std::bit_cast<f32>(0x{text[2:]}u)"
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return f"std::bit_cast<f64>(0x{text[2:]}ull)"
    if re.fullmatch(r"-?\d+\.\d*", text):
        return f"f32({text})"
    return f"{text.rstrip('U')}ll" if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text) else None


class _Function:
    """The state of an entry's translation: names and declarations, as its statements are read in order."""

    def __init__(self, params: dict[str, int], dynamic_shared: list[str]) -> None:
        self._params, self._dynamic = params, dynamic_shared
        self._registers: dict[str, str] = {}
        self._scopes: list[dict[str, str]] = [{}]
        self._blocks = 0
        self._shared: dict[str, int] = {}
        self._local: dict[str, str] = {}
        self.fixed_shared = 0

    def declared(self) -> Iterator[str]:
        """C++ declarations of all registers, each under a name of its own, and of local memory."""
        for name, kind in self._registers.items():
            yield f"{kind} {name};"
        yield from self._local.values()

    def statements(self, body: str) -> Iterator[str]:
        """C++ of the body, a line per statement."""
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
            for name in split(match[2]):
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

    def name(self, name: str) -> str:
        """C++ name of a register."""
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
        # Inline assembly repeats its labels, so they belong to their block; the compiler's begin with $ and
        # belong to the function.
        suffix = "" if name.startswith("$") else self._scopes[-1].get("", "")
        return "l_" + re.sub(r"\W", "_", name) + suffix

    def value(self, text: str, kind: str) -> str:
        """An operand, converted to the C++ type ``kind``."""
        text = text.strip()
        if text.startswith("!"):
            return f"!{self.value(text[1:], kind)}"
        found = SPECIAL.get(text) or _literal(text) or self._place(text) or self.name(text)
        return f"as<{kind}>({found})"

    def _place(self, name: str) -> str | None:
        """C++ of the address of a parameter or variable; None for any other name."""
        if name in self._params:
            return f"reinterpret_cast<u64>(block.params) + {self._params[name]}"
        if name in self._shared:
            return f"u64(SHARED_FIRST + {self._shared[name]})"
        if name in self._dynamic:
            return "u64(SHARED_FIRST + DYNAMIC)"
        if name in self._local or (re.match(r"[A-Za-z_]", name) and not self._known(name)):
            return f"reinterpret_cast<u64>(&{name}[0])"
        return None

    def _known(self, name: str) -> bool:
        return any(name in scope for scope in self._scopes)

    def put(self, target: str, value: str) -> str:
        """C++ statement that assigns a value to a register."""
        return "" if target == "_" else f"put({self.name(target)}, {value});"

    def address(self, text: str) -> tuple[str, bool]:
        """C++ of ``[register+offset]`` or ``[parameter+offset]``, and whether it is a parameter's address."""
        match = re.fullmatch(r"\[\s*([$%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", text.strip())
        if not match:
            raise NotTranslated(f"the address {text}")
        return f"{self.value(match[1], 'u64')} + {match[2] or 0}", match[1] in self._params

    # ---- statements ----

    def _guarded(self, token: str) -> str:
        match = re.match(r"@(!?)([%\w]+)\s+(.*)", token, re.DOTALL)
        if not match:
            return self._instruction(token)
        return f"if ({match[1]}{self.name(match[2])}) {{ {self._instruction(match[3])} }}"

    def _instruction(self, token: str) -> str:
        name, _, rest = re.sub(r"\s+", " ", token).partition(" ")
        if name in ("ret", "exit"):
            return "return;"
        if name in ("bra", "bra.uni"):
            return f"goto {self._label(rest.strip())};"
        if name.startswith(WAITED_AT_ONCE) and "noinc" not in name:
            return ";"
        parts, given = name.split("."), split(rest)
        make = next((made for start, made in WHOLE.items() if name.startswith(start)), BY_NAME.get(parts[0]))
        if not make:
            raise NotTranslated(token)
        try:
            return make(self, parts, given)
        except (KeyError, ValueError, IndexError) as why:
            raise NotTranslated(f"{token}: {why!r}") from why
