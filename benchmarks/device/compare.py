"""The derived rule of correctness: at most twice the error of plain torch in the same type, plus one rounding."""

from __future__ import annotations

import math

import torch
from record import Record
from torch import Tensor


def within(record: Record, name: str, got: Tensor, plain: Tensor, exact: Tensor, roundings: float = 1.0,
           chain: float = 0.0) -> bool:
    """got: the kernel's; plain: torch's in the same type; exact: in float64.

    The floor of an element is `roundings` units of its own last place, and 1e-6 of the largest, for float32 sums in
    another order; in float32 a rounding of the result is small beside those, and counts eight times. `chain` is added
    for a sum that is formed in one order where plain torch forms it in many short ones: see `one_order`.
    """
    exact = exact.double()
    scale = exact.abs()
    unit = roundings * torch.finfo(got.dtype).eps * (8.0 if got.dtype == torch.float32 else 1.0)
    errors = (got.double() - exact).abs()
    theirs = (plain.double() - exact).abs().max().item() if plain.numel() else 0.0
    allowed = chain + 2 * theirs + unit * scale + 1e-6 * (scale.max().item() if exact.numel() else 0.0)
    finite = bool(torch.isfinite(got.float()).all())
    return record.check(name, finite and bool((errors <= allowed).all()), plain_torch=theirs, finite=finite,
                        error=errors.max().item() if got.numel() else 0.0)


def one_order(terms: int, scale: float) -> float:
    """Six standard deviations of the error of a float32 sum of `terms` products of root mean square `scale`, one after
    the other.

    After k of them the sum is about scale * sqrt(k), and adding the next rounds it by at most 2^-24 of that. Such
    errors are independent, so their variance is at most 2^-48 scale^2 (1 + ... + terms). Simulated, the largest of 6144
    sums of 4096 normal products is off by half of this; products rounded to TF32 are off by ten times as much.
    """
    return 6 * 2.0**-24 * scale * math.sqrt(terms * (terms + 1) / 2)


def same(record: Record, name: str, got: Tensor, wanted: Tensor) -> bool:
    """Bit for bit."""
    got, wanted = got.cpu().contiguous(), wanted.cpu().contiguous()
    equal = got.dtype == wanted.dtype and got.shape == wanted.shape and torch.equal(
        got.flatten().view(torch.uint8), wanted.flatten().view(torch.uint8))
    return record.check(name, equal, different=None if equal or got.shape != wanted.shape else
                        int((got != wanted).sum()))
