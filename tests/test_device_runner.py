"""benchmarks/device without a GPU: its dry run works from end to end, and a stage that breaks costs that stage only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEVICE = ROOT / "benchmarks" / "device"


def run(out: Path, *options: str, broken: str = "", timeout: int = 170) -> tuple[int, str, dict]:
    """(exit status, output, the JSON) of a dry run."""
    environment = os.environ | {"STARS_DEVICE_BREAK": broken}
    environment.pop("OUT", None)
    done = subprocess.run([sys.executable, str(DEVICE / "run.py"), "--dry-run", "--out", str(out), *options],
                          capture_output=True, text=True, timeout=timeout, env=environment, cwd=out)
    files = list(out.glob("device-dry-*.json"))
    assert len(files) == 1, done.stdout + done.stderr
    return done.returncode, done.stdout, json.loads(files[0].read_text())


def python(code: str, cwd: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=cwd,
                          env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_reduced_dry_run(tmp_path):
    """Every kind of stage but the slow comparison with transformers: checks pass, figures and facts are there."""
    stages = ["environment", "kernels-rows", "kernels-attention", "kernels-sampler", "engine", "micro", "end-to-end-1b"]
    code, output, found = run(tmp_path, "--only", ",".join(stages))
    assert code == 0, output
    assert [stage["stage"] for stage in found["stages"]] == stages
    assert all(stage["status"] == "ok" for stage in found["stages"]), output
    assert found["correct"] and found["dry_run"] and not found["failed_checks"]
    assert found["copy_gb_s"] > 0 and found["machine"]["torch"] and found["machine"]["commit"]
    by_name = {stage["stage"]: stage for stage in found["stages"]}
    for name in ("kernels-rows", "kernels-attention", "kernels-sampler", "engine"):
        assert len(by_name[name]["checks"]) >= 10, name
    for name in ("micro", "end-to-end-1b"):
        assert not by_name[name]["notes"] or name == "end-to-end-1b", by_name[name]["notes"]
        assert len(by_name[name]["figures"]) >= 20, name
        for one in by_name[name]["figures"]:
            assert set(one) == {"name", "value", "unit", "limit", "of", "ratio", "aim", "reached", "higher_is_better",
                                "detail"}
            assert one["value"] > 0 and not one["aim"]
    table = output[output.rindex("CPU, dry run") :]
    assert all(stage in table for stage in stages) and table.rstrip().endswith(".json") and "correct" in table


def test_a_stage_that_breaks_costs_that_stage_only(tmp_path):
    """One raises, one hangs, one dies; the others finish, and the run says what happened and fails."""
    code, output, found = run(
        tmp_path, "--only", "kernels-rows,kernels-products,kernels-sampler,micro,end-to-end-qwen3-8b",
        "--stage-seconds", "12", broken="kernels-rows=hang,kernels-products=crash,micro=raise")
    assert code == 1
    status = {stage["stage"]: stage["status"] for stage in found["stages"]}
    assert status == {"kernels-rows": "timed out", "kernels-products": "crashed", "kernels-sampler": "ok",
                      "micro": "failed", "end-to-end-qwen3-8b": "ok"}, output
    assert not found["correct"] and found["failed_stages"] == ["kernels-rows", "kernels-products"]
    assert "RuntimeError: broken on purpose" in output and "NOT CORRECT: kernels-rows, kernels-products" in output


def test_a_measurement_that_fails_costs_its_own_figures(tmp_path):
    """The others of the stage are there, and the stage does not pass for whole."""
    code = (f"import sys; sys.path.insert(0, {str(DEVICE)!r})\n"
            "import importable; importable.install()\n"
            "import end_to_end, micro; from record import Record, Settings\n"
            "def broken(*given): raise RuntimeError('broken on purpose')\n"
            "settings = Settings(dry=True, quick=True)\n"
            "record = Record('record.json', 'micro')\n"
            "broken.__name__ = '_sampler'\n"
            "micro._sampler = broken\n"
            "micro.run(record, settings)\n"
            "bench = Record('bench.json', 'end-to-end-1b')\n"
            "end_to_end.Bench.plain = broken\n"
            "end_to_end.llama_1b(bench, settings)\n"
            "figures = [[one['name'] for one in kept.content['figures']] for kept in (record, bench)]\n"
            "print(record.lost, bench.lost, any('commit' in name for name in figures[0]), "
            "any('at once' in name for name in figures[1]))")
    assert python(code, tmp_path).splitlines()[-1] == "['sampler'] ['plain'] True True"


@pytest.mark.slow
def test_the_whole_dry_run(tmp_path):
    """Beside transformers, too."""
    code, output, found = run(tmp_path)
    assert code == 0, output
    by_name = {stage["stage"]: stage for stage in found["stages"]}
    assert "sanitizer" not in by_name
    assert by_name["side-by-side-1b"]["status"] == by_name["compiled-1b"]["status"] == "ok"
    assert any("loop on transformers, width 1" in one["name"] for one in by_name["side-by-side-1b"]["figures"])


def test_the_checkout_is_importable_without_an_installation(tmp_path):
    """`stars` is engine/ and its two folders, in any working directory, and nothing else becomes importable."""
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(DEVICE)!r}]\n"
            "import importable; importable.install()\n"
            "import stars, stars.kernels.types, stars.bindings, importlib.util as util\n"
            "names = [util.find_spec(name) for name in ('kernels', 'engine', 'bindings')]\n"
            "print([stars.__file__, stars.kernels.types.__file__, stars.bindings.__file__], names)")
    wanted = [str(ROOT / place) for place in ("engine/__init__.py", "kernels/types.py", "bindings/__init__.py")]
    assert python(code, tmp_path) == f"{wanted} [None, None, None]"


def test_the_sanitizer_stage_reads_what_the_tool_says(tmp_path):
    """A stand-in for compute-sanitizer: a clean report over checks passes, an invalid access fails; a tool that refuses
    the card, one that hangs, and none at all are only noted: they say nothing of the kernels."""
    tool = tmp_path / "compute-sanitizer"
    code = (f"import os, sys; sys.path.insert(0, {str(DEVICE)!r})\n"
            "import importable; importable.install()\n"
            "import sanitizer; from record import Record, Settings\n"
            f"sanitizer.PLACES = ()\nrecord = Record('record.json', 'sanitizer')\nos.environ['PATH'] = {{path}}\n"
            "sanitizer.run(record, Settings())\n"
            "print([check['passed'] for check in record.content['checks']], len(record.content['notes']))")
    path = f"{str(tmp_path)!r} + ':/usr/bin:/bin'"
    # The stage under the tool writes what it checked to the file behind --out.
    wrote = 'for last; do :; done; echo \'{"checks": [1, 2]}\' > "$last"\n'
    reports = ((f"{wrote}echo '===== ERROR SUMMARY: 0 errors'\n", "[True, True, True, True] 0"),
               ("echo '===== Invalid __global__ read of size 2'\nexit 77\n", "[False, False, False, False] 0"),
               ("echo 'Error: Device not supported'\nexit 1\n", "[] 4"),
               ("echo '===== ERROR SUMMARY: 0 errors'\n", "[] 4"),  # nothing had run
               (f"{wrote}exec sleep 60\n", "[] 4"))
    for script, wanted in reports:
        tool.write_text(f"#!/bin/sh\n{script}")
        tool.chmod(0o755)
        for file in tmp_path.glob("sanitized-*.json"):
            file.unlink()
        environment = os.environ | {"STARS_STAGE_DEADLINE": f"{time.monotonic() + 13}"}
        assert python(code.format(path=path), tmp_path, environment).splitlines()[-1] == wanted
    tool.unlink()
    assert python(code.format(path="'/nowhere'"), tmp_path).splitlines()[-1] == "[] 1"
