"""What `deterministic=True` rests on: a row's bits must not depend on how many rows it is computed with."""

from __future__ import annotations

import torch

from stars.errors import ModelError
from stars.kernels import linear
from stars.kernels.linear import Weight
from stars.model.decoder import Decoder
from stars.model.heads import RewardHead
from stars.target import Target

ROW_COUNTS = (1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 64)


def check_row_invariance(decoder: Decoder, target: Target) -> None:
    """Runs the decoder's products on the same rows in batches of several sizes; ModelError unless the bits agree.

    Attention, norms and the sampler work row by row in a fixed order in every implementation of `stars.kernels`.
    """
    layer = decoder.layers[0]  # the others have the same shapes
    kind, head = decoder.dtype, decoder.score_head
    low_rank = {(one.out_features, one.in_features): one for pair in decoder.adapters for one in pair}
    rewarding = head.products if isinstance(head, RewardHead) else (head,)
    for name, weight, given, taken in (
        ("qkv", layer.qkv, kind, kind), ("o", layer.o, kind, kind), ("gate_up", layer.gate_up, kind, kind),
        ("down", layer.down, kind, kind), ("head", decoder.head, kind, torch.float32),
        *(("adapter's", product, kind, kind) for product in low_rank.values()),
        *(("reward head", product, torch.float32, torch.float32) for product in rewarding),
    ):
        if weight is not None and not _invariant(weight, decoder.device, given, taken):
            raise ModelError(f"deterministic=True cannot be kept here, because the bits of a row of the {name} product "
                             f"change with the number of rows: {target.one_order}")


def _invariant(weight: Weight, device: torch.device, given: torch.dtype, taken: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(ROW_COUNTS), weight.in_features, generator=generator)  # [rows, in_features]
    x = x.to(device, given)
    whole = torch.empty(max(ROW_COUNTS), weight.out_features, device=device, dtype=taken)
    linear(x, weight, whole)
    for rows in ROW_COUNTS:
        part = torch.empty(rows, weight.out_features, device=device, dtype=taken)
        linear(x[:rows].contiguous(), weight, part)
        if not torch.equal(part, whole[:rows]):
            return False
    return True
