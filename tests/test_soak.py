"""A small soak: benchmarks/soak.py with some hundred requests, of another seed than its result's."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from array import array
from pathlib import Path

import pytest

pytest.importorskip("llguidance")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import soak  # noqa: E402

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


def test_deadlines_that_are_missed():
    """More than 0.1 % of them explains, at one false alarm in 1000: each is late by a whole round that began after."""
    for missed, count in ((0, 443), (1, 1), (2, 30), (4, 443), (5, 443)):
        tail = sum(math.comb(count, k) * soak.MISSED**k * (1 - soak.MISSED)**(count - k)
                   for k in range(missed, count + 1))
        assert math.isclose(soak.chance(missed, count), tail, rel_tol=1e-9)
    run = object.__new__(soak.Soak)
    run.begins, run.round_ends = array("d", [0.5, 1.5]), array("d", [1.4, 2.0])
    for missed, wrong in ((4, []), (5, ["5 of 443 deadlines were missed by more than a segment"])):
        run.problems, run.late = [], [(1.0, 1.4, 1.4)] * (443 - missed) + [(1.0, 2.1, 2.1)] * missed
        assert run.check_deadlines()["missed"] == missed and run.problems == wrong


def test_a_text_that_is_another_than_alone():
    run = soak.Soak(soak.build(), 60, 17, lambda row: True, 8, 60)
    run.run()
    run.check_texts()
    assert run.problems == []
    deltas = [number for number in run.texts if soak.plan_of(17, number, run.rows).given["sampling_params"].output_kind
              is soak.KIND.DELTA]
    ids, text, *ends = run.texts[deltas[0]][0]
    assert text
    run.texts[deltas[0]][0] = (ids, text[:-1], *ends)
    run.check_texts()
    [problem] = run.problems
    assert problem.startswith(f"request {deltas[0]}: has another text than alone")
