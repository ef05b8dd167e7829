"""Plants the errors of `mutants.py` one at a time and reports which the tests notice: `make mutate`.

The checkout is never touched: each job works on a copy, whose folders a small import hook puts in the place of the
installed package. First every test file that a row names must pass on the copy as it is. Then each error gets a
process of pytest that ends at the first failure; one that takes far longer than without the error counts as caught.
Errors in C++ share one job, which builds libstars once and then what an error changes.

Exit codes: 0 if at least 90 % were caught, 1 if fewer, 2 where nothing can be said: a row is out of date, the tests
fail without any error, a change does not compile.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import queue
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutate.mutants import MIN_CAUGHT, MUTANTS, Mutant, problem, test_file  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("engine", "kernels", "bindings", "tests", "benchmarks", "docs")
CPP = (".cpp", ".h")
PATIENCE, MIN_LIMIT = 5.0, 60.0  # times what the tests take without an error, and seconds
FAILED, COLLECTION_FAILED = 1, 2  # exit codes of pytest

T, Out = TypeVar("T"), TypeVar("Out")

HOOK = '''
import sys
from importlib.util import spec_from_file_location

ROOT = {root!r}
FOLDERS = {{"stars": "engine", "stars.kernels": "kernels", "stars.bindings": "bindings"}}


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in FOLDERS:
            return None
        folder = ROOT + "/" + FOLDERS[name]
        return spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])


sys.meta_path.insert(0, Finder)
'''


class Refused(Exception):
    """Nothing can be said about the tests; one sentence says why."""


class Ran(NamedTuple):
    """One process of pytest."""

    code: int | None  # None: it took too long
    seconds: float
    output: str

    @property
    def first_failure(self) -> str:
        """What noticed, in a few words."""
        if self.code is None:
            return "took too long"
        lines = [line for line in self.output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        if lines:
            return lines[0].split(" - ")[0].split(" ", 1)[1].removeprefix("tests/")
        return f"exit code {self.code}"


class Result(NamedTuple):
    """What became of one error."""

    mutant: Mutant
    caught: bool
    how: str
    seconds: float


class Tree:
    """A copy of the checkout, in which an error can be planted and the tests be run."""

    def __init__(self, root: Path, home: Path, threads: int):
        self.path = home
        home.mkdir()
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "results")
        for folder in FOLDERS:
            if (root / folder).is_dir():
                shutil.copytree(root / folder, home / folder, ignore=ignore)
        for file in root.iterdir():
            if file.is_file():
                shutil.copy2(file, home / file.name)
        hook = home / "import_hook"
        hook.mkdir()
        (hook / "sitecustomize.py").write_text(HOOK.format(root=str(home)), encoding="utf8")
        path = os.pathsep.join(filter(None, (str(hook), os.environ.get("PYTHONPATH"))))
        # Jobs side by side whose threads wait for each other's processors take many times as long.
        self._environment = {"STARS_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads), **os.environ,
                             "PYTHONPATH": path}
        self._library = home / "bindings" / "lib" / "libstars.so"
        self._process: subprocess.Popen | None = None
        self._stopped = False

    def write(self, file: str, text: str) -> None:
        """Replaces a file's text. Compiled Python is told apart by seconds and sizes alone: it is removed."""
        path = self.path / file
        path.write_text(text, encoding="utf8")
        if path.suffix == ".py":
            Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    def read(self, file: str) -> str:
        """A file's text."""
        return (self.path / file).read_text(encoding="utf8")

    def pytest(self, files: Iterable[str], limit: float | None = None) -> Ran:
        """Runs test files until the first failure, and no longer than `limit` seconds."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-rfE", *files]
        begin = time.monotonic()
        process = self._process = subprocess.Popen(
            command, cwd=self.path, env=self._environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            output, _ = process.communicate(timeout=limit)
            code = process.returncode
        except subprocess.TimeoutExpired:
            code, output = None, ""
        _kill(process)  # and what the tests have left running
        process.wait()
        if self._stopped:
            raise Refused("interrupted")
        return Ran(code, time.monotonic() - begin, output)

    def stop(self) -> None:
        """Ends the tests that run now, and those of another thread that would be next."""
        self._stopped = True
        if self._process is not None:
            _kill(self._process)

    def check_imports(self) -> None:
        """Raises Refused unless the tests of this copy import this copy."""
        script = "import stars, stars.kernels, stars.bindings as b; print(stars.__file__, stars.kernels.__file__, " \
                 "b.__file__)"
        ran = subprocess.run([sys.executable, "-c", script], cwd=self.path, env=self._environment, text=True,
                             capture_output=True)
        places = ran.stdout.split()
        if ran.returncode or not all(Path(place).is_relative_to(self.path) for place in places):
            raise Refused(f"the copy's tests import {places or ran.stderr.strip()} and not the copy: run this with the "
                          "Python that the package is installed for")

    def build(self) -> None:
        """Brings libstars up to date with the sources; Refused where it cannot be built."""
        cmake, ninja = _tool("cmake"), _tool("ninja")
        if cmake is None:
            raise Refused("errors in C++ need CMake: pip install cmake ninja, or leave them out with --python-only")
        build = self.path / "build"
        if not build.exists():
            generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
            _quiet([cmake, *generator, "-S", self.path, "-B", build, "-DCMAKE_BUILD_TYPE=Release",
                    f"-DSTARS_OUTPUT_DIR={self._library.parent.parent}"])
        _quiet([cmake, "--build", build, "--target", "stars"])

    def plant(self, mutant: Mutant, limit: float) -> Result:
        """Runs a row's tests with its error in the tree, and takes the error out again."""
        original = self.read(mutant.file)
        native = mutant.file.endswith(CPP)
        self.write(mutant.file, original.replace(mutant.text, mutant.replacement))
        try:
            if native:
                self.build()
            ran = self.pytest(map(test_file, mutant.tests.split()), limit)
        finally:
            self.write(mutant.file, original)
        # A crash has a negative code. The other codes say that pytest was asked for something that is not there.
        if ran.code not in (None, 0, FAILED, COLLECTION_FAILED) and ran.code > 0:
            raise Refused(f"pytest ended with code {ran.code} for {mutant.file} ({mutant.error}): {ran.output[-2000:]}")
        return Result(mutant, ran.code != 0, ran.first_failure if ran.code != 0 else "", ran.seconds)


class Runner:
    """Plants rows in copies of the checkout at `root`, `jobs` at a time."""

    def __init__(self, root: Path, jobs: int, home: Path):
        self.jobs = jobs
        threads = max(1, (os.cpu_count() or 1) // jobs)
        self.trees = [Tree(root, home / f"job{job}", threads) for job in range(jobs)]
        self._free: queue.Queue[Tree] = queue.Queue()
        for tree in self.trees:
            self._free.put(tree)

    def baseline(self, mutants: Sequence[Mutant]) -> dict[str, float]:
        """Seconds of every test file that a row names; Refused if one fails as it is."""
        def run(tree: Tree, name: str) -> tuple[str, Ran]:
            return name, tree.pytest([test_file(name)])

        seconds = {}
        for name, ran in self._each(run, sorted({name for mutant in mutants for name in mutant.tests.split()})):
            if ran.code != 0:
                raise Refused(f"{test_file(name)} fails without any error ({ran.first_failure}): mend that first")
            seconds[name] = ran.seconds
        return seconds

    def run(self, mutants: Sequence[Mutant], seconds: dict[str, float],
            report: Callable[[Result], None]) -> list[Result]:
        """The results, each reported as it comes. Errors in C++ are one piece of work, which is begun first."""
        native = [mutant for mutant in mutants if mutant.file.endswith(CPP)]

        def run(tree: Tree, piece: list[Mutant]) -> list[Result]:
            if piece is native:
                tree.build()
            results = []
            for mutant in piece:
                limit = max(MIN_LIMIT, PATIENCE * sum(seconds[name] for name in mutant.tests.split()))
                results.append(tree.plant(mutant, limit))
                report(results[-1])
            if piece is native:
                tree.build()  # without the last error, for what this copy is used for next
            return results

        pieces = [native] * bool(native) + [[mutant] for mutant in mutants if mutant not in native]
        return [result for results in self._each(run, pieces) for result in results]

    def _each(self, call: Callable[[Tree, T], Out], items: Iterable[T]) -> Iterator[Out]:
        """call(tree, item) for every item, each with a tree of its own; the results as they come."""
        def in_a_tree(item: T) -> Out:
            tree = self._free.get()
            try:
                return call(tree, item)
            finally:
                self._free.put(tree)

        pool = ThreadPoolExecutor(self.jobs)
        try:
            for future in as_completed([pool.submit(in_a_tree, item) for item in items]):
                yield future.result()
        except BaseException:
            for tree in self.trees:
                tree.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; its exit code."""
    parser = argparse.ArgumentParser(description="Plants errors one at a time and reports which the tests notice.")
    parser.add_argument("--only", action="append", metavar="TEXT",
                        help="rows whose file or error holds TEXT; repeatable")
    parser.add_argument("--python-only", action="store_true", help="no errors in C++")
    parser.add_argument("--jobs", type=int, default=2, help="at a time (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print the rows and plant nothing")
    options = parser.parse_args(arguments)
    chosen = [mutant for mutant in MUTANTS
              if (not options.only or any(text in f"{mutant.file}: {mutant.error}" for text in options.only))
              and not (options.python_only and mutant.file.endswith(CPP))]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.file}: {mutant.error} ({mutant.tests})")
        return 0
    begin = time.monotonic()

    def report(result: Result) -> None:
        how = f"caught by {result.how}" if result.caught else "SURVIVED"
        print(f"{result.mutant.file}: {result.mutant.error}: {how} ({result.seconds:.0f} s)", flush=True)

    try:
        if not chosen or options.jobs < 1:
            raise Refused("there is nothing to do: see --list for the rows, and give --jobs 1 or more")
        wrong = problem(chosen, ROOT)
        if wrong is not None:
            raise Refused(wrong)
        with tempfile.TemporaryDirectory(prefix="mutate-") as home:
            runner = Runner(ROOT, options.jobs, Path(home).resolve())
            runner.trees[0].check_imports()
            results = runner.run(chosen, runner.baseline(chosen), report)
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return summary(results, time.monotonic() - begin)


def summary(results: Sequence[Result], seconds: float) -> int:
    """Prints how many were caught and which were not; the exit code."""
    survivors = [result.mutant for result in results if not result.caught]
    caught = len(results) - len(survivors)
    for mutant in survivors:
        print(f"survived: {mutant.file}: {mutant.error} ({mutant.tests})")
    print(f"{caught} of {len(results)} errors caught ({caught / len(results):.1%}; {MIN_CAUGHT:.0%} are needed) in "
          f"{seconds / 60:.1f} minutes")
    return 0 if caught >= MIN_CAUGHT * len(results) else 1


def _tool(name: str) -> str | None:
    """A program beside this Python or on the PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def _kill(process: subprocess.Popen) -> None:
    """Ends a process with all that it started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _quiet(command: Sequence[str | Path]) -> None:
    ran = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if ran.returncode:
        raise Refused(f"libstars does not build with a row's change: {ran.stdout[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
