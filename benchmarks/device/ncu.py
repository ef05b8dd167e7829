"""What limits the longest kernels of a step: Nsight Compute's stall reasons, the card's clocks left alone."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from record import OutOfTime, Record, Settings, seconds_left
from step_table import labels, short

PLACES = ("/usr/local/cuda/bin/ncu", *map(str, sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"), reverse=True)))
FALLBACK = ["gate_up", "down", "qkv"]
METRICS = {
    "gpu__time_duration.sum": "us", "dram__bytes_read.sum": "bytes read",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of memory's peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% of warps active",
    "launch__registers_per_thread": "registers", "launch__grid_size": "programs"}
STALLS = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
REASONS = ("long_scoreboard", "short_scoreboard", "barrier", "membar", "math_pipe_throttle", "mio_throttle",
           "lg_throttle", "wait", "no_instruction", "not_selected", "dispatch_stall", "sleeping")


def run(record: Record, settings: Settings) -> None:
    """One part. A tool that is missing, or refuses the card, is a note."""
    tool = shutil.which("ncu") or next((place for place in PLACES if os.access(place, os.X_OK)), None)
    if tool is None:
        record.note("ncu was not found: left out")
        return
    record.part("stall reasons", profile, record, settings, tool)


def profile(record: Record, settings: Settings, tool: str) -> None:
    """Profiles a step of two layers of the headline's shape, whose kernels are those of 32."""
    metrics = [*METRICS, *(STALLS.format(reason) for reason in REASONS)]
    command = [tool, "--clock-control", "none", "--csv", "--page", "raw", "--metrics", ",".join(metrics),
               "--profile-from-start", "off", "--target-processes", "application-only", "--print-units", "base",
               sys.executable, str(Path(__file__).resolve().parent / "ncu_target.py")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, seconds_left()))
    except subprocess.TimeoutExpired as error:
        raise OutOfTime(f"ncu did not end in time: {_tail(error.stdout)} {_tail(error.stderr)}") from None
    rows = parse(done.stdout)
    if not rows:
        record.note(f"ncu ended with {done.returncode} and no table: {_tail(done.stdout)} {_tail(done.stderr)}")
        return
    record.fact("ncu", rows)
    # Those of the headline's table of a step at 8 lanes: two layers and one head say nothing of their shares.
    named = [short(label) for label in labels([row["kernel"] for row in rows])]
    for wanted in settings.facts.get("longest kernels") or FALLBACK:
        of_it = [row for row, name in zip(rows, named, strict=True) if name == wanted]
        if not of_it:
            record.note(f"ncu has seen no {wanted}")
            continue
        row = max(of_it, key=lambda row: row.get("us", 0.0))
        worst = sorted(row["stalls"].items(), key=lambda entry: -entry[1])[:3]
        peak = row.get("bytes read", 0.0) / row["us"] / 1e3 if row.get("us") else None
        record.figure(f"ncu: {wanted}, {', '.join(f'{name} {share:.1f}' for name, share in worst)}", peak, "GB/s",
                      None if settings.bandwidth is None else settings.bandwidth / 1e9, "read bandwidth",
                      higher_is_better=True, **row)


def parse(text: str) -> list[dict]:
    """Rows of {kernel, us, bytes read, …, stalls} from what `ncu --csv --page raw` prints; none without a table."""
    lines = text.splitlines()
    begin = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    table = list(csv.DictReader(io.StringIO("\n".join(lines[begin:]))))
    rows = []
    for entry in table:
        if not (entry.get("ID") or "").strip().isdigit():
            continue  # the line of units
        row: dict = {"kernel": re.sub(r"\s+", " ", entry.get("Kernel Name") or "?"), "stalls": {}}
        for metric, name in METRICS.items():
            value = _number(entry.get(metric))
            if value is not None:
                row[name] = value / 1e3 if name == "us" else value  # ncu's base unit is the nanosecond
        for reason in REASONS:
            value = _number(entry.get(STALLS.format(reason)))
            if value is not None:
                row["stalls"][reason] = value
        rows.append(row)
    return rows


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def _tail(said: str | bytes | None) -> str:
    text = said.decode(errors="replace") if isinstance(said, bytes) else said or ""
    return " ".join(text.strip().splitlines()[-3:])[-300:]
