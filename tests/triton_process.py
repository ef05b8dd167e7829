"""Runs a test file in a process of its own under Triton's interpreter.

The interpreter's flag is read when a kernel is decorated, so interpreter tests and compiler tests cannot share one
process. A file of interpreter tests ends with `run_in_interpreter(globals())`: in the main process that leaves one test
in it, which runs the file again with the flag set, where all of its tests are there.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

from apart import run_apart

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_in_interpreter(names: dict, timeout: int = 900) -> None:
    """Replaces the tests among a module's `names` by one that runs them in the interpreter, unless this is it."""
    run_apart(names, "TRITON_INTERPRET", timeout)
    if not INTERPRETED:
        names["test_in_the_interpreter"] = needs_triton(names.pop("test_in_a_process_of_its_own"))
