"""Kernels that work row by row: norms, the gate, rows and copies; against float64 or byte for byte."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from compare import same, within
from launchers import launchers
from parallel import run_apart
from record import Record, Settings

from stars.kernels.linear import Weight
from stars.kernels.rms_norm import rms_norm_reference
from stars.kernels.swiglu import swiglu_reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(record: Record, settings: Settings) -> None:
    """Every kernel in every type, at odd sizes and at those of real models."""
    run_apart(record, settings, {str(dtype).removeprefix("torch."): partial(_of_type, dtype=dtype)
                                 for dtype in DTYPES}, most=2)


def _of_type(record: Record, settings: Settings, dtype: torch.dtype) -> None:
    ops = launchers(settings.dry)
    device, real = settings.device, not settings.dry
    kind = str(dtype).removeprefix("torch.")
    for hidden in ((4096, 2048) if real else ()) + (17, 257):
        with record.checking(f"rms_norm {kind} {hidden}"):
            rms_norm(record, ops, device, dtype, 37, hidden)
    for intermediate in ((14336,) if real else ()) + (17, 1025):
        with record.checking(f"swiglu {kind} {intermediate}"):
            swiglu(record, ops, device, dtype, 17, intermediate)
    with record.checking(f"take_rows {kind}"):
        rows(record, ops, device, dtype)
    with record.checking(f"copy_rows {kind}"):
        copies(record, ops, device, dtype)


def draw_from(device: str, seed: int):
    """draw(*shape): normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device)


def rms_norm(record: Record, ops: SimpleNamespace, device: str, dtype: torch.dtype, rows: int, hidden: int) -> None:
    name = f"rms_norm {str(dtype)[6:]} {hidden}"
    draw = draw_from(device, hidden)
    for weight_dtype in {dtype, torch.float32}:
        x, residual = draw(rows, hidden).to(dtype), (3 * draw(rows, hidden)).to(dtype)
        weight = (1 + 0.2 * draw(hidden)).to(weight_dtype)
        plain, plain_residual = torch.empty_like(x), residual.clone()
        rms_norm_reference(x, weight, 1e-6, plain, plain_residual)
        got, got_residual = torch.full_like(x, torch.nan), residual.clone()
        ops.rms_norm(x, weight, 1e-6, got, got_residual)
        y = got_residual.double()
        exact = weight.double() * y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        within(record, f"{name}, weight {str(weight_dtype)[6:]}", got, plain, exact)
        within(record, f"{name}, residual", got_residual, plain_residual, residual.double() + x.double(), 1.0)
    alone = torch.empty_like(x[:1])
    ops.rms_norm(x[5:6], weight, 1e-6, alone, residual[5:6].clone())
    same(record, f"{name}, a row alone", alone[0], got[5])


def swiglu(record: Record, ops: SimpleNamespace, device: str, dtype: torch.dtype, rows: int,
            intermediate: int) -> None:
    gate_up = (4 * draw_from(device, intermediate)(rows, 2 * intermediate)).to(dtype)
    got, plain = (torch.full((rows, intermediate), torch.nan, dtype=dtype, device=device) for _ in range(2))
    swiglu_reference(gate_up, plain)
    ops.swiglu(gate_up, got)
    gate, up = gate_up.double().chunk(2, dim=-1)
    within(record, f"swiglu {str(dtype)[6:]} {intermediate}", got, plain, gate / (1 + (-gate).exp()) * up)


def rows(record: Record, ops: SimpleNamespace, device: str, dtype: torch.dtype) -> None:
    matrix = draw_from(device, 0)(101, 1027).to(dtype)
    index = torch.tensor([3, 0, 100, 3, 57] * 4 + [1], dtype=torch.int32, device=device)
    for target in {dtype, torch.float32}:
        got = torch.full((len(index), 1027), torch.nan, dtype=target, device=device)
        ops.take_rows(matrix, index, got)
        same(record, f"take_rows {str(dtype)[6:]} to {str(target)[6:]}", got, matrix[index.long()].to(target))
        ops.embedding(index, Weight(matrix, None, 101, 1027), got.fill_(torch.nan))
        same(record, f"embedding {str(dtype)[6:]} to {str(target)[6:]}", got, matrix[index.long()].to(target))


def copies(record: Record, ops: SimpleNamespace, device: str, dtype: torch.dtype) -> None:
    for layers, heads, head_dim, count in ((1, 1, 17, 1), (3, 2, 20, 17), (5, 8, 128, 32)):
        draw = draw_from(device, count)
        k_source, v_source = (draw(layers, 40, heads, head_dim).to(dtype) for _ in range(2))
        got = [draw(layers, 50, heads, head_dim).to(dtype) for _ in range(2)]
        wanted = [tensor.clone() for tensor in got]
        order = torch.Generator().manual_seed(count)
        source, target = (torch.randperm(40, generator=order)[:count].int().to(device) for _ in range(2))
        ops.copy_rows(k_source, v_source, source, *got, target)
        for tensor, origin in zip(wanted, (k_source, v_source), strict=True):
            tensor[:, target.long()] = origin[:, source.long()]
        for which, mine, theirs in zip(("keys", "values"), got, wanted, strict=True):
            same(record, f"copy_rows {str(dtype)[6:]} {layers} layers, {count} rows, {which}", mine, theirs)
