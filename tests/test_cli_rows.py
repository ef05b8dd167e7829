"""`stars generate` and its files: what may be overwritten and when, whole rows, bad rows alone, --resume."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

import stars
from json_rows import rows, write_rows
from stars.cli import generate as command
from stars.cli import main, options
from stars.cli.rows import rows_of_file
from stars.line_file import LineFile

FLAGS = ["--max-tokens", "7", "--seed", "3", "--max-num-lanes", "8", "--max-num-seqs", "4", "--no-progress"]
STARS = [*FLAGS, "--segment-size", "3", "--max-attempts", "3", "--reward-threshold", "0.5"]
OLD = '{"precious": 1}\n'
# No two share a page: the keys that a finished response leaves in one have other last bits than a prompt's.
PROMPTS = [{"prompt": f"{number} times upon a time", "note": [number]} for number in range(12)]


pytestmark = pytest.mark.usefixtures("usual_signals")


@pytest.fixture
def files(tmp_path):
    """Input, output and trace of a run, the latter two with something in them."""
    output, trace = tmp_path / "out.jsonl", tmp_path / "trace.jsonl"
    output.write_text(OLD)
    trace.write_text(OLD)
    return write_rows(tmp_path / "in.jsonl", *PROMPTS), output, trace


def arguments(files, *more) -> list[str]:
    given, output, trace = files
    return ["generate", "--input", given, "--output", output, "--trace", trace, *more]


def settled(row: dict) -> dict:
    """A row without what differs from run to run: times, and what depends on the company in the batch."""
    return {name: value for name, value in row.items() if name != "metrics"}


def by_index(path) -> list[dict]:
    found = [settled(row) for row in rows(path.read_text())]
    return sorted(found, key=lambda row: row["index"])


def traced(path) -> dict[str, str]:
    """The texts of a trace; every request stands in it once."""
    requests = stars.read_trace(path)
    assert len({request.request_id for request in requests}) == len(requests)
    return {request.request_id: request.completions[0].text for request in requests}


@pytest.fixture(scope="module")
def uninterrupted(pair, tmp_path_factory):
    """Input, output and trace of a whole seeded run."""
    directory = tmp_path_factory.mktemp("whole")
    files = write_rows(directory / "in.jsonl", *PROMPTS), directory / "out.jsonl", directory / "trace.jsonl"
    assert main([str(argument) for argument in arguments(files, *pair, *STARS)]) == 0
    assert len(by_index(files[1])) == len(PROMPTS) == len(traced(files[2]))
    return files


@pytest.fixture
def halfway(uninterrupted, tmp_path):
    """What a kill in the middle of a write leaves of that run: five rows and half of one, a trace cut in a request."""
    files = given, output, trace = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "trace.jsonl"
    shutil.copy(uninterrupted[0], given)
    lines = uninterrupted[1].read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:5]) + lines[5][:40])
    records = uninterrupted[2].read_bytes().splitlines(keepends=True)
    starts = [number for number, record in enumerate(records) if b'"type": "request"' in record]
    trace.write_bytes(b"".join(records[: starts[6] + 2]) + records[starts[6] + 2][:25])
    return files


# -- when files are opened ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [
    ["--model", "/nonexistent"], ["--temperature", "-1"], ["--segment-size", "0"], ["--max-model-len", "100000"],
    ["--reward", "/nonexistent"], ["--trace", "absent/trace"], ["--input", "absent"], ["--bogus"],
])
def test_what_fails_before_the_engine_stands_leaves_files_alone(run, pair, files, wrong):
    code, _, _ = run(*arguments(files, *pair, *FLAGS), *wrong)
    assert code == (2 if wrong == ["--bogus"] else 1)
    assert files[1].read_text() == files[2].read_text() == OLD
    for path in files[1:]:
        path.unlink()
    run(*arguments(files, *pair, *FLAGS), *wrong)
    assert not files[1].exists() and not files[2].exists()


@pytest.mark.parametrize(("where", "number", "code"), [
    ("build_engine", signal.SIGINT, 130), ("build_engine", signal.SIGTERM, 143),
    ("_measured", signal.SIGTERM, 143),
])
def test_an_interrupt_before_the_first_row_leaves_files_alone(run, pair, files, monkeypatch, where, number, code):
    monkeypatch.setattr(options if where == "build_engine" else command, where,
                        lambda *_: signal.raise_signal(number))
    before = signal.getsignal(signal.SIGTERM)
    assert run(*arguments(files, *pair, *FLAGS)) == (code, "", "stars: interrupted\n")
    assert files[1].read_text() == files[2].read_text() == OLD and signal.getsignal(signal.SIGTERM) is before


def test_a_prompt_that_cannot_stream_leaves_the_trace_alone(run, pair, files):
    code, out, err = run("generate", "", "--stream", "--trace", files[2], *pair[:2], *FLAGS)
    assert (code, out) == (1, "") and "empty" in err and files[2].read_text() == OLD


def test_old_files_are_replaced_once_the_engine_stands(run, pair, files):
    code, _, _ = run(*arguments(files, *pair, *STARS))
    assert code == 0 and OLD not in files[1].read_text() + files[2].read_text()
    assert [row["prompt"] for row in by_index(files[1])] == [row["prompt"] for row in PROMPTS]
    assert traced(files[2]) == {str(row["index"]): row["outputs"][0]["text"] for row in by_index(files[1])}


@pytest.mark.parametrize("name", ["itself", "relative", "soft", "hard"])
@pytest.mark.parametrize("flags", [("--input", "--output"), ("--input", "--trace"), ("--output", "--trace")])
def test_one_file_for_two_things_is_refused(run, pair, tmp_path, monkeypatch, flags, name):
    monkeypatch.chdir(tmp_path)
    given = write_rows(tmp_path / "in.jsonl", *PROMPTS)
    other = {"itself": given, "relative": "./in.jsonl", "soft": tmp_path / "soft", "hard": tmp_path / "hard"}[name]
    if name == "soft":
        other.symlink_to(given)
    elif name == "hard":
        os.link(given, other)
    rest = [] if flags[0] == "--input" else ["Once upon"]
    code, _, err = run("generate", *rest, flags[0], given, flags[1], other, *pair, *FLAGS)
    assert code == 1 and err.count("\n") == 1 and all(flag in err for flag in flags)
    assert rows(given.read_text()) == PROMPTS


def test_two_outputs_on_stdout_are_refused(run, pair):
    code, out, err = run("generate", "x", "--json", "--trace", "-", *pair, *FLAGS)
    assert (code, out) == (1, "") and "--trace - and --output - are one file" in err


def test_the_trace_page_does_not_replace_its_trace(run, uninterrupted, tmp_path):
    trace = tmp_path / "t.jsonl"
    shutil.copy(uninterrupted[2], trace)
    os.link(trace, tmp_path / "hard")
    before = trace.read_bytes()
    code, _, err = run("trace", "html", trace, "-o", tmp_path / "hard")
    assert code == 1 and "the trace itself" in err and trace.read_bytes() == before
    page = tmp_path / "page.html"
    page.write_text("old")
    (tmp_path / "broken").write_text("{}\n")
    for wrong in ([tmp_path / "broken", "-o", page], [trace, "-o", tmp_path / "no" / "page.html"], [trace, "-o", ""]):
        assert run("trace", "html", *wrong)[0] == 1 and page.read_text() == "old"
    assert run("trace", "html", trace, "-o", page)[:2] == (0, f"{page}\n")
    assert page.read_text().startswith("<!doctype html>")
    code, out, _ = run("trace", "html", trace, "-o", "-")
    assert code == 0 and out.split("</h1>")[1] == page.read_text().split("</h1>")[1]


def test_write_trace_keeps_the_old_trace_until_the_new_one_is_complete(pair, tmp_path):
    engine = stars.Engine(pair[1], max_num_lanes=4)
    outputs = engine.generate(["Once"] * 2, stars.SamplingParams(max_tokens=2), use_tqdm=False)
    (tmp_path / "t").write_text(OLD)
    with pytest.raises(ValueError):
        stars.write_trace(tmp_path / "t", outputs, engine.tokenizer, [None])
    assert (tmp_path / "t").read_text() == OLD


# -- whole rows ---------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_whole_rows_that_can_be_gone_on_with(run, pair, files, uninterrupted):
    given, output, trace = files
    whole = uninterrupted[1].read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) * 2 // 3, before[1]))
    try:
        code, out, err = run("generate", "--input", given, "--output", output, *pair, *STARS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, out) == (1, "")
    assert err == (f"stars: error: {output}: File too large: every line in it is whole, so make room and go on with "
                   "--resume\n")
    kept = by_index(output)
    assert 4 <= len(kept) < len(PROMPTS) and output.read_bytes().endswith(b"}\n")
    code, _, err = run("generate", "--input", given, "--output", output, "--resume", *pair, *STARS)
    assert code == 0 and err == f"stars: {len(kept)} of 12 rows are done in {output}\n"
    assert by_index(output) == by_index(uninterrupted[1])


def test_a_device_that_is_full_is_said_in_one_sentence(run, pair):
    for flag in ("--output", "--trace"):
        code, _, err = run("generate", "Once", flag, "/dev/full", *pair[:2], *FLAGS)
        assert code == 1 and err.startswith("stars: error: /dev/full: No space left on device: ") and len(
            err.splitlines()) == 1


def test_a_second_run_on_the_same_output_is_refused(run, pair, files):
    for path in files[1:]:
        with LineFile(path):
            code, _, err = run(*arguments(files, *pair, *FLAGS, "--reward-threshold", "0"))
        assert code == 1 and f"{path} is being written by another run" in err and path.read_text() == OLD


def test_devices_and_pipes_take_rows(pair, run, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    code, out, _ = run("generate", "Once", "--output", fifo, "--trace", "/dev/null", *pair[:2], *FLAGS)
    (row,) = rows(os.read(reader, 1 << 16).decode())
    os.close(reader)
    assert (code, out) == (0, "") and row["outputs"][0]["finish_reason"] == "length"
    assert run("generate", "Once", "--output", "/dev/null", *pair[:2], *FLAGS) == (0, "", "")


# -- rows in ------------------------------------------------------------------------------------------------------

BAD = [  # (a line, the id of its row where it can be read, what its error says)
    ('{"id": 1, "prompt": "Once", "x": ' + "[" * 900 + "]" * 900 + "}", 1, "nested more than 100 deep"),
    ('{"id": 2, "prompt": "Once", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", None, "nested too deep"),
    ('{"id": 3, "prompt": "Once", "x": ' + '{"a": [' * 51 + "]}" * 51 + "}", 3, "nested more than 100 deep"),
    ('{"id": 4, "prompt": "Once", "x": NaN}', 4, "NaN is no JSON number"),
    ('{"id": 5, "prompt": "Once", "x": -Infinity}', 5, "-Infinity is no JSON number"),
    ('{"id": "six", "prompt": "Once", "x": [1e400]}', "six", "1e400 is beyond"),
    ('{"id": NaN, "prompt": "Once"}', None, "NaN"),
    ('{"id": 8, "prompt": "Once", "x": ' + "9" * 5000 + "}", None, "too many digits"),
    ('{"id": 9, "prompt_token_ids": [' + "9" * 400 + "]}", 9, "vocabulary"),
    ('{"id": 10, "prompt": "\\ud800"}', 10, "Unicode"),
    (b'{"id": 11, "prompt": "\xff"}', None, "'utf-8' codec"),
    (b'\xff\xfe{\x00"\x00a\x00"\x00', None, "'utf-8' codec"),
    ("[1]", None, "not list"), ("null", None, "not NoneType"), ("1", None, "not int"), ('""', None, "empty"),
    ("{", None, "no row of JSON"), ('{"id": 17}{"id": 18}', None, "no row of JSON"),
    ('{"id": 19}', 19, 'exactly one of "prompt"'),
    ('{"id": 20, "messages": [{"role": 5, "content": []}]}', 20, "chat template"),
    ('{"id": 21, "prompt": 5}', 21, "not int"),
]
GOOD = [  # (a line, the id of its row)
    (b'\xef\xbb\xbf{"id": "first", "prompt": "Once"}\r', "first"),
    ('{"id": "\\udfff", "prompt": "Once"}', "\udfff"),
    ('{"id": -0.5, "prompt": "Once", "x": ' + "9" * 4000 + "}", -0.5),
    ('{"id": 12345678901234567890, "prompt": "Once", "x": ' + "[" * 99 + "]" * 99 + "}", 12345678901234567890),
    ('{"id": "", "prompt": "Once", "error": "old", "outputs": [], "index": 9, "seed": "x", "metrics": 1}', ""),
    ('  {"id": [1], "prompt": "Once"}', [1]),
    ('"Once"', None),
]


def test_a_bad_row_fails_alone(run, pair, tmp_path):
    lines = [GOOD[0][0]]  # the one with the byte order mark
    for number, (line, *_) in enumerate(BAD):
        lines += [line, "  ", *(GOOD[number][0] for _ in range(0 < number < len(GOOD)))]
    given, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    code, out, err = run("generate", "--input", given, "--output", output, *pair[:2], *FLAGS)
    first = next(row for row in rows(output.read_text()) if "error" in row)
    assert (code, out) == (1, "") and err == (f"stars: error: row {first['index']}: {first['error']}\n"
                                              f"stars: {len(BAD)} of {len(BAD) + len(GOOD)} rows failed\n")
    found = sorted(rows(output.read_text()), key=lambda row: row["index"])
    assert [row["index"] for row in found] == list(range(len(BAD) + len(GOOD)))
    failed = [row for row in found if "error" in row]
    assert [row.get("id") for row in failed] == [identity for _, identity, _ in BAD]
    for row, (_, _, words) in zip(failed, BAD, strict=True):
        assert words in row["error"] and row["outputs"] == []
    passed = [row for row in found if "error" not in row]
    assert [row.get("id") for row in passed] == [identity for _, identity in GOOD]
    text = stars.Engine(pair[1], max_num_lanes=8).generate(
        "Once", stars.SamplingParams(max_tokens=7, seed=3), use_tqdm=False)[0].outputs[0].text
    assert {row["outputs"][0]["text"] for row in passed} == {text}
    assert passed[2]["x"] == int("9" * 4000) and passed[4]["seed"] == 3


def test_lines_are_numbered_as_an_editor_does(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\r\n\r\n"a"\r\n{\r\n\t\r\n\xef\xbb\xbf"b"')
    good, bad, mark = rows_of_file(str(path), chat=False)
    assert (good.index, good.prompt, good.error) == (0, "a", None)
    assert bad.index == 1 and bad.error.startswith(f"{path}: line 4 ")
    assert mark.error.startswith(f"{path}: line 6 ")


def test_closed_stdin_is_said(run, pair, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    for words in (["generate", "--input", "-", *pair], ["trace", "show", "-"]):
        code, _, err = run(*words)
        assert code == 1 and "stdin" in err and "closed" in err and err.count("\n") == 1


# -- --resume -----------------------------------------------------------------------------------------------------


def test_a_resumed_run_ends_as_an_uninterrupted_one(run, pair, halfway, uninterrupted):
    code, out, err = run(*arguments(halfway, *pair, *STARS, "--resume"))
    assert (code, out, err) == (0, "", f"stars: 5 of 12 rows are done in {halfway[1]}\n")
    assert by_index(halfway[1]) == by_index(uninterrupted[1])
    assert traced(halfway[2]) == traced(uninterrupted[2])
    assert halfway[1].read_bytes().startswith(b"".join(uninterrupted[1].read_bytes().splitlines(keepends=True)[:5]))


def test_a_finished_run_is_left_alone(run, halfway, pair, uninterrupted, monkeypatch):
    for kept, whole in zip(halfway, uninterrupted, strict=True):
        shutil.copy(whole, kept)
    monkeypatch.setattr(options, "build_engine", lambda args: pytest.fail("there is nothing to run"))
    code, out, err = run(*arguments(halfway, *pair, *STARS, "--resume"))
    assert (code, out, err) == (0, "", f"stars: 12 of 12 rows are done in {halfway[1]}\n")
    assert [path.read_bytes() for path in halfway] == [path.read_bytes() for path in uninterrupted]


@pytest.mark.parametrize("missing", ["both", "trace", "empty"])
def test_resume_begins_where_there_is_nothing(run, pair, files, uninterrupted, missing):
    given, output, trace = files
    for path in (output, trace):
        path.unlink()
    if missing == "trace":
        shutil.copy(uninterrupted[1], output)
        output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:8]))
    elif missing == "empty":
        output.write_bytes(b"")
        trace.write_bytes(b'{"type": "tra')
    assert run(*arguments(files, *pair, *STARS, "--resume"))[0] == 0
    assert by_index(output) == by_index(uninterrupted[1])
    assert len(traced(trace)) == (4 if missing == "trace" else 12)


def test_rows_that_failed_are_run_again(run, pair, files, uninterrupted):
    given, output, trace = files
    write_rows(given, *PROMPTS[:3], {**PROMPTS[3], "prompt": ""}, "{broken", *PROMPTS[5:])
    assert run(*arguments(files, *pair, *STARS))[0] == 1
    again = [json.loads(line) for line in output.read_text().splitlines()]
    again[-1]["outputs"][0]["finish_reason"], again[-1]["error"] = "error", "the reward is NaN"
    write_rows(output, *again)
    assert run(*arguments(files, *pair, *STARS, "--resume"))[0] == 1  # two are still as bad
    assert [row["index"] for row in by_index(output)] == list(range(12)) and len(traced(trace)) == 10
    write_rows(given, *PROMPTS)
    code, _, err = run(*arguments(files, *pair, *STARS, "--resume"))
    assert (code, err) == (0, f"stars: 10 of 12 rows are done in {output}\n")
    assert by_index(output) == by_index(uninterrupted[1]) and traced(trace) == traced(uninterrupted[2])


def test_rows_are_found_by_id_wherever_they_stand_now(run, pair, files):
    given, output, trace = files
    named = [{"id": identity, "prompt": f"Once {identity}"} for identity in ("a", 1, "1", 2.5, -7)]
    write_rows(given, *named)
    assert run(*arguments(files, *pair, *STARS))[0] == 0
    before = {repr(row["id"]): row for row in by_index(output)}
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3]))
    moved = [named[3], {"id": "new", "prompt": "The dog"}, named[0], named[4], named[2], {"prompt": "Twice"}, named[1]]
    write_rows(given, *moved)
    code, _, err = run(*arguments(files, *pair, *STARS, "--resume"))
    assert (code, err) == (0, f"stars: 3 of 7 rows are done in {output}\n")
    found = by_index(output)
    assert [row.get("id") for row in found] == [2.5, "new", "a", -7, "1", None, 1]
    assert [row["index"] for row in found] == list(range(7))
    for row in found:
        if repr(row.get("id")) in before:
            assert {**row, "index": None} == {**before[repr(row["id"])], "index": None}
    assert traced(trace) == {str(row["index"]): row["outputs"][0]["text"] for row in found}
    prompts = {request.request_id: request.prompt for request in stars.read_trace(trace)}
    assert prompts == {str(row["index"]): row["prompt"] for row in found}


def test_a_measured_threshold_is_measured_on_the_same_rows(run, pair, files):
    flags = [*FLAGS, "--segment-size", "3", "--max-attempts", "3"]
    _, _, measured = run(*arguments(files, *pair, *flags))
    whole = by_index(files[1])
    files[1].write_bytes(b"".join(files[1].read_bytes().splitlines(keepends=True)[:9]))
    code, _, err = run(*arguments(files, *pair, *flags, "--resume"))
    assert code == 0 and err.splitlines()[1:] == measured.splitlines() and "reward threshold" in measured
    assert by_index(files[1]) == whole


def changed(given, output, trace, kind) -> None:
    lines = output.read_text().splitlines(keepends=True)
    first = json.loads(lines[0])
    if kind == "another prompt":
        write_rows(given, *[{**row, "prompt": row["prompt"] + "!"} for row in PROMPTS])
    elif kind == "another kind of prompt":
        write_rows(given, *[{"messages": row["prompt"]} for row in PROMPTS])
    elif kind == "a shorter input":
        write_rows(given, *PROMPTS[:1])
        output.write_text("".join(lines[:5]))
    elif kind == "an input that got ids":
        write_rows(given, *[{**row, "id": number} for number, row in enumerate(PROMPTS)])
    elif kind == "the same id twice":
        write_rows(given, *[{**row, "id": 1.0 if number else 1} for number, row in enumerate(PROMPTS[:2])])
    elif kind == "a row twice":
        output.write_text("".join([*lines[:5], lines[0]]))
    elif kind == "no rows of generate":
        output.write_text(OLD)
    elif kind == "no JSON":
        output.write_text(lines[0] + "notes\n" + lines[1])
    elif kind == "notes without a line end":
        output.write_text(lines[0] + "notes")
    elif kind == "an index that is no number":
        write_rows(output, {**first, "index": True})
    elif kind == "outputs that are none":
        write_rows(output, {**first, "outputs": [1]})
    elif kind == "another trace":
        trace.write_text(OLD)
    elif kind == "a trace of another version":
        trace.write_text(trace.read_text().replace('"version": 1', '"version": 2'))
    elif kind == "a damaged trace":
        records = trace.read_text().splitlines(keepends=True)
        trace.write_text("".join([*records[:2], "[]\n", *records[2:]]))


@pytest.mark.parametrize(("kind", "words"), [
    ("another prompt", "line 1: index [0-9]+ was made from another prompt"),
    ("another kind of prompt", "another prompt"), ("a shorter input", "is not in the input"),
    ("an input that got ids", "is not in the input"), ("the same id twice", "rows 0 and 1 .* same id 1.0"),
    ("a row twice", "line 6: index [0-9]+ is there a second time"), ("no rows of generate", "line 1, is not a row"),
    ("no JSON", "line 2, is not a row"), ("notes without a line end", "line 2, is not a row"),
    ("an index that is no number", "line 1, is not a row"), ("outputs that are none", "line 1, is not a row"),
    ("another trace", "line 1, is not the beginning of a trace"),
    ("a trace of another version", "is not the beginning of a trace of version 1"),
    ("a damaged trace", "line 3, is no record"),
])
def test_files_of_another_run_are_refused_and_kept(run, pair, halfway, kind, words):
    changed(*halfway, kind)
    before = [path.read_bytes() for path in halfway]
    code, out, err = run(*arguments(halfway, *pair, *STARS, "--resume"))
    last = err.splitlines()[-1]
    assert (code, out) == (1, "") and last.startswith("stars: error: ") and len(last) < 400
    assert re.search(words, last) and [path.read_bytes() for path in halfway] == before


@pytest.mark.parametrize("flags", [
    [], ["--output", "-"], ["--json"], ["--output", "o", "--trace", "-"], ["--stream"],
])
def test_resume_needs_a_file(run, pair, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("generate", "x", "--resume", *flags, *pair)
    assert code == 2 and "--resume" in err.splitlines()[-1] and not list(tmp_path.iterdir())


def test_resume_needs_a_file_that_can_be_read_again(run, pair, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in ("/dev/null", tmp_path / "fifo"):
        code, _, err = run("generate", "x", "--resume", "--output", path, *pair)
        assert code == 1 and "can be read again" in err


def test_a_row_written_meanwhile_by_another_run_is_noticed(run, pair, halfway, monkeypatch):
    build = options.build_engine
    another = b'{"index": 11, "outputs": []}\n'

    def slow(*args):
        with open(halfway[1], "ab") as file:
            file.write(another)
        return build(*args)

    monkeypatch.setattr(options, "build_engine", slow)
    before = halfway[1].read_bytes()
    code, _, err = run(*arguments(halfway, *pair, *STARS, "--resume"))
    assert code == 1 and "another run is writing to it" in err and halfway[1].read_bytes() == before + another


def test_prompts_as_arguments_are_resumed_too(run, pair, tmp_path):
    flags = ["generate", "Once", "Twice", "Thrice", "--output", tmp_path / "o", *pair[:2], *FLAGS]
    run(*flags)
    whole = by_index(tmp_path / "o")
    (tmp_path / "o").write_bytes((tmp_path / "o").read_bytes().splitlines(keepends=True)[1])
    code, _, err = run(*flags, "--resume")
    assert code == 0 and "1 of 3 rows are done" in err and by_index(tmp_path / "o") == whole


def test_a_killed_run_is_gone_on_with(run, pair, tmp_path):
    """SIGKILL in the middle, then to the end."""
    files = write_rows(tmp_path / "in.jsonl", *({"prompt": f"Once {n}", "id": f"row-{n}"} for n in range(400))), \
        tmp_path / "out.jsonl", tmp_path / "trace.jsonl"
    flags = [*arguments(files), *pair, *STARS, "--resume"]
    process = subprocess.Popen([sys.executable, "-c", "import sys; from stars.cli import main; sys.exit(main())",
                                *map(str, flags)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if files[1].exists() and files[1].read_bytes().count(b"\n") >= 15:
            break
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    process.stderr.close()
    least = files[1].read_bytes().count(b"\n")
    assert 15 <= least < 400
    with open(files[1], "ab") as file:  # what a kill in the middle of a write leaves
        file.write(b'{"prompt": "Once 399", "id": "row-3')
    code, _, err = run(*flags)
    assert code == 0 and err == f"stars: {least} of 400 rows are done in {files[1]}\n"
    found = by_index(files[1])
    assert [row["id"] for row in found] == [f"row-{n}" for n in range(400)]
    assert traced(files[2]) == {str(row["index"]): row["outputs"][0]["text"] for row in found}
    engine = stars.Engine(pair[1], pair[3], max_num_lanes=8, max_num_seqs=4)
    policy = stars.STARS(segment_size=3, max_attempts=3, reward_threshold=0.5)
    alone = engine.generate([f"Once {n}" for n in range(0, 400, 57)], stars.SamplingParams(max_tokens=7, seed=3),
                            policy, use_tqdm=False)
    assert [found[n]["outputs"][0]["text"] for n in range(0, 400, 57)] == [one.outputs[0].text for one in alone]


@pytest.mark.parametrize("again", ["the same order", "another order"])
def test_a_kill_between_the_two_files_moves_the_trace_once(run, pair, files, monkeypatch, again):
    given, output, trace = files
    named = [{"id": name, "prompt": f"Once {name}"} for name in ("a", "b", "c", "d")]
    write_rows(given, *named)
    assert run(*arguments(files, *pair, *STARS))[0] == 0
    texts = {row["id"]: row["outputs"][0]["text"] for row in by_index(output)}
    write_rows(given, *named[1:], named[0])
    replace = LineFile.replace

    def killed(self, lines):
        if self.name == str(output):
            raise KeyboardInterrupt
        replace(self, lines)

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(LineFile, "replace", killed)
            assert run(*arguments(files, *pair, *STARS, "--resume"))[0] == 130
        if again == "another order":
            write_rows(given, *reversed(named))
    for _ in range(2):
        assert run(*arguments(files, *pair, *STARS, "--resume"))[0] == 0
        found = by_index(output)
        assert {row["id"]: row["outputs"][0]["text"] for row in found} == texts
        prompts = {request.request_id: request.prompt for request in stars.read_trace(trace)}
        assert prompts == {str(row["index"]): row["prompt"] for row in found} and len(prompts) == 4


@pytest.mark.parametrize("which", [1, 2])
def test_a_file_of_two_names_is_not_parted_from_the_other(run, pair, halfway, tmp_path, which):
    os.link(halfway[which], tmp_path / "link")
    before = [path.read_bytes() for path in halfway]
    code, _, err = run(*arguments(halfway, *pair, *STARS, "--resume"))
    assert code == 1 and f"{halfway[which]} has another name, a hard link" in err
    assert [path.read_bytes() for path in halfway] == before


def test_ids_that_are_no_text_are_not_taken_for_others(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"id": "\xed\xa0\x80", "prompt": "x"}\n{"id": "\\ud800", "prompt": "y"}\n')
    bad, good = rows_of_file(str(path), chat=False)
    assert bad.key == ("index", 0) and f"{path}: line 1 is no row" in bad.error and good.key == ("id", "\ud800")


def test_empty_columns_are_no_prompts(tmp_path):
    path = write_rows(tmp_path / "in.jsonl", {"prompt": "x", "messages": None, "prompt_token_ids": None},
                      {"prompt": "x", "prompt_token_ids": [1]}, {"prompt": "x", "messages": []}, {"prompt": None})
    found = rows_of_file(str(path), chat=False)
    assert [row.prompt for row in found] == ["x", {"prompt_token_ids": [1]}, None, None]
    assert all("exactly one of" in row.error for row in found[2:])
