"""The derived rule of correctness: at most twice the error of plain torch in the same type, plus one rounding."""

from __future__ import annotations

import torch
from record import Record
from torch import Tensor


def within(record: Record, name: str, got: Tensor, plain: Tensor, exact: Tensor, roundings: float = 1.0) -> bool:
    """got: the kernel's; plain: torch's in the same type; exact: in float64.

    The floor of an element is `roundings` units of its own last place, and 1e-6 of the largest, for float32 sums in
    another order; in float32 a rounding of the result is small beside those, and counts eight times.
    """
    exact = exact.double()
    scale = exact.abs()
    unit = roundings * torch.finfo(got.dtype).eps * (8.0 if got.dtype == torch.float32 else 1.0)
    errors = (got.double() - exact).abs()
    theirs = (plain.double() - exact).abs().max().item() if plain.numel() else 0.0
    allowed = 2 * theirs + unit * scale + 1e-6 * (scale.max().item() if exact.numel() else 0.0)
    finite = bool(torch.isfinite(got.float()).all())
    return record.check(name, finite and bool((errors <= allowed).all()), plain_torch=theirs, finite=finite,
                        error=errors.max().item() if got.numel() else 0.0)


def same(record: Record, name: str, got: Tensor, wanted: Tensor) -> bool:
    """Bit for bit."""
    got, wanted = got.cpu().contiguous(), wanted.cpu().contiguous()
    equal = got.dtype == wanted.dtype and got.shape == wanted.shape and torch.equal(
        got.flatten().view(torch.uint8), wanted.flatten().view(torch.uint8))
    return record.check(name, equal, different=None if equal or got.shape != wanted.shape else
                        int((got != wanted).sum()))
