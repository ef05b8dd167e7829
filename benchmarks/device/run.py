"""Everything there is to learn on a GPU, in one command and under nine minutes; needs no network and no installation.

    make device                                        or, with options:
    python benchmarks/device/run.py [--quick] [--out DIR] [--only kernels-rows,micro] [--dry-run]

Every stage is a process with a time limit, so that a crash or a hang loses that stage and no other. --quick takes about
two minutes. --dry-run runs on the CPU: toy shapes, torch references instead of kernels, no graphs; it shows that the
script works, and its figures mean nothing. Writes device-<gpu>-<time>.json to DIR (or $OUT, or benchmarks/results),
prints a table last, and exits with 1 if a check of correctness failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from importable import ROOT
from report import file_name, print_errors, print_table, result
from stages import LEAST_SECONDS, QUICK_SECONDS, STAGES, TOTAL_SECONDS, Stage, groups

HERE = Path(__file__).resolve().parent


def main() -> int:
    options = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the stages are ended, too
    begin = time.monotonic()
    total = options.seconds or (QUICK_SECONDS if options.quick else TOTAL_SECONDS)
    chosen = [stage for stage in STAGES if _wanted(stage, options)]
    found: list[dict] = []
    target = None
    with tempfile.TemporaryDirectory(prefix="stars-device-", ignore_cleanup_errors=True) as scratch:
        environment = os.environ | {
            "STARS_CHECKOUT": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false"}
        # One cache for all stages of this run, and of no other: nothing stale is measured.
        environment.setdefault("TRITON_CACHE_DIR", str(Path(scratch) / "triton"))
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(scratch) / "inductor"))
        for group in groups(chosen):
            left = total - (time.monotonic() - begin)
            if left < LEAST_SECONDS:
                found += [_never_ran(stage, "the time of the run was used up") for stage in group]
                continue
            found += _run(group, left, options, Path(scratch), environment, found)
            if found[0]["facts"].get("gpu") is False:  # nothing else could run
                print_errors(found)
                return 1
            whole = result(found, options, time.monotonic() - begin)
            target = target or Path(options.out) / file_name(whole)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(whole, indent=1) + "\n")
    whole = result(found, options, time.monotonic() - begin)
    if target is not None:
        target.write_text(json.dumps(whole, indent=1) + "\n")
    print_errors(found)
    print_table(whole)
    print(f"\n{whole['seconds']:.0f} s, written to {target}")
    return 0 if whole["correct"] else 1


def _wanted(stage: Stage, options: argparse.Namespace) -> bool:
    if options.only:
        return stage.name in options.only or (stage.name == "environment" and not options.dry_run)
    return (stage.dry or not options.dry_run) and (stage.quick or not options.quick)


def _run(group: list[Stage], left: float, options: argparse.Namespace, scratch: Path, environment: dict[str, str],
         before: list[dict]) -> list[dict]:
    """Runs the stages of a group side by side and returns what they wrote, in order."""
    facts = scratch / "facts.json"
    facts.write_text(json.dumps({name: value for stage in before for name, value in stage["facts"].items()}))
    started = []
    for stage in group:
        limit = min(left, (stage.quick_seconds or stage.seconds) if options.quick else stage.seconds)
        limit = min(limit, options.stage_seconds or limit)
        out = scratch / f"{stage.name}.json"
        command = [sys.executable, str(HERE / "stage.py"), stage.name, "--out", str(out), "--facts", str(facts)]
        command += ["--quick"] * options.quick + ["--dry-run"] * options.dry_run
        print(f"{stage.name} (at most {limit:.0f} s)", flush=True)
        log = (scratch / f"{stage.name}.log").open("wb")
        deadline = time.monotonic() + limit  # of a clock that all processes share
        process = subprocess.Popen(command, env=environment | {"STARS_STAGE_DEADLINE": f"{deadline:.1f}"}, cwd=scratch,
                                   stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        started.append((stage, process, log, out, deadline))
    found = []
    try:
        for stage, process, log, out, deadline in started:
            timed_out = False
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                timed_out = True
            _stop(process)
            log.close()
            output = Path(log.name).read_text(errors="replace")
            print(f"-- {stage.name}\n{output[-3000:]}", flush=True)
            found.append(_collect(stage, process.returncode, timed_out, out, output))
    finally:
        for _, process, *_ in started:
            _stop(process)
    return found


def _stop(process: subprocess.Popen) -> None:
    """Ends a stage and what it started: they are a session of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _collect(stage: Stage, code: int, timed_out: bool, out: Path, output: str) -> dict:
    """What a stage wrote before it ended, and how it ended."""
    found = json.loads(out.read_text()) if out.exists() else _never_ran(stage, "it wrote nothing")
    if timed_out:
        found["status"], found["error"] = "timed out", f"stopped after its time limit\n{output[-1500:]}"
    elif found["status"] in ("running", "skipped") and code != 0:
        found["status"], found["error"] = "crashed", f"exit status {code}\n{output[-1500:]}"
    return found | {"correctness": stage.correctness}


def _never_ran(stage: Stage, why: str) -> dict:
    return {"stage": stage.name, "status": "skipped", "seconds": 0.0, "error": None, "checks": [], "figures": [],
            "facts": {}, "notes": [why], "correctness": stage.correctness}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about two minutes: fewer cases, the small model only")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, toy shapes: whether the script works")
    parser.add_argument("--out", help="folder of the JSON file ($OUT, else benchmarks/results)")
    parser.add_argument("--only", type=lambda text: text.split(","), help=(
        f"comma-separated, after the environment: {', '.join(stage.name for stage in STAGES[1:])}"))
    parser.add_argument("--seconds", type=float, help=f"of the whole run ({TOTAL_SECONDS}, quick {QUICK_SECONDS})")
    parser.add_argument("--stage-seconds", type=float, help="upper bound on every stage's own limit")
    options = parser.parse_args()
    unknown = set(options.only or ()) - {stage.name for stage in STAGES}
    if unknown:
        parser.error(f"there is no stage {', '.join(sorted(unknown))}")
    home = ROOT / (".benchmarks" if options.dry_run else "benchmarks/results")
    options.out = options.out or os.environ.get("OUT") or str(home)
    return options


if __name__ == "__main__":
    sys.exit(main())
