"""What is there: the card, versions, and the two ceilings everything else is measured against."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import time
from pathlib import Path

import torch
from importable import ROOT
from record import Record, Settings
from timing import seconds_a_call

QUERY = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.limit"


def run(record: Record, settings: Settings) -> None:
    """Describes the machine, measures copy bandwidth and the bf16 product, builds libstars where it can be."""
    record.fact("machine", _machine(settings))
    with record.measuring("copy bandwidth and product"):
        _ceilings(record, settings)
    _libstars(record, settings)


def _ceilings(record: Record, settings: Settings) -> None:
    if not settings.dry:  # an idle card runs at a fraction of its clock
        heat = torch.randn(4096, 4096, device=settings.device).bfloat16()
        until = time.perf_counter() + 0.5
        while time.perf_counter() < until:
            torch.mm(heat, heat)
            torch.cuda.synchronize()
    size = (1 << 20) if settings.dry else (1 << 30)
    source = torch.randn(size // 4, device=settings.device).view(torch.uint8)
    target = torch.empty_like(source)
    copy = 2 * size / seconds_a_call([lambda: target.copy_(source)], settings.device, least=10)
    record.fact("copy_gb_s", copy / 1e9)
    record.figure("copy, read and written", copy / 1e9, "GB/s", bytes=2 * size)
    words, total = source.view(torch.float32), torch.empty((), device=settings.device)
    read = size / seconds_a_call([lambda: torch.sum(words, 0, out=total)], settings.device, least=10)
    record.fact("read_gb_s", read / 1e9)
    record.figure("sum, read alone", read / 1e9, "GB/s", copy / 1e9, "copy", bytes=size)
    side = 128 if settings.dry else 8192
    a, b = (torch.randn(side, side, device=settings.device).bfloat16() for _ in range(2))
    c = torch.empty_like(a)
    flops = 2 * side**3 / seconds_a_call([lambda: torch.mm(a, b, out=c)], settings.device, least=10)
    record.fact("matmul_tflop_s", flops / 1e12)
    record.figure("bf16 product of random matrices", flops / 1e12, "TFLOP/s", side=side)


def _machine(settings: Settings) -> dict:
    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    machine = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
               "triton": version("triton"), "transformers": version("transformers"), "numpy": version("numpy"),
               "flash_attn": importlib.util.find_spec("flash_attn") is not None,
               "tools": [tool for tool in ("nvcc", "compute-sanitizer", "ncu", "cmake", "ninja", "g++")
                         if shutil.which(tool)], "commit": _commit()}
    if settings.dry:
        return machine
    card = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    machine |= {"gpu": card.name, "capability": f"{card.major}.{card.minor}", "processors": card.multi_processor_count,
                "l2_mb": getattr(card, "L2_cache_size", 0) / 1e6, "memory_gib": total / 2**30, "free_gib": free / 2**30}
    if shutil.which("nvidia-smi"):
        try:
            said = subprocess.run(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"], capture_output=True,
                                  text=True, timeout=10).stdout
        except (OSError, subprocess.TimeoutExpired):
            said = ""
        values = [value.strip() for value in said.strip().splitlines()[0].split(",")] if said.strip() else []
        machine["nvidia_smi"] = dict(zip(QUERY.split(","), values, strict=False))
        machine["driver"] = machine["nvidia_smi"].get("driver_version")
    return machine


def _commit() -> str:
    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True,
                                  timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no", "engine", "kernels", "bindings")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


def _libstars(record: Record, settings: Settings) -> None:
    """The C++ library is optional: without it host arithmetic is numpy's and torch's."""
    from stars.bindings import libstars

    if libstars.available() or settings.dry:
        record.fact("libstars", libstars.available())
        return
    missing = [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]
    library = ROOT / "bindings" / "lib" / "libstars.so"
    if missing or library.exists():
        record.fact("libstars", False)
        record.note(f"libstars is not there ({', '.join(missing) or 'the library found does not load'})")
        return
    build = Path.cwd() / "libstars"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    try:
        for command in (["cmake", *generator, "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
                         f"-DSTARS_OUTPUT_DIR={ROOT / 'bindings'}"],
                        ["cmake", "--build", str(build), "--target", "stars", "--parallel"]):
            subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        record.fact("libstars", True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        record.fact("libstars", False)
        record.note(f"libstars was not built: {str(getattr(error, 'stderr', '') or error)[-300:]}")
