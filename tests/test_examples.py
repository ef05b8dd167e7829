"""What property tests see is the same in every run, alone or beside any other file."""

from __future__ import annotations

import importlib.util
import random
import sys

from hypothesis import given, settings
from hypothesis import strategies as st


def examples() -> list[tuple]:
    """What a property test is given, in order."""
    seen = []

    @settings(max_examples=150)
    @given(st.integers(), st.floats(), st.text(), st.lists(st.integers(0, 1 << 40)))
    def note(number, real, text, numbers):
        seen.append(repr((number, real, text, numbers)))

    note()
    return seen


def test_examples_do_not_depend_on_what_else_was_imported(tmp_path, monkeypatch):
    first = examples()
    draw = random.Random(1)
    file = tmp_path / "full_of_constants.py"
    file.write_text("VALUES = [" + ", ".join(f"{draw.randrange(1 << 40)}, {draw.random()}, 'word{i}'"
                                             for i in range(200)) + "]\n")
    spec = importlib.util.spec_from_file_location("full_of_constants", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "full_of_constants", module)
    spec.loader.exec_module(module)
    assert len(set(first)) > 100 and examples() == first


def test_examples_do_not_depend_on_the_run():
    assert settings.default.derandomize and settings.default.database is None
