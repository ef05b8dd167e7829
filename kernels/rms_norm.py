"""RMS norm with the residual stream's addition in it."""

from __future__ import annotations

import torch
from torch import Tensor

from stars.kernels.dispatch import operation


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


@operation(cpu="stars.bindings.libstars:rms_norm", cuda="stars.kernels.triton.rms_norm:rms_norm",
           reference=rms_norm_reference)
def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None = None) -> None:
    """residual += x (where given); out = weight * y / sqrt(mean(y^2) + eps), y = residual or x. `out` may be `x`."""
