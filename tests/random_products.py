"""Products to be checked: random cases from a seed of their own, and `linear` into memory that holds NaN before."""

from __future__ import annotations

import torch

from stars import kernels


def random_case(in_features: int, out_features: int, dtype: torch.dtype, rows: int, bias: bool = True,
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """float32 x [rows, in_features], a matrix of `dtype` [out_features, in_features] and a float32 bias."""
    generator = torch.Generator().manual_seed(in_features * 10007 + out_features * 101 + rows)
    matrix = torch.randn(out_features, in_features, generator=generator).to(dtype)
    x = torch.randn(rows, in_features, generator=generator)
    return x, matrix, torch.randn(out_features, generator=generator) if bias else None


def run_linear(x: torch.Tensor, weight: kernels.Weight) -> torch.Tensor:
    """float32 [rows, out_features]; a number that `linear` does not write is NaN."""
    out = torch.full((x.shape[0], weight.out_features), torch.nan)
    kernels.linear(x, weight, out)
    return out
