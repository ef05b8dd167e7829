"""RMS norm with the residual stream's addition in it."""

from __future__ import annotations

import torch
from torch import Tensor

from stars.bindings import libstars
from stars.kernels.dispatch import on_libstars, on_triton


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None = None) -> None:
    """residual += x (where given); out = weight * y / sqrt(mean(y^2) + eps), y = residual or x. `out` may be `x`."""
    if on_libstars(x):
        libstars.rms_norm(x, weight, eps, out, residual)
    elif on_triton(x):
        from stars.kernels.triton.rms_norm import rms_norm as launch

        launch(x, weight, eps, out, residual)
    else:
        rms_norm_reference(x, weight, eps, out, residual)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None = None) -> None:
    """residual += x (where given); out = weight * cast(y / sqrt(mean(y^2) + eps)), y = residual or x.

    Normalised in float32, cast to x's dtype, then multiplied (Zhang and Sennrich, arXiv 1910.07467; the order of cast
    and product is that of transformers' Llama). x, out, residual [rows, hidden]; weight [hidden]. `out` may be `x`.
    """
    if residual is not None:
        residual.add_(x)
    y = (x if residual is None else residual).float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    out.copy_(weight * y.to(weight.dtype))
