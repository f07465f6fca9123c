"""PTX kernels on the CPU: what threads of a warp and a block see of each other, and what is refused."""

from __future__ import annotations

import ctypes
import struct
import subprocess

import pytest

import ptx
from ptx_instructions import NotTranslated
from ptx_kernels import COMPILER, PARAMS, Dim

HEAD = """.version 9.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 smem[];
"""
ENTRY = """.visible .entry k(.param .u64 k_param_0, .param .u32 k_param_1)
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .f32 %f<20>; .reg .b64 %rd<20>;
    ld.param.u64 %rd1, [k_param_0];
    cvta.to.global.u64 %rd2, %rd1;
    ld.param.u32 %r1, [k_param_1];
    mov.u32 %r2, %tid.x;
    mul.wide.u32 %rd3, %r2, 4;
    add.s64 %rd4, %rd2, %rd3;
{body}
    ret;
}}
"""
Holds = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_size_t)


@pytest.fixture
def run(tmp_path):
    """A function that runs instructions as a block of ``threads``; ``%rd4`` is the thread's word of an array, ``%r1`` a
    given number."""

    def made(body: str, threads: int = 32, number: int = 0, words: int = 0) -> list[int]:
        made_at = tmp_path / f"{len(list(tmp_path.iterdir()))}.so"
        source = ptx.translate(HEAD + ENTRY.format(body=body), "k")
        subprocess.run([*COMPILER, "-x", "c++", "-", "-o", str(made_at)], input=source, text=True, check=True)
        library = ctypes.CDLL(str(made_at))
        array = (ctypes.c_uint32 * (words or threads))()
        first, size = ctypes.addressof(array), ctypes.sizeof(array)
        values = (ctypes.c_uint64(first), ctypes.c_uint32(number))
        given = (ctypes.c_void_p * 2)(*map(ctypes.addressof, values))
        params = ctypes.create_string_buffer(PARAMS)
        library.gather(given, params)
        library.run.restype = ctypes.c_char_p
        holds = Holds(lambda at, many: first <= at and at + many <= first + size)
        wrong = library.run(Dim(1, 1, 1), Dim(threads, 1, 1), ctypes.c_size_t(1024), params, holds)
        if wrong:
            raise RuntimeError(wrong.decode())
        return list(array)

    return made


def test_lanes_see_one_anothers_values(run):
    """Shuffles read the values of other lanes."""
    found = run("shfl.sync.bfly.b32 %r3, %r2, 5, 31, -1; st.global.u32 [%rd4], %r3;")
    assert found == [lane ^ 5 for lane in range(32)]
    found = run(
        "shfl.sync.down.b32 %r3|%p1, %r2, 3, 31, -1; @!%p1 mov.u32 %r3, 99; st.global.u32 [%rd4], %r3;"
    )
    assert found == [*range(3, 32), 99, 99, 99]


def test_a_barrier_is_passed_by_all_or_none(run):
    """After a barrier, each thread sees what the others wrote to shared memory before it."""
    found = run("""
        mov.u32 %r3, smem; shl.b32 %r4, %r2, 2; add.s32 %r5, %r3, %r4; mul.lo.s32 %r6, %r2, %r2; st.shared.u32 [%r5], %r6;
        bar.sync 0;
        sub.s32 %r7, 95, %r2; shl.b32 %r7, %r7, 2; add.s32 %r7, %r3, %r7; ld.shared.u32 %r8, [%r7]; st.global.u32 [%rd4], %r8;
    """, threads=96)  # fmt: skip
    assert found == [(95 - thread) ** 2 for thread in range(96)]


def test_branches_blocks_and_labels_of_their_own(run):
    """Threads branch independently, and inline code that is used twice has its own labels."""
    again = "{ .reg .pred q; AGAIN: add.u32 %r3, %r3, 1; setp.lt.u32 q, %r3, %r4; @q bra AGAIN; }"
    found = run(
        f"mov.u32 %r3, 0; add.u32 %r4, %r2, 1; {again} add.u32 %r4, %r4, %r1; {again} st.global.u32 [%rd4], %r3;",
        number=7,
    )
    assert found == [lane + 8 for lane in range(32)]


def test_a_product_of_a_warp(run):
    """The matrix product of a warp puts row 3 and column 2 in the right place (16x16 by 16x8 in bfloat16)."""
    one, two = 0x3F80, 0x4000
    body = f"""
        mov.u32 %r10, 0; mov.u32 %r11, 0; mov.u32 %r12, 0; mov.u32 %r13, 0; mov.u32 %r14, 0; mov.u32 %r15, 0; mov.f32 %f9, 0f00000000;
        setp.eq.u32 %p1, %r2, 12; @%p1 mov.u32 %r10, {one};
        setp.eq.u32 %p2, %r2, 8; @%p2 mov.u32 %r14, {two};
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%f1,%f2,%f3,%f4}}, {{%r10,%r11,%r12,%r13}}, {{%r14,%r15}}, {{%f9,%f9,%f9,%f9}};
        shl.b32 %r20, %r2, 2; mul.wide.u32 %rd5, %r20, 4; add.s64 %rd6, %rd2, %rd5; st.global.v4.f32 [%rd6], {{%f1,%f2,%f3,%f4}};
    """
    found = run(body, words=128)
    values = struct.unpack("<128f", struct.pack("<128I", *found))
    # Lanes 12 to 15 hold row 3, and the second of them its columns 2 and 3.
    assert {at: value for at, value in enumerate(values) if value} == {13 * 4: 2.0}


@pytest.mark.parametrize(("body", "why"), [
    ("add.s64 %rd4, %rd4, 4; st.global.u32 [%rd4], %r2;", "lies in no tensor"),
    ("add.s64 %rd4, %rd4, 2; st.global.u32 [%rd4], %r2;", "not aligned"),
    ("mov.u32 %r3, 262144; ld.shared.u32 %r4, [%r3];", "out of bounds"),
    ("setp.lt.u32 %p1, %r2, 8; @%p1 bra $ON; bar.sync 0, 32; $ON: bar.sync 1, 32;", "wait for one another"),
])  # fmt: skip
def test_what_would_fail_or_hang_on_a_gpu_is_an_error(run, body, why):
    """Reads out of bounds, unaligned access and deadlocks raise an error that says why."""
    with pytest.raises(RuntimeError, match=why):
        run(body)


def test_an_unknown_instruction_is_named():
    """An instruction that is not supported is refused by its name."""
    with pytest.raises(NotTranslated, match=r"prmt\.b32 %r3"):
        ptx.translate(HEAD + ENTRY.format(body="prmt.b32 %r3, %r1, %r2, 0x7610;"), "k")
