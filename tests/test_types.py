"""The package's annotations agree with its code, by mypy; `type_check.py` says of which files."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WRONG = """import asyncio

from stars.outputs import Attempt

def untyped(value):
    return value

def reward(attempt: Attempt) -> str:
    return attempt.reward

def of_python_3_11() -> None:
    asyncio.TaskGroup()
"""


def check(*files: str) -> tuple[int, str]:
    """(exit code, output) of the check. In a process of its own: mypy holds on to some hundred megabytes."""
    assert find_spec("mypy") is not None, "mypy is not installed here: pip install -r requirements.txt"
    done = subprocess.run([sys.executable, "tests/type_check.py", *files], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_package():
    code, output = check()
    assert code == 0, output


def test_what_is_wrong_is_found(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG)
    code, output = check(str(wrong))
    found = [line.rpartition("[")[2] for line in output.splitlines() if line.startswith(f"{wrong}:")]
    newer = ["attr-defined]"] if sys.version_info < (3, 12) else []
    assert code == 1 and found == ["no-untyped-def]", "return-value]", *newer]
