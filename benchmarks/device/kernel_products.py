"""Products and rotations: against float64, and the same bits for a row in any company."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from compare import one_order, same, within
from kernel_rows import DTYPES, draw_from
from launchers import launchers
from parallel import run_apart
from record import Record, Settings
from torch import Tensor

from stars.kernels.linear import Weight, linear_reference
from stars.kernels.rope_write import rope_write_reference
from stars.kernels.types import Batch, LayerKV

MAX_ROWS = 70


def run(record: Record, settings: Settings) -> None:
    """Every type; odd sizes and those of an 8B model; every head size, with and without norms."""
    run_apart(record, settings, {f"{name} {str(dtype).removeprefix('torch.')}": partial(of_type, dtype=dtype)
                                 for dtype in DTYPES for name, of_type in (("linear", _linears), ("rope_write", _ropes))
                                 }, most=2)


def _linears(record: Record, settings: Settings, dtype: torch.dtype) -> None:
    ops = launchers(settings.dry)
    real = () if settings.dry else ((1, 6144, 4096), (MAX_ROWS, 4096, 4096))
    for rows, out_features, in_features in (*real, (1, 17, 40), (37, 40, 304)):
        with record.checking(f"linear {str(dtype)[6:]} {rows} x {out_features} x {in_features}"):
            linear(record, ops, settings.device, dtype, rows, out_features, in_features)


def _ropes(record: Record, settings: Settings, dtype: torch.dtype) -> None:
    ops = launchers(settings.dry)
    for head_dim in (128, 64, 80) if settings.quick else (128, 64, 80, 96, 256):
        for norm in (False, True):
            with record.checking(f"rope_write {str(dtype)[6:]} {head_dim}{' norm' * norm}"):
                rope_write(record, ops, settings.device, dtype, head_dim, norm)


def linear(record: Record, ops: SimpleNamespace, device: str, dtype: torch.dtype, rows: int, out_features: int,
           in_features: int) -> None:
    name = f"{str(dtype)[6:]} {rows} x {out_features} x {in_features}"
    draw = draw_from(device, rows)
    x, matrix = draw(rows, in_features).to(dtype), draw(out_features, in_features).to(dtype)
    for bias in (None, draw(out_features).to(dtype)):
        weight = Weight(matrix, bias, out_features, in_features)
        exact = x.double() @ matrix.double().t() + (0 if bias is None else bias.double())
        plain, got = (torch.full((rows, out_features), torch.nan, dtype=dtype, device=device) for _ in range(2))
        linear_reference(x, weight, plain)
        for kind, launch in (("linear", ops.linear), ("linear_invariant", ops.linear_invariant)):
            launch(x, weight, got.fill_(torch.nan))
            chain = one_order(in_features, 1.0) if kind == "linear_invariant" and dtype == torch.float32 else 0.0
            within(record, f"{kind} {name}{' bias' * (bias is not None)}", got, plain, exact, chain=chain)
    if ops.linear_invariant is not linear_reference:  # plain torch makes no such promise
        part = torch.empty(1, out_features, dtype=dtype, device=device)
        ops.linear_invariant(x[rows // 2 : rows // 2 + 1], weight, part)
        same(record, f"linear_invariant {name}, a row alone", part[0], got[rows // 2])


def rope_write(record: Record, ops: SimpleNamespace, device: str, dtype: torch.dtype, head_dim: int,
               norm: bool) -> None:
    name = f"rope_write {str(dtype)[6:]} {head_dim}{' norm' * norm}"
    rows, heads, kv_heads, positions = 19, 6, 2, 200
    draw = draw_from(device, head_dim)
    qkv = (2 * draw(rows, (heads + 2 * kv_heads) * head_dim)).to(dtype)
    at = torch.randperm(positions, generator=torch.Generator().manual_seed(1))[:rows].int().to(device)
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(2))[:rows].int().to(device)
    slots[3] = -1
    angles = draw(positions, head_dim // 2)
    norms = [(1 + 0.2 * draw(head_dim)) for _ in range(2)] if norm else [None, None]
    none = torch.zeros(1, dtype=torch.int32, device=device)
    for into_slab in (False, True):
        batch = Batch(none, at, slots, into_slab, none, none, none[None], none, none, none)

        def rotated(launch, kind: torch.dtype, batch=batch) -> list[Tensor]:
            cache = [torch.full((40, kv_heads, head_dim), 7.0, dtype=kind, device=device) for _ in range(4)]
            q = torch.full((rows, heads, head_dim), torch.nan, dtype=kind, device=device)
            launch(qkv.to(kind), batch, angles.cos(), angles.sin(), LayerKV(*cache, 16), q, *norms, 1e-6)
            return [q, *cache]

        got, plain = rotated(ops.rope_write, dtype), rotated(rope_write_reference, dtype)
        exact = rotated(rope_write_reference, torch.float64)
        for part, mine, theirs, truth in zip(("q", "k pages", "v pages", "k slabs", "v slabs"), got, plain, exact,
                                             strict=True):
            within(record, f"{name} into {'slab' if into_slab else 'pages'}: {part}", mine, theirs, truth)
