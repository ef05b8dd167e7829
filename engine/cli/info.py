"""`stars info`: what is installed and what this machine brings."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from stars.trace.json_lines import dumps
from stars.version import __version__

DISTRIBUTIONS = {"flash-attn-4": "flash-attn-4", "flash-attn-2": "flash-attn", "varlen": "torch", "sdpa": "torch",
                 "triton": "triton"}
"""What has the version of each backend of a prefill."""


EXAMPLE = (8192, 2048)
"""A product [out_features, in_features] of a model of a billion parameters."""


def info(args: argparse.Namespace) -> int:
    """Runs the command."""
    from stars.bindings import libstars

    built, auto = libstars.available(), _auto_dtype()
    gpu, (chosen, backends) = _gpu(), _prefill()
    auto = _auto_dtype()
    facts = {
        "stars": __version__, "python": platform.python_version(), "torch": _version("torch"),
        "libstars": {"instructions": libstars.isa(), "threads": libstars.num_threads()} if built else None,
        "dtype auto": auto,
        "cpu": _cpu_name(), "cores": os.cpu_count(), "transformers": _version("transformers"),
        "triton": _version("triton"), "gpu": gpu, "prefill": {"chosen": chosen, "backends": backends},
    }
    if args.json:
        print(dumps(facts))
        return 0
    facts["libstars"] = "not built: the slower torch references are used"
    if built:
        facts["libstars"] = f"instructions {libstars.isa()}, threads {libstars.num_threads()}"
    facts["dtype auto"] = f"{auto['dtype']} on the CPU for a model in bfloat16, {auto['why']}"
    facts["gpu"] = "none that torch can use"
    if gpu is not None:
        facts["gpu"] = f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.1f} GiB"
    facts["prefill"] = _in_words(chosen, backends, gpu)
    for name, value in facts.items():
        print(f"{name:<14}{value if value is not None else 'not installed'}")
    return 0


def _auto_dtype() -> dict[str, str]:
    """What dtype="auto" would be for a model in bfloat16 whose products are `EXAMPLE`'s."""
    from stars.model.auto_dtype import measured_dtype

    return measured_dtype((EXAMPLE,))._asdict()


def _gpu() -> dict[str, Any] | None:
    """The GPU that `device="cuda"` would use, where there is one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {"name": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory}


def _prefill() -> tuple[str | None, dict[str, dict[str, str | None]]]:
    """The backend that a bfloat16 model's prefill would run through, None without a GPU that serves, and what is known
    of each library."""
    import torch

    from stars.device import check_gpu
    from stars.errors import ModelError
    from stars.kernels.prefill_attention import BACKENDS, Case, choose_backend, problem

    backends = {name: {"version": _version(DISTRIBUTIONS[name]), "problem": problem(name)} for name in BACKENDS}
    try:
        check_gpu()
    except ModelError:
        return None, backends
    return choose_backend(Case(torch.cuda.get_device_capability(), torch.bfloat16, head_dim=128)), backends


def _in_words(chosen: str | None, backends: dict[str, dict[str, str | None]], gpu: dict[str, Any] | None) -> str:
    """What serves a prefill, and why the preferred libraries do not."""
    if chosen is None:
        serves = "the CPU's own attention" + (', as device="cuda" is refused here' if gpu else "")
        passed_over = list(backends)
    else:
        serves = f"{chosen} {_version(DISTRIBUTIONS[chosen])} for a bfloat16 model"
        passed_over = list(backends)[: list(backends).index(chosen)] if chosen in backends else list(backends)
    problems = [f"{name} {backends[name]['problem']}" for name in passed_over if backends[name]["problem"]]
    return f"{serves} ({', '.join(problems)})" if problems else serves


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The processor's name where the system gives one."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
