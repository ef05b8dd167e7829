"""The products of an 8B model: cuBLAS, cublasLt, and our kernel over a list of tiles; the best of each goes to a table.

The outcome is the part "plain" of the tuned table (`tables.whole`), by which `linear` goes on cards of that name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from compare import one_order, within
from launchers import launchers
from record import Record, Settings, device_lost
from rehearse import compile_first
from tables import PREFIX, part
from timing import ROTATED_BYTES, Seconds, rehearsing, seconds_a_call, sets

from stars.kernels.linear import Weight
from stars.kernels.triton.tuned import VERSION, Tile, slug


class Product(NamedTuple):
    """One matrix of a layer, or the head."""

    name: str
    out_features: int
    in_features: int
    widened: bool = False  # the output is float32, as logits are


REAL = (Product("gate_up", 28672, 4096), Product("down", 4096, 14336), Product("qkv", 6144, 4096),
        Product("o", 4096, 4096), Product("head", 128256, 4096, widened=True))
TOY = (Product("gate_up", 96, 64), Product("o", 64, 64), Product("head", 100, 64, widened=True))
ROWS = (1, 16, 128, 8, 32)
"""The most telling first. A scoring pass of four candidates of 32 tokens has 128 rows."""

FACT = f"{PREFIX}products"

SPREAD = 1 / 64  # standard deviation of weights

SKINNY = (Tile(16, 32, 256, 4, 4), Tile(16, 16, 512, 4, 4), Tile(16, 32, 512, 4, 3), Tile(16, 64, 256, 4, 4),
          Tile(16, 64, 128, 4, 6), Tile(16, 128, 128, 8, 4), Tile(64, 32, 128, 4, 4), Tile(64, 64, 128, 4, 4))
TALL = (Tile(64, 32, 128, 4, 4), Tile(64, 64, 128, 4, 4), Tile(64, 128, 64, 4, 4), Tile(128, 64, 64, 4, 4),
        Tile(128, 64, 128, 8, 3), Tile(128, 128, 64, 8, 4))
"""None takes more than 144 of the 227 KiB that a block may have, and none spills (sm_90, Triton 3.6.0)."""


def tiles(rows: int) -> tuple[Tile, ...]:
    """Those worth trying at so many rows."""
    return SKINNY if rows <= 32 else TALL


def run(record: Record, settings: Settings) -> None:
    """One part for each number of rows; the table grows with each."""
    products, counts = (TOY, (1, 8)) if settings.dry else (REAL, ROWS)
    compile_first(record, settings, [
        lambda silent, rows=rows: _of_rows(silent, settings, rows, products, []) for rows in counts
        if _part(rows) not in record.done])
    # What a process before this one has measured stays in the table.
    before = record.content["facts"].get(FACT, {"plain": []})["plain"]
    table = [entry for entry in before if _part(entry["rows"]) in record.done]
    for rows in counts:
        record.part(_part(rows), _of_rows, record, settings, rows, products, table, least=1.5)


def _part(rows: int) -> str:
    return f"{rows} rows"


def _of_rows(record: Record, settings: Settings, rows: int, products: tuple[Product, ...], table: list[dict]) -> None:
    # One tensor is enough for all weights: their values do not matter, where they lie does.
    largest = max(2 * product.out_features * product.in_features for product in products)
    store = torch.empty((max(ROTATED_BYTES, 2 * largest) if not settings.dry else 4 * largest) // 2,
                        dtype=torch.bfloat16, device=settings.device)
    if not rehearsing():
        store.normal_(0.0, SPREAD)
    for product in products:
        entry = _measure(record, settings, rows, product, store)
        table.append(entry)
        gpu = "none" if settings.dry else torch.cuda.get_device_name()
        record.fact(FACT, part(VERSION, gpu, f"{slug(gpu)}.json", plain=table))


def _measure(record: Record, settings: Settings, rows: int, product: Product, store: torch.Tensor) -> dict:
    name, out_features, in_features, widened = product
    size = out_features * in_features
    count = min(len(store) // size, max(2, sets(2 * size, settings.dry)))
    weights = [Weight(store[index * size : (index + 1) * size].view(out_features, in_features), None, out_features,
                      in_features) for index in range(count)]
    x = torch.randn(rows, in_features, device=settings.device).bfloat16()
    out = torch.empty(rows, out_features, device=settings.device, dtype=torch.float32 if widened else x.dtype)

    def timed(one: Callable[[Weight], object]) -> Seconds:
        return seconds_a_call([lambda weight=weight: one(weight) for weight in weights], settings.device, repeats=5,
                              least=6)

    def library(weight: Weight, out: torch.Tensor = out) -> None:
        if not widened:
            torch.mm(x, weight.values.t(), out=out)
        elif settings.dry:  # torch widens on a GPU alone
            torch.mm(x.float(), weight.values.t().float(), out=out)
        else:
            torch.mm(x, weight.values.t(), out_dtype=torch.float32, out=out)

    found: dict[str, Seconds | None] = {}
    for kind in ("cublas", "cublaslt"):
        if settings.dry:
            found[kind] = timed(library)
            continue
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library(kind)
        try:
            found[kind] = timed(library)
        finally:
            torch.backends.cuda.preferred_blas_library(before)
    best, best_tile = None, None
    for tile in tiles(rows)[: 2 if settings.dry else None]:
        try:
            seconds = timed(lambda weight, tile=tile: launchers(settings.dry).product(x, weight, out, tile))
        except Exception as error:  # a tile that one card does not take is no reason to lose the others
            if device_lost() is not None:
                raise
            record.note(f"{name}, {rows} rows, {tuple(tile)}: {type(error).__name__}: {str(error)[:120]}")
            continue
        if best is None or seconds < best:
            best, best_tile = seconds, tile
    found["ours"] = best
    if best_tile is not None and not rehearsing():  # the fastest is worth nothing if it is wrong
        got, plain = torch.full_like(out, torch.nan), torch.empty_like(out)
        launchers(settings.dry).product(x, weights[0], got, best_tile)
        library(weights[0], plain)
        within(record, f"product {name}, {rows} rows, {tuple(best_tile)}", got, plain,
               x.float() @ weights[0].values.float().t(),
               chain=one_order(in_features, SPREAD) if widened else 0.0)
    fastest = min((kind for kind in found if found[kind] is not None), key=lambda kind: found[kind])
    limit = None if settings.bandwidth is None else 2 * size / settings.bandwidth
    record.figure(f"product {name}, {rows} rows, {fastest}", 1e6 * found[fastest], "us",
                  None if limit is None else 1e6 * limit, "its weights at read bandwidth", tile=best_tile,
                  spread=[1e6 * one for one in found[fastest].spread],
                  **{kind: None if seconds is None else 1e6 * seconds for kind, seconds in found.items()})
    return {"name": name, "scheme": "bf16", "rows": rows, "out_features": out_features, "in_features": in_features,
            **({"out": "fp32"} if widened else {}), "best": fastest,
            "tile": None if best_tile is None else best_tile._asdict(),
            "us": {kind: None if seconds is None else round(1e6 * seconds, 2) for kind, seconds in found.items()}}
