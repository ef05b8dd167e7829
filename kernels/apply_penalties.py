"""Penalties on what was said already, on the logits of every lane and in place, before a draw.

As in vLLM. A token of the prompt or the response has its logit divided by `repetition` where it is positive and
multiplied by it where it is not. Then `frequency` times its count in the response is subtracted, and `presence` if it
is there at all. The response is the committed one and what the lane has drawn of its segment: candidates of one segment
are penalised for their own words only.

Each logit is formed in float64 and rounded once, so every implementation gives the same bits. A product of a penalty
and a count is exact in float64, whether or not a compiler fuses it with the subtraction.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from stars.kernels.dispatch import operation
from stars.kernels.types import LaneState, Penalties


def apply_penalties_reference(logits: Tensor, lanes: LaneState, penalties: Penalties) -> None:
    """As `apply_penalties`, one lane at a time."""
    for lane, row in enumerate(logits):
        if lanes.done[lane]:
            continue
        start, count = int(penalties.start[lane]), int(penalties.count[lane])
        entries = penalties.history[start : start + count].tolist()
        said = Counter(dict(entries))  # a token of the prompt alone has count 0, and is there
        said.update(lanes.out_tokens[lane, : int(lanes.steps[lane])].tolist())
        tokens = sorted(said)
        token_ids = torch.tensor(tokens, dtype=torch.long, device=logits.device)  # [said]
        counts = torch.tensor([said[token] for token in tokens], dtype=torch.float64, device=logits.device)  # [said]
        repetition, frequency, presence = (
            field[lane].double() for field in (penalties.repetition, penalties.frequency, penalties.presence))
        z = row[token_ids].double()  # [said]
        z = (z / repetition).where(z > 0, z * repetition)
        z = z - frequency * counts - presence * (counts > 0)
        row[token_ids] = z.to(row.dtype)


@operation(cpu="stars.bindings.libstars:apply_penalties", cuda="stars.kernels.triton.apply_penalties:apply_penalties",
           reference=apply_penalties_reference)
def apply_penalties(logits: Tensor, lanes: LaneState, penalties: Penalties) -> None:
    """Changes `logits` float32 [lanes, vocab] (on a GPU also float16 or bfloat16) of the lanes that are not done."""
