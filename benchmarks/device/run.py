"""Everything there is to learn on a GPU in one call of 300 seconds, the most certain knowledge first.

    make device                                        or, with options:
    python benchmarks/device/run.py [--quick] [--only micro,products] [--rerun FOLDER] [--out DIR] [--dry-run]

Every stage is a process with a time limit of its own, so that a crash or a hang loses that stage and no other. What is
found goes to DIR (or $OUT, or benchmarks/results) as it is found, so that a run that is stopped anywhere keeps what it
had: device-<gpu>-<time>.json, its log, tuned/<gpu>.json (to be dropped into kernels/triton/; the stages behind the one
that writes it already go by it), and at the end a block for NOTES.md. --quick takes two minutes: first light and the 8B
headline, by the table that is there. --rerun takes the newest JSON of FOLDER and runs what failed or is missing there.
--dry-run runs on the CPU: toy shapes, torch references or Triton's interpreter instead of kernels, no graphs; it shows
that the script works, and its figures mean nothing. A table comes last; exit status 1 means that something was not
correct.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from importable import ROOT
from record import FAILED, OK, RUNNING, complete, empty
from report import FORMAT, Report, gpu_slug
from stages import MIN_SECONDS, QUICK_SECONDS, STAGES, TOTAL_SECONDS, Stage, groups

HERE = Path(__file__).resolve().parent
POLL_SECONDS = 0.1
IMPORT_SECONDS = 60.0  # from a cold disk
AGAIN_SECONDS, MAX_TIMES = 12.0, 3  # what is left for it to be worth starting a stage again; how often it is started
SAVE_SECONDS = 0.5
AHEAD = ("headline-8b", "quantised-8b", "kernels-attention", "kernels-attention-more", "kernels-sampler", "engine",
         "kernels-products", "kernels-rows", "kernels-fused", "products", "micro")
"""Stages whose kernels are compiled in the background, once the card was described."""


def main() -> int:
    begin = time.monotonic()
    options = _parse()
    if not options.dry_run and options.arch is None:
        print("run.py: there is no GPU here: run it on a machine with one, or with --dry-run")
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    before = _newest(Path(options.rerun), options.dry_run) if options.rerun else {}
    chosen = [stage for stage in STAGES if _wanted(stage, options, before)]
    with tempfile.TemporaryDirectory(prefix="stars-device-", ignore_cleanup_errors=True) as scratch:
        run = Run(options, Path(scratch), before, begin)
        stopped = False
        try:
            run.all(chosen)
        except KeyboardInterrupt:  # SIGTERM too: what was found until now is worth its table
            stopped = True
        finally:
            run.end()
    run.report.print()
    return 0 if run.report.correct and not stopped else 1


class Running:
    """A stage's process: in standby first, then with the device."""

    def __init__(self, stage: Stage, options: argparse.Namespace, scratch: Path, environment: dict[str, str],
                 before: dict | None, times: int = 1):
        self.stage, self.times = stage, times
        self.out, self.log = scratch / f"{stage.name}.json", scratch / f"{stage.name}.log"
        self.ready = self.out.with_suffix(".ready")
        self.ready.unlink(missing_ok=True)
        command = [sys.executable, str(HERE / "stage.py"), stage.name, "--standby", "--out", str(self.out)]
        command += ["--quick"] * options.quick + ["--dry-run"] * options.dry_run + ["--again"] * (times > 1)
        if before is not None:
            parts = scratch / f"{stage.name}-before.json"
            parts.write_text(json.dumps(before))
            command += ["--parts", str(parts)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, cwd=scratch, stdin=subprocess.PIPE, stdout=log,
                                            stderr=subprocess.STDOUT, start_new_session=True)
        self.deadline = 0.0
        self.timed_out = False

    def await_imports(self, until: float) -> None:
        """Until it has imported what is slow to import, or has ended; not for ever."""
        until = min(until, time.monotonic() + IMPORT_SECONDS)
        while not self.ready.exists() and self.process.poll() is None and time.monotonic() < until:
            time.sleep(POLL_SECONDS)

    def go(self, seconds: float, facts: dict) -> None:
        """The device is this stage's, for so long."""
        self.deadline = time.monotonic() + seconds  # of a clock that all processes share
        try:
            self.process.stdin.write((json.dumps({"deadline": self.deadline, "facts": facts}) + "\n").encode())
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended already, and its log says why

    def ended(self) -> bool:
        """Whether it has ended, or has just been ended because its time is up; what it started has ended with it."""
        if self.process.poll() is None and time.monotonic() > self.deadline:
            self.timed_out = True
        elif self.process.poll() is None:
            return False
        self.stop()
        return True

    def stop(self) -> None:
        """Ends the stage and what it started: they are a session of their own."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver is left to it
            self.process.wait(3)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def found(self) -> dict:
        """What the stage has written so far, and how it ended, if it has."""
        found = json.loads(self.out.read_text()) if self.out.exists() else empty(self.stage.name)
        code = self.process.poll()
        if self.timed_out:
            found["status"], found["error"] = "timed out", f"stopped after its time limit\n{self.output()[-800:]}"
        elif code is not None and code != 0 and found["status"] in ("running", OK):
            found["status"], found["error"] = "crashed", f"exit status {code}\n{self.output()[-1500:]}"
        return found | {"correctness": self.stage.correctness}


class Run:
    """One call: its stages, what helps them in the background, and what it has found."""

    def __init__(self, options: argparse.Namespace, scratch: Path, before: dict, begin: float):
        self.options, self.scratch = options, scratch
        self.before = {stage["stage"]: stage for stage in before.get("stages", [])}
        self.begin = begin
        self.total = options.seconds or (QUICK_SECONDS if options.quick else TOTAL_SECONDS)
        self.report = Report(options, before)
        self.environment = os.environ | {
            "STARS_CHECKOUT": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "PYTHONFAULTHANDLER": "1"}
        # One cache for all stages of this run, and of no other: nothing stale is measured.
        self.environment.setdefault("TRITON_CACHE_DIR", str(scratch / "triton"))
        self.environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(scratch / "inductor"))
        self.running: list[Running] = []  # with the device, and in standby
        self.background: dict[str, subprocess.Popen] = {}

    def all(self, chosen: list[Stage]) -> None:
        """The groups of stages one after the other; the next one imports while one runs."""
        waiting = groups(chosen)
        standby = self._prepare(waiting[0]) if waiting else []
        names = [stage.name for stage in chosen]
        if "host" in names or "engine" in names:
            self._help("build_libstars.py")
        # At once: the kernels of one small engine would take one process as long as its stage may; and a hundred tiles.
        for name, workers in (("first-engine", 5), ("tune-chain", 8)):
            if name in names:
                self._help("ahead.py", "--only", name, "--workers", str(workers))
        while waiting:
            group, now = waiting.pop(0), standby
            for one in now:
                one.await_imports(self.begin + self.total)
            left = self.total - (time.monotonic() - self.begin)
            if left < MIN_SECONDS:
                for stage in (stage for rest in [group, *waiting] for stage in rest):
                    if stage.name not in self.report.stages:
                        self.report.stage(self._missing(stage, "skipped", "the time of the run was used up"))
                break
            facts = self.report.facts()
            for one in now:
                most = one.stage.seconds * (2 if self.options.only else 1)  # no others are to have their turn
                limit = min(left, most, self.options.stage_seconds or most)
                print(f"{one.stage.name} (at most {limit:.0f} s)", flush=True)
                one.go(limit, facts)
            standby = self._prepare(waiting[0]) if waiting else []
            self._watch(now)
            if self.report.facts().get("gpu") is False:  # nothing else could run
                break
            if group[0].name == "machine":
                # After the stage whose figures every ratio rests on, in the order in which they are needed.
                self.environment["STARS_FAKE_GPU"] = self.report.facts().get("machine", {}).get("gpu", "none")
                ahead = [name for name in names if name in AHEAD]
                if ahead:
                    self._help("ahead.py", "--only", ",".join(ahead))

    def _prepare(self, group: list[Stage]) -> list[Running]:
        started = [Running(stage, self.options, self.scratch, self.environment,
                           None if stage.name == "machine" else self.before.get(stage.name)) for stage in group]
        self.running += started
        return started

    def _watch(self, group: list[Running]) -> None:
        """Until all of them have ended; what they have found is written down meanwhile."""
        going, saved = list(group), 0.0
        while going:
            for one in [one for one in going if one.ended()]:
                going.remove(one)
                again = self._again(one)
                if again is not None:
                    going.append(again)
                    continue
                self.report.log(f"-- {one.stage.name}\n{one.output()}")
                self.report.stage(one.found())
            if going:
                if time.monotonic() - saved > SAVE_SECONDS:
                    for one in going:
                        found = one.found()
                        self.report.stage(found, save=False)
                        if self._stuck(one, found):
                            one.stop()  # and what comes after that part runs in another process
                    self._note_background()
                    self.report.save(time.monotonic() - self.begin)
                    saved = time.monotonic()
                time.sleep(POLL_SECONDS)
        self.report.save(time.monotonic() - self.begin)

    def _stuck(self, one: Running, found: dict) -> bool:
        """Whether one of its parts takes too long, while there is time for others."""
        most = self.options.part_seconds or one.stage.part_seconds
        return RUNNING in found["parts"].values() and time.monotonic() - found.get("part_began", 1e18) > most and (
            one.deadline - time.monotonic() > _worth(one.stage) and one.times < MAX_TIMES)

    def _note_background(self) -> None:
        """When what runs beside the stages had ended: until then it shared the cores with what was timed."""
        for name, process in self.background.items():
            if process.poll() is not None:
                self.report.background.setdefault(name, round(time.monotonic() - self.begin, 1))

    def _again(self, ended: Running) -> Running | None:
        """A stage that one of its parts has ended, for the parts after that one, in what is left of its time."""
        found, left = ended.found(), ended.deadline - time.monotonic()
        culprits = [name for name, how in found["parts"].items() if how == RUNNING or name == found.get("ended_by")]
        if ended.timed_out or not culprits or left < _worth(ended.stage) or ended.times == MAX_TIMES:
            return None
        found["parts"] |= dict.fromkeys(culprits, FAILED)
        found["notes"].append(f"{', '.join(culprits)} ended the process: the parts after it ran in another")
        print(f"{ended.stage.name} again, after {', '.join(culprits)} ({left:.0f} s)", flush=True)
        content = {name: value for name, value in found.items() if name not in ("correctness", "ended_by")}
        ended.out.write_text(json.dumps(content))  # what is read of it until the new process writes
        again = Running(ended.stage, self.options, self.scratch, self.environment, content, ended.times + 1)
        self.running.append(again)
        again.go(left, self.report.facts())
        return again

    def _help(self, script: str, *arguments: str) -> None:
        """Starts a script beside the stages, at low priority; not in a dry run, where nothing is compiled."""
        if self.options.dry_run:
            return
        arguments = (*arguments, "--arch", str(self.options.arch)) if script == "ahead.py" else arguments
        name = " ".join((script, *arguments[:2]))
        log = (self.scratch / f"help-{len(self.background)}.log").open("wb")
        nice = ["nice", "-n", "10"] if shutil.which("nice") else []
        self.background[name] = subprocess.Popen(
            [*nice, sys.executable, str(HERE / script), *arguments], env=self.environment, cwd=self.scratch, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True)

    def _missing(self, stage: Stage, status: str, why: str) -> dict:
        return empty(stage.name) | {"status": status, "notes": [why], "correctness": stage.correctness}

    def end(self) -> None:
        """Stops whatever runs, and writes down what it had found."""
        self._note_background()
        for process in self.background.values():
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for name, log in zip(self.background, sorted(self.scratch.glob("help-*.log")), strict=False):
            self.report.log(f"-- {name}, in the background\n{log.read_text(errors='replace')[-4000:]}")
        for one in self.running:
            cut_off = one.deadline and one.process.poll() is None
            one.stop()
            if cut_off:
                self.report.stage(one.found() | {"status": "cut off", "error": "the run was stopped"})
        self.report.end(time.monotonic() - self.begin)


def _worth(stage: Stage) -> float:
    """Seconds that have to be left for a stage to be started again."""
    return min(AGAIN_SECONDS, stage.seconds / 2)


def _wanted(stage: Stage, options: argparse.Namespace, before: dict) -> bool:
    if stage.name == "machine" and not (options.only and options.dry_run):
        return True  # the others are measured against this card, and nothing runs where there is none
    if options.only:
        return stage.name in options.only
    found = next((found for found in before.get("stages", ()) if found["stage"] == stage.name), None)
    if found is not None and complete(found):
        return False
    return (stage.always or found is not None) and (stage.dry or not options.dry_run) and (
        stage.quick or not options.quick)


def _newest(folder: Path, dry: bool) -> dict:
    """The newest result of this card in a folder; where there is none it says so and ends."""
    gpu = "dry" if dry else gpu_slug()
    files = sorted(folder.glob(f"device-{gpu}-*.json"), key=lambda path: path.stat().st_mtime)
    files = [file for file in files if not file.stem.endswith("-products")]
    if not files:
        sys.exit(f"run.py: there is no device-{gpu}-*.json in {folder}: give the folder that an earlier run wrote to")
    try:
        found = json.loads(files[-1].read_text())
        if found["format"] == FORMAT and all(set(empty("")) <= set(stage) for stage in found["stages"]):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    sys.exit(f"run.py: {files[-1]} is no result of this runner: give the folder of another")


def _compute_capability() -> int | None:
    """90 for 9.0, of the first GPU; None where the driver finds none. Without torch, which takes seconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    driver.cuDeviceGetAttribute(ctypes.byref(major), 75, 0)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, 0)
    return 10 * major.value + minor.value


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two minutes: first light and the 8B headline")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, toy shapes: whether the script works")
    parser.add_argument("--out", help="folder of the results ($OUT, else benchmarks/results)")
    parser.add_argument("--only", type=lambda text: text.split(","), help=(
        f"comma-separated, after the machine: {', '.join(stage.name for stage in STAGES[1:])}"))
    parser.add_argument("--rerun", metavar="FOLDER", help="run what failed or is missing in the newest result there")
    parser.add_argument("--seconds", type=float, help=f"of the whole run ({TOTAL_SECONDS}, quick {QUICK_SECONDS})")
    parser.add_argument("--stage-seconds", type=float, help="upper bound on every stage's own limit")
    parser.add_argument("--part-seconds", type=float, help="upper bound on every part's")
    options = parser.parse_args()
    unknown = set(options.only or ()) - {stage.name for stage in STAGES}
    if unknown:
        parser.error(f"there is no stage {', '.join(sorted(unknown))}")
    home = ROOT / (".benchmarks" if options.dry_run else "benchmarks/results")
    options.out = options.out or os.environ.get("OUT") or str(home)
    if Path(options.out).exists() and not Path(options.out).is_dir():
        parser.error(f"{options.out} is no folder: give one for the results")
    options.arch = None if options.dry_run else _compute_capability()
    return options


if __name__ == "__main__":
    sys.exit(main())
