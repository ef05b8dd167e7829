"""A small soak: benchmarks/soak.py with some hundred requests, of another seed than its result's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llguidance")

ROOT = Path(__file__).resolve().parents[1]
COUNT = 300


def test_a_small_soak(tmp_path):
    """In a process of its own, whose objects and threads are counted."""
    output = tmp_path / "soak.json"
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--requests", str(COUNT), "--seed",
                           "17", "--alone", "60", "--growth", "64", "--output", str(output)], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert result["problems"] == [] and sum(result["ends"].values()) == COUNT
    assert result["texts_compared_with_alone"] == 60
    assert all(result["rows"].values()), result["rows"]  # what the engine has is asked of it
    assert {"cancel: cancelled", "abort: abort", "leave: left", "fail: error", "bad: refused"} <= set(result["ends"])
    assert any(end.startswith("close: closed") for end in result["ends"])
