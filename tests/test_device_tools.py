"""What `make device` reads from other tools, and what it makes of it: profiles, sanitizer reports, product tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

DEVICE = Path(__file__).resolve().parents[1] / "benchmarks" / "device"
sys.path.insert(0, str(DEVICE))

import ncu  # noqa: E402
import record as records  # noqa: E402
import tables  # noqa: E402

from stars.kernels.triton import tuned  # noqa: E402

SETUP = f"import sys; sys.path.insert(0, {str(DEVICE)!r})\nimport importable; importable.install()\n"


def python(code: str, cwd: Path, environment: dict[str, str] | None = None) -> list[str]:
    done = subprocess.run([sys.executable, "-c", SETUP + code], capture_output=True, text=True, timeout=300, cwd=cwd,
                          env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


def test_the_sanitizer_stage_reads_what_the_tool_says(tmp_path):
    """A stand-in for compute-sanitizer: a clean report over checks passes, an invalid access fails; a tool that refuses
    the card, one that hangs, and none at all are only noted: they say nothing of the kernels."""
    tool = tmp_path / "compute-sanitizer"
    code = ("import os, sanitizer; from record import Record, Settings\n"
            "sanitizer.PLACES = ()\nrecord = Record('record.json', 'sanitizer')\nos.environ['PATH'] = {path}\n"
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
        environment = os.environ | {"STARS_STAGE_DEADLINE": f"{time.monotonic() + 14}"}
        assert python(code.format(path=path), tmp_path, environment)[-1] == wanted
    tool.unlink()
    assert python(code.format(path="'/nowhere'"), tmp_path)[-1] == "[] 1"


NCU_CSV = '''==PROF== Connected to process 77
==PROF== Profiling "gemv": 0%....100% - 3 passes
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"dram__bytes_read.sum","gpu__time_duration.sum","launch__grid_size",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"
"","","","","","","","","","","","byte","ns","","inst","inst"
"9","77","python3","127.0.0.1","rms_norm_kernel","1","7","(128,1,1)","(8,1,1)","0","9.0","65536","1500","8","1.0","1.0"
"0","77","python3","127.0.0.1","gemv(float)","1","7","(128,1,1)","(8,1,1)","0","9.0","234,881,024","90,112","1,024",\
"11.5","2.25"
"1","77","python3","127.0.0.1","swiglu_kernel","1","7","(128,1,1)","(8,1,1)","0","9.0","524288","2048","8","n/a","3.0"
'''


def test_what_ncu_prints_is_read(tmp_path, monkeypatch):
    """Numbers with separators, units' line and prose left out, one that is no number; and no table at all."""
    rows = ncu.parse(NCU_CSV)
    assert rows.pop(0)["kernel"] == "rms_norm_kernel" and rows == [
        {"kernel": "gemv(float)", "us": 90.112, "bytes read": 234881024.0, "programs": 1024.0,
         "stalls": {"long_scoreboard": 11.5, "wait": 2.25}},
        {"kernel": "swiglu_kernel", "us": 2.048, "bytes read": 524288.0, "programs": 8.0, "stalls": {"wait": 3.0}}]
    assert ncu.parse("==ERROR== no permission to use performance counters\n") == [] == ncu.parse("")
    tool = tmp_path / "ncu"
    monkeypatch.setattr(ncu, "PLACES", (str(tool),))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{NCU_CSV}END\n")
    tool.chmod(0o755)
    record = records.Record(tmp_path / "record.json", "ncu")
    facts = {"read_gb_s": 3000.0, "longest kernels": ["gate_up", "swiglu_kernel", "down"]}
    ncu.run(record, records.Settings(facts=facts))
    figures = record.content["figures"]
    assert [one["name"] for one in figures] == ["ncu: gate_up, long_scoreboard 11.5, wait 2.2",
                                                "ncu: swiglu_kernel, wait 3.0"]
    assert record.content["notes"] == ["ncu has seen no down"]
    assert figures[0]["value"] == pytest.approx(234881024 / 90.112e-6 / 1e9) and figures[0]["limit"] == 3000.0
    for script, words in (("echo refused; exit 3", "ended with 3 and no table"), ("exec sleep 30", "did not end in")):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        monkeypatch.setenv("STARS_STAGE_DEADLINE", f"{time.monotonic() + 2}")
        other = records.Record(tmp_path / "other.json", "ncu")
        ncu.run(other, records.Settings())
        assert words in other.content["notes"][0] and other.finish() and not other.content["figures"]
        assert records.complete(other.content) == ("no table" in words)  # what found no time is to be repeated
    tool.unlink()
    missing = records.Record(tmp_path / "missing.json", "ncu")
    ncu.run(missing, records.Settings())
    assert missing.content["notes"] == ["ncu was not found: left out"] and missing.finish()


def test_a_step_is_taken_apart(tmp_path):
    """Launches of three steps of two layers, behind a prompt's: sums by kernel, a library's named by its neighbours."""
    code = """
import json
from step_table import Launch, table
layer = [("rms_norm_kernel", 2), ("gemv<a>", 17), ("rope_write_kernel", 2), ("attention_kernel", 4),
         ("merge_kernel", 1), ("gemv<a>", 11), ("rms_norm_kernel", 2), ("nvjet<b>", 80), ("swiglu_kernel", 3),
         ("gemv<c>", 40), ("splitKreduce_kernel<d>", 1)]
step = [("take_rows_kernel", 1), *layer, *layer, ("rms_norm_kernel", 2), ("gemv<e>", 350), ("scan_kernel", 5),
        ("finish_kernel", 2)]
prompt = [("take_rows_kernel", 9), ("rms_norm_kernel", 9), ("take_rows_kernel", 5)]
launches, at = [], 0.0
for name, us in [*prompt, *step, *step, *step, ("take_rows_kernel", 1)]:
    launches.append(Launch(name, at, at + us))
    at += us + 1
print(json.dumps(table(launches, {"gate_up": 235e6, "attention_kernel": 4e6})))
print(table([], {}))
"""
    first, empty = python(code, tmp_path)
    rows = {row["kernel"]: row for row in json.loads(first)}
    assert rows["gate_up (nvjet)"] == {"kernel": "gate_up (nvjet)", "launches": 2, "us_a_step": 160, "us": 80,
                                       "bytes": 235e6, "gb_s": pytest.approx(2937.5)}
    assert {name: rows[name]["us_a_step"] for name in ("qkv (gemv)", "o (gemv)", "down (gemv)", "head (gemv)")} == {
        "qkv (gemv)": 34, "o (gemv)": 22, "down (gemv)": 80, "head (gemv)": 350}
    assert rows["down (splitKreduce_kernel)"]["launches"] == 2 and rows["rms_norm_kernel"]["launches"] == 5
    assert rows["all, from the first launch to the end of the last"]["us_a_step"] == 1 + 2 * 163 + 359 + 26
    assert list(rows)[0].startswith("all") and empty == "[]"


def test_a_fused_step_is_taken_apart(tmp_path):
    """Its products have one name, and are told apart by their place in a layer."""
    code = """
from step_table import labels
layer = ["product_kernel", "attention_kernel", "product_kernel", "product_kernel", "product_kernel"]
names = ["embedding_scaled_kernel", *layer, *layer[:2], "merge_kernel", *layer[2:], "product_kernel", "scan_kernel"]
print([label.split(" ")[0] for label in labels(names)])
"""
    layer = ["qkv", "attention_kernel", "o", "gate_up", "down"]
    assert python(code, tmp_path) == [str(["embedding_scaled_kernel", *layer, *layer[:2], "merge_kernel", *layer[2:],
                                           "head", "scan_kernel"])]


def test_a_table_is_what_was_measured_and_what_was_not(tmp_path):
    """Of the stages' parts, and of the table in the checkout for all else; read again, it says the same."""
    tile = tuned.Tile(16, 64, 128, 4, 4, splits=2)._asdict()
    plain = {"scheme": "bf16", "out_features": 64, "in_features": 32, "best": "ours", "tile": tile}
    chain = {"model": tuned.ModelShape(32, 64, 96, 100)._asdict(), "scheme": "bf16", "fused": True}
    entry = {"end": "qkv", "scheme": "bf16", "out_features": 64, "in_features": 32, "tile": tile}
    (tmp_path / "a.json").write_text(json.dumps({
        "version": 2, "plain": [plain | {"rows": 1, "best": "cublas"}, plain | {"rows": 16}], "tiles": [],
        "chains": [chain | {"rows": 1, "fused": False}, chain | {"rows": 4}]}))
    facts = {"tuned bf16": tables.part(2, "A", "a.json", tiles=[entry | {"rows": 1}], chains=[chain | {"rows": 1}]),
             "tuned fp8": tables.part(2, "A", "a.json", tiles=[entry | {"rows": 1, "scheme": "fp8"}]),
             "tuned products": tables.part(2, "A", "a.json", plain=[plain | {"rows": 1}]), "read_gb_s": 1.0}
    found = tables.whole(facts, tmp_path)
    assert [(one["rows"], one["best"]) for one in found["plain"]] == [(1, "ours"), (16, "ours")]
    assert [(one["rows"], one["fused"]) for one in found["chains"]] == [(1, True), (4, True)]
    assert [one["scheme"] for one in found["tiles"]] == ["bf16", "fp8"] and found["file"] == "a.json"
    assert tables.whole({"read_gb_s": 1.0}, tmp_path) is None
    wide = tables.part(2, "A", "a.json", plain=[plain | {"rows": 1, "out": "fp32"}])
    assert [one["best"] for one in tables.whole({"tuned products": wide}, tmp_path)["plain"]] == [
        "ours", "cublas", "ours"]  # an output of another type is another product
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "products": []}))
    assert len(tables.whole(facts, tmp_path)["plain"]) == 1 == len(tables.whole(facts, tmp_path / "none")["chains"])
    (tmp_path / "b.json").write_text(tables.text(found))
    table = tuned.read(tmp_path / "b.json")
    with tuned.using(table):
        assert tuned.fused(tuned.ModelShape(32, 64, 96, 100), "bf16", 3) and table == tuned.parse(found)
        assert tuned.tile("qkv", "fp8", 1, 64, 32) == tuned.Tile(**tile) == tuned.plain("bf16", 9, 64, 32)


def test_later_stages_go_by_what_was_measured(tmp_path):
    code = """
import stage, tables
from record import Settings
from stars.kernels.triton import tuned
tile = tuned.Tile(16, 64, 64, 4, 4)
facts = {"tuned bf16": tables.part(2, "A", "a.json", tiles=[
    {"end": "qkv", "scheme": "bf16", "rows": 8, "out_features": 64, "in_features": 32, "tile": tile._asdict()}])}
before = tuned.tile("qkv", "bf16", 5, 64, 32)
with stage.tuned_in_force(Settings(facts=facts)):
    print(tuned.tile("qkv", "bf16", 5, 64, 32) == tile)
with stage.tuned_in_force(Settings()):
    print(tuned.tile("qkv", "bf16", 5, 64, 32) == before != tile)
"""
    assert python(code, tmp_path) == ["True", "True"]


def test_tiles_that_are_tried_fit_a_block(tmp_path):
    """Of every product, and few enough for their stage; what the card's compiler makes of them is in NOTES."""
    code = """
import tune_chain
from stars.kernels.triton import tuned
for candidates, bytes_a_weight in ((tune_chain.FLOAT_16, 2), (tune_chain.FLOAT_64, 2), (tune_chain.FLOAT_128, 2),
                                   (tune_chain.BITS_8, 1)):
    print(max(tile.stages * tile.inner * (2 * tile.rows + bytes_a_weight * tile.features) // 1024
              for tiles in candidates.values() for tile in tiles), set(candidates) == set(tune_chain.PRODUCTS),
          sum(map(len, candidates.values())) <= 50, all(len(set(tiles)) == len(tiles) for tiles in candidates.values()))
"""
    for line in python(code, tmp_path):
        most, *rest = line.split()
        assert int(most) <= tuned.SHARED[90] - 8 and rest == ["True"] * 3, line


CRASH = """
import host; from record import Record, Settings
host.PROGRAM = {program!r}
host.LIBRARY = host.HERE / "host.py"  # one that is there and is no library
host.shutil.which = lambda tool, which=host.shutil.which: None if "gdb" in tool else which(tool)
record = Record("record.json", "host")
host.run(record, Settings())
print([check["passed"] for check in record.content["checks"]], record.content["parts"], record.finish())
crash = record.content["facts"].get("libstars, the crash", {{}})
print(record.content["facts"]["libstars"]["how"], sorted(crash), {{one["how"] for name, one in crash.items()
      if name in host.CIRCUMSTANCES}}, all("SIG11 si_code" in crash[name]["said"] for name in host.CIRCUMSTANCES
                                           if crash))
"""


def test_a_library_that_crashes_is_looked_into(tmp_path):
    """By what signal, from where, in which circumstances; a wrong product is a failed check, and no crash."""
    abort = "import os, signal\nprint('usable', flush=True)\nsignal.raise_signal(signal.SIGSEGV)"
    checks, crash = python(CRASH.format(program=abort), tmp_path)[-2:]
    assert checks == "[False] {'libstars': 'failed'} False"
    assert crash == ("SIGSEGV ['16 CPUs given', 'again', 'avx2', 'environment', 'machine', 'two threads', "
                     "'without torch'] {'SIGSEGV'} True")
    assert python(CRASH.format(program="print('error', 0.5)"), tmp_path)[-2:] == [
        "[False] {'libstars': 'failed'} False", "0 [] set() True"]
    assert python(CRASH.format(program="print('isa x')\nprint('error 1e-7')"), tmp_path)[-2] == (
        "[True] {'libstars': 'ok'} True")


@pytest.fixture
def cards(tmp_path, monkeypatch):
    """Puts a machine's card by its name, with tables in `tmp_path`."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))

    def forget() -> None:
        for known in (tuned._of_the_card, tuned._shared, tuned.default):
            known.cache_clear()

    def put(name: str) -> None:
        monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
        forget()

    yield put
    forget()


def test_a_measured_table_says_which_products_are_ours(tmp_path, cards):
    """What the products' stage writes is what `linear` reads: the next larger number of rows, None where cuBLAS won."""
    best = {"name": "qkv", "scheme": "bf16", "out_features": 6144, "in_features": 4096}
    small, tall = tuned.Tile(16, 32, 256, 4, 4), tuned.Tile(128, 64, 64, 4, 4)
    entries = [best | {"rows": 16, "best": "ours", "tile": small._asdict()},
               best | {"rows": 1, "best": "cublas", "tile": small._asdict()},
               best | {"rows": 144, "best": "ours", "tile": tall._asdict()},
               best | {"rows": 1, "best": "ours", "tile": tall._asdict(), "out": "fp32"}]
    content = {"version": tuned.VERSION, "plain": entries, "tiles": [], "chains": []}
    (tmp_path / "nvidia-h100-80gb-hbm3.json").write_text(json.dumps(content))
    cards("NVIDIA H100 80GB HBM3")
    assert [tuned.plain("bf16", rows, 6144, 4096) for rows in (1, 2, 16, 17, 132, 144, 145)] == [
        None, small, small, tall, tall, tall, None]
    assert tuned.plain("fp16", 16, 6144, 4096) is None  # not measured
    assert tuned.plain("bf16", 16, 6144, 4096, "bf16") == small
    assert [tuned.plain("bf16", rows, 6144, 4096, "fp32") for rows in (1, 16, 17, 144)] == [tall, None, None, None]
    assert tuned.plain("bf16", 16, 4096, 4096) is None and tuned.plain("fp32", 16, 6144, 4096) is None
    cards("another card")
    assert tuned.plain("bf16", 16, 6144, 4096) is None


def test_a_measured_table_says_what_is_fused(tmp_path, cards):
    shape = tuned.ModelShape(4096, 6144, 14336, 128256)
    tile = tuned.Tile(16, 64, 128, 4, 4, splits=4, swap=True, pdl=True, prefetch=512)
    chain = {"model": shape._asdict(), "scheme": "bf16", "us": 5300}
    content = {"version": tuned.VERSION, "plain": [], "chains": [chain | {"rows": 16, "fused": True},
                                                                 chain | {"rows": 64, "fused": False}],
               "tiles": [{"end": "qkv", "scheme": "bf16", "rows": 16, "out_features": 6144, "in_features": 4096,
                          "tile": tile._asdict()}]}
    (tmp_path / "a-card.json").write_text(json.dumps(content))
    cards("A card")
    assert [tuned.fused(shape, "bf16", rows) for rows in (1, 16, 17, 64, 65)] == [True, True, False, False, False]
    assert not tuned.fused(shape._replace(vocab=32000), "bf16", 1) and not tuned.fused(shape, "fp32", 1)
    assert not tuned.fused(shape, "fp16", 1)  # whose range ends at 65504
    assert tuned.fused(shape, "int4-32", 128) and not tuned.fused(shape, "int4-32", 129)
    assert tuned.tile("qkv", "bf16", 3, 6144, 4096) == tile
    assert tuned.tile("qkv", "bf16", 17, 6144, 4096) == tuned.default("qkv", "bf16", 17, 6144, 4096)
    with tuned.using(tuned.Table()):
        assert not tuned.fused(shape, "bf16", 1) and tuned.tile("qkv", "bf16", 3, 6144, 4096) != tile
    assert tuned.fused(shape, "bf16", 1)


def test_a_table_of_another_version_is_a_warning_and_the_library(tmp_path, cards):
    (tmp_path / "a-card.json").write_text(json.dumps({"gpu": "A card", "products": [{"rows": 1}]}))
    cards("A card")
    with pytest.warns(UserWarning, match=r"a-card.json is a table of version None, not 2: .* has written a new one$"):
        assert tuned.plain("bf16", 1, 6144, 4096) is None
    assert not tuned.fused(tuned.ModelShape(4096, 6144, 14336, 128256), "bf16", 1)


@pytest.mark.parametrize(("text", "why"), [
    ('{"version": 2, "plain": [', "JSONDecodeError: Expecting value: .*"),
    ("[2]", "TypeError: it holds no object"),
    ('{"version": 2, "plain": [], "tiles": []}', "KeyError: 'chains'"),
    ('{"version": 2, "plain": [{"rows": 1}], "tiles": [], "chains": []}', "KeyError: '.*'"),
    ('{"version": 2, "plain": [], "chains": [], "tiles": [{"end": "qkv", "scheme": "bf16", "rows": 1, "out_features": '
     '1, "in_features": 1, "tile": {"rows": 16, "depth": 1}}]}', "TypeError: .*'depth'"),
])
def test_a_broken_table_is_a_warning_and_the_library(tmp_path, cards, text, why):
    (tmp_path / "a-card.json").write_text(text)
    cards("A card")
    with pytest.warns(UserWarning, match=rf"a-card.json cannot be read \({why}\): products .* has written a new one$"):
        assert tuned.plain("bf16", 1, 6144, 4096) is None
    assert tuned.tile("qkv", "bf16", 1, 6144, 4096) == tuned.default("qkv", "bf16", 1, 6144, 4096)


def test_the_tables_that_are_shipped_are_of_this_version():
    files = sorted(tuned.FOLDER.glob("*.json"))
    assert [file.name for file in files] == ["nvidia-h100-80gb-hbm3.json", "nvidia-h200.json"]
    for file in files:
        assert file.name == f"{tuned.slug(json.loads(file.read_text())['gpu'])}.json"
    table = tuned.read(files[0])
    assert len(table.plain) == 5 and not table.chains  # no card has run the fused rotation
    with tuned.using(table):
        assert tuned.plain("bf16", 1, 4096, 14336) == tuned.Tile(16, 32, 512, 4, 3)
        assert tuned.plain("bf16", 400, 4096, 14336) is None
    with tuned.using(tuned.read(files[1])):
        shape = tuned.ModelShape(4096, 6144, 14336, 128256)
        assert [tuned.fused(shape, "bf16", rows) for rows in (1, 16, 64, 65, 128)] == [True] * 3 + [False] * 2
        assert tuned.tile("residual", "bf16", 1, 4096, 4096) == tuned.Tile(16, 64, 128, 4, 4, 4, True, True, 512)
        assert tuned.tile("residual", "int8", 100, 4096, 14336) == tuned.Tile(128, 128, 128, 8, 3, 4)
        assert tuned.tile("qkv", "int4-32", 1, 6144, 4096) == tuned.default("qkv", "int4-32", 1, 6144, 4096)


def test_default_tiles_are_those_that_a_chain_of_products_liked():
    """`results/skinny-h100-80gb-hbm3-2026-11-27.json`, chain "tuned at 16 rows"."""
    measured = {("qkv", 6144, 4096): (64, 128, 4, 4, 4, False), ("residual", 4096, 4096): (64, 128, 4, 4, 4, True),
                ("swiglu", 28672, 4096): (64, 128, 4, 4, 1, True), ("residual", 4096, 14336): (32, 512, 4, 3, 2, False),
                ("normed", 128256, 4096): (64, 256, 4, 3, 1, False)}
    for (end, out_features, in_features), wanted in measured.items():
        assert tuned.default(end, "bf16", 16, out_features, in_features, 227)[1:7] == wanted


def test_default_tiles_fit_every_card_and_every_size():
    for shared in sorted(set(tuned.SHARED.values())):
        for end in ("qkv", "residual", "swiglu", "normed", "plain"):
            for scheme, item in (("bf16", 2), ("fp32", 4), ("fp8", 2), ("int4-128", 2)):
                for rows in (1, 16, 17, 33, 65, 1000):
                    for out_features, in_features in ((96, 96), (6144, 4096), (4096, 14336), (152064, 8192)):
                        tile = tuned.default(end, scheme, rows, out_features, in_features, shared)
                        assert tile.stages * tile.inner * (tile.rows + tile.features) * item <= 1024 * (shared - 8)
                        assert tile.stages >= 2 and tile.splits * 512 <= max(512, in_features)
                        assert tile.features % tuned.SUMMED == 0 and (end != "plain" or tile.splits == 1)


def test_room_is_what_the_largest_launch_needs():
    """By hand: a head of 80 in three tiles of 32, two splits, three blocks of 16 rows; and a product in one piece."""
    tile = tuned.Tile(16, 32, 128, 4, 4, splits=2)
    assert tuned.needed("qkv", tile, 33, 6 * 80, 80) == (3 * 6 * 2 * 16 * 96, 3 * 6)
    assert tuned.needed("residual", tile, 5, 100, 0) == (4 * 2 * 16 * 32, 4)
    assert tuned.needed("qkv", tile._replace(splits=1, features=128), 5, 6 * 80, 80) == (0, 0)
    wide = tuned.Tile(128, 128, 64, 8, 4)
    assert [tuned.of_heads(wide, head_dim)[:2] for head_dim in (16, 80, 128, 256)] == [
        (128, 16), (128, 128), (128, 128), (64, 128)]
    entry = {("residual", "bf16", 100, 64): ((8, tile), (40, tile._replace(splits=1)))}
    with tuned.using(tuned.Table(tiles=entry)):
        assert tuned.room(40, [tuned.Product("residual", "bf16", 100, 64)]) == (4 * 2 * 16 * 32, 4)


def test_kernels_compiled_ahead_are_found_by_their_launch(tmp_path):
    """The engine's kernels over fake tensors, a few of them compiled for sm_90 by workers; the launch of one on its own
    then finds it in Triton's cache."""
    code = """
import os
from compile_pool import Driver, Pointer, Pool, describe
import torch
from triton import knobs
from triton.runtime import driver
from stars.kernels.triton.swiglu import swiglu, swiglu_kernel
pool = Pool(2, 90)
driver.set_active(Driver(90))
from triton.runtime.jit import JITFunction
launch = JITFunction.run
JITFunction.run = lambda self, *args, grid, warmup, **kwargs: describe(self, args, kwargs)
gate_up, out = torch.zeros(17, 2048, dtype=torch.bfloat16), torch.zeros(17, 1024, dtype=torch.bfloat16)
with pool.recording():
    swiglu(gate_up, out)
    swiglu(gate_up[:1], out[:1])
print({name: len(seconds) for name, seconds in pool.wait().items()}, len(pool.tasks))
pool.close()
hits = []
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
swiglu(gate_up, out)
print(hits)
"""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    compiled, hits = python(code, tmp_path, environment)
    assert compiled == "{'swiglu_kernel': 1} 1" and hits == "[True]"


def test_a_product_compiled_ahead_is_the_one_that_its_launch_would_compile(tmp_path):
    """Of weights in int8, which is a type of Triton's, too: told so, it is refused, since it became another kernel."""
    code = """
import tempfile
import torch
from compile_pool import Driver, Pool, describe
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from stars.kernels.linear import as_stored
from stars.kernels.quant import quantize
from stars.kernels.triton import dequant, skinny
pool = Pool(1, 90)
driver.set_active(Driver(90))
JITFunction.run = lambda self, *args, grid, warmup, **kwargs: describe(self, args, kwargs)
weight, x = as_stored(quantize(torch.ones(64, 128), "int8")), torch.zeros(3, 128, dtype=torch.bfloat16)
def product():
    skinny.plain(x, weight, torch.zeros(3, 64, dtype=torch.bfloat16))
with pool.recording():
    product()
    dequant.kernel_scheme, honest = lambda scheme: scheme, dequant.kernel_scheme
    try:
        product()
    except ValueError as error:
        print(error)
dequant.kernel_scheme = honest
print(sum(map(len, pool.wait().values())))
pool.close()
made = []
def compiled(*, src, metadata, metadata_group, times, cache_hit):
    [ptx] = [open(path).read() for name, path in metadata_group.items() if name.endswith(".ptx")]
    made.append((cache_hit, ptx))
knobs.compilation.listener = compiled
product()
skinny.product_kernel.device_caches.clear()
with tempfile.TemporaryDirectory() as folder:
    knobs.cache.dir = folder
    product()
print([hit for hit, _ in made], made[0][1] == made[1][1], "0x4140" in made[0][1])
"""
    refused, count, found = python(code, tmp_path, os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")})
    assert refused.endswith("Triton reads its constants int8 back as types of its own: call them otherwise")
    assert count == "1" and found == "[True, False] True True"


def test_what_a_stage_launches_is_compiled_before_it_is_timed(tmp_path):
    """`compile_first` calls the parts with nothing launched; one that fails there is left to its turn."""
    code = """
import torch
from record import Record, Settings
from rehearse import compile_first
from timing import rehearsing, seconds_a_call
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
import compile_pool
from compile_pool import Driver, describe
from stars.kernels.triton.swiglu import swiglu
driver.set_active(Driver(90))
torch.cuda.get_device_capability = lambda: (9, 0)
JITFunction.run = lambda self, *args, grid, warmup, **kwargs: describe(self, args, kwargs)
compile_pool.usual_workers = lambda: 2
gate_up, out = torch.zeros(17, 96, dtype=torch.bfloat16), torch.zeros(17, 48, dtype=torch.bfloat16)
seen = []
def part(record):
    seen.append((rehearsing(), record.path.name))
    assert seconds_a_call([lambda: swiglu(gate_up, out)] * 3, "cuda") == 1.0
def fails(record):
    raise ValueError("on purpose")
record = Record("record.json", "micro")
compile_first(record, Settings(), [part, fails])
hits = []
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
swiglu(gate_up, out)
facts = record.content["facts"]["micro: kernels compiled ahead"]
print(seen, facts["kernels"], hits, rehearsing(), record.content["figures"])
compile_first(record, Settings(dry=True), [fails])
"""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    assert python(code, tmp_path, environment)[-1] == "[(True, 'rehearsal.json')] 1 [True] False []"


PLANTED = """
from types import SimpleNamespace
import torch
import kernel_ranking, kernel_sampler, launchers
from record import Record, Settings
right, inf = launchers.launchers(True), float("inf")
def never(logits, lanes, filters=True, ended=None, cuts=True):
    right.sample_step(logits, lanes._replace(entropy_cut=lanes.entropy_cut + inf), filters, ended)
def cooler(logits, lanes, filters=True, ended=None, cuts=True):
    right.sample_step(logits.float() * 1.0001, lanes, filters, ended, cuts)
def drawn(logits, lanes, filters=True, ended=None, cuts=True):
    before = lanes.done.clone()
    right.sample_step(logits, lanes, filters, ended, cuts)
    lanes.out_tokens[(lanes.done > before), 1] = 3
def untold(logits, lanes, filters=True, ended=None, cuts=True):
    right.sample_step(logits, lanes, filters, None, cuts)
def highest(logits, ranking, filters=True):
    turned = ranking._replace(token_ids=ranking.token_ids.clone())
    right.top_tokens(logits.flip(1), turned, filters)
    ids = turned.token_ids
    ranking.token_ids.copy_(torch.where(ids >= 0, logits.shape[1] - 1 - ids, ids))
def unfiltered(logits, ranking, filters=True):
    right.top_tokens(logits, ranking._replace(top_k=ranking.top_k * 0), filters)
def forbidden(logits, ranking, filters=True):
    right.top_tokens(logits.clamp(min=-1e30), ranking, filters)
def left(logits, ranking, filters=True):
    right.top_tokens(logits, ranking, filters)
    ranking.token_ids[ranking.token_ids == -1] = -7
def shifted(logits, targets, logprobs):
    right.token_logprobs(logits, targets.clamp(min=0), logprobs)
def coarse(logits, targets, logprobs):
    right.token_logprobs(logits * 1.001, targets, logprobs)
def failed(module, part, **planted):
    module.launchers = lambda dry: SimpleNamespace(**vars(right) | planted)
    record = Record("record.json", "kernels-sampler")
    part(record, Settings(dry=True))
    return any(not check["passed"] for check in record.content["checks"])
def cut(record, settings):
    kernel_sampler.cuts(record, settings, 37, 80, torch.float32)
def ranked(record, settings):
    kernel_ranking.ranked(record, settings, 37, 35)
print([failed(kernel_sampler, cut, sample_step=one) for one in (right.sample_step, never, cooler, drawn, untold)],
      [failed(kernel_ranking, ranked, top_tokens=one) for one in (
          right.top_tokens, highest, unfiltered, forbidden, left)],
      [failed(kernel_sampler, kernel_sampler.given_tokens, token_logprobs=one) for one in (
          right.token_logprobs, shifted, coarse)])
"""


def test_checks_of_cuts_rankings_and_given_tokens_notice_errors(tmp_path):
    """No cut at all, one at another temperature, a token behind it, one that the host is not told of; the highest id of
    equals, a filter that is ignored, tokens that are forbidden, columns that are left as they were; a token in place of
    none, logits of another temperature."""
    assert python(PLANTED, tmp_path)[-1] == f"{[False] + [True] * 4} {[False] + [True] * 4} {[False, True, True]}"


AHEAD = """
import sys
import ahead, fake_cuda
kernels = set()
ahead.describe = lambda kernel, args, options: kernels.add(kernel.fn.__name__)
ahead.STAGES[{stage!r}]()
print(sorted(kernels), fake_cuda.faults)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["first-engine", "engine"])
def test_small_engines_are_compiled_ahead(tmp_path, stage):
    """They run to their end over fake tensors, all methods and heads of theirs; the kernels of a draft are among them.
    """
    kernels = {"scan_kernel", "bracket_kernel", "collect_kernel", "select_kernel", "draw_kernel", "finish_kernel",
               "attention_kernel", "score_kernel", "append_draft_kernel", "copy_rows_kernel"}
    said = python(AHEAD.format(stage=stage), tmp_path)[-1]
    assert said.endswith(" []") and all(repr(kernel) in said for kernel in kernels), said
