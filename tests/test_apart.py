"""Runs of test files in processes of their own: begun in turn, waited for, and failed with what they said."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from apart import Apart, Beside

TESTS = "import os, time\n\ndef test_it():\n    time.sleep(float(os.environ['SECONDS']))\n    assert {passes}\n"


def run_of(folder: Path, name: str, passes: bool = True, seconds: float = 0.0, timeout: float = 60.0) -> Apart:
    file = folder / "tests" / f"test_{name}.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(TESTS.format(passes=passes))
    return Apart(file, {"SECONDS": str(seconds), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, timeout)


def test_a_run_passes_fails_or_takes_too_long(tmp_path):
    good, bad, slow = (run_of(tmp_path, "good"), run_of(tmp_path, "bad", passes=False),
                       run_of(tmp_path, "slow", seconds=60.0, timeout=2.0))
    beside = Beside([slow, bad, good], 3)
    beside.go_on()
    for run in (good, bad, slow):
        beside.wait_for(run)
    good.check()
    with pytest.raises(pytest.fail.Exception, match=r"(?s)test_bad.py: exit code 1\n.*assert False.*1 failed"):
        bad.check()
    with pytest.raises(pytest.fail.Exception, match="test_slow.py: exit code -9 after 2 seconds"):
        slow.check()


def test_runs_are_begun_in_turn(tmp_path):
    """One at a time beside the tests, another while those wait for one, and none where there is no core for it."""
    runs = [run_of(tmp_path, name, seconds=60.0) for name in ("first", "second", "third")]
    beside = Beside(runs, 1)
    for _ in range(2):
        beside.go_on()
        assert [run.begun for run in runs] == [True, False, False]
    last = run_of(tmp_path, "last")
    beside = Beside([*runs, last], 1)
    begin = time.monotonic()
    beside.wait_for(last)  # of which a process is kept waiting, with the first beside it
    assert time.monotonic() - begin < 50 and [run.begun for run in runs] == [True, False, False]
    beside.go_on()
    assert [run.begun for run in runs] == [True, False, False]
    beside.stop()
    assert [run.ended for run in runs] == [True, False, False]
    beside.go_on()
    assert [run.begun for run in runs] == [True, True, False]
    beside.stop()
    alone = run_of(tmp_path, "alone")
    single = Beside([alone, runs[2]], 0)
    single.go_on()
    assert not alone.begun
    single.wait_for(alone)
    assert alone.ended and not runs[2].begun
