"""compute-sanitizer's memcheck over the quick kernel stages, where the tool is there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from record import Record, Settings

HERE = Path(__file__).resolve().parent
PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")


def run(record: Record, settings: Settings) -> None:
    """Every access of the kernels in bounds. What does not fit in the stage's time is said, not failed."""
    tool = shutil.which("compute-sanitizer") or next((place for place in PLACES if os.access(place, os.X_OK)), None)
    if tool is None:
        record.note("compute-sanitizer was not found: left out")
        return
    limit = float(os.environ.get("STARS_STAGE_SECONDS", 100)) - 8
    processes = {}
    for name in ("kernels-rows", "kernels-products", "kernels-attention", "kernels-sampler"):
        out = Path(f"sanitized-{name}.json").resolve()
        command = [tool, "--tool", "memcheck", "--error-exitcode", "77", "--print-limit", "5", sys.executable,
                   str(HERE / "stage.py"), name, "--quick", "--out", str(out)]
        log = Path(f"sanitized-{name}.log").open("wb+")
        # Without torch's cache of blocks, every tensor is an allocation of its own whose end is watched.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        processes[name] = (subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment), log, out)
    deadline = time.monotonic() + limit
    for name, (process, log, out) in processes.items():
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done = len(json.loads(out.read_text())["checks"]) if out.exists() else 0
            record.note(f"{name} under memcheck did not end in {limit:.0f} s: {done} checks had run")
        log.seek(0)
        text = log.read().decode(errors="replace")
        summary = [line for line in text.splitlines() if "ERROR SUMMARY" in line or "Invalid " in line][:6]
        clean = process.returncode != 77 and not any("Invalid " in line for line in summary)
        record.check(f"memcheck of {name}", clean, summary=summary, exit_status=process.returncode,
                     tail=[] if clean else text[-1500:].splitlines())
