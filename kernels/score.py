"""The end of a scoring pass: the rewards of all lanes.

The reward of a lane is head . (norm_weight * y / sqrt(mean(y^2) + eps)) + bias, y = residual + branch, or the residual
where no branch is left to add: the end of the decoder, for the last row of each lane. The norm and the product are
formed in float32 from the stored y. Only a head that normalises its rewards has a bias. Whether a reward is accepted is
for the host to say.
"""

from __future__ import annotations

from torch import Tensor

from stars.kernels.dispatch import Implementation, operation
from stars.kernels.linear import Weight, linear, linear_reference
from stars.kernels.rms_norm import rms_norm, rms_norm_reference


def score_reference(residual: Tensor, branch: Tensor | None, norm_weight: Tensor, eps: float, head: Weight,
                    hidden: Tensor, rewards: Tensor) -> None:
    """As `score`."""
    if branch is None:
        rms_norm_reference(residual, norm_weight, eps, hidden)
    else:
        rms_norm_reference(branch, norm_weight, eps, hidden, residual)
    linear_reference(hidden, head, rewards.unsqueeze(1))


def _in_steps(residual: Tensor, branch: Tensor | None, norm_weight: Tensor, eps: float, head: Weight, hidden: Tensor,
              rewards: Tensor) -> None:
    if branch is None:
        rms_norm(residual, norm_weight, eps, hidden)
    else:
        rms_norm(branch, norm_weight, eps, hidden, residual)
    linear(hidden, head, rewards.unsqueeze(1))


@operation(cpu=[Implementation(_in_steps)], cuda="stars.kernels.triton.score:score", reference=score_reference)
def score(residual: Tensor, branch: Tensor | None, norm_weight: Tensor, eps: float, head: Weight, hidden: Tensor,
          rewards: Tensor) -> None:
    """Writes rewards float32 [lanes].

    residual [lanes, hidden], which may be overwritten; branch [lanes, hidden] or None; norm_weight [hidden]; head
    float32 [1, hidden], its bias float32 [1] or None; hidden float32 [lanes, hidden] is room for implementations that
    go in steps.
    """
