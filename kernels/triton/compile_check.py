"""Compiles every kernel ahead of time, no GPU needed: registers, spills and shared memory per kernel and architecture.

    python -m stars.kernels.triton.compile_check [--arch 80 90 100] [--only TEXT ...] [--json]

Exits 1 if a kernel spills or takes more shared memory than a block may have. Must run without TRITON_INTERPRET, which
replaces the compiler when a kernel is decorated. Binaries are kept in Triton's cache.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import pkgutil
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory a block may have, by compute capability (CUDA C++ programming guide, table of limits)."""

ARCHES = (80, 90, 100)


class Usage(NamedTuple):
    """What one kernel takes on one architecture."""

    name: str
    arch: int
    registers: int
    spill_bytes: int  # stored to local memory by the register allocator
    stack_bytes: int  # local memory, spills included
    shared_bytes: int  # asked for at the launch and declared in the kernel
    warps: int
    error: str = ""

    @property
    def problem(self) -> str:
        """Why this is not fit to run; empty if it is."""
        if self.error:
            return self.error
        if self.spill_bytes or self.stack_bytes:
            return f"spills {self.spill_bytes} bytes, {self.stack_bytes} bytes of local memory"
        if self.shared_bytes > SHARED_LIMIT[self.arch] * 1024:
            return f"takes {self.shared_bytes} bytes of shared memory, of {SHARED_LIMIT[self.arch] * 1024}"
        return ""


def modules() -> list[str]:
    """The files of this package that list variants."""
    package = importlib.import_module("stars.kernels.triton")
    names = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"stars.kernels.triton.{info.name}")
        if hasattr(module, "variants"):
            names.append(module.__name__)
    return names


def compile_variant(module: str, index: int, arch: int) -> Usage:
    """Compiles variant `index` of `module` for compute capability `arch`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from stars.kernels.triton.variant import attributes

    variant = importlib.import_module(module).variants()[index]
    aligned = attributes(variant) | {
        (position,): [["tt.divisibility", 16]]
        for position, (name, kind) in enumerate(variant.signature.items())
        if kind in ("i32", "i64") and name.endswith("_stride")  # as the widths of models are, and as a launch finds out
    }
    source = ASTSource(variant.kernel, variant.signature, variant.constexprs, aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages,
               "enable_fp_fusion": variant.fp_fusion, "maxnreg": variant.max_registers}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        registers, spills, stack, static = _resources(compiled.asm["ptx"], arch, options)
    except Exception as error:  # whatever the compiler raises is this variant's result, and the others go on
        return Usage(variant.name, arch, 0, 0, 0, 0, variant.num_warps, f"{type(error).__name__}: {error}"[:300])
    # Tensor memory (sm_100) and global scratch are no concern of these kernels.
    return Usage(variant.name, arch, registers, spills, stack, max(static, compiled.metadata.shared), variant.num_warps)


def _resources(ptx: str, arch: int, options: dict[str, object]) -> tuple[int, int, int, int]:
    """(registers, bytes of spill stores, bytes of stack, bytes of static shared memory), from ptxas -v.

    Triton runs the assembler once more, since what it passes differs between versions (from 3.7 on another level of
    register allocation, under which other kernels spill) and its cache keeps no log.
    """
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    backend = make_backend(GPUTarget("cuda", arch, 32))
    with knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(ptx, {}, backend.parse_options(dict(options)), arch)
    said = log.getvalue()

    def number(pattern: str) -> int:
        found = re.findall(pattern, said)
        return max(map(int, found), default=0)

    if "registers" not in said:
        raise RuntimeError(f"ptxas -v said nothing of registers: {said[:200]}")
    return (number(r"Used (\d+) registers"), number(r"(\d+) bytes spill stores"), number(r"(\d+) bytes stack frame"),
            number(r"(\d+) bytes smem"))


def check(arches=ARCHES, only=(), processes: int = 2) -> list[Usage]:
    """Compiles the variants whose name begins with one of `only` (all, if empty) for `arches`."""
    tasks = []
    for module in modules():
        for index, variant in enumerate(importlib.import_module(module).variants()):
            if not only or variant.name.startswith(tuple(only)):
                tasks += [(module, index, arch) for arch in arches if arch in variant.arches]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_variant, *zip(*tasks, strict=True))) if tasks else []


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m stars.kernels.triton.compile_check", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHES), choices=sorted(SHARED_LIMIT))
    parser.add_argument("--only", nargs="+", default=[], help="beginnings of the names to compile")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("compile_check: unset TRITON_INTERPRET, under which nothing is compiled", file=sys.stderr)
        return 2
    usages = check(options.arch, options.only)
    if options.json:
        print(json.dumps([usage._asdict() | {"problem": usage.problem} for usage in usages], indent=1))
    else:
        print(f"{'kernel':44} {'arch':>5} {'warps':>5} {'registers':>9} {'spilled':>7} {'shared':>7}")
        for usage in usages:
            print(f"{usage.name:44} sm_{usage.arch:<3} {usage.warps:4} {usage.registers:9} {usage.spill_bytes:7} "
                  f"{usage.shared_bytes:7} {usage.problem}")
    wrong = sum(bool(usage.problem) for usage in usages)
    if not usages or wrong:
        print(f"{wrong} of {len(usages)} do not fit", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
