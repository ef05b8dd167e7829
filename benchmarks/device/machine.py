"""What is there: the card, versions, and the ceilings that everything else is measured against."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import time

import torch
from importable import ROOT
from record import Record, Settings
from timing import seconds_a_call

QUERY = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.limit"

MIN_BYTES = 1 << 30
"""Of a buffer whose figure counts as the limit: of a smaller one a part may still be in the second-level cache."""


def run(record: Record, settings: Settings) -> None:
    """Describes the machine, measures read and copy bandwidth and the bf16 product."""
    if not settings.dry and not torch.cuda.is_available():
        record.fact("gpu", False)
        raise RuntimeError("torch finds no GPU here: use a CUDA build of torch on a machine with one, or --dry-run")
    record.part("description", lambda: record.fact("machine", _machine(settings)))
    if not settings.dry:
        _heat()
    record.part("copy", _copy, record, settings)
    record.part("read", _read, record, settings)
    record.part("product", _product, record, settings)


def _heat() -> None:
    """An idle card runs at a fraction of its clock."""
    heat = torch.randn(4096, 4096, device="cuda").bfloat16()
    until = time.perf_counter() + 0.5
    while time.perf_counter() < until:
        torch.mm(heat, heat)
        torch.cuda.synchronize()


def _sizes(settings: Settings) -> tuple[int, ...]:
    """Bytes of a buffer: the smallest is five times the second-level cache of an H100, and only shown."""
    return (1 << 18, 1 << 20) if settings.dry else (1 << 30, 1 << 28, 1 << 32)


def _copy(record: Record, settings: Settings) -> None:
    best = 0.0
    for size in _sizes(settings):
        source = torch.randint(-(2**31), 2**31, (size // 4,), dtype=torch.int32, device=settings.device)
        target = torch.empty_like(source)
        seconds = seconds_a_call([lambda source=source, target=target: target.copy_(source)], settings.device, least=4)
        best = max(best, 2 * size / seconds / 1e9 if size >= MIN_BYTES or settings.dry else 0.0)
        record.figure(f"copy of {size >> 20} MiB, read and written", 2 * size / seconds / 1e9, "GB/s", bytes=2 * size,
                      spread=[2 * size / one / 1e9 for one in reversed(seconds.spread)])
        record.fact("copy_gb_s", best)


def _read(record: Record, settings: Settings) -> None:
    """The best of several readers at several sizes; torch's sum beside them."""
    best = 0.0
    for size in _sizes(settings):
        words = torch.randint(-(2**31), 2**31, (size // 4,), dtype=torch.int32, device=settings.device)
        readers = {"torch.sum": lambda words=words: torch.sum(words.view(torch.float32))}
        if not settings.dry:
            import reader

            out = torch.empty(size // 4 // 2048, dtype=torch.int32, device=settings.device)
            readers |= {f"blocks of {block} x {steps}": lambda words=words, out=out, choice=(block, steps, warps):
                        reader.read(words, out, choice) for block, steps, warps in reader.CHOICES}
        found = {name: seconds_a_call([call], settings.device, repeats=5, least=4) for name, call in readers.items()}
        fastest = min(found, key=found.get)
        best = max(best, size / found[fastest] / 1e9 if size >= MIN_BYTES or settings.dry else 0.0)
        record.figure(f"read of {size >> 20} MiB, {fastest}", size / found[fastest] / 1e9, "GB/s",
                      spread=[size / one / 1e9 for one in reversed(found[fastest].spread)],
                      all={name: size / seconds / 1e9 for name, seconds in found.items()})
        record.fact("read_gb_s", best)


def _product(record: Record, settings: Settings) -> None:
    side = 128 if settings.dry else 8192
    a, b = (torch.randn(side, side, device=settings.device).bfloat16() for _ in range(2))
    c = torch.empty_like(a)
    seconds = seconds_a_call([lambda: torch.mm(a, b, out=c)], settings.device, repeats=5, least=4)
    record.fact("matmul_tflop_s", 2 * side**3 / seconds / 1e12)
    record.figure("bf16 product of random matrices", 2 * side**3 / seconds / 1e12, "TFLOP/s", side=side,
                  spread=[2 * side**3 / one / 1e12 for one in reversed(seconds.spread)])


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
                                  text=True, timeout=4).stdout
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
                                  timeout=3).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no", "engine", "kernels", "bindings")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")
