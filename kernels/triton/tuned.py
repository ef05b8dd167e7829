"""What a card was seen to like: which products are ours there, in which tiles, and whether a pass is fused.

One file a card, `tuned/<slug>.json`, which `benchmarks/device` writes:

    {"version": 2, "gpu": the card's name,
     "plain":  [{"scheme", "rows", "out_features", "in_features", "best": "ours" or a library, "tile": {...},
                 "out": "fp32" where the output is of that type and the weights are not}, ...],
     "tiles":  [{"end", "scheme", "rows", "out_features", "in_features", "tile": {...}}, ...],
     "chains": [{"model": {"hidden", "qkv", "intermediate", "vocab"}, "scheme", "rows", "fused": bool}, ...]}

Everything was measured at some numbers of rows; a number between two goes by the larger. Figures beside these fields
are for readers. Where there is no file, one that cannot be read, or one of another version, products are the library's,
no pass of 16-bit weights is fused, and the tiles are those of `default`.
"""

from __future__ import annotations

import json
import re
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).with_name("tuned")

VERSION = 2

MAX_FUSED_ROWS = 128
"""Rows up to which a pass over quantised weights is fused."""

FIXED_ROWS = 64
"""Rows whose tile serves weights packed as deterministic, at any number of rows."""

SUMMED = 32
"""Features whose squares make one entry of `Stream.squares`."""

WARPS = 1024
"""Warps that a product is to have at least, by splits: eight for each processor of a large card."""

HEAD_NUMBERS = 1 << 14
"""Rows times features of whole heads that a program ends: 64 registers a thread of eight warps."""

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""KiB of shared memory a block may have, by compute capability."""

_FLOATS = ("bf16", "fp16", "fp32")
_IN_FLOAT32 = " in fp32"


class Tile(NamedTuple):
    """What a program of a product's kernel works on, and how."""

    rows: int
    features: int
    inner: int
    warps: int
    stages: int
    splits: int = 1  # programs that share a tile, each with a part of the inner dimension
    swap: bool = False  # weights as the left operand, which from 64 features on is wgmma
    pdl: bool = False  # starts while the kernel before it still runs
    prefetch: int = 0  # with pdl: bytes of each weight row that are asked for before that kernel is waited for


class ModelShape(NamedTuple):
    """The widths of a decoder, by which a measured chain is found."""

    hidden: int
    qkv: int  # (heads + 2 * kv_heads) * head_dim
    intermediate: int
    vocab: int  # 0: no language model head


class Product(NamedTuple):
    """A product of a fused pass, as `room` wants to know it."""

    end: str  # "qkv", "residual", "swiglu", "normed" or "plain"
    scheme: str  # of its weight, as `called`
    out_features: int
    in_features: int
    head_dim: int = 0  # of "qkv"


class Table(NamedTuple):
    """What was measured: by what it was measured for, (rows, outcome) in order of rows."""

    plain: Mapping[tuple[str, str, int, int], tuple[tuple[int, Tile | None], ...]] = {}  # no tile: a library is faster
    tiles: Mapping[tuple[str, str, int, int], tuple[tuple[int, Tile], ...]] = {}
    chains: Mapping[tuple[ModelShape, str], tuple[tuple[int, bool], ...]] = {}


_in_force: list[Table] = []
"""The tables of the `using` that are open, the innermost last."""


def called(scheme: str, float32: bool) -> str:
    """A weight's scheme as tiles are asked for by: "int8 in fp32" where activations are float32 beside a quantised one.

    Such a product has no tensor core: in the tiles of the others its sums leave no registers.
    """
    return scheme + _IN_FLOAT32 if float32 and scheme not in _FLOATS else scheme


def slug(gpu: str) -> str:
    """The card's name as a file's: "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def parse(content: Mapping[str, Any]) -> Table:
    """The table of a file's content of this version."""
    plain: dict[tuple[str, str, int, int], list[tuple[int, Tile | None]]] = {}
    for entry in content["plain"]:
        best = Tile(**entry["tile"]) if entry["best"] == "ours" else None
        key = (entry["scheme"], entry.get("out", entry["scheme"]), entry["out_features"], entry["in_features"])
        plain.setdefault(key, []).append((entry["rows"], best))
    tiles: dict[tuple[str, str, int, int], list[tuple[int, Tile]]] = {}
    for entry in content["tiles"]:
        where = (entry["end"], entry["scheme"], entry["out_features"], entry["in_features"])
        tiles.setdefault(where, []).append((entry["rows"], Tile(**entry["tile"])))
    chains: dict[tuple[ModelShape, str], list[tuple[int, bool]]] = {}
    for entry in content["chains"]:
        chain = (ModelShape(**entry["model"]), entry["scheme"])
        chains.setdefault(chain, []).append((entry["rows"], entry["fused"]))
    return Table(_in_order(plain), _in_order(tiles), _in_order(chains))


def read(path: Path) -> Table:
    """The table of a file; an empty one where there is none, and, with a warning, where it is broken or of another
    version.
    """
    if not path.exists():
        return Table()
    try:
        content = json.loads(path.read_text(encoding="utf8"))
        if not isinstance(content, dict):
            raise TypeError("it holds no object")
        if content.get("version") == VERSION:
            return parse(content)
        problem = f"is a table of version {content.get('version')}, not {VERSION}"
    except (OSError, ValueError, LookupError, TypeError) as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
    warnings.warn(f"{path} {problem}: products on this card go to the library until `make device` has written a new "
                  "one", stacklevel=2)
    return Table()


@contextmanager
def using(table: Table) -> Iterator[None]:
    """Inside, `table` is in force instead of the card's, in all threads: for benchmarks and tests."""
    _in_force.append(table)
    try:
        yield
    finally:
        _in_force.remove(table)


def plain(scheme: str, rows: int, out_features: int, in_features: int, out: str = "") -> Tile | None:
    """How our kernel is to form a product without a fused end; None leaves it to the library.

    out: the type of the output, as schemes are called, where it is not the weights'.
    """
    return _outcome(_table().plain, (scheme, out or scheme, out_features, in_features), rows)


def tile(end: str, scheme: str, rows: int, out_features: int, in_features: int) -> Tile:
    """How a product of a fused pass is formed: as the card's table says, else as `default` does."""
    found = _outcome(_table().tiles, (end, scheme, out_features, in_features), rows)
    return default(end, scheme, rows, out_features, in_features) if found is None else found


def fused(model: ModelShape, scheme: str, rows: int) -> bool:
    """Whether a pass of so many rows is fused: where this was measured ahead, and over quantised weights.

    There is no library for those, up to `MAX_FUSED_ROWS`. Not in float16: `Stream.scaled` holds a residual that was not
    normed yet, which in some models leaves that type's range.
    """
    if scheme not in _FLOATS and rows <= MAX_FUSED_ROWS:
        return True
    return scheme != "fp16" and bool(_outcome(_table().chains, (model, scheme), rows))


@cache
def default(end: str, scheme: str, rows: int, out_features: int, in_features: int, shared: int | None = None) -> Tile:
    """A tile that works at any size, on a card whose blocks have `shared` KiB of shared memory (None: this one).

    Up to 16 rows they are the best that an H100 was seen to like in a chain of all products of an 8B step, by their
    proportions. Beyond, tiles grow with the rows: a program reads as many activations as weights at the most.
    """
    shared = _shared() if shared is None else shared
    floats = scheme in _FLOATS
    if scheme == "fp32" or scheme.endswith(_IN_FLOAT32):  # without tensor cores
        chosen = Tile(16, 32, 32, 4, 2)
    elif not floats:
        chosen = _quantised(rows, shared)
    elif rows > 64:
        chosen = Tile(128, 128, 64, 8, 4, swap=True)
    elif rows > 32:
        chosen = Tile(64, 128, 64, 8, 4, swap=True)
    elif rows > 16:
        chosen = Tile(32, 64, 128, 4, 4, swap=True)
    elif end == "normed":
        chosen = Tile(16, 64, 256, 4, 3)
    elif end == "residual" and in_features >= 2 * out_features:
        chosen = Tile(16, 32, 512, 4, 3)
    else:
        chosen = Tile(16, 64, 128, 4, 4, swap=end != "qkv")
    limit = 1024 * (shared - 8)  # the rest is for sums and turned tiles
    # Bytes of an activation, which beside quantised weights may be a float32, and of a weight.
    x, item = (2, 2) if scheme in ("bf16", "fp16") else (4, 4 if scheme == "fp32" else 1)
    while chosen.stages * chosen.inner * (chosen.rows * x + chosen.features * item) > limit:
        chosen = chosen._replace(inner=chosen.inner // 2) if chosen.inner > 64 else chosen._replace(
            stages=chosen.stages - 1)
    programs = -(-out_features // chosen.features) * -(-rows // chosen.rows)
    splits = 1
    most = 4 if end == "qkv" and not floats else 8  # two warps that add up more parts of a whole head would spill
    while (end != "plain" and splits * programs * chosen.warps < WARPS and splits < most
           and in_features >= 1024 * splits):
        splits *= 2
    return chosen._replace(splits=splits)


def _quantised(rows: int, shared: int) -> Tile:
    """Tiles in which no number is turned from bits twice, and whose loads are of sixteen bytes a thread.

    Up to 32 rows by the matrix instruction of a warp: with the weights as its left operand, whose rows two warps share,
    or as its right one. (Four warps with them on the left get Hopper's matrix instruction, for which Triton loads a
    left operand of 8 bits byte by byte.) Beyond, that instruction takes them as its right operand, from shared memory;
    older cards, whose instruction takes them from registers, have too few for 128 rows of 128 features.
    """
    if rows > 64:
        return Tile(128, 128 if shared >= SHARED[90] else 64, 64, 8, 3)
    if rows > 32:
        return Tile(64, 128, 64, 8, 4)
    return Tile(16, 64, 128, 2, 4, swap=True) if rows <= 16 else Tile(32, 128, 128, 4, 3)


def room(rows: int, products: Iterable[Product]) -> tuple[int, int]:
    """(floats, tickets) of the SplitSpace that passes of 1 to `rows` rows need."""
    floats = tickets = 1
    for product in products:
        for count in range(1, rows + 1):
            chosen = tile(product.end, product.scheme, count, product.out_features, product.in_features)
            chosen = chosen if product.end != "qkv" else of_heads(chosen, product.head_dim)
            more = needed(product.end, chosen, count, product.out_features, product.head_dim)
            floats, tickets = max(floats, more[0]), max(tickets, more[1])
    return floats, tickets


def needed(end: str, tile: Tile, rows: int, out_features: int, head_dim: int = 0) -> tuple[int, int]:
    """(floats, tickets) that one launch meets in; zeros where no programs share anything. A tile `of_heads` for "qkv".
    """
    units, tiles, width = units_of(end, tile, out_features, head_dim)
    if tiles * tile.splits == 1:
        return 0, 0
    blocks = -(-rows // tile.rows)
    return blocks * units * tile.splits * tile.rows * width, blocks * units


def units_of(end: str, tile: Tile, out_features: int, head_dim: int = 0) -> tuple[int, int, int]:
    """(units, tiles of a unit, features of a unit): what is ended as a whole, a head of "qkv" or else a tile."""
    if end != "qkv":
        return -(-out_features // tile.features), 1, tile.features
    tiles = -(-head_dim // tile.features)
    return out_features // head_dim, tiles, tiles * tile.features


def of_heads(tile: Tile, head_dim: int) -> Tile:
    """The tile for the end "qkv": no wider than a head, and no more rows than registers hold of whole heads."""
    width = head_width(head_dim)
    return tile._replace(features=min(tile.features, width), rows=min(tile.rows, max(16, HEAD_NUMBERS // width)))


def head_width(head_dim: int) -> int:
    """The features of a tile that takes a whole head: halves of a power of two."""
    return 2 * (1 << (head_dim // 2 - 1).bit_length())


def _outcome(entries: Mapping[Any, tuple[tuple[int, Any], ...]], key: tuple[Any, ...], rows: int) -> Any:
    """Of the least number of rows measured that is no less than `rows`; None where there is none."""
    found = entries.get(key, ())
    at = bisect_left(found, rows, key=lambda entry: entry[0])
    return found[at][1] if at < len(found) else None


def _in_order(entries: dict[Any, list[tuple[int, Any]]]) -> dict[Any, tuple[tuple[int, Any], ...]]:
    return {key: tuple(sorted(found, key=lambda entry: entry[0])) for key, found in entries.items()}


def _table() -> Table:
    return _in_force[-1] if _in_force else _of_the_card()


@cache
def _of_the_card() -> Table:
    """The table of this machine's card; empty where there is no card (Triton's interpreter) or no table of it."""
    if not torch.cuda.is_available():
        return Table()
    return read(FOLDER / f"{slug(torch.cuda.get_device_name())}.json")


@cache
def _shared() -> int:
    """KiB of shared memory that a block may have on this card; the least of all where that is not known."""
    if not torch.cuda.is_available():
        return min(SHARED.values())
    major, minor = torch.cuda.get_device_capability()
    return SHARED.get(10 * major + minor, min(SHARED.values()))
