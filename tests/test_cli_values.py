"""The command line's values: what --stream prints, what the reward's flags do, exit codes, signals, closed pipes."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch

import stars
from editing import edit_tensors
from json_rows import rows, write_rows
from stars.cli import generate as command
from stars.cli import main
from stars.cli.signals import Terminated
from stars.engine import Engine
from tiny_models import EOS

FLAGS = ["--max-tokens", "9", "--seed", "3", "--max-num-lanes", "8", "--max-num-seqs", "4", "--no-progress"]
PARAMS = stars.SamplingParams(max_tokens=9, seed=3)
POLICY = stars.STARS(segment_size=3, max_attempts=4, reward_threshold=1.0)
POLICY_FLAGS = ["--segment-size", "3", "--max-attempts", "4", "--reward-threshold", "1.0"]
PROMPT = "The dog"


pytestmark = pytest.mark.usefixtures("usual_signals")


# -- --stream -----------------------------------------------------------------------------------------------------


class Written(io.StringIO):
    """A stdout that keeps what each print wrote."""

    def __init__(self):
        super().__init__()
        self.parts: list[str] = []

    def write(self, text: str) -> int:
        self.parts += [text] if text else []
        return len(text)


@pytest.mark.parametrize(("flags", "params"), [
    ([], PARAMS), (["--stop", "e"], stars.SamplingParams(max_tokens=9, seed=3, stop="e")),
    (["--max-tokens", "40", "--ignore-eos"], stars.SamplingParams(max_tokens=40, seed=3, ignore_eos=True)),
])
def test_stream_prints_each_segment_as_it_is_committed(pair, flags, params):
    engine = Engine(pair[1], pair[3], max_num_lanes=8, max_num_seqs=4)
    texts = [output.outputs[0].text for output in engine.stream(PROMPT, params, POLICY)]
    assert len(texts) > 1 or flags
    expected = [text[len(before):] for before, text in zip(["", *texts], texts, strict=False)]
    written = Written()
    with contextlib.redirect_stdout(written):
        assert main(["generate", PROMPT, "--stream", *pair, *FLAGS, *POLICY_FLAGS, *flags]) == 0
    assert written.parts == [part for part in expected if part] + ["\n"]
    assert "".join(expected) == engine.generate(PROMPT, params, POLICY, use_tqdm=False)[0].outputs[0].text


def test_stream_prints_token_ids_where_there_is_no_text(run, tiny_model):
    flags = ["--model", tiny_model(), *FLAGS]
    code, out, err = run("generate", "x", "--stream", *flags)
    assert (code, out) == (1, "") and "tokenizer" in err  # a prompt argument is text


def test_streamed_token_ids_are_those_printed_whole(monkeypatch, run, tiny_model):
    monkeypatch.setattr(command, "rows_of_arguments", lambda prompts, chat: [
        command.Row(0, {}, {"prompt_token_ids": [3, 4]})])
    flags = ["generate", "x", "--model", tiny_model(), *FLAGS, "--policy", "sample"]
    (output,) = Engine(tiny_model(), max_num_lanes=8).generate({"prompt_token_ids": [3, 4]}, PARAMS, use_tqdm=False)
    expected = " ".join(map(str, output.outputs[0].token_ids)) + "\n"
    assert run(*flags) == (0, expected, "") and run(*flags, "--stream") == (0, expected, "")


def test_stream_writes_the_trace_behind(run, pair, tmp_path):
    code, out, _ = run("generate", PROMPT, "--stream", *pair, *FLAGS, *POLICY_FLAGS, "--trace", tmp_path / "t")
    (request,) = stars.read_trace(tmp_path / "t")
    assert code == 0 and request.completions[0].text + "\n" == out and request.prompt == PROMPT


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_stream_keeps_what_was_committed(run, pair, monkeypatch, tmp_path, number, code):
    stream = Engine.stream

    def interrupted(self, *given):
        for output in stream(self, *given):
            signal.raise_signal(number)
            yield output

    monkeypatch.setattr(Engine, "stream", interrupted)
    engine = Engine(pair[1], pair[3], max_num_lanes=8, max_num_seqs=4)
    first = next(stream(engine, PROMPT, PARAMS, POLICY)).outputs[0].text
    found = run("generate", PROMPT, "--stream", *pair, *FLAGS, *POLICY_FLAGS, "--trace", tmp_path / "t")
    assert found == (code, first + "\n", "stars: interrupted: the text above is what had been committed\n")
    assert stars.read_trace(tmp_path / "t") == []


# -- the reward's flags -------------------------------------------------------------------------------------------


def score(directory: str, token_ids: list[int]) -> float:
    """The logit that transformers gives at the last token."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.inference_mode():
        hidden = model.model(torch.tensor([token_ids])).last_hidden_state[:, -1]
        return float(model.score(hidden))


CHAT = "<s><|user|>{}</s>\n<|assistant|>{}"  # the template of the tiny models
CASES = {  # flags: what the reward model reads before, and behind, a response
    (): ("<s>The dog", ""),
    ("--reward-template", "auto"): ("<s>The dog", ""),
    ("--reward-template", "raw", "--reward-close", "none"): ("<s>The dog", ""),
    ("--reward-close", "eos"): ("<s>The dog", "</s>"),
    ("--reward-template", "chat"): (CHAT.format("The dog", ""), ""),
    ("--reward-template", "chat", "--reward-close", "template"): (CHAT.format("The dog", ""), "</s>\n"),
    ("--reward-template", "chat", "--reward-close", "eos"): (CHAT.format("The dog", ""), "</s>"),
}


def test_reward_template_and_close_decide_what_is_scored(run, pair):
    tokenizer = stars.model.tokenizer.load_tokenizer(pair[3])
    found = {}
    for flags, (before, behind) in CASES.items():
        code, out, _ = run("generate", PROMPT, *pair, *FLAGS, "--policy", "sample", "--ignore-eos", "--json", *flags)
        (row,) = rows(out)
        output = row["outputs"][0]
        ids = tokenizer.encode(before, add_special_tokens=False) + output["token_ids"] + (
            tokenizer.encode(behind, add_special_tokens=False))
        assert code == 0 and output["reward"] == pytest.approx(score(pair[3], ids), abs=2e-4)
        options_given = dict(zip((flag.removeprefix("--reward-") for flag in flags[::2]), flags[1::2], strict=True))
        engine = Engine(pair[1], stars.CausalReward(pair[3], **options_given), max_num_lanes=8, max_num_seqs=4)
        params = stars.SamplingParams(max_tokens=9, seed=3, ignore_eos=True)
        (direct,) = engine.generate(PROMPT, params, stars.Sample(score=True), use_tqdm=False)
        assert output["token_ids"] == direct.outputs[0].token_ids
        assert output["reward"] == pytest.approx(direct.outputs[0].reward, abs=1e-5)
        found[flags] = round(output["reward"], 3)
    assert len(set(found.values())) == 5  # the first three cases are one


def test_auto_is_chat_for_messages(run, pair):
    flags = ["generate", PROMPT, "--chat", *pair, *FLAGS, "--policy", "sample", "--json"]
    auto, chat, raw = (rows(run(*flags, *more)[1])[0]["outputs"][0] for more in (
        [], ["--reward-template", "chat"], ["--reward-template", "raw"]))
    tokenizer = stars.model.tokenizer.load_tokenizer(pair[3])
    ids = tokenizer.encode(CHAT.format("The dog", ""), add_special_tokens=False) + auto["token_ids"]
    assert auto["reward"] == pytest.approx(score(pair[3], ids), abs=2e-4) == chat["reward"]
    assert raw["reward"] == pytest.approx(auto["reward"], abs=2e-4)  # both models have one template here
    assert auto["token_ids"] == raw["token_ids"]


def test_the_flags_decide_what_is_accepted(run, pair):
    """The threshold that an engine built by hand measures, and the text it chooses, with a closed chat reward."""
    flags = ["--reward-template", "chat", "--reward-close", "template", *POLICY_FLAGS]
    reward = stars.CausalReward(pair[3], template="chat", close="template")
    engine = Engine(pair[1], reward, max_num_lanes=8, max_num_seqs=4)
    (direct,) = engine.generate(PROMPT, PARAMS, POLICY, use_tqdm=False)
    (row,) = rows(run("generate", PROMPT, *pair, *FLAGS, *flags, "--json")[1])
    assert row["outputs"][0]["text"] == direct.outputs[0].text
    assert row["metrics"]["attempts_counted"] == direct.metrics.attempts_counted
    (calibrated,) = rows(run("calibrate", PROMPT, *pair, *FLAGS, *flags[:4], "--num-samples", "5", "--json")[1])
    assert calibrated["reward_threshold"] == pytest.approx(
        engine.calibrate(PROMPT, PARAMS, num_samples=5), abs=1e-5)


def test_a_template_that_is_not_there_is_said(run, tiny_model, pair):
    bare = str(tiny_model(tokenizer=True, head="reward"))
    for flags, word in ((["--reward-close", "template"], "chat template"), (["--reward-template", "chat"], "template")):
        code, _, err = run("generate", PROMPT, *pair[:2], "--reward", bare, *FLAGS, *POLICY_FLAGS, *flags)
        assert code == 1 and word in err.splitlines()[-1]
    code, _, err = run("generate", PROMPT, *pair[:2], *FLAGS, "--reward-close", "eos")
    assert code == 2 and "belong to --reward" in err
    assert EOS == 2  # what "eos" above stands for


# -- exit codes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("raised", "code", "said"), [
    (None, 0, ""),
    (stars.ModelError("two\nlines"), 1, "stars: error: two lines\n"),
    (FileNotFoundError(2, "No such file or directory", "x"), 1, "stars: error: x: No such file or directory\n"),
    (OSError(28, "No space left on device"), 1, "stars: error: stdout: No space left on device\n"),
    (OSError("odd"), 1, "stars: error: odd\n"),
    (KeyboardInterrupt(), 130, "stars: interrupted\n"),
    (Terminated(), 143, "stars: interrupted\n"),
    (BrokenPipeError(), 141, ""),
])
def test_exit_codes(run, monkeypatch, raised, code, said):
    def body(args) -> int:
        if raised is not None:
            raise raised
        return 0

    for name, given in (("stars.cli.info.info", ["info"]), ("stars.cli.inspect.inspect", ["inspect", "x"]),
                        ("stars.cli.calibrate.calibrate", ["calibrate", "x"]), ("stars.demo.demo", ["demo"]),
                        ("stars.cli.generate.generate", ["generate", "x"]),
                        ("stars.cli.trace.show", ["trace", "show", "x"])):
        monkeypatch.setattr(name, body)
        assert run(*given) == (code, "", said)


def test_exit_codes_of_rows(run, pair, copied, tmp_path):
    broken = copied(pair[3])
    edit_tensors(broken, score__weight=lambda weight: weight * float("nan"))
    flags = [*pair[:2], *FLAGS]
    failing = ["--reward", broken, "--policy", "sample"]
    assert run("generate", PROMPT, "Once", *flags)[0] == 0
    assert run("generate", PROMPT, "", *flags)[0] == 1
    assert run("generate", PROMPT, *flags, *failing)[0] == 1
    code, out, err = run("generate", PROMPT, *flags, *failing, "--stream")
    assert code == 1 and err.startswith("stars: error: ") and "NaN" in err and err.count("\n") == 1
    empty = write_rows(tmp_path / "empty.jsonl")
    assert run("generate", "--input", empty, *flags) == (0, "", "")
    assert run("calibrate", "--input", empty, *pair)[0] == 1
    for wrong in ("generate", "calibrate"):
        assert run(wrong, "--input", "", *pair)[0] == 1  # no file has this name


def test_help_and_version_give_zero(run):
    for words in (["--help"], ["--version"], ["generate", "--help"], ["trace", "html", "--help"]):
        code, out, err = run(*words)
        assert code == 0 and out and not err
    assert "--resume" in run("generate", "--help")[1]


# -- signals ------------------------------------------------------------------------------------------------------


def raising(monkeypatch, *numbers: int, after: int = 2) -> None:
    """Sends the signals while the engine's step number `after` runs."""
    step, count = Engine.step, [0]

    def interrupted(self):
        count[0] += 1
        if count[0] == after:
            for number in numbers:
                signal.raise_signal(number)
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_keeps_the_rows(run, pair, tmp_path, monkeypatch, number, code):
    given = write_rows(tmp_path / "in.jsonl", *({"prompt": PROMPT, "id": n} for n in range(30)))
    output, trace = tmp_path / "out.jsonl", tmp_path / "t.jsonl"
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    raising(monkeypatch, number, after=12)
    flags = ["generate", "--input", given, *pair, *FLAGS, *POLICY_FLAGS, "--output", output, "--trace", trace]
    found, _, err = run(*flags)
    kept = rows(output.read_text())
    assert found == code and 0 < len(kept) < 30
    assert err == f"stars: interrupted: {len(kept)} of 30 rows had finished and were kept in {output}\n"
    assert len(stars.read_trace(trace)) == len(kept)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    monkeypatch.undo()
    raising(monkeypatch, number)
    found, _, err = run(*flags, "--resume")
    assert found == code and err.splitlines()[-1].startswith("stars: interrupted: ")
    more = rows(output.read_text())
    assert more[: len(kept)] == kept and f"{len(more)} of 30 rows" in err.splitlines()[-1]


@pytest.mark.parametrize(("numbers", "code"), [
    ((signal.SIGINT, signal.SIGINT), 130), ((signal.SIGTERM, signal.SIGTERM), 143),
    ((signal.SIGINT, signal.SIGTERM), 143), ((signal.SIGTERM, signal.SIGINT), 130),
])
def test_a_second_signal_ends_at_once(run, pair, monkeypatch, numbers, code):
    raising(monkeypatch, *numbers)
    assert run("generate", PROMPT, "Once", *pair, *FLAGS, *POLICY_FLAGS) == (code, "", "stars: interrupted\n")


def test_ignored_signals_stay_ignored(run, pair, monkeypatch):
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        raising(monkeypatch, *before)
        code, out, err = run("generate", PROMPT, *pair, *FLAGS, *POLICY_FLAGS)
        assert (code, err) == (0, "") and out.strip()
        assert {number: signal.getsignal(number) for number in before} == dict.fromkeys(before, signal.SIG_IGN)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_another_thread_has_no_handlers(run, pair):
    expected = run("generate", PROMPT, *pair, *FLAGS, *POLICY_FLAGS)
    found = []
    thread = threading.Thread(target=lambda: found.append(run("generate", PROMPT, *pair, *FLAGS, *POLICY_FLAGS)))
    thread.start()
    thread.join()
    assert found == [expected] and expected[0] == 0


def test_sigterm_ends_a_process_with_143(pair, tmp_path):
    """A real one, of a real process, while it loads or runs."""
    given = write_rows(tmp_path / "in.jsonl", *({"prompt": "Once", "id": n} for n in range(3000)))
    process = subprocess.Popen(
        [*PROGRAM, "generate", "--input", given, *pair[:2], *FLAGS, "--ignore-eos", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    process.terminate()
    kept, err = rows(first + process.stdout.read()), process.stderr.read()
    assert process.wait(timeout=60) == 143 and 0 < len(kept) < 3000
    assert err == f"stars: interrupted: {len(kept)} of 3000 rows had finished and were kept\n"


# -- pipes that nobody reads --------------------------------------------------------------------------------------

PROGRAM = [sys.executable, "-c", "import sys; from stars.cli import main; sys.exit(main())"]


def ends(words: list[str], unbuffered: bool = False, **streams) -> tuple[int, bytes]:
    """(exit code, what came on the streams that are read)."""
    environment = {**os.environ, **({"PYTHONUNBUFFERED": "1"} if unbuffered else {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    program = [*PROGRAM, *map(str, words)]
    done = subprocess.run(program, stdin=subprocess.DEVNULL, env=environment, timeout=60, **streams)
    return done.returncode, (done.stdout or b"") + (done.stderr or b"")


@pytest.fixture
def unread():
    """The end of a pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.fixture(scope="module")
def trace(pair, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "t.jsonl"
    assert main(["generate", PROMPT, *pair, *FLAGS, *POLICY_FLAGS, "--output", "/dev/null", "--trace", str(path)]) == 0
    return path


@pytest.mark.parametrize("unbuffered", [False, True])
def test_unread_pipes_end_quietly(unread, trace, unbuffered):
    for words in (["--help"], ["generate", "--help"], ["--version"], ["trace", "show", trace],
                  ["trace", "html", trace, "-o", "-"]):
        assert ends(words, unbuffered, stdout=unread) == (141, b""), words
    for words in (["generate", "--bogus"], ["trace", "show", "/absent"]):
        assert ends(words, unbuffered, stderr=unread) == (141, b""), words
    code, out = ends(["trace", "show", trace], unbuffered, stderr=unread)
    assert code == 0 and b"request 0" in out  # nothing had to be said there


def test_a_warning_that_nobody_reads_ends_quietly(unread):
    assert ends(["generate", "x", "--max-tokens", "2"], stderr=unread) == (141, b"")


def test_a_full_stdout_is_said_once(trace):
    for words in (["--help"], ["trace", "show", trace], ["trace", "html", trace, "-o", "-"]):
        with open("/dev/full", "wb") as full:
            code, err = ends(words, stdout=full)
        assert code == 1 and re.fullmatch(rb"stars: error: stdout: No space left on device(: [a-z ]+)?\n", err), words


def test_closed_streams(trace, tmp_path):
    """As `>&-` and `2>&-` leave them: descriptors that are not there, and that no file may take."""
    def closed(*words, fd: int) -> tuple[int, bytes]:
        shell = " ".join(f"'{word}'" for word in [*PROGRAM, *words])
        done = subprocess.run(["bash", "-c", f"{shell} {fd}>&-"], capture_output=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    assert closed("trace", "show", trace, fd=1) == (1, b"stars: error: stdout: Bad file descriptor\n")
    assert closed("--help", fd=1) == (1, b"stars: error: stdout: Bad file descriptor\n")
    code, out = closed("trace", "show", trace, fd=2)
    assert code == 0 and b"request 0" in out
    assert closed("trace", "show", "/absent", fd=2) == (1, b"")
    code, _ = closed("trace", "html", trace, "-o", tmp_path / "page.html", fd=1)
    assert code == 1 and (tmp_path / "page.html").read_text().startswith("<!doctype html>")
