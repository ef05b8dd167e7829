"""`stars info`: what is installed and what this machine brings."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata
from pathlib import Path

from stars import __version__
from stars.trace import dumps


def info(args: argparse.Namespace) -> int:
    """Runs the command."""
    from stars.bindings import libstars

    built = libstars.available()
    facts = {
        "stars": __version__, "python": platform.python_version(), "torch": _version("torch"),
        "libstars": {"instructions": libstars.isa(), "threads": libstars.num_threads()} if built else None,
        "cpu": _cpu_name(), "cores": os.cpu_count(), "transformers": _version("transformers"),
        "triton": _version("triton"),
    }
    if args.json:
        print(dumps(facts))
        return 0
    library = "not built: the slower torch references are used"
    if built:
        library = f"instructions {libstars.isa()}, threads {libstars.num_threads()}"
    for name, value in ({**facts, "libstars": library}).items():
        print(f"{name:<14}{value if value is not None else 'not installed'}")
    return 0


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
