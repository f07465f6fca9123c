"""Compiles the FlashInfer kernels that memserve uses for one GPU architecture; needs nvcc, but no GPU.

    make gpu-kernels ARCH=9.0a ARGS="--only page,decode --head-dims 128"

Libraries go to ``.gpu/aot/<name>/<name>.so``, which git ignores, and together into ``.gpu/aot.tar.xz``. They
depend on neither Python nor torch; ``make gpu-check`` puts them where FlashInfer looks first. The same
kernels as PTX, which ``make gpu-rehearsal`` runs, go to ``.gpu/ptx/<name>``. Needs nvcc, ninja, torch,
``flashinfer-python`` and ``apache-tvm-ffi`` in the versions that will run the kernels, and cuRAND's headers,
from the toolkit or the package ``nvidia-curand``. cuBLAS is not needed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import site
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OUT = ROOT / ".gpu"
UNUSED_HEADERS = ("cublasLt.h", "cublas_v2.h")
"""Headers that sources include without using them; not every toolkit has them."""
NOT_RUN = ("ragged", "mask_2", "mask_3", "binding")
"""Parts of the names of sources that have no kernels, or only kernels that memserve never launches."""
KINDS = ("page", "activation", "norm", "rope", "cascade", "decode", "fa2", "fa3")


def options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", default="9.0a", help="compute capability, 9.0a for Hopper")
    parser.add_argument("--only", default=",".join(KINDS), help=f"some of {', '.join(KINDS)}")
    parser.add_argument("--head-dims", default="64,128")
    return parser.parse_args()


def environment(arch: str) -> None:
    """Set the variables of FlashInfer's build; make stand-ins for the driver and ``UNUSED_HEADERS``."""
    os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")
    extra = OUT / "stand-ins"
    extra.mkdir(parents=True, exist_ok=True)
    for header in UNUSED_HEADERS:
        (extra / header).touch()
    for header in random_headers():
        (extra / header.name).unlink(missing_ok=True)
        (extra / header.name).symlink_to(header)
    stub = extra / "libcuda.so"
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(stub), "-Wl,-soname,libcuda.so.1"]
    subprocess.run(command, input=b"", check=True)
    os.environ.update(
        FLASHINFER_CUDA_ARCH_LIST=arch,
        FLASHINFER_WORKSPACE_BASE=str(OUT / "workspace"),
        FLASHINFER_EXTRA_CUDAFLAGS=f"-I{extra} -Xfatbin=-compress-all --compress-mode=size",
        FLASHINFER_EXTRA_LDFLAGS=f"-L{extra}",
        TVM_FFI_DISABLE_TORCH_C_DLPACK="1",
    )
    os.environ.setdefault("MAX_JOBS", "1")


def random_headers() -> list[Path]:
    """cuRAND's headers from an installed package; none if the toolkit has them.

    The package's other headers would shadow the toolkit's. Ends the program if there are no headers.
    """
    if Path(os.environ["CUDA_HOME"], "include", "curand_kernel.h").exists():
        return []
    folders = [Path(folder) for folder in site.getsitepackages()]
    found = [header for folder in folders for header in folder.glob("nvidia/*/include/curand*.h")]
    if not found:
        raise SystemExit(
            f"{os.environ['CUDA_HOME']} has no cuRAND headers, which norms and fa3 include: pip install --no-deps nvidia-curand"
        )
    return found


def specs(kinds: list[str], head_dims: list[int]) -> list[Any]:
    """The modules to build, quickest first."""
    import torch
    from flashinfer.jit import activation, cascade, norm, page, rope
    from flashinfer.jit.attention import modules

    alone = {
        "page": page.gen_page_module,
        "activation": lambda: activation.gen_act_and_mul_module("silu"),
        "norm": norm.gen_norm_module,
        "rope": rope.gen_rope_module,
        "cascade": cascade.gen_cascade_module,
    }
    found = [make() for kind, make in alone.items() if kind in kinds]
    types = (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.int32)
    for size in head_dims:
        if "decode" in kinds:
            found.append(modules.gen_batch_decode_module(*types, size, size, 0, False, False))
        found += [
            modules.gen_batch_prefill_module(kind, *types, size, size, 0, False, False, False)
            for kind in ("fa2", "fa3")
            if kind in kinds
        ]
    return found


def keep_ptx(spec: Any, folder: Path) -> None:
    """Write the PTX that nvcc makes of the same sources with the same options, before machine code."""
    from flashinfer.jit import env

    if folder.exists():
        return
    spec.write_ninja()
    found = subprocess.run(
        ["ninja", "-C", str(env.FLASHINFER_JIT_DIR), "-f", str(spec.ninja_path), "-t", "commands"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    commands = [shlex.split(line) for line in found.stdout.splitlines() if "nvcc" in line and " -c " in line]
    new = folder.with_name(f"{folder.name}.new")
    new.mkdir(parents=True, exist_ok=True)
    for command in commands:
        source = Path(command[command.index("-c") + 1])
        if any(part in source.stem for part in NOT_RUN):
            continue
        target = new / f"{source.stem}.ptx"
        subprocess.run(as_ptx(command, source, target), check=True, cwd=env.FLASHINFER_JIT_DIR)
        if ".entry" not in target.read_text():
            target.unlink()
    new.rename(folder)


def as_ptx(command: list[str], source: Path, target: Path) -> list[str]:
    """The compile command changed to stop at PTX."""
    arch = next(option for option in command if option.startswith("-gencode"))
    left_out = (
        "-gencode",
        "-Xfatbin",
        "--compress-mode",
        "--generate-dependencies",
        "--dependency-output",
        "-M",
    )
    options = [
        one
        for one in command[1 : command.index("-c")]
        if not one.startswith(left_out) and not one.endswith(".d")
    ]
    virtual = arch.partition("arch=")[2].partition(",")[0]
    return [command[0], *options, f"-arch={virtual}", "-ptx", str(source), "-o", str(target)]


def main() -> None:
    """Build, strip and pack the libraries, and keep their PTX."""
    given = options()
    environment(given.arch)
    kinds = [kind for kind in given.only.split(",") if kind != "fa3" or given.arch.startswith("9.0")]
    for spec in specs(kinds, [int(size) for size in given.head_dims.split(",")]):
        folder = OUT / "aot" / spec.name
        target = folder / f"{spec.name}.so"
        keep_ptx(spec, OUT / "ptx" / spec.name)
        if target.exists():
            print(f"{spec.name}: there already")
            continue
        began = time.perf_counter()
        spec.build(False)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(spec.jit_library_path, target)
        subprocess.run(["strip", "--strip-unneeded", str(target)], check=True)
        print(
            f"{spec.name}: {time.perf_counter() - began:.0f} s, {target.stat().st_size >> 10} KiB", flush=True
        )
    with tarfile.open(OUT / "aot.tar.xz", "w:xz") as archive:
        archive.add(OUT / "aot", arcname=".")
    print(f"{OUT / 'aot.tar.xz'}: {(OUT / 'aot.tar.xz').stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
