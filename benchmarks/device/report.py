"""What a run has found so far, on disk at any time; the table at its end, and the block for NOTES.md."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from aims import AIMS, Aim
from record import OK, number
from stages import STAGES
from tables import PREFIX, text, whole

ORDER = [stage.name for stage in STAGES]
FORMAT = 2  # of the JSON file; raised when a field changes its meaning
MAX_LINES = 72  # of the table
BASELINES = ("8B: step ms",)
"""Facts that other figures are divided by: not those of another run, whose card may have been another of the kind."""


class Report:
    """The result's file, its log and its tables: four files at most, each replaced in one step."""

    def __init__(self, options: argparse.Namespace, before: dict[str, Any]):
        self.options = options
        self.stages: dict[str, dict] = {stage["stage"]: stage for stage in before.get("stages", [])}
        self.runs: list[dict] = before.get("runs", [])
        self.folder = Path(options.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.target = self._free_name()
        self.seconds = 0.0
        self.background: dict[str, float] = {}  # seconds after which what ran beside the stages had ended
        self._complained = False
        self._log = self.target.with_suffix(".log").open("a")

    def _free_name(self) -> Path:
        """device-<gpu>-<date>-<time>.json, "dry" in place of the GPU in a dry run: no run replaces another."""
        gpu = "dry" if self.options.dry_run else gpu_slug()
        stem = f"device-{gpu}-{self.date[:16].replace(':', '').replace('T', '-')}{'-quick' * self.options.quick}"
        names = (self.folder / f"{stem}{f'-{count}' if count else ''}.json" for count in range(1000))
        return next(name for name in names if not name.exists())

    def stage(self, found: dict, save: bool = True) -> None:
        """What a stage has found, at its end or while it runs."""
        before = {name: stage for name, stage in self.stages.items() if name != found["stage"]}
        before[found["stage"]] = {"date": self.date} | found
        self.stages = {name: before[name] for name in ORDER if name in before}
        if save:
            self.save()
            if any(name.startswith(PREFIX) for name in found["facts"]):
                self.keep_table()

    def facts(self) -> dict[str, Any]:
        """What the stages so far have to say to later ones."""
        return {name: value for stage in self.stages.values() for name, value in stage["facts"].items()
                if name not in BASELINES or stage["date"] == self.date}

    def log(self, text: str) -> None:
        """A stage's output: the end of it on the screen, all of it in the log."""
        self._guard(lambda: (self._log.write(text + "\n"), self._log.flush()))
        print(text[:200] if len(text) < 200 else f"{text.splitlines()[0]}\n{text[-1500:]}", flush=True)

    @property
    def failed_checks(self) -> list[str]:
        return [check["name"] for stage in self.stages.values() for check in stage["checks"] if not check["passed"]]

    @property
    def failed_stages(self) -> list[str]:
        return [name for name, stage in self.stages.items()
                if stage["correctness"] and stage["status"] in ("failed", "crashed", "timed out")]

    @property
    def correct(self) -> bool:
        no_gpu = self.facts().get("gpu") is False
        return not no_gpu and not self.failed_checks and not self.failed_stages

    def whole(self) -> dict[str, Any]:
        """Everything, as it stands."""
        facts = self.facts()
        return {
            "format": FORMAT, "date": self.date, "seconds": round(self.seconds, 1), "dry_run": self.options.dry_run,
            "quick": self.options.quick, "machine": facts.get("machine", {}), "read_gb_s": facts.get("read_gb_s"),
            "copy_gb_s": facts.get("copy_gb_s"), "matmul_tflop_s": facts.get("matmul_tflop_s"),
            "correct": self.correct, "failed_checks": self.failed_checks, "failed_stages": self.failed_stages,
            "background": self.background, "runs": self.runs, "stages": list(self.stages.values())}

    def save(self, seconds: float | None = None) -> None:
        self.seconds = self.seconds if seconds is None else seconds
        self._guard(lambda: _replace(self.target, json.dumps(self.whole(), indent=1) + "\n"))

    def keep_table(self) -> Path | None:
        """tuned/<the name by which it is read>: what was measured, to be dropped into kernels/triton/."""
        table = whole(self.facts())
        if table is None:
            return None
        path = self.folder / "tuned" / table["file"]
        self._guard(lambda: (path.parent.mkdir(exist_ok=True), _replace(path, text(table))))
        return path

    def _guard(self, write: Callable[[], object]) -> None:
        """A disk that is full ends no run: the table still comes."""
        try:
            write()
        except OSError as error:
            if not self._complained:
                print(f"could not write: {error}", flush=True)
            self._complained = True

    def end(self, seconds: float) -> None:
        """The last state, and what is made of it."""
        facts = self.facts()
        self.runs = [*self.runs, {"date": self.date, "seconds": round(seconds, 1), "machine": facts.get("machine", {})}]
        self.save(seconds)
        if not self.options.dry_run and facts.get("gpu") is not False:
            self._guard(lambda: _replace(self.target.with_name(f"{self.target.stem}-notes.md"), self.notes() + "\n"))
        self.keep_table()
        self._guard(self._log.close)
        if facts.get("gpu") is False:  # nothing was found, and nothing is left behind
            self.target.unlink()
            self.target.with_suffix(".log").unlink()

    # -- tables -----------------------------------------------------------------------------------------------------

    def aimed(self) -> Iterator[tuple[Aim, dict | None]]:
        """Every row with each figure that stands for it, or None."""
        figures = [figure for stage in self.stages.values() for figure in stage["figures"]]
        for aim in AIMS:
            yield from [(aim, figure) for figure in figures if figure["aim"] == aim.key] or [(aim, None)]

    def lines(self) -> list[str]:
        """At most MAX_LINES: the machine, a line a stage, the rows, what failed, and what room is left for."""
        whole = self.whole()
        machine = whole["machine"]
        lines = [f"{machine.get('gpu', 'CPU, dry run: figures mean nothing')}, torch {machine.get('torch')}, commit "
                 f"{machine.get('commit')}, read {number(whole['read_gb_s'])} and copy {number(whole['copy_gb_s'])} "
                 f"GB/s, bf16 product {number(whole['matmul_tflop_s'])} TFLOP/s"]
        for stage in self.stages.values():
            passed = sum(check["passed"] for check in stage["checks"])
            checks = f"{passed}/{len(stage['checks'])} checks" if stage["checks"] else ""
            why = stage["notes"][-1] if stage["notes"] else (stage["error"] or "").strip().splitlines()[-1:]
            why = why if isinstance(why, str) else " ".join(why)
            lines.append(f"{stage['stage']:<24}{stage['status']:<10}{stage['seconds']:>5.0f} s  {checks:<15}"
                         f"{len(stage['figures']):>3} figures  {why[:70]}".rstrip())
        lines.append(f"{'row':<74}{'value':>8} {'unit':<8}{'ratio':>6}  aim")
        for aim, figure in self.aimed():
            if figure is None:
                lines.append(f"{aim.row[:73]:<74}{'':>8} {'':<8}{'':>6}  {aim.bound:<8} not measured")
                continue
            met = {None: " nothing to compare with" if aim.bound else "", True: " met", False: " MISSED"}[
                aim.met(figure["ratio"])]
            ratio = "" if figure["ratio"] is None else f"{figure['ratio']:.2f}"
            lines.append(f"{figure['name'][:73]:<74}{number(figure['value']):>8} {figure['unit']:<8}{ratio:>6}  "
                         f"{aim.bound:<8}{met}".rstrip())
        last = [f"FAILED: {name[:100]}" for name in self.failed_checks[:8]]
        last += [f"… and {len(self.failed_checks) - 8} more"] * (len(self.failed_checks) > 8)
        last.append("correct" if self.correct else f"NOT CORRECT: {', '.join(self.failed_stages) or 'see above'}")
        last.append(f"{whole['seconds']:.0f} s, written to {self.target}")
        others = [figure for stage in self.stages.values() for figure in stage["figures"] if not figure["aim"]]
        for figure in others[: max(0, MAX_LINES - len(lines) - len(last))]:
            ratio = "" if figure["ratio"] is None else f"{figure['ratio']:.2f}"
            of = f"  of {figure['of']}" if figure["of"] and ratio else ""
            lines.append(f"{figure['name'][:73]:<74}{number(figure['value']):>8} {figure['unit']:<8}{ratio:>6}{of}")
        return lines[: MAX_LINES - len(last)] + last

    def print(self) -> None:
        """What went wrong, then the table."""
        if self.facts().get("gpu") is False:
            print(next(stage["error"] for stage in self.stages.values() if "gpu" in stage["facts"]).splitlines()[-1])
            return
        for stage in self.stages.values():
            if stage["status"] not in (OK, "skipped"):
                said = [(stage["error"] or "").strip()[-600:], *stage["notes"][-3:]]
                print(f"\n{stage['stage']} {stage['status']}: " + "\n    ".join(said))
        print("\n" + "\n".join(self.lines()), flush=True)

    def notes(self) -> str:
        """A block for benchmarks/NOTES.md: the prediction beside the outcome."""
        machine = self.whole()["machine"]
        kind = next((kind for kind in ("h100", "h200") if kind.upper() in str(machine.get("gpu"))), None)
        lines = [f"### {self.date[:10]}, {machine.get('gpu', 'no GPU')}, torch {machine.get('torch')}, Triton "
                 f"{machine.get('triton')}, commit {machine.get('commit')} (`results/{self.target.name}`)", "",
                 f"Read {number(self.whole()['read_gb_s'])} GB/s, copy {number(self.whole()['copy_gb_s'])} GB/s, bf16 "
                 f"product {number(self.whole()['matmul_tflop_s'])} TFLOP/s.", "",
                 "| row | aim | prediction | outcome | |", "|---|---|---|---|---|"]
        for aim, figure in self.aimed():
            met = {None: "", True: "met", False: "missed"}[aim.met(figure["ratio"])] if figure else "not measured"
            ratio = "" if figure is None or figure["ratio"] is None else f"{figure['ratio']:.3g}"
            value = "" if figure is None else f" ({number(figure['value'])} {figure['unit']})"
            lines.append(f"| {figure['name'] if figure else aim.row} | {aim.bound} | "
                         f"{getattr(aim, kind) if kind else 'none'} | "
                         f"{ratio}{value} | {met} |")
        return "\n".join(lines)


def _replace(path: Path, text: str) -> None:
    beside = path.with_suffix(".part")
    beside.write_text(text)
    os.replace(beside, path)


def gpu_slug() -> str:
    """The card's name as it stands in a file's: "h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", _gpu_name().lower()).strip("-")


@cache
def _gpu_name() -> str:
    """Asked of the driver's tool, before any stage has begun."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    try:
        said = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True,
                              text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    return said.splitlines()[0].replace("NVIDIA", "") if said else "unknown"
