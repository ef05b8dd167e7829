"""The end of a scoring pass: rewards of the lanes, and the law's verdict on each.

1. The reward of a lane is head . (norm_weight * y / sqrt(mean(y^2) + eps)) + bias, y = residual + branch: the end of
   the decoder, for the last row of each lane. The norm and the product are formed in float32 from the stored y. Only a
   head that normalises its rewards has a bias.
2. tau and the test are `stars.rules`, in float64, uniforms those of `philox.accept_uniform`. A verdict depends on its
   own lane alone; the first accepted in attempt order, and the best of the rejected, are for the loop to find, which
   owns the slabs. Lanes that need no verdict (the reward of a prompt, an argmax) get one that nobody reads.
"""

from __future__ import annotations

from torch import Tensor

from stars import rules as law
from stars.bindings import libstars
from stars.kernels.dispatch import on_libstars, on_triton
from stars.kernels.linear import Weight, linear
from stars.kernels.philox import accept_uniform, unpack_stream
from stars.kernels.rms_norm import rms_norm
from stars.kernels.types import DecideState


def score_and_decide(residual: Tensor, branch: Tensor, norm_weight: Tensor, eps: float, head: Weight, hidden: Tensor,
                     state: DecideState) -> None:
    """Writes state.rewards and state.accepted.

    residual, branch [lanes, hidden], the residual may be overwritten; norm_weight [hidden]; head float32 [1, hidden],
    its bias float32 [1] or None; hidden float32 [lanes, hidden] is room for implementations that go in steps.
    """
    if on_triton(residual):
        from stars.kernels.triton.score_and_decide import score_and_decide as launch

        launch(residual, branch, norm_weight, eps, head.values, state, head.bias)
        return
    rms_norm(branch, norm_weight, eps, hidden, residual)
    linear(hidden, head, state.rewards.unsqueeze(1))
    if on_libstars(residual):
        libstars.decide(state)
    else:
        decide_reference(state)


def decide_reference(state: DecideState) -> None:
    """Writes state.accepted from state.rewards."""
    columns = [tensor.tolist() for tensor in state[: DecideState._fields.index("accepted")]]
    for lane, (seed, stream, attempt, tokens, max_tokens, start, reward_threshold, beta, reward) in enumerate(
            zip(*columns, strict=True)):
        tau = law.threshold(tokens, max_tokens, start, reward_threshold)
        uniform = accept_uniform(seed, attempt, *unpack_stream(stream))
        state.accepted[lane] = int(reward < float("inf") and law.accepts(uniform, reward, tau, beta))
