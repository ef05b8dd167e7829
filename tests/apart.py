"""Test files that run in processes of their own, begun beside the tests before them where a core is free for that.

A test `is_apart` stands for such a run. `Beside` begins the runs of a session one at a time, in their order, so that a
test mostly finds its run ended. No thread looks after them: tests count threads, and fork.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest


class Apart:
    """The tests of `file` in a process that has these variables, and no longer than `timeout` seconds.

    It has one thread: what it computes is small, and the other cores have work.
    """

    def __init__(self, file: Path, environment: dict[str, str], timeout: float):
        self.command = [sys.executable, "-m", "pytest", "-q", "-x", "--durations=5", str(file)]
        self._home = file.parent.parent
        self._environment = os.environ | {"OMP_NUM_THREADS": "1", "STARS_NUM_THREADS": "1"} | environment
        self._timeout = timeout
        self._process: subprocess.Popen | None = None

    @property
    def begun(self) -> bool:
        """Whether the process was started."""
        return self._process is not None

    @property
    def ended(self) -> bool:
        """Whether the process has ended by itself, or been stopped as it took too long."""
        if self._process is None:
            return False
        if self._process.poll() is None and time.monotonic() > self._deadline:
            self.stop()
        return self._process.poll() is not None

    def begin(self) -> None:
        """Starts the process. What it prints goes to a file: a pipe that nobody reads would fill."""
        self._output = tempfile.TemporaryFile("w+", encoding="utf8", errors="replace")
        self._deadline = time.monotonic() + self._timeout
        self._process = subprocess.Popen(self.command, cwd=self._home, env=self._environment, text=True,
                                         stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.STDOUT)

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def check(self) -> None:
        """Fails with the output of a process that has ended unless its tests passed."""
        if not self._process.returncode:
            return
        self._output.seek(0)
        late = f" after {self._timeout:.0f} seconds" if time.monotonic() > self._deadline else ""
        pytest.fail(f"{' '.join(self.command)}: exit code {self._process.returncode}{late}\n"
                    f"{self._output.read()[-8000:]}", pytrace=False)


class Beside:
    """The runs of a session: `most` of them at a time beside the tests of this process."""

    def __init__(self, runs: Sequence[Apart], most: int):
        self._runs, self._most = list(runs), most

    def go_on(self, most: int | None = None) -> None:
        """Begins the next runs, if fewer than `most` are under way."""
        free = (self._most if most is None else most) - sum(run.begun and not run.ended for run in self._runs)
        for run in [run for run in self._runs if not run.begun][: max(free, 0)]:
            run.begin()

    def wait_for(self, run: Apart) -> None:
        """Returns once a run has ended. Meanwhile this process works on nothing, so one more may be under way."""
        if not run.begun:
            run.begin()
        while not run.ended:
            self.go_on(self._most + 1 if self._most else 0)
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends what is under way."""
        for run in self._runs:
            run.stop()


def cores() -> int:
    """How many may be used: those of this process, or as many as libstars was told to use threads."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
               int(os.environ.get("STARS_NUM_THREADS", "64")))


def runs_of(items: Sequence[pytest.Item]) -> list[Apart]:
    """The runs that the tests of a session stand for, without those that will be skipped."""
    return [item.function.apart for item in items if hasattr(getattr(item, "function", None), "apart")
            and not any(mark.args[0] for mark in item.iter_markers("skipif"))]


def is_apart(file: Path, environment: dict[str, str], timeout: float) -> Callable[..., None]:
    """A test that runs a file in a process that has these variables, and fails with its output if that fails."""
    run = Apart(file, environment, timeout)

    def test(beside: Beside) -> None:
        beside.wait_for(run)
        run.check()

    test.apart = run
    return test


def run_apart(names: dict, variable: str = "STARS_TESTS_APART", timeout: float = 900) -> None:
    """Replaces the tests among a module's `names` by one that runs them in a process where `variable` is 1.

    Where it is 1 already nothing is replaced: so one of those tests is run by itself.
    """
    if os.environ.get(variable) == "1":
        return
    for name in [name for name in names if name.startswith("test_")]:
        del names[name]
    names["test_in_a_process_of_its_own"] = is_apart(Path(names["__file__"]), {variable: "1"}, timeout)
