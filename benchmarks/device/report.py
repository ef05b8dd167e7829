"""The JSON of a run, and the table at its end."""

from __future__ import annotations

import argparse
import re
import time
from typing import Any

from record import number

FORMAT = 1  # of the JSON file; raised when a field changes its meaning


def result(stages: list[dict], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Everything a run found."""
    facts = {name: value for stage in stages for name, value in stage["facts"].items()}
    failed = [check["name"] for stage in stages for check in stage["checks"] if not check["passed"]]
    broken = [stage["stage"] for stage in stages
              if stage["correctness"] and stage["status"] in ("failed", "crashed", "timed out")]
    return {
        "format": FORMAT, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seconds": round(seconds, 1),
        "dry_run": options.dry_run, "quick": options.quick, "machine": facts.get("machine", {}),
        "copy_gb_s": facts.get("copy_gb_s"), "matmul_tflop_s": facts.get("matmul_tflop_s"),
        "correct": not failed and not broken, "failed_checks": failed, "failed_stages": broken, "stages": stages}


def file_name(whole: dict[str, Any]) -> str:
    """device-<gpu>-<date>-<time>.json, "dry" in place of the GPU in a dry run: no run replaces another."""
    gpu = "dry" if whole["dry_run"] else whole["machine"].get("gpu", "unknown")
    gpu = re.sub(r"[^a-z0-9]+", "-", gpu.lower().replace("nvidia", "")).strip("-")
    return f"device-{gpu}-{whole['date'][:16].replace(':', '').replace('T', '-')}{'-quick' * whole['quick']}.json"


def print_errors(stages: list[dict]) -> None:
    """The last lines of what went wrong."""
    for stage in stages:
        if stage["status"] not in ("ok", "skipped"):
            print(f"\n{stage['stage']} {stage['status']}: {(stage['error'] or '').strip()[-1200:]}")


def print_table(whole: dict[str, Any]) -> None:
    """One line a stage, then every figure that has an aim, then what failed."""
    machine = whole["machine"]
    print(f"\n{machine.get('gpu', 'CPU, dry run: figures mean nothing')}, torch {machine.get('torch')}, "
          f"commit {machine.get('commit')}, copy {number(whole['copy_gb_s'])} GB/s, "
          f"bf16 product {number(whole['matmul_tflop_s'])} TFLOP/s")
    for stage in whole["stages"]:
        passed = sum(check["passed"] for check in stage["checks"])
        checks = f"{passed}/{len(stage['checks'])} checks" if stage["checks"] else ""
        why = f"  ({stage['notes'][-1]})" if stage["notes"] else ""
        print(f"{stage['stage']:<24}{stage['status']:<11}{stage['seconds']:>6.0f} s  {checks:<15}"
              f"{len(stage['figures'])} figures{why}")
    print(f"\n{'figure':<76}{'value':>9} {'unit':<9}{'ratio':>6} {'of':<36}aim")
    for stage in whole["stages"]:
        for one in stage["figures"]:
            if one["aim"] or whole["dry_run"]:
                ratio = "" if one["ratio"] is None else f"{one['ratio']:.2f}"
                met = {None: "", True: " ok", False: " MISSED"}[one["reached"]]
                print(f"{one['name'][:75]:<76}{number(one['value']):>9} {one['unit']:<9}{ratio:>6} "
                      f"{one['of'][:35]:<36}{one['aim']}{met}")
    for name in whole["failed_checks"]:
        print(f"FAILED: {name}")
    print("correct" if whole["correct"] else f"NOT CORRECT: {', '.join(whole['failed_stages']) or 'see above'}")
