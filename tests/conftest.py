"""Fixtures that several test files share: tiny checkpoints, each written once a session."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: device="auto" is the CPU in all tests, on any machine

import pytest
import torch
from hypothesis import settings
from hypothesis.internal.conjecture.providers import HypothesisProvider

from apart import Beside, cores, runs_of
from stars.bindings import libstars
from stars.cli import main
from stars.kernels.dispatch import references_only
from tiny_models import TinyModel, write_model

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network for a model; read where huggingface_hub is imported

# Property tests see the same examples in every run, from a fixed seed and no store of earlier ones. One draw in twenty
# takes a constant that hypothesis found in the source of every module imported so far. What a test saw, and so what it
# caught, would depend on which other files were collected with it: there are no such constants here.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.load_profile("fixed")
HypothesisProvider._maybe_draw_constant = lambda self, choice_type, constraints, *, p=0.05: None

beside_key = pytest.StashKey[Beside]()


def pytest_collection_finish(session) -> None:
    """Begins what runs in processes of its own: one beside the tests of this one, where there are two cores."""
    beside = session.stash[beside_key] = Beside(runs_of(session.items), min(cores() - 1, 1))
    if not session.config.option.collectonly:
        beside.go_on()


def pytest_runtest_teardown(item) -> None:
    item.session.stash[beside_key].go_on()


def pytest_sessionfinish(session) -> None:
    if beside_key in session.stash:  # it is not where the tests could not be collected
        session.stash[beside_key].stop()


@pytest.fixture(scope="session")
def beside(request) -> Beside:
    """The processes beside this one, for tests that stand for one of them."""
    return request.session.stash[beside_key]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Callable[..., Path]:
    """tiny_model(family="qwen3", tied=True, …): the directory of that checkpoint. Treat it as read-only."""
    written: dict[TinyModel, Path] = {}

    def get(tiny: TinyModel | None = None, **options) -> Path:
        tiny = TinyModel(**options) if tiny is None else tiny
        if tiny not in written:
            logging.getLogger("transformers").setLevel(logging.ERROR)
            written[tiny] = write_model(tmp_path_factory.mktemp(f"{tiny.family}-{tiny.head}"), tiny)
        return written[tiny]

    return get


@pytest.fixture
def copied(tmp_path) -> Callable[[Path], Path]:
    """copied(directory): a copy of a model, to be changed (`editing`)."""

    def copy(directory: Path) -> Path:
        return Path(shutil.copytree(directory, tmp_path / f"copy{len(list(tmp_path.glob('copy*')))}"))

    return copy


@pytest.fixture(params=["libstars", "references"])
def operations(request) -> Iterator[str]:
    """Runs a test once with libstars, where it was built, and once with the torch references alone."""
    if request.param == "libstars" and not libstars.available():
        pytest.skip("libstars was not built")
    with references_only() if request.param == "references" else nullcontext():
        yield request.param


@pytest.fixture(scope="session")
def lm(tiny_model) -> Path:
    """A language model that can be given text and messages."""
    return tiny_model(family="llama", tokenizer=True, chat_template=True)


@pytest.fixture(scope="session")
def pair(tiny_model) -> list[str]:
    """The command line's flags for a language model and a reward model of its vocabulary."""
    lm = tiny_model(tokenizer=True, chat_template=True)
    return ["--model", str(lm), "--reward", str(tiny_model(tokenizer=True, chat_template=True, head="reward"))]


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, str, str]]:
    """run(*arguments) of the command line: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module", autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """What a library makes of the root logger, as Ray does, would be the next file's: its lines, and what they hold."""
    root = logging.getLogger()
    level, handlers, factory = root.level, root.handlers[:], logging.getLogRecordFactory()
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
    logging.setLogRecordFactory(factory)


@pytest.fixture(scope="module", autouse=True)
def one_libstars_thread(request) -> Iterator[None]:
    """Threads that wait for each other cost far more than they give at the tests' sizes, where others use the cores.

    A module of operations whose work is divided is marked `threads`: it has as many as there are cores.
    """
    before = libstars.num_threads() if libstars.available() else None
    if before is not None and request.node.get_closest_marker("threads") is None:
        libstars.set_num_threads(1)
    yield
    if before is not None:
        libstars.set_num_threads(before)


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Threads cost more than they give at the tests' sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """Signals as they are in a terminal: whoever runs the tests in the background ignores Ctrl-C."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_round_raises(request) -> Iterator[None]:
    """An engine that runs the requests of a failed round one by one would hide an error of its own from a test."""
    raised: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.addFilter(lambda record: record.getMessage().startswith("a round raised"))
    handler.emit = lambda record: raised.append(record.getMessage())
    logger = logging.getLogger("stars.errors")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    if request.node.get_closest_marker("rounds_raise") is None:
        assert not raised, raised
