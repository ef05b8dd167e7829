"""benchmarks/device without a GPU: its dry run works from end to end, and whatever breaks or kills it costs little."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from apart import run_apart

ROOT = Path(__file__).resolve().parents[1]
DEVICE = ROOT / "benchmarks" / "device"
sys.path.insert(0, str(DEVICE))

import aims  # noqa: E402
import record as records  # noqa: E402
import report  # noqa: E402
import stages  # noqa: E402

ALWAYS = [stage for stage in stages.STAGES if stage.always and stage.dry]
FIELDS = {"name", "part", "value", "unit", "limit", "of", "ratio", "aim", "higher_is_better", "detail"}


def start(out: Path, *options: str, broken: str = "", mark: str = "") -> subprocess.Popen:
    environment = os.environ | {"STARS_DEVICE_BREAK": broken, "STARS_TEST_MARK": mark}
    environment.pop("OUT", None)
    return subprocess.Popen([sys.executable, str(DEVICE / "run.py"), "--dry-run", "--out", str(out), *options],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def run(out: Path, *options: str, broken: str = "", timeout: int = 170) -> tuple[int, str, dict]:
    """(exit status, output, the newest JSON) of a dry run."""
    process = start(out, *options, broken=broken)
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output, newest(out)


def newest(out: Path) -> dict:
    files = [file for file in out.glob("device-*.json") if not file.stem.endswith("-products")]
    return json.loads(max(files, key=lambda file: file.stat().st_mtime_ns).read_text())


def by_name(found: dict) -> dict[str, dict]:
    return {stage["stage"]: stage for stage in found["stages"]}


def python(code: str, cwd: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=cwd,
                          env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_whole_dry_run(tmp_path):
    """Every stage of a whole run: checks pass, figures and facts are there, the table is short and comes last."""
    code, output, found = run(tmp_path)
    assert code == 0, output
    assert [stage["stage"] for stage in found["stages"]] == [stage.name for stage in ALWAYS]
    assert all(stage["status"] == "ok" for stage in found["stages"]), output
    assert found["correct"] and found["dry_run"] and not found["failed_checks"]
    assert found["read_gb_s"] > 0 and found["copy_gb_s"] > 0 and found["machine"]["torch"]
    for stage in found["stages"]:
        assert stage["parts"] and set(stage["parts"].values()) == {"ok"}, stage["stage"]
        assert {one["part"] for one in stage["figures"] + stage["checks"]} <= set(stage["parts"])
        for one in stage["figures"]:
            assert set(one) == FIELDS and not one["aim"], one
            assert one["value"] > 0 or one["unit"] == "rounds", one
    counts = {name: (len(stage["checks"]), len(stage["figures"])) for name, stage in by_name(found).items()}
    assert all(counts[stage.name][0] >= 4 for stage in ALWAYS if stage.correctness and stage.name != "host"), counts
    least = {"machine": 5, "tune-chain": 6, "headline-8b": 15, "quantised-8b": 12, "beside-8b": 8, "products": 4,
             "micro": 20, "serving": 7}
    assert all(counts[name][1] >= count for name, count in least.items()), counts
    assert {"logits", "aligned", "steps", "unfused steps", "early stop", "reward passes"} <= set(
        by_name(found)["headline-8b"]["parts"])
    assert {"fp8", "int8", "int4"} == set(by_name(found)["quantised-8b"]["parts"])
    assert {"methods beside the CPU"} < set(by_name(found)["first-engine"]["parts"])
    assert {"sample_step, cuts", "top_tokens"} < set(by_name(found)["first-kernels"]["parts"])
    assert {"cuts of 37, float32", "rankings of 5003", "logprobs"} < set(by_name(found)["kernels-sampler"]["parts"])
    assert {"heads beside the CPU", "several models beside the CPU", "quantised beside the CPU"} < set(
        by_name(found)["engine"]["parts"])
    assert by_name(found)["quantised-8b"]["facts"]["8B fp8: start-up"]["captures"] == 0  # of the CPU
    table = output[output.rindex("CPU, dry run") :].rstrip().splitlines()
    assert len(table) <= report.MAX_LINES and table[-1].endswith(".json") and "correct" in table[-2]
    table = json.loads((tmp_path / "tuned" / "none.json").read_text())
    assert {(entry["name"], entry.get("out")) for entry in table["plain"]} == {
        ("gate_up", None), ("o", None), ("head", "fp32")}
    assert {entry["end"] for entry in table["tiles"]} == {"qkv", "residual", "swiglu", "normed"}
    assert [(entry["rows"], entry["model"]["vocab"]) for entry in table["chains"]] == [(1, 100), (4, 0)]


def test_a_stage_that_breaks_costs_that_stage_only(tmp_path):
    """One raises, one hangs, one dies; the others finish, and the run says what happened and fails."""
    code, output, found = run(
        tmp_path, "--only", "kernels-rows,kernels-products,kernels-sampler,micro,serving", "--stage-seconds", "14",
        broken="kernels-rows=hang,kernels-products=crash,micro=raise")
    assert code == 1
    status = {stage["stage"]: stage["status"] for stage in found["stages"]}
    assert status == {"kernels-rows": "timed out", "kernels-products": "crashed", "kernels-sampler": "ok",
                      "micro": "failed", "serving": "ok"}, output
    assert not found["correct"] and found["failed_stages"] == ["kernels-rows", "kernels-products"]
    assert "RuntimeError: broken on purpose" in output and "NOT CORRECT: kernels-rows, kernels-products" in output
    for name in ("kernels-rows", "kernels-products", "micro"):  # what they had found is there
        assert [one["name"] for one in by_name(found)[name]["figures"]] == ["of a stage that breaks"]


def test_a_part_that_ends_its_process_costs_no_other(tmp_path):
    """The stage is started again for what lies behind it, and does not pass for whole."""
    code, output, found = run(tmp_path, "--only", "serving,micro", broken="serving=die,micro=pass")
    stage = by_name(found)["serving"]
    assert stage["parts"] == {"before it breaks": "ok", "dies": "failed", "behind it": "ok"}, output
    assert [one["name"] for one in stage["figures"]] == ["of a stage that breaks", "of a part behind one that dies"]
    assert stage["status"] == "failed" and stage["error"] == "failed: dies" and code == 0  # no stage of correctness
    assert stage["notes"] == ["dies ended the process: the parts after it ran in another"]
    assert output.count("Fatal Python error: Aborted") <= 1 and "serving again, after dies" in output


def test_a_part_that_is_stuck_costs_no_other(tmp_path):
    code, output, found = run(tmp_path, "--only", "serving", "--part-seconds", "1", broken="serving=stuck")
    stage = by_name(found)["serving"]
    assert stage["parts"] == {"before it breaks": "ok", "stuck": "failed", "behind it": "ok"}, output
    assert [one["name"] for one in stage["figures"]][-1] == "of a part behind one that is stuck"
    assert stage["seconds"] < 20 and stage["status"] == "failed" and output.count("serving again") == 1


def test_the_time_of_a_run_is_kept(tmp_path):
    """What no longer fits is left out and said to be; the table still comes."""
    begin = time.monotonic()
    code, output, found = run(tmp_path, "--only", "serving,micro,products", "--seconds", "5",
                              broken="serving=hang,products=pass,micro=pass")
    assert time.monotonic() - begin < 12 and "written to" in output
    assert by_name(found)["serving"]["status"] == "timed out"
    assert [by_name(found)[name]["status"] for name in ("products", "micro")] == ["skipped", "skipped"]
    assert by_name(found)["micro"]["notes"] == ["the time of the run was used up"]


def test_a_kill_among_forked_parts_keeps_what_they_found(tmp_path):
    """Parts in processes of their own: what one has found is on disk while another still runs; all end with the run."""
    mark = uuid.uuid4().hex
    process = start(tmp_path, "--only", "kernels-rows", broken="kernels-rows=apart", mark=mark)
    try:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            found = by_name(newest(tmp_path)) if list(tmp_path.glob("device-*.json")) else {}
            if len(found.get("kernels-rows", {"figures": []})["figures"]) == 2:
                break
            time.sleep(0.05)
        process.kill()
        process.communicate(timeout=30)
    finally:
        process.kill()
    stage = by_name(newest(tmp_path))["kernels-rows"]
    assert [one["name"] for one in stage["figures"]] == ["of a stage that breaks", "of a part in a process of its own"]
    assert stage["parts"] == {"before it breaks": "ok", "quick": "ok", "hangs": "running"}
    until = time.monotonic() + 10
    while marked(mark) and time.monotonic() < until:
        time.sleep(0.05)
    assert not marked(mark)


def test_what_is_chosen():
    """A quick run, one by name, a rerun: also of a stage with a part that found no time."""
    code = (f"import sys; sys.path.insert(0, {str(DEVICE)!r})\n"
            "import run; from record import empty\n"
            "from stages import STAGES\n"
            "from types import SimpleNamespace as Options\n"
            "def names(before=None, **given):\n"
            "    options = Options(**dict(only=None, rerun=None, quick=False, dry_run=False) | given)\n"
            "    print([stage.name for stage in STAGES if run._wanted(stage, options, before or {})])\n"
            "names(quick=True)\n"
            "names(only=['micro'])\n"
            "ok = [empty(s.name) | {'status': 'ok', 'parts': {'a': 'ok'}} for s in STAGES if s.always]\n"
            "ok[3]['parts']['b'] = 'no time'\n"
            "ok[-1]['status'] = 'skipped'\n"
            "ok += [empty('sanitizer') | {'status': 'failed'}]\n"
            "names({'stages': ok}, rerun='.')")
    assert python(code, ROOT / "tests").splitlines() == [
        "['machine', 'host', 'first-kernels', 'first-engine', 'headline-8b']", "['machine', 'micro']",
        "['machine', 'first-engine', 'micro', 'sanitizer']"]


def test_a_lost_device_ends_the_stage(tmp_path, monkeypatch):
    """A kernel's error that shows only when the device is waited for is put to the part that launched it."""
    torch = type("Torch", (), {})()
    torch.cuda = type("Cuda", (), {"is_initialized": lambda: True, "synchronize": lambda: None})
    monkeypatch.setitem(sys.modules, "torch", torch)
    record = records.Record(tmp_path / "stage.json", "stage")
    record.part("good", lambda: None)

    def illegal() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    torch.cuda.synchronize = illegal
    with pytest.raises(records.DeviceLost, match="illegal memory access"):
        record.part("bad", lambda: None)
    assert record.content["parts"] == {"good": "ok", "bad": "failed"} and record.content["ended_by"] == "bad"
    assert json.loads((tmp_path / "stage.json").read_text())["ended_by"] == "bad"
    torch.cuda.is_initialized = lambda: False
    assert records.device_lost() is None


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_keeps_what_it_had(tmp_path, how):
    """In every stage: all earlier ones are there, and what this one had found; and no process is left."""
    def killed(index: int) -> str | None:
        stage, out, mark = ALWAYS[index], tmp_path / str(index), uuid.uuid4().hex
        out.mkdir()
        broken = ",".join(f"{other.name}={'hang' if other is stage else 'pass'}" for other in ALWAYS)
        process = start(out, broken=broken, mark=mark)
        try:
            until = time.monotonic() + 60
            while time.monotonic() < until:
                found = by_name(newest(out)) if list(out.glob("device-*.json")) else {}
                if found.get(stage.name, {"figures": []})["figures"]:
                    break
                time.sleep(0.05)
            process.send_signal(how)
            output, _ = process.communicate(timeout=30)
        finally:
            process.kill()
        whole = newest(out)
        found = by_name(whole)
        before = [other.name for other in ALWAYS[:index] if not stage.group or other.group != stage.group]
        if [found[name]["status"] for name in before] != ["ok"] * len(before):
            return f"{stage.name}: {[(name, found.get(name, {}).get('status')) for name in before]}"
        if [one["name"] for one in found[stage.name]["figures"]] != ["of a stage that breaks"]:
            return f"{stage.name} lost its figures: {found[stage.name]}"
        wanted = "cut off" if how == signal.SIGTERM else "running"
        if found[stage.name]["status"] != wanted or process.returncode == 0:
            return f"{stage.name} is {found[stage.name]['status']}, exit status {process.returncode}"
        if how == signal.SIGTERM and "written to" not in output:
            return f"{stage.name}: no table came: {output[-500:]}"
        until = time.monotonic() + 10
        while marked(mark):
            if time.monotonic() > until:
                return f"{stage.name} left processes: {marked(mark)}"
            time.sleep(0.05)
        return None

    with ThreadPoolExecutor(3) as pool:
        problems = [problem for problem in pool.map(killed, range(len(ALWAYS))) if problem]
    assert not problems, "\n".join(problems)


def marked(mark: str) -> list[int]:
    """Processes that were started with this mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            pass  # it has just ended
    return found


def test_a_rerun_repeats_what_failed_or_is_missing(tmp_path):
    """The machine is looked at again; what was well is kept with its figures, also inside a stage."""
    rest = ",".join(f"{stage.name}=pass" for stage in ALWAYS if stage.name not in ("machine", "products", "serving"))
    _, _, first = run(tmp_path, "--only", ",".join(stage.name for stage in ALWAYS if stage.name != "serving"),
                      broken=f"{rest},products=raise")
    assert by_name(first)["products"]["status"] == "failed" and "serving" not in by_name(first)
    time.sleep(0.05)
    code, output, second = run(tmp_path, "--rerun", str(tmp_path), broken=rest.replace("=pass", "=raise"))
    assert code == 0, output
    ran = {line.split(" ")[0] for line in output.splitlines() if "(at most" in line}
    assert ran == {"machine", "products", "serving"}
    assert all(stage["status"] == "ok" for stage in second["stages"]) and len(second["runs"]) == 2
    assert list(by_name(second)) == [stage.name for stage in ALWAYS]
    figures = [one["name"] for one in by_name(second)["products"]["figures"]]
    assert figures[0] == "of a stage that breaks" and len(figures) == 7  # its good part was kept, and not repeated


def test_a_rerun_keeps_the_rest_of_a_table(tmp_path):
    """The table has the rows of both runs, under the card's name."""
    _, _, first = run(tmp_path, "--only", "products")
    file = next(file for file in tmp_path.glob("device-*.json") if not file.stem.endswith("-products"))
    by_name(first)["products"]["parts"]["8 rows"] = "no time"
    file.write_text(json.dumps(first))
    (tmp_path / "tuned" / "none.json").unlink()
    run(tmp_path, "--rerun", str(tmp_path), broken=",".join(
        f"{stage.name}=pass" for stage in ALWAYS if stage.name not in ("machine", "products")))
    table = json.loads((tmp_path / "tuned" / "none.json").read_text())["plain"]
    assert sorted((entry["rows"], entry["name"]) for entry in table) == [
        (1, "gate_up"), (1, "head"), (1, "o"), (8, "gate_up"), (8, "head"), (8, "o")]


def test_parts_that_were_well_are_not_run_again(tmp_path):
    """A part that raises, one with a failed check, one without time and one that is well; then the others again."""
    def bad() -> None:
        raise ValueError("on purpose")

    def short() -> None:
        raise records.OutOfTime("no time was left for half of it")

    first = records.Record(tmp_path / "stage.json", "stage")
    first.part("good", lambda: first.figure("good figure", 2.0, "s", 4.0))
    first.part("raises", bad)
    first.part("wrong", lambda: first.check("wrong check", False))
    first.part("late", bad, least=1e9)
    first.part("cut short", short)
    assert first.content["parts"] == {"good": "ok", "raises": "failed", "wrong": "failed", "late": "no time",
                                      "cut short": "no time"}
    assert not first.finish() and first.content["status"] == "failed"
    assert "1 checks failed" in first.content["error"] and "ValueError: on purpose" in " ".join(first.content["notes"])
    second = records.Record(tmp_path / "again.json", "stage", content=records.kept(first.content))
    second.part("good", bad)
    for name in ("raises", "wrong", "late", "cut short"):
        second.part(name, lambda name=name: second.figure(name, 1.0, "s"))
    assert second.finish() and set(second.content["parts"].values()) == {"ok"}
    assert [one["name"] for one in second.content["figures"]] == ["good figure", "raises", "wrong", "late",
                                                                        "cut short"]
    assert second.content["figures"][0]["ratio"] == 0.5 and not second.content["checks"]
    assert json.loads((tmp_path / "again.json").read_text())["status"] == "ok"


def test_a_measurement_that_fails_costs_its_own_figures(tmp_path):
    """The others of the stage are there, and the stage does not pass for whole."""
    code = (f"import sys; sys.path.insert(0, {str(DEVICE)!r})\n"
            "import importable; importable.install()\n"
            "import bench, headline, micro; from record import Record, Settings\n"
            "def broken(*given): raise RuntimeError('broken on purpose')\n"
            "settings = Settings(dry=True, quick=True)\n"
            "record = Record('record.json', 'micro')\n"
            "broken.__name__ = 'sampler'\n"
            "micro.sampler = broken\n"
            "micro.run(record, settings)\n"
            "other = Record('bench.json', 'headline-8b')\n"
            "bench.Bench.plain = broken\n"
            "headline.llama_8b(other, settings)\n"
            "print([name for name, how in [*record.content['parts'].items(), *other.content['parts'].items()] "
            "if how != 'ok'], record.finish(), other.finish())")
    assert python(code, tmp_path).splitlines()[-1] == "['sampler', 'plain tokens'] False False"


def test_parts_in_processes_of_their_own(tmp_path):
    """One that kills its process costs itself; what the others find comes together, in the order of the parts."""
    code = (f"import sys; sys.path.insert(0, {str(DEVICE)!r})\n"
            "import os, time, parallel; from record import Record, Settings\n"
            "def dies(record, settings):\n"
            "    record.figure('before', 1.0, 's'); os.kill(os.getpid(), 9)\n"
            "def raises(record, settings): raise ValueError('on purpose')\n"
            "def slow(record, settings): time.sleep(0.5); record.check('slow', True); record.fact('seen', 1)\n"
            "record = Record('record.json', 'stage')\n"
            "parts = {'slow': slow, 'dies': dies, 'raises': raises, 'also': slow}\n"
            "parallel.run_apart(record, Settings(dry=True), parts, most=2)\n"
            "content = record.content\n"
            "print(content['parts'], [one['name'] for one in content['figures']], len(content['checks']), "
            "content['facts'], os.listdir('.'), record.finish())")
    assert python(code, tmp_path).splitlines()[-1] == (
        "{'slow': 'ok', 'dies': 'failed', 'raises': 'failed', 'also': 'ok'} ['before'] 2 {'seen': 1} "
        "['record.json'] False")


def seconds_of(some: list) -> int:
    """The most that stages take together: those of one group run side by side."""
    return sum(max(stage.seconds for stage in group) for group in stages.groups(some))


def test_the_limits_add_up():
    """300 seconds for a whole run and 120 for a quick one, each kind of knowledge within its own."""
    assert seconds_of([stage for stage in stages.STAGES if stage.always]) <= stages.TOTAL_SECONDS <= 295
    assert seconds_of([stage for stage in stages.STAGES if stage.quick]) <= stages.QUICK_SECONDS < 120
    most = {"first light": 40, "chain": 45, "headline": 65, "quantised": 35, "beside": 45, "kernels": 35, "limits": 25,
            "serving": 20}
    kinds = {"first light": ("machine", "host", "first-kernels", "first-engine"), "chain": ("tune-chain",),
             "headline": ("headline-8b",), "quantised": ("quantised-8b",), "beside": ("beside-8b",),
             "limits": ("products", "micro"), "serving": ("serving",)}
    kinds["kernels"] = tuple(stage.name for stage in stages.STAGES if stage.group == "kernels")
    assert {name for names in kinds.values() for name in names} == {
        stage.name for stage in stages.STAGES if stage.always}
    for kind, names in kinds.items():
        assert seconds_of([stage for stage in stages.STAGES if stage.name in names]) <= most[kind], kind
    assert all(stage.quick for stage in stages.STAGES if stage.name in (*kinds["first light"], "headline-8b"))


def test_rows_and_bounds():
    """A row without a figure is not measured; a figure meets its bound or misses it."""
    aim = aims.BY_KEY["step-16"]
    assert [aim.met(ratio) for ratio in (None, 1.0, 1.08, 1.09)] == [None, True, True, False]
    assert [aims.BY_KEY["together"].met(ratio) for ratio in (7.9, 8.0)] == [False, True]
    assert aims.BY_KEY["aligned-0.1"].met(1.0) is None
    options = type("Options", (), dict(out="/nonexistent", dry_run=False, quick=False))
    made = report.Report.__new__(report.Report)
    made.options, made.runs, made.seconds, made.date = options, [], 1.0, "2026-01-01T00:00:00Z"
    made.target, made.background = Path("device-h100.json"), {}
    figures = [{"name": f"figure {index}", "part": "p", "value": 1.0, "unit": "ms", "limit": 1.0, "of": "it",
                "ratio": 1.0, "aim": "step-16" if index == 90 else "", "higher_is_better": False, "detail": {}}
               for index in range(100)]
    stage = records.empty("headline-8b") | {"figures": figures, "status": "ok", "correctness": False, "checks": [
        {"name": f"check {index}", "part": "p", "passed": False, "detail": {}} for index in range(30)]}
    made.stages = {name.name: stage | {"stage": name.name, "figures": figures if index == 0 else []}
                   for index, name in enumerate(stages.STAGES)}
    lines = made.lines()
    assert len(lines) == report.MAX_LINES
    assert sum("not measured" in line for line in lines) == len(aims.AIMS) - 1
    assert any(line.startswith("figure 90 ") and line.endswith("met") for line in lines)
    made.stages["machine"]["facts"] = {"machine": {"gpu": "NVIDIA H100 80GB HBM3"}}
    block = made.notes()
    assert block.count("not measured") == len(aims.AIMS) - 1
    assert "| figure 90 | <= 1.08 | 1.04 | 1 (1 ms) | met |" in block


def test_without_transformers_there_is_a_note(tmp_path):
    """What does not need it runs."""
    stub = tmp_path / "stub" / "transformers"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise RuntimeError('not here')\n")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(stub.parent)
    try:
        code, output, found = run(tmp_path, "--only", "headline-8b,beside-8b")
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    assert code == 0, output
    headline, beside = found["stages"]
    assert headline["notes"] == ["transformers cannot be imported (not here): logits were compared with nothing"]
    assert beside["notes"] == ["transformers cannot be imported (not here): nothing to stand beside"]
    assert not beside["figures"]
    assert len(headline["figures"]) >= 15 and headline["status"] == beside["status"] == "ok"


def test_no_gpu_is_one_line(tmp_path):
    """Nothing runs, nothing is left behind, and the exit status says so."""
    done = subprocess.run([sys.executable, str(DEVICE / "run.py"), "--out", str(tmp_path)], capture_output=True,
                          text=True, timeout=120, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1 and not list(tmp_path.iterdir()) and not done.stderr
    assert done.stdout == "run.py: there is no GPU here: run it on a machine with one, or with --dry-run\n"


@pytest.mark.parametrize(("options", "words"), [
    (["--only", "micro,unknown"], "there is no stage unknown"),
    (["--rerun", "."], "there is no device-dry-*.json in ."),
    (["--rerun", "odd"], "device-dry-1.json is no result of this runner"),
    (["--rerun", "real"], "there is no device-dry-*.json in real"),
    (["--out", "odd/device-dry-1.json"], "is no folder"),
])
def test_arguments_that_cannot_be(tmp_path, options, words):
    for folder, name in (("odd", "device-dry-1.json"), ("real", "device-h100-1.json")):  # a card's is no dry run's
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(json.dumps({"format": report.FORMAT, "stages": [{"stage": "micro"}]}))
    done = subprocess.run([sys.executable, str(DEVICE / "run.py"), "--dry-run", *options], capture_output=True,
                          text=True, timeout=60, cwd=tmp_path)
    assert done.returncode != 0 and words in done.stderr


def test_a_pair_that_does_not_fit_the_card(tmp_path):
    """It says what it would need and a 1B pair takes its place; on an 80 GB card the 8B pair has room to spare."""
    code = (f"import sys; sys.path.insert(0, {str(DEVICE)!r})\n"
            "import importable; importable.install()\n"
            "import torch, bench; from record import Record, Settings\n"
            "from stars import prefill\n"
            "torch.cuda.is_available, torch.cuda.get_device_capability = lambda: True, lambda *given: (9, 0)\n"
            "torch.cuda.get_device_name = lambda *given: 'none'\n"
            "needed = bench.needs('Llama-3.1-8B')\n"
            "record = Record('record.json', 'headline-8b')\n"
            "for free in (75e9, 40e9):\n"
            "    torch.cuda.mem_get_info = lambda: (int(free), 80 << 30)\n"
            "    print(bench.fitting(record, Settings(), 'Llama-3.1-8B', 'Llama-3.2-1B'))\n"
            "print(record.content['notes'], sum(needed.values()) < 75e9, len(needed))")
    lines = python(code, tmp_path).splitlines()
    assert lines[0] == "Llama-3.1-8B" and lines[-2] == "Llama-3.2-1B"
    assert "a pair of Llama-3.1-8B needs" in lines[-1] and lines[-1].endswith("Llama-3.2-1B instead'] True 11")


def test_parameters_are_those_of_a_checkpoint():
    """The formula against real decoders of the toy shapes, and the published sizes."""
    code = (f"import sys; sys.path.insert(0, {str(DEVICE)!r})\n"
            "import importable; importable.install()\n"
            "import torch; from models import config_of, hf_over, parameters, random_decoder\n"
            "for shape in ('toy', 'toy-qwen3'):\n"
            "    for head in ('lm', 'reward'):\n"
            "        config = config_of(shape, head)\n"
            "        model = hf_over(random_decoder(config, 'cpu', torch.float32, head), shape, head)\n"
            "        print(sum(p.numel() for p in model.parameters()) == parameters(config, head))\n"
            "print(parameters(config_of('Llama-3.1-8B'), 'lm'), parameters(config_of('Llama-3.2-1B'), 'lm'))")
    lines = python(code, ROOT / "tests").splitlines()
    assert lines == ["True"] * 4 + ["8030261248 1235814400"]


def test_the_checkout_is_importable_without_an_installation(tmp_path):
    """`stars` is engine/ and its two folders, in any working directory, and nothing else becomes importable."""
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(DEVICE)!r}]\n"
            "import importable; importable.install()\n"
            "import stars, stars.kernels.types, stars.bindings, importlib.util as util\n"
            "names = [util.find_spec(name) for name in ('kernels', 'engine', 'bindings')]\n"
            "print([stars.__file__, stars.kernels.types.__file__, stars.bindings.__file__], names)")
    wanted = [str(ROOT / place) for place in ("engine/__init__.py", "kernels/types.py", "bindings/__init__.py")]
    assert python(code, tmp_path) == f"{wanted} [None, None, None]"


run_apart(globals())
