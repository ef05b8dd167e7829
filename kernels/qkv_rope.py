"""From the residual stream to attention's inputs in one launch: norm, projection, QK norm, rotation, write of the keys.
"""

from __future__ import annotations

from torch import Tensor

from stars.kernels.dispatch import operation
from stars.kernels.linear import Weight
from stars.kernels.linear_normed import normed_product
from stars.kernels.rope_write import rope_write_reference
from stars.kernels.types import Batch, LayerKV, SplitSpace, Stream


def qkv_rope_reference(
    stream: Stream, weight: Weight, eps: float, batch: Batch, cos: Tensor, sin: Tensor, kv: LayerKV, q_out: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, space: SplitSpace,
) -> None:
    """As `qkv_rope`, in float32 and rounded once."""
    rope_write_reference(normed_product(stream, weight, eps), batch, cos, sin, kv, q_out, q_norm, k_norm, eps)


@operation(cuda="stars.kernels.triton.skinny:qkv_rope", reference=qkv_rope_reference, by="q_out")
def qkv_rope(
    stream: Stream, weight: Weight, eps: float, batch: Batch, cos: Tensor, sin: Tensor, kv: LayerKV, q_out: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, space: SplitSpace,
) -> None:
    """`rope_write` of qkv = rstd * (stream.scaled @ weight.T) + bias, rstd as in `linear_normed`.

    weight [(heads + 2 * kv_heads) * head_dim, hidden], queries first; q_out [rows, heads, head_dim]; cos, sin float32
    [positions, head_dim / 2]; q_norm, k_norm [head_dim] or None, both with `eps`. A slot of -1 writes nothing.
    """
