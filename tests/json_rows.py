"""Rows of JSON in files, for tests of the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def rows(text: str) -> list[dict]:
    """The rows of strict JSON in `text`."""
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def write_rows(path: Path, *values) -> Path:
    """Writes values as rows, strings as they are."""
    path.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values))
    return path
