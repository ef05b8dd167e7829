"""The table of planted errors is up to date, and its runner tells caught errors from those that survive."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mutate.mutants import MIN_MUTANTS, MUTANTS, Mutant, problem
from mutate.run import HOOK, Refused, Runner, Tree, summary

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_is_up_to_date():
    """Every text stands once in its file, every change is one and runs, every test file exists."""
    wrong = [text for mutant in MUTANTS if (text := problem([mutant], ROOT)) is not None]
    assert not wrong
    assert len(MUTANTS) >= MIN_MUTANTS
    assert len({(mutant.file, mutant.text) for mutant in MUTANTS}) == len(MUTANTS)


GOOD = Mutant("engine/sums.py", "a + b", "a - b", "the sum is a difference", "sums")


@pytest.mark.parametrize("row, words", [
    (GOOD, None),
    (GOOD._replace(file="engine/gone.py"), "engine/gone.py (the sum is a difference) names a file that is not there"),
    (GOOD._replace(text="a * b"), "its text stands 0 times"),
    (GOOD._replace(text="return"), "its text stands 2 times"),
    (GOOD._replace(replacement="a + b"), "changes nothing"),
    (GOOD._replace(replacement="a +"), "is no Python any more"),
    (GOOD._replace(tests=""), "names no test file"),
    (GOOD._replace(tests="sums gone"), "names tests/test_gone.py, which is not there"),
])
def test_rows_that_cannot_be_planted_are_named(checkout, row, words):
    said = problem([GOOD, row], checkout)
    assert said is None if words is None else words in said


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A package of one module, importable as `stars` by the runner's hook alone, with two test files."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    files = {
        "engine/__init__.py": "", "kernels/__init__.py": "", "bindings/__init__.py": "",
        "engine/sums.py": "def add(a, b):\n    return a + b\n\n\ndef twice(x):\n    while x < 0:\n        x += 9\n"
                          "    return 2 * x\n",
        "tests/test_sums.py": "from stars.sums import add, twice\n\n\ndef test_add():\n    assert add(2, 3) == 5\n\n\n"
                              "def test_twice():\n    assert twice(-4) == 10\n",
        "tests/test_nothing.py": "import stars.sums\n\n\ndef test_import():\n    assert stars.sums.add\n",
        "pyproject.toml": "[tool.pytest.ini_options]\naddopts = \"--import-mode=importlib -p no:cacheprovider\"\n",
    }
    for name, text in files.items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "checkout"


def test_errors_are_caught_or_survive(checkout, tmp_path, capsys):
    """Two copies, three errors: a failing test, none that looks, an import that raises."""
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    (tmp_path / "home").mkdir()
    runner = Runner(checkout, 2, tmp_path / "home")
    runner.trees[0].check_imports()
    rows = [GOOD, GOOD._replace(tests="nothing"), GOOD._replace(text="def add", replacement="1 / 0\ndef add")]
    seconds = runner.baseline(rows)
    assert set(seconds) == {"sums", "nothing"} and min(seconds.values()) > 0
    reported = []
    results = runner.run(rows, seconds, reported.append)
    assert sorted(results) == sorted(reported)
    assert {result.mutant: (result.caught, result.how) for result in results} == {
        rows[0]: (True, "test_sums.py::test_add"), rows[1]: (False, ""), rows[2]: (True, "test_sums.py")}
    assert summary(results, 60.0) == 1
    assert summary([result._replace(caught=True) for result in results], 60.0) == 0
    assert capsys.readouterr().out.splitlines() == [
        "survived: engine/sums.py: the sum is a difference (nothing)",
        "2 of 3 errors caught (66.7%; 90% are needed) in 1.0 minutes",
        "3 of 3 errors caught (100.0%; 90% are needed) in 1.0 minutes"]
    for tree in runner.trees:  # the errors were taken out again, and the checkout was never touched
        assert tree.read("engine/sums.py").encode() == before[checkout / "engine/sums.py"]
    assert before == {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}


def test_an_error_without_an_end_is_caught(checkout, tmp_path):
    result = Tree(checkout, tmp_path / "copy", 1).plant(GOOD._replace(text="x += 9", replacement="x += 0"), limit=1.0)
    assert (result.caught, result.how) == (True, "took too long")


def test_a_test_that_fails_without_any_error_is_refused(checkout, tmp_path):
    (checkout / "tests/test_nothing.py").write_text("def test_import():\n    assert False\n")
    (tmp_path / "home").mkdir()
    with pytest.raises(Refused, match="test_nothing.py fails without any error .*::test_import"):
        Runner(checkout, 1, tmp_path / "home").baseline([GOOD._replace(tests="nothing")])


def test_a_copy_that_is_not_imported_is_refused(checkout, tmp_path):
    tree = Tree(checkout, tmp_path / "copy", 1)
    (tmp_path / "copy" / "import_hook" / "sitecustomize.py").write_text(HOOK.format(root=str(checkout)))
    with pytest.raises(Refused, match="and not the copy"):
        tree.check_imports()


def test_rows_are_listed_and_unknown_ones_refused():
    command = [sys.executable, str(ROOT / "tests" / "mutate" / "run.py")]
    listed = subprocess.run([*command, "--list", "--only", "engine/rules.py"], capture_output=True, text=True)
    assert listed.returncode == 0
    assert len(listed.stdout.splitlines()) == sum(mutant.file == "engine/rules.py" for mutant in MUTANTS)
    refused = subprocess.run([*command, "--only", "no such row"], capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.startswith("refused: there is nothing to do")
