"""What stood beside the tokens that were drawn: the place of each, and the most probable ones with their probabilities.

Run behind a draw, on the logits that it drew from, which it leaves as they are. Of a lane that wants k tokens, those k
of the largest logits come in order, of equal logits the lowest ids first; a token whose logit is -inf is left out, and
the columns that are left get -1 with log-probability -inf. The rank of the drawn token is its place in that order, from
1. The log-probability is log_softmax(logits) of the logits given (penalised, if they were): no temperature, no filter.

A lane is read once a draw: `told` says how many of its draws were read before, and a lane that ended earlier, or was
cut, has drawn none since. A drawn token of -1 says that the logits were no distribution: it has rank 0, and no tokens
beside it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stars.kernels.dispatch import operation
from stars.kernels.types import TopLogprobs


def top_logprobs_reference(logits: Tensor, steps: Tensor, tokens: Tensor, top: TopLogprobs) -> None:
    """As `top_logprobs`; any device, one lane at a time."""
    most = top.token_ids.shape[2]
    for lane, row in enumerate(logits):  # row [vocab]
        wanted, step = min(int(top.wanted[lane]), most), int(steps[lane]) - 1
        if wanted < 0 or step < int(top.told[lane]):
            continue
        top.told[lane] = step + 1
        token = int(tokens[lane, step])
        top.ranks[lane, step] = 0
        top.token_ids[lane, step], top.logprobs[lane, step] = -1, -math.inf
        if top.own is not None:
            top.own[lane, step] = math.nan
        if not 0 <= token < len(row) or not math.isfinite(row.max().item()):  # max propagates NaN
            continue
        # In float64: a float32 sum of a large vocabulary's flat tail errs by 3e-4 of it.
        logprobs = torch.log_softmax(row.double(), dim=0)
        top.ranks[lane, step] = 1 + int((row > row[token]).sum()) + int((row[:token] == row[token]).sum())
        if top.own is not None:
            top.own[lane, step] = logprobs[token]
        order = torch.sort(row, descending=True, stable=True).indices[:wanted]  # the lowest of equals comes first
        order = order[row[order] > -torch.inf]
        top.token_ids[lane, step, : len(order)] = order.to(torch.int32)
        top.logprobs[lane, step, : len(order)] = logprobs[order].float()


@operation(cpu="stars.bindings.libstars:top_logprobs", cuda="stars.kernels.triton.top_logprobs:top_logprobs",
           reference=top_logprobs_reference)
def top_logprobs(logits: Tensor, steps: Tensor, tokens: Tensor, top: TopLogprobs) -> None:
    """Reads what each lane has drawn since it was last read: token tokens[lane, steps[lane] - 1].

    logits float32 [lanes, vocab]; steps int32 [lanes], tokens int32 [lanes, max_steps]: as of a LaneState.
    """
