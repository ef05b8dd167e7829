"""Changes to a copy of a model's directory: keys of its JSON files, tensors of its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file, which need not be there; ... removes one."""
    state = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({key: value for key, value in state.items() if value is not ...}))


def edit_config(directory: Path, **changes: Any) -> None:
    """Sets keys of config.json; ... removes one."""
    edit_json(directory / "config.json", **changes)


def edit_tensors(directory: Path, **changes: Any) -> None:
    """Sets tensors of model.safetensors, dots written as "__"; a function is given the old one, ... removes it."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors[name] = value(tensors[name]) if callable(value) else value
    save_file({name: value for name, value in tensors.items() if value is not ...}, path, metadata={"format": "pt"})
