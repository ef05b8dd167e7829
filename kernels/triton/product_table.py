"""Which products our own kernel forms on a GPU, and with which tiles: measured tables, one file a card.

`benchmarks/device` (stage `products`) writes such a table; copied to `product_tables/`, it is what `linear` goes by on
cards of that name. Without one, products are cuBLAS'.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

TABLES = Path(__file__).with_name("product_tables")


class Tile(NamedTuple):
    """What a program of the product's kernel works on, and how."""

    rows: int
    features: int
    inner: int
    warps: int
    stages: int


def slug(gpu: str) -> str:
    """The card's name as a file's: "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def read(path: Path) -> dict[tuple[int, int], list[tuple[int, Tile | None]]]:
    """By (out_features, in_features): (rows, tile) in order of rows, no tile where a library was the fastest.

    An empty table where there is no file.
    """
    found: dict[tuple[int, int], list[tuple[int, Tile | None]]] = {}
    for entry in json.loads(path.read_text())["products"] if path.exists() else ():
        tile = Tile(*entry["tile"]) if entry["best"] == "ours" else None
        found.setdefault((entry["out_features"], entry["in_features"]), []).append((entry["rows"], tile))
    return {shape: sorted(entries, key=lambda entry: entry[0]) for shape, entries in found.items()}


@cache
def _measured() -> dict[tuple[int, int], list[tuple[int, Tile | None]]]:
    """The table of this machine's card; empty where there is no card (Triton's interpreter) or no table of it."""
    if not torch.cuda.is_available():
        return {}
    return read(TABLES / f"{slug(torch.cuda.get_device_name())}.json")


def tile(rows: int, out_features: int, in_features: int) -> Tile | None:
    """How our kernel is to form a product of this shape, by the next larger number of rows that was measured.

    None leaves it to cuBLAS.
    """
    entries = _measured().get((out_features, in_features), ())
    return next((chosen for measured, chosen in entries if measured >= rows), None)
