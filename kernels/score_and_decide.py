"""Rewards of drafted lanes and the law's verdict on them, in one step.

1. The reward of a lane is head . (norm_weight * y / sqrt(mean(y^2) + eps)) + head_bias, with y = residual + branch at
   the lane's last row: the end of the decoder, for those rows only. It is formed in float32 from the stored y; where
   the norm's weight is narrower than float32, y is cast to its type before the product, as in `rms_norm`.
2. Lanes of a request are judged in attempt order. A reward of NaN or +inf is an error, and ends the request; the first
   lane that the law accepts wins. Both leave all behind them unjudged, and the best seen as it was.
3. Where nobody won, the best seen so far is brought up to date: a lane replaces it if its reward is greater, so that
   the earliest of equal ones stays. The winner's and the best's slab ids change places: the lane gets the other's.

tau and the test are `stars.law`, in float64, uniforms those of `philox.accept_uniform`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stars import law
from stars.kernels.dispatch import on_triton
from stars.kernels.philox import KIND_ACCEPT, pack_attempt, philox4x32, split_seed, uniform
from stars.kernels.types import DecideState

WINNER, BEST, ERROR = range(3)
"""Columns of DecideState.record: the winning lane, the lane of this round that is the best seen, the lane at fault."""


def score_and_decide(
    residual: Tensor, branch: Tensor | None, rows: Tensor, norm_weight: Tensor, eps: float, head: Tensor,
    head_bias: Tensor | None, state: DecideState,
) -> None:
    """Rewards of all lanes with a row, then the verdicts; see `score_and_decide_reference`."""
    if on_triton(residual):
        from stars.kernels.triton.score_and_decide import score_and_decide as launch

        launch(residual, branch, rows, norm_weight, eps, head, head_bias, state)
    else:
        score_and_decide_reference(residual, branch, rows, norm_weight, eps, head, head_bias, state)


def score(
    residual: Tensor, branch: Tensor | None, rows: Tensor, norm_weight: Tensor, eps: float, head: Tensor,
    head_bias: Tensor | None, rewards: Tensor,
) -> None:
    """The rewards alone, float32 [lanes], of the lanes with a row: for r(prompt), and for what is decided elsewhere."""
    if on_triton(residual):
        from stars.kernels.triton.score_and_decide import score as launch

        launch(residual, branch, rows, norm_weight, eps, head, head_bias, rewards)
    else:
        score_reference(residual, branch, rows, norm_weight, eps, head, head_bias, rewards)


def score_and_decide_reference(
    residual: Tensor, branch: Tensor | None, rows: Tensor, norm_weight: Tensor, eps: float, head: Tensor,
    head_bias: Tensor | None, state: DecideState,
) -> None:
    """Writes state.rewards of the lanes with a row and judges them.

    residual, branch [all rows, hidden] (branch None: it is in the residual already; neither is written); rows int32
    [lanes] the last row of each lane, or -1 for a lane that is not scored in this call; norm_weight, head [hidden];
    head_bias [1] or None.
    """
    score_reference(residual, branch, rows, norm_weight, eps, head, head_bias, state.rewards)
    decide_reference(rows, state)


def score_reference(
    residual: Tensor, branch: Tensor | None, rows: Tensor, norm_weight: Tensor, eps: float, head: Tensor,
    head_bias: Tensor | None, rewards: Tensor,
) -> None:
    """Writes rewards float32 [lanes] of the lanes with a row."""
    for lane, row in enumerate(rows.tolist()):
        if row >= 0:
            y = residual[row] if branch is None else (residual[row] + branch[row]).to(residual.dtype)  # [hidden]
            y = y.float()
            y = y * torch.rsqrt(y.square().mean() + eps)
            y = (norm_weight * y.to(norm_weight.dtype)).float()
            reward = (y * head.float()).sum()
            rewards[lane] = reward if head_bias is None else reward + head_bias.float()[0]


def decide_reference(rows: Tensor, state: DecideState) -> None:
    """Judges the lanes with a row by state.rewards."""
    starts = state.lane_start.tolist()
    for request, (winner, _, error) in enumerate(state.record.tolist()):
        if winner < 0 and error < 0:
            lanes = [lane for lane in range(starts[request], starts[request + 1]) if rows[lane] >= 0]
            _decide_one(request, lanes, state)


def _decide_one(request: int, lanes: list[int], state: DecideState) -> None:
    best, best_reward = -1, float(state.best_reward[request])
    known = int(state.best_attempt[request]) > 0
    for lane in lanes:
        reward = float(state.rewards[lane])
        if math.isnan(reward) or reward == math.inf:
            state.record[request, ERROR] = lane
            return
        tau = law.threshold(int(state.tokens[lane]), int(state.max_tokens[request]), float(state.start[request]),
                            float(state.reward_threshold[request]))
        if law.accepts(_uniform(request, lane, state), reward, tau, float(state.beta[request])):
            state.record[request, WINNER] = lane
            return
        if not known or reward > best_reward:
            best, best_reward, known = lane, reward, True
    if best >= 0:
        state.record[request, BEST] = best
        state.best_reward[request] = best_reward
        state.best_attempt[request] = state.attempts[best]
        kept = state.best_slab[:, request].clone()
        state.best_slab[:, request] = state.slabs[:, best]
        state.slabs[:, best] = kept


def _uniform(request: int, lane: int, state: DecideState) -> float:
    word = pack_attempt(int(state.attempts[lane]), KIND_ACCEPT)
    counter = (0, 0, word, int(state.streams[request]) & 0xFFFFFFFF)
    return float(uniform(philox4x32(counter, split_seed(int(state.seeds[request])))[0]))
