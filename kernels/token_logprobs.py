"""Log-probabilities of given tokens: what a model says of a text that others wrote.

log softmax(logits)[target] = logits[target] - max - log(sum(exp(logits - max))), in float32, at temperature 1 and
without filters.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stars.kernels.dispatch import Implementation, operation


def token_logprobs_reference(logits: Tensor, targets: Tensor, logprobs: Tensor) -> None:
    """As `token_logprobs`."""
    found = torch.log_softmax(logits, dim=-1).gather(1, targets.long().clamp(min=0))
    logprobs.copy_(found.masked_fill(targets < 0, 0.0))


def _on_the_host(logits: Tensor, targets: Tensor, logprobs: Tensor) -> None:
    """By numpy, row by row: torch's threads would wait for those of libstars."""
    from stars.bindings.libstars import leave_out

    leave_out()
    room = np.empty(logits.shape[1], np.float32)
    wanted, out = targets.numpy(), logprobs.numpy()
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # of what makes a row NaN
        for row, values in enumerate(logits.numpy()):
            highest = values.max()
            np.exp(np.subtract(values, highest, out=room), out=room)
            found = values[np.maximum(wanted[row], 0)] - highest - np.log(room.sum())
            out[row] = np.where(wanted[row] < 0, np.float32(0.0), found)


@operation(cpu=[Implementation(_on_the_host)], cuda="stars.kernels.triton.token_logprobs:token_logprobs",
           reference=token_logprobs_reference)
def token_logprobs(logits: Tensor, targets: Tensor, logprobs: Tensor) -> None:
    """Writes logprobs float32 [rows, n]: of tokens targets[row] by logits[row], 0 where a target is negative.

    logits float32 [rows, vocab]; targets int32 [rows, n], below vocab. Logits of -inf have probability 0; NaN and +inf
    make their row NaN.
    """
