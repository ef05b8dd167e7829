"""The text files of a model directory: they came with a download, so whatever is in them ends in one sentence."""

from __future__ import annotations

import json
import reprlib
import sys
from pathlib import Path
from typing import Any

from stars.errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Where a model's weights are, or which files they are in."""

GGUF, GGUF_MAGIC = ".gguf", b"GGUF"
"""How the names of models that are one file end, and how those files begin."""

MAX_BYTES = 1 << 28
"""Of a JSON file or template: the longest tokenizer.json in use is an eighth of it, an index of shards far shorter."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def shown(value: Any) -> str:
    """`value` for an error message: its repr, short however long or nested it is."""
    return _short.repr(value)


def printed(name: str) -> str:
    """A name from a file for an error message: as it is, unless it is over-long or holds what no line may."""
    return name if name.isprintable() and len(name) <= 200 else shown(name)


def is_finite(value: Any) -> bool:
    """Whether `value` is a number that a float holds: no NaN, no infinity, no integer beyond the largest float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_file(path: Path) -> bool:
    """Whether there is a file; False for names that the system refuses, such as loops of links."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_directory(path: Path) -> bool:
    """Whether there is a directory; False for names that the system refuses, such as over-long ones."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_gguf(path: Path) -> bool:
    """Whether there is a file that is a GGUF file, by its name or by how it begins."""
    if not is_file(path):
        return False
    if path.suffix.lower() == GGUF:
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == GGUF_MAGIC
    except OSError:
        return False


def settings_of(directory: Path) -> dict[str, Any]:
    """What config.json of a model's directory says; nothing of a model that is one file. Raises ModelError."""
    return {} if is_file(directory) else read_json(directory / "config.json")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8; ModelError where it cannot be read."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ModelError(f"{path} has {size} bytes where {MAX_BYTES} are the most: copy the model again")
        return path.read_text(encoding="utf8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}): copy the model again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ModelError where it cannot be read or is something else."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}): copy the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object: copy the model again")
    return value
