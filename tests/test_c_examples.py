"""bindings/examples, built with the compiler at hand and run: the same text as each other, and as a host in Python.

And docs/libstars.md: its loop is C, its figures were measured.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from controller_host import Hosted, respond
from stars.bindings import libstars
from stars.bindings.controller import Controller
from stars.bindings.layouts import HEADER, HEADER_TEXT

BINDINGS = Path(__file__).resolve().parents[1] / "bindings"
EXAMPLES = BINDINGS / "examples"
COMPILERS = {"bigram.c": ("cc", "gcc", "clang"), "bigram.cpp": ("c++", "g++", "clang++")}
FLAGS = {"bigram.c": ["-std=c11"], "bigram.cpp": ["-std=c++20", "-pthread"]}
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
SANITIZERS = {"address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
              "thread": ["-fsanitize=thread"]}

pytestmark = pytest.mark.skipif(not libstars.available(), reason="libstars was not built")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(source, *flags): the program; skips where there is no compiler, or none that has the flags."""
    built: dict[tuple, Path] = {}

    def make(source: str, *flags: str) -> Path:
        compiler = next(filter(None, map(shutil.which, COMPILERS[source])), None)
        if compiler is None:
            pytest.skip(f"there is no compiler for {source}")
        if (source, flags) not in built:
            program = tmp_path_factory.mktemp("examples") / source.replace(".", "_")
            library = libstars.library_path().resolve()
            if flags:
                trial = program.with_suffix(".c" if source.endswith(".c") else ".cpp")
                trial.write_text("int main(void) { return 0; }\n")
                tried = subprocess.run([compiler, *flags, trial, "-o", program], capture_output=True, text=True)
                if tried.returncode or subprocess.run([program], capture_output=True).returncode:
                    pytest.skip(f"{compiler} has no {' '.join(flags)} here")
            made = subprocess.run([compiler, *FLAGS[source], *STRICT, *flags, "-I", BINDINGS, EXAMPLES / source, "-o",
                                   program, library, f"-Wl,-rpath,{library.parent}"], capture_output=True, text=True)
            assert made.returncode == 0, made.stderr
            built[source, flags] = program
        return built[source, flags]

    return make


def run(program: Path, *arguments: object, before: tuple[str, ...] = (), code: int = 0) -> str:
    """What it prints: on stdout, or where it ends with another code on stderr."""
    done = subprocess.run([*before, str(program), *map(str, arguments)], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"})
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


# -- the same in Python -----------------------------------------------------------------------------------------------

TABLE = (EXAMPLES / "bigram.h").read_text(encoding="utf8")
WORDS = re.findall(r'"([^"]*)"', re.search(r"WORDS\[VOCAB\] = \{(.*?)\}", TABLE, re.DOTALL)[1])
ROWS = re.findall(r'"(\d+)"', re.search(r"LOGITS\[VOCAB\] = \{(.*?)\}", TABLE, re.DOTALL)[1])
LIKED = [float(value) for value in re.search(r"LIKED\[VOCAB\] = \{(.*?)\}", TABLE)[1].split(",")]
LOGITS = np.array([[int(digit) for digit in row] for row in ROWS], dtype=np.float32)


def hosted(seed: int, width: int, sample: int) -> Hosted:
    """A response of the toy in Python."""
    controller = Controller(max_tokens=40, reward_threshold=4.0, seed=seed, beta=0.25, alpha=0.25, segment_size=5,
                            max_attempts=12, sample=sample)
    return respond(controller, width, lambda response: LOGITS[response[-1] if response else 0],
                   lambda ids: sum(LIKED[token] for token in ids), eos=0)


def told(seed: int, width: int, samples: int) -> str:
    """What the programs print."""
    lines = []
    for sample in range(samples):
        response, so_far = hosted(seed, width, sample), 0.0
        for segment in response.segments:
            so_far += sum(LIKED[token] for token in segment.token_ids)
            best = "" if segment.accepted else ", the best of all that were rejected"
            words = " ".join(WORDS[token] for token in segment.token_ids)
            lines.append(f"{words} [attempt {segment.winner}{best}, reward {so_far:.3f}]\n")
        progress = response.progress
        lines.append(f"= {response.finish_reason}: {progress.segments} segments, {progress.accepted} of "
                     f"{progress.attempts_counted} attempts accepted\n")
    return "".join(lines)


def test_the_table_of_the_toy():
    assert LOGITS.shape == (len(WORDS), len(WORDS)) == (len(LIKED),) * 2
    assert (LOGITS.max(1) > 3).all()


@pytest.mark.parametrize("source", COMPILERS)
def test_the_text_is_that_of_a_host_in_python(build, source):
    program = build(source)
    expected = told(7, 4, 24)
    assert run(program, 7, 4, 24) == expected
    for width in (1, 16):
        assert run(program, 7, width, 24) == expected
    assert run(program, 2**64 - 1, 3, 4) == told(2**64 - 1, 3, 4) != run(program, 2**64 - 2, 3, 4)
    assert run(program) == told(7, 4, 1)
    assert "the best of all that were rejected" in expected and "= stop" in expected


@pytest.mark.parametrize("source", COMPILERS)
@pytest.mark.parametrize("arguments", [("x",), (-1,), (2**64,), (7, 0), (7, 17), (7, 4, 0), (7, 4, 4097), (7, "4x")])
def test_other_arguments_are_refused(build, source, arguments):
    assert run(build(source), *arguments, code=2).startswith("usage: bigram ")


@pytest.mark.parametrize("source", ["bigram.c", pytest.param("bigram.cpp", marks=pytest.mark.slow)])
def test_a_program_of_another_version_says_so(build, source, tmp_path):
    """Compiled with the header of a version to come, which stands before the real one."""
    version = HEADER.constants["STARS_ABI_VERSION"]
    define = f"#define STARS_ABI_VERSION {version}"
    (tmp_path / "stars.h").write_text(HEADER_TEXT.replace(define, define.replace(str(version), str(version + 1))))
    text = run(build(source, f"-I{tmp_path}"), code=1)
    assert f"compiled with version {version + 1} of stars.h and this library has {version}" in text


def test_the_loop_of_the_page_is_c(tmp_path):
    """It is compiled, not linked: what drafts and scores is the reader's."""
    compiler = next(filter(None, map(shutil.which, COMPILERS["bigram.c"])), None)
    if compiler is None:
        pytest.skip("there is no C compiler")
    page = (BINDINGS.parent / "docs" / "libstars.md").read_text(encoding="utf8")
    [block] = re.findall(r"^```c\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "loop.c").write_text(block)
    made = subprocess.run([compiler, "-std=c11", *STRICT, "-fsyntax-only", "-I", BINDINGS, tmp_path / "loop.c"],
                          capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_the_figures_of_the_page_are_those_that_were_measured():
    page = (BINDINGS.parent / "docs" / "libstars.md").read_text(encoding="utf8")
    results = BINDINGS.parent / "benchmarks" / "results" / "controller-cost.json"
    figures = json.loads(results.read_text(encoding="utf8"))["figures"]
    for figure in figures:
        assert f"| {figure['name']} | {figure['value']:.0f} |" in page
    assert f"takes {1e3 * figures[0]['value'] / 4096:.0f} ns" in page
    assert f"takes {figures[-1]['value']:.0f} µs there" in page


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("source", COMPILERS)
def test_sanitizers_find_nothing(build, source, sanitizer):
    """In the example; `make sanitize` runs them with a library that is built so, too."""
    assert run(build(source, *SANITIZERS[sanitizer]), 7, 4, 24) == told(7, 4, 24)


@pytest.mark.slow
@pytest.mark.parametrize("source", COMPILERS)
def test_valgrind_finds_nothing(build, source):
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        pytest.skip("there is no valgrind")
    before = (valgrind, "--quiet", "--error-exitcode=9", "--leak-check=full",
              "--errors-for-leak-kinds=definite,possible")
    assert run(build(source), 7, 4, 6, before=before) == told(7, 4, 6)
