"""The end of a scoring pass: the rewards of all lanes.

The reward of a lane is head . (norm_weight * y / sqrt(mean(y^2) + eps)) + bias, y = residual + branch: the end of the
decoder, for the last row of each lane. The norm and the product are formed in float32 from the stored y. Only a head
that normalises its rewards has a bias. Whether a reward is accepted is for the host to say.
"""

from __future__ import annotations

from torch import Tensor

from stars.bindings import libstars
from stars.kernels.dispatch import on_libstars, on_triton
from stars.kernels.linear import Weight, linear_reference
from stars.kernels.rms_norm import rms_norm_reference


def score(residual: Tensor, branch: Tensor, norm_weight: Tensor, eps: float, head: Weight, hidden: Tensor,
          rewards: Tensor) -> None:
    """Writes rewards float32 [lanes].

    residual, branch [lanes, hidden], the residual may be overwritten; norm_weight [hidden]; head float32 [1, hidden],
    its bias float32 [1] or None; hidden float32 [lanes, hidden] is room for implementations that go in steps.
    """
    if on_triton(residual):
        from stars.kernels.triton.score import score as launch

        launch(residual, branch, norm_weight, eps, head, hidden, rewards)
    elif on_libstars(residual):
        libstars.rms_norm(branch, norm_weight, eps, hidden, residual)
        libstars.linear(hidden, head, rewards.unsqueeze(1))
    else:
        score_reference(residual, branch, norm_weight, eps, head, hidden, rewards)


def score_reference(residual: Tensor, branch: Tensor, norm_weight: Tensor, eps: float, head: Weight, hidden: Tensor,
                    rewards: Tensor) -> None:
    """As `score`."""
    rms_norm_reference(branch, norm_weight, eps, hidden, residual)
    linear_reference(hidden, head, rewards.unsqueeze(1))
