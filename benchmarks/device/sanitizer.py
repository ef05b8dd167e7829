"""compute-sanitizer's memcheck over the quick kernel stages, where the tool is there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from record import Record, Settings, seconds_left

HERE = Path(__file__).resolve().parent
PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")


def run(record: Record, settings: Settings) -> None:
    """Every access of the kernels in bounds. Only what the tool reports counts: where it refuses the card, or has no
    time to end, that is said."""
    tool = shutil.which("compute-sanitizer") or next((place for place in PLACES if os.access(place, os.X_OK)), None)
    if tool is None:
        record.note("compute-sanitizer was not found: left out")
        return
    processes = {}
    for name in ("kernels-rows", "kernels-products", "kernels-attention", "kernels-sampler"):
        out = Path(f"sanitized-{name}.json").resolve()
        # Without the errors of API calls: libraries provoke some on purpose, to see what a driver can do.
        command = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "77", "--print-limit",
                   "5", "--target-processes", "all", sys.executable, str(HERE / "stage.py"), name, "--quick", "--out",
                   str(out)]
        log = Path(f"sanitized-{name}.log").open("wb+")
        # Without torch's cache of blocks, every tensor is an allocation of its own whose end is watched.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        processes[name] = (subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment), log, out)
    for name, (process, log, out) in processes.items():
        try:
            process.wait(max(0.1, seconds_left()))
            ended = True
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = False
        log.seek(0)
        text = log.read().decode(errors="replace")
        summary = [line for line in text.splitlines() if "ERROR SUMMARY" in line or "Invalid " in line][:6]
        found = any("Invalid " in line for line in summary) or (ended and process.returncode == 77)
        done = len(json.loads(out.read_text())["checks"]) if out.exists() else 0
        if found or (ended and done and any("ERROR SUMMARY" in line for line in summary)):
            record.check(f"memcheck of {name}", not found, summary=summary, exit_status=process.returncode, checks=done,
                         tail=text[-1500:].splitlines() if found else [])
        else:
            why = "did not end in time" if not ended else f"ended with {process.returncode} and no summary"
            record.note(f"{name} under memcheck {why}, {done} checks had run: {text.strip()[-200:]}")
