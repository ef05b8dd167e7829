"""`stars serve` as a process: what it refuses before it reads a model, how it begins, and the ways in which it ends."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import pytest

from wire import Answer, Wire, events, request

COMMAND = [sys.executable, "-c", "import sys; from stars.cli import main; sys.exit(main())", "serve"]
START = 60  # seconds
BODY = {"model": "film-reviews", "prompt": "This film was", "max_tokens": 12}
SLOW = BODY | {"max_tokens": 300, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
               "stars": {"reward_threshold": 99.0, "segment_size": 4, "max_attempts": 8}}
ROOM = ("--max-num-seqs", "64", "--cache-tokens", "32768")
"""For all streams of a test side by side."""


class Process(NamedTuple):
    """A server of its own."""

    process: subprocess.Popen
    address: tuple[str, int]
    line: str  # what it said when it listened

    def ask(self, *given, **options) -> Answer:
        with Wire(self.address) as wire:
            return wire.send(request(*given, **options)).answer()

    def texts(self) -> list[str]:
        """Of a few seeds."""
        return [json.loads(self.ask("/v1/completions", BODY | {"seed": seed}).body)["choices"][0]["text"]
                for seed in range(4)]

    def end(self) -> tuple[int, str]:
        """Its exit code and what it said."""
        _, said = self.process.communicate(timeout=START)
        return self.process.returncode, said


@contextmanager
def started(*flags: str, background: bool = False, **environment: str) -> Iterator[Process]:
    usual = {"OMP_NUM_THREADS": "1", "STARS_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    with subprocess.Popen([*COMMAND, "--port", "0", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, env={**os.environ, **usual, **environment},
                          preexec_fn=lambda: _signals(background)) as process:
        try:
            line = process.stdout.readline()
            found = re.search(r"http://([\d.]+):(\d+)", line)
            assert found, process.communicate(timeout=START)
            yield Process(process, (found[1], int(found[2])), line)
        finally:
            process.kill()


def _signals(background: bool) -> None:
    """In the child: as a terminal gives them, or a script to what it puts into the background."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN if background else signal.default_int_handler)


def begun(stack: ExitStack, server: Process, count: int) -> list[Wire]:
    """Streams that have sent their first segment."""
    wires = [stack.enter_context(Wire(server.address)) for _ in range(count)]
    for seed, wire in enumerate(wires):
        wire.send(request("/v1/completions", SLOW | {"seed": seed}))
    for wire in wires:
        assert wire._file.readline().split()[1] == b"200"
        wire.head()
    return wires


def test_killed_and_started_again_it_is_as_before():
    """kill -9 in the midst of 64 streams: clients see that theirs broke off, and the next requests, of a new process on
    the same port, are right."""
    with ExitStack() as stack:
        with started(*ROOM) as server:
            assert re.fullmatch(r"stars: serving film-reviews at http://127\.0\.0\.1:\d+ \(page at /, policy stars\)\n",
                                server.line)
            right = server.texts()
            wires = begun(stack, server, 64)
            server.process.kill()
            for wire in wires:
                with pytest.raises((EOFError, ConnectionError)):
                    list(events(wire.chunks()))
            assert server.process.wait(START) == -signal.SIGKILL
        with pytest.raises(ConnectionError):
            Wire(server.address)
        with started(*ROOM, "--port", str(server.address[1])) as again:
            assert again.address == server.address
            assert again.texts() == right
            again.process.send_signal(signal.SIGTERM)  # nothing is under way
            assert again.end()[0] == 0


def test_a_server_writes_no_files(tmp_path):
    """Neither at home nor among temporary files nor where it was started, whether requests succeed or fail."""
    here = sorted(os.listdir())
    with started(HOME=str(tmp_path), TMPDIR=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache")) as server:
        assert len(server.texts()) == 4
        assert server.ask("/v1/completions", BODY | {"stars": {"beta": -1}}).status == 400
        assert server.ask("/nothing").status == 404
        assert [str(path) for path in tmp_path.rglob("*")] == []
        server.process.send_signal(signal.SIGTERM)
        assert server.end()[0] == 0
    assert [str(path) for path in tmp_path.rglob("*")] == [] and sorted(os.listdir()) == here


def test_sigterm_ends_all_streams_properly_and_the_process_with_0():
    with ExitStack() as stack, started("--drain-seconds", "1", *ROOM, "--log-requests") as server:
        wires = begun(stack, server, 32)
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        found = []
        for wire in wires:
            found.append(list(events(wire.chunks())))
            assert wire.ended()
        seconds = time.monotonic() - begin
        for one in found:
            assert one[-1] == "[DONE]" and one[-2]["usage"]["completion_tokens"] > 0
            [reason] = [event["choices"][0]["finish_reason"] for event in one[:-2] if event["choices"][0][
                "finish_reason"]]
            assert reason == "abort"
        code, said = server.end()
        print(f"32 streams ended {seconds:.2f} s after SIGTERM, the process {time.monotonic() - begin:.2f} s after it")
        assert code == 0 and 0.9 < seconds < 20
        assert said.count("POST /v1/completions 200") == 32 and "Traceback" not in said


@pytest.mark.parametrize("number, code", [
    (signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_second_signal_ends_it_at_once(number, code):
    with ExitStack() as stack, started("--drain-seconds", "100") as server:
        [wire] = begun(stack, server, 1)
        server.process.send_signal(number)
        assert "again to end at once" in [server.process.stderr.readline() for _ in range(2)][1]
        assert server.ask("/health").status == 200 and server.ask("/ready").status == 503
        begin = time.monotonic()
        server.process.send_signal(number)
        assert server.process.wait(50) == code and time.monotonic() - begin < 50
        with pytest.raises((EOFError, ConnectionError)):
            list(events(wire.chunks()))


def test_keys_of_the_environment_count_and_signals_that_are_ignored_do_not():
    """Ctrl-C is ignored by what a script put into the background."""
    with started("--api-key", "one", "--served-model-name", "me", "--policy", "sample", background=True,
                 STARS_API_KEY="two three") as server:
        assert "serving me at" in server.line and "policy sample" in server.line
        statuses = [server.ask("/v1/models", None, f"Authorization: Bearer {key}").status
                    for key in ("one", "two", "three", "two three", "four")]
        assert statuses == [200, 200, 200, 401, 401]
        assert server.ask("/health", None, "Host: evil.example").status == 400
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert server.ask("/ready").status == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.end()[0] == 0


# -- what is refused before a model is read ---------------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch) -> None:
    def built(*_, **__):
        raise AssertionError("a model was read")

    monkeypatch.setattr("stars.cli.options.build_engine", built)
    monkeypatch.setattr("stars.engine.Engine.__init__", built)


@pytest.mark.parametrize("flags, code, said", [
    (["--port", "70000"], 1, "--port is 70000"),
    (["--port", "many"], 2, "--port"),
    (["--host", "no.such.host.invalid"], 1, "cannot listen at no.such.host.invalid"),
    (["--max-waiting", "0"], 1, "max_waiting"),
    (["--max-body-bytes", "-1"], 1, "max_body_bytes"),
    (["--drain-seconds", "nan"], 1, "drain_seconds"),
    (["--max-connections", "100000000"], 1, "max_connections is 100000000, and this process may have"),
    (["--api-key", "with space"], 1, "API key"),
    (["--api-key", ""], 1, "API key"),
    (["--served-model-name", "a:b"], 1, "without a colon"),
    (["--policy", "nobody"], 2, "--policy"),
    (["--policy", "sample", "--beta", "1"], 2, "--beta belongs to --policy"),
    (["--set", "nobody=1"], 2, "--set nobody"),
    (["--max-attempts", "0"], 1, "max_attempts"),
    (["--beta", "auto", "--reward-threshold", "1"], 1, "--beta auto needs a calibration"),
    (["--calibration", "no.such.file"], 1, "no.such.file"),
    (["--calibration", "setup.py"], 1, "setup.py is no calibration"),
    (["--calibration", "x.json", "--reward-threshold", "1"], 2, "--calibration gives the reward_threshold"),
    (["--reward-timeout", "1"], 2, "belong to --reward-url"),
    (["--model", "x", "--policy", "stars"], 2, "needs a reward model"),
    (["a prompt"], 2, "unrecognized arguments"),
])
def test_what_cannot_be_is_said_before_a_model_is_read(run, no_model, flags, code, said):
    found, out, err = run("serve", *flags)
    assert (found, out) == (code, "") and said in err and "Traceback" not in err


def test_a_port_that_is_taken_is_said_before_a_model_is_read(run, no_model):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, err = run("serve", "--port", port)
    assert code == 1 and f"cannot listen at 127.0.0.1, port {port}: Address already in use" in err


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_without_the_extra_it_says_what_to_install(run, no_model, monkeypatch, missing):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    code, _, err = run("serve")
    assert code == 1 and err == f"stars: error: stars serve needs {missing}: pip install 'stars-engine[serve]'\n"


def test_who_opens_it_to_others_without_a_key_is_warned(run, monkeypatch):
    class Stop(stars_error()):
        pass

    def built(*_, **__):
        raise Stop("far enough")

    monkeypatch.setattr("stars.cli.options.build_engine", built)
    warning = "stars: warning: whoever reaches 0.0.0.0 may use this server"
    for flags, environment, warned in (([], "", True), (["--api-key", "a"], "", False), ([], "a b", False)):
        monkeypatch.setenv("STARS_API_KEY", environment)
        assert (warning in run("serve", "--host", "0.0.0.0", "--port", 0, *flags)[2]) is warned
    assert warning not in run("serve", "--port", 0)[2]
    err = run("serve", "--port", 0, "--model", "x", "--reward", "y")[2]
    assert "policy stars has no reward_threshold: requests must bring one" in err


def test_a_beta_far_from_the_calibrations_is_told(run, monkeypatch):
    from stars.cli import options

    def built(*_, **__):
        raise stars_error()("far enough")

    monkeypatch.setattr("stars.cli.options.build_engine", built)
    calibration = str(options.shipped_calibration())
    told = "stars: policy stars has beta 0.7 and the calibration suggests 0.1"
    assert told in run("serve", "--port", 0, "--calibration", calibration)[2]
    for flags in ([], ["--calibration", calibration, "--beta", "auto"], ["--calibration", calibration, "--beta", 0.5]):
        assert "the calibration suggests" not in run("serve", "--port", 0, *flags)[2]


def test_what_goes_wrong_is_said(run, monkeypatch):
    """An answer says that the log has more of it."""
    log = logging.getLogger("stars.serve.http.limits")
    error = stars_error()("far enough")

    def built(*_, **__):
        log.error("a request failed", exc_info=error)
        log.info("nobody asked")
        raise error

    monkeypatch.setattr("stars.cli.options.build_engine", built)
    err = run("serve", "--port", 0)[2]
    assert err.count("a request failed") == 1 and "StarsError: far enough" in err and "nobody asked" not in err
    log.error("afterwards")


def stars_error() -> type[Exception]:
    from stars.errors import StarsError

    return StarsError


def test_the_shipped_pair_has_a_threshold_that_was_measured():
    from stars.calibration import Calibration
    from stars.cli import options

    found = Calibration.load(str(options.shipped_calibration()))
    prompts = options.shipped_calibration().with_name("calibration_prompts.jsonl").read_text(encoding="utf8")
    assert found.prompts == len(prompts.splitlines()) and found.samples == 16 * found.prompts
    assert found.warning is None
