"""The source is in the form that pyproject.toml asks for, by ruff."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("engine", "kernels", "bindings", "benchmarks", "docs", "tests", "setup.py")


def test_lint():
    assert find_spec("ruff") is not None, "ruff is not installed: pip install -r requirements.txt"
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--quiet", *FOLDERS], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
