"""Log-probabilities of given tokens: what a model says of a text that others wrote.

log softmax(logits)[target] = logits[target] - max - log(sum(exp(logits - max))), in float32, at temperature 1 and
without filters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stars.kernels.dispatch import operation


def token_logprobs_reference(logits: Tensor, targets: Tensor, logprobs: Tensor) -> None:
    """As `token_logprobs`."""
    wanted = targets.long().clamp(min=0).unsqueeze(1)
    found = torch.log_softmax(logits, dim=-1).gather(1, wanted).squeeze(1)
    logprobs.copy_(found.masked_fill(targets < 0, 0.0))


@operation(cuda="stars.kernels.triton.token_logprobs:token_logprobs", reference=token_logprobs_reference)
def token_logprobs(logits: Tensor, targets: Tensor, logprobs: Tensor) -> None:
    """Writes logprobs float32 [rows]: of token targets[row] by logits[row], 0 where the target is negative.

    logits float32 [rows, vocab]; targets int32 [rows], below vocab. Logits of -inf have probability 0; NaN and +inf
    make their row NaN.
    """
