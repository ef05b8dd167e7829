"""A factor on every value, and a soft bound: what embeddings are multiplied by, and what logits are kept within."""

from __future__ import annotations

from torch import Tensor

from stars.kernels.dispatch import operation


def rescale_reference(x: Tensor, scale: float, softcap: float | None = None) -> None:
    """x = scale * x in place, and then softcap * tanh(x / softcap) where one is given. x [rows, width]."""
    if scale != 1.0:
        x.mul_(scale)
    if softcap is not None:
        x.div_(softcap).tanh_().mul_(softcap)


@operation(cpu="stars.bindings.libstars:rescale", cuda="stars.kernels.triton.rescale:rescale",
           reference=rescale_reference)
def rescale(x: Tensor, scale: float, softcap: float | None = None) -> None:
    """x = scale * x in place, and then softcap * tanh(x / softcap) where one is given. x [rows, width]."""
