"""The tuned table of a run: what its stages have measured, in the form that `stars.kernels.triton.tuned` reads.

A stage leaves its part as a fact "tuned ...". What no stage has measured is taken from the table in the checkout, so
that the whole can take that one's place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from importable import ROOT

SHIPPED = ROOT / "kernels" / "triton" / "tuned"
PREFIX = "tuned "
IDENTITY = {"plain": ("scheme", "out", "rows", "out_features", "in_features"),
            "tiles": ("end", "scheme", "rows", "out_features", "in_features"), "chains": ("model", "scheme", "rows")}
"""What an entry is for: what was measured takes its place. What an entry lacks is as it usually is."""


def part(version: int, gpu: str, file: str, **entries: list[dict]) -> dict[str, Any]:
    """The value of such a fact; entries: lists of "plain", "tiles" or "chains". file: the table's own name."""
    return {"version": version, "gpu": gpu, "file": file, **entries}


def whole(facts: dict[str, Any], shipped: Path = SHIPPED) -> dict[str, Any] | None:
    """The table of all such facts; None where there are none. Its "file" says under which name it is read."""
    parts = [value for name, value in facts.items() if name.startswith(PREFIX)]
    if not parts:
        return None
    head = {name: parts[0][name] for name in ("version", "gpu", "file")}
    before = _shipped(shipped / head["file"], head["version"])
    found: dict[str, Any] = dict(head)
    for kind, fields in IDENTITY.items():
        fresh = [entry for one in parts for entry in one.get(kind, [])]
        measured = {_identity(entry, fields) for entry in fresh}
        found[kind] = fresh + [entry for entry in before.get(kind, []) if _identity(entry, fields) not in measured]
    return found


def text(table: dict[str, Any]) -> str:
    """As it is committed: an entry a line."""
    lines = [f" {json.dumps(name)}: {json.dumps(table[name])}" for name in ("version", "gpu")]
    for kind in IDENTITY:
        entries = ",\n".join(f"  {json.dumps(entry)}" for entry in table[kind])
        lines.append(f" {json.dumps(kind)}: [" + (f"\n{entries}\n ]" if entries else "]"))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _identity(entry: dict[str, Any], fields: tuple[str, ...]) -> str:
    return json.dumps([entry.get(field) for field in fields], sort_keys=True)


def _shipped(path: Path, version: int) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if found.get("version") == version else {}
