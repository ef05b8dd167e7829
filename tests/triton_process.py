"""Runs a test file in a process of its own under Triton's interpreter.

The interpreter's flag is read when a kernel is decorated, so interpreter tests and compiler tests cannot share one
process. A file of interpreter tests ends with `run_in_interpreter(globals())`: in the main process that leaves one test
in it, which runs the file again with the flag set, where all of its tests are there.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_in_interpreter(names: dict, timeout: int = 900) -> None:
    """Replaces the tests among a module's `names` by one that runs them in the interpreter, unless this is it."""
    if INTERPRETED:
        return
    for name in [name for name in names if name.startswith("test_")]:
        del names[name]
    file = Path(names["__file__"])

    @needs_triton
    def test_in_the_interpreter():
        run_pytest(file, {"TRITON_INTERPRET": "1"}, timeout)

    names["test_in_the_interpreter"] = test_in_the_interpreter


def run_pytest(file: Path, environment: dict[str, str], timeout: int) -> None:
    """Runs the tests of `file` in a new process; fails with its output if they do."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--durations=5", str(file)]
    done = subprocess.run(command, cwd=file.parent.parent, env=os.environ | environment, capture_output=True, text=True,
                          timeout=timeout)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}", pytrace=False)
