"""One draw for every lane of a draft: filters, Gumbel argmax, log-probability, and the step to the next forward pass.

Semantics, for every lane that is not done:

1. The log-probability of a token is log_softmax(logits) of the logits given (penalised, if they were): no temperature,
   no filter.
2. temperature 0: the token is the argmax of the raw logits. Otherwise z = logits / temperature in float32, and
   filters apply in vLLM's order.
   min_p keeps z >= z_max + log(min_p), which is p >= min_p * p_max of p = softmax(z).
   top_k keeps z >= the k-th largest z of the kept, so that ties at the threshold stay.
   top_p keeps a token if the probability of the strictly more probable kept tokens is below top_p of that of all kept
   tokens, so that ties at the threshold stay and at least the most probable token does.
   The token is the argmax over the kept of z + g, g the Gumbel noise of `stars.kernels.philox`. If temperature is so
   small that z overflows, the token is the argmax of the raw logits.
   Ties of an argmax go to the lowest token id. A logit of -inf forbids its token.
3. The token and its log-probability go to column `steps`, and `steps` grows by one. If the token is one of the lane's
   stop ids, or steps == max_tokens, the lane is done; otherwise token_ids = token, and positions, slots and slab_used
   grow by one.

A lane whose logits contain NaN or +inf gets token -1 with log-probability NaN and is done; one whose logits are nothing
but -inf, so that every token is forbidden, gets token -1 with log-probability -inf.

A lane with an `entropy_cut` that has drawn `least_tokens` is done without a draw, `steps` and all else as they were,
where the entropy of softmax(logits given) is at least the cut: sum of -p log p over the whole vocabulary in nats, at
temperature 1 and before any filter. Logits that are no distribution have no entropy: they give token -1 as above.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stars.kernels import philox
from stars.kernels.dispatch import operation
from stars.kernels.types import LaneState


def sample_step_reference(logits: Tensor, lanes: LaneState, filters: bool = True, ended: Tensor | None = None,
                          cuts: bool = True) -> None:
    """As `sample_step`; any device, one lane at a time. ValueError if a lane has a filter or a cut that the caller says
    it has not."""
    _check(logits, lanes)
    filtered = (lanes.top_k > 0) | (lanes.top_p < 1.0) | (lanes.min_p > 0.0)
    if not filters and bool((filtered & (lanes.done == 0)).any()):
        raise ValueError("sample_step: a lane has top_k, top_p or min_p: call it with filters=True")
    if not cuts and bool(((lanes.entropy_cut < math.inf) & (lanes.done == 0)).any()):
        raise ValueError("sample_step: a lane has an entropy_cut: call it with cuts=True")
    done, steps, max_tokens = lanes.done.tolist(), lanes.steps.tolist(), lanes.max_tokens.tolist()
    for lane, row in enumerate(logits):  # row [vocab]
        if done[lane]:
            continue
        step = steps[lane]
        logprob: float | Tensor
        highest = row.max().item()  # NaN where one is
        if not math.isfinite(highest):
            token, logprob = -1, -math.inf if highest == -math.inf else math.nan
        elif cuts and _cut(row, lanes, lane):
            lanes.done[lane] = 1
            if ended is not None:
                ended[lane] = 1
            continue
        else:
            token = _draw(row, lanes, lane)
            # In float64: a float32 sum of a large vocabulary's flat tail errs by 3e-4 of it.
            logprob = torch.log_softmax(row.double(), dim=0)[token]
        lanes.out_tokens[lane, step] = token
        lanes.out_logprobs[lane, step] = logprob
        lanes.steps[lane] += 1
        if token < 0 or step + 1 >= max_tokens[lane] or token in lanes.stop_ids[lane].tolist():
            lanes.done[lane] = 1
        else:
            lanes.token_ids[lane] = token
            for counter in (lanes.positions, lanes.slots, lanes.slab_used):
                counter[lane] += 1
        if ended is not None and lanes.done[lane]:
            ended[lane] = 1


@operation(cpu="stars.bindings.libstars:sample_step", cuda="stars.kernels.triton.sample_step:sample_step",
           reference=sample_step_reference)
def sample_step(logits: Tensor, lanes: LaneState, filters: bool = True, ended: Tensor | None = None,
                cuts: bool = True) -> None:
    """Advances `lanes` in place by one draw from `logits` float32 [lanes, vocab].

    With filters=False the caller knows that no lane has top_k, top_p or min_p: a GPU then leaves out four launches.
    With cuts=False it knows that no lane has an entropy_cut: no entropy is then computed.
    ended: int32 [lanes] or longer, which gets a 1 for each lane that this draw ends; a GPU also takes pinned memory of
    the host, and libstars, whose `done` the host sees as it is, takes none.
    """


def entropy(row: Tensor) -> float:
    """Entropy in nats of softmax(row), row float32 [vocab] with a finite maximum; formed in float64."""
    logprobs = torch.log_softmax(row.double(), dim=0)
    return float(torch.special.entr(logprobs.exp()).sum())


def sampling_threshold(scaled: Tensor, top_k: int, top_p: float, min_p: float) -> float:
    """The smallest kept value of `scaled` float32 [vocab] (logits / temperature); every filter is such a threshold."""
    highest = scaled.max()
    threshold = torch.full_like(highest, -torch.inf)
    if min_p > 0.0:
        threshold = highest + torch.tensor(math.log(min_p), dtype=torch.float32, device=scaled.device)
    if 0 < top_k < scaled.numel():
        threshold = torch.maximum(threshold, scaled.topk(top_k).values[-1])
    if top_p < 1.0:
        values = scaled[scaled >= threshold].sort(descending=True).values.double()  # [kept]
        mass = (values - highest.double()).exp()  # [kept]
        first_equal = torch.searchsorted(-values, -values)  # [kept] rank of the first token with the same value
        above = (mass.cumsum(0) - mass)[first_equal]  # [kept] mass of the strictly more probable
        kept = (above < top_p * mass.sum()).sum().clamp(min=1)
        threshold = values[kept - 1].float()
    return threshold.item()


def proposal_logprobs(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """log p of what a lane of these parameters draws from, float64 [rows, vocab] of logits float32 [rows, vocab]; -inf
    where a token is filtered out. Where its draw is an argmax, p is 1 at that token."""
    scale = torch.tensor([temperature], dtype=torch.float32, device=logits.device)
    rows = logits / scale if temperature > 0 else logits
    thresholds = torch.full((len(logits), 1), -torch.inf, device=logits.device)
    drawn = torch.isfinite(rows.amax(1)) if temperature > 0 else torch.zeros(len(logits), dtype=torch.bool)
    if top_k > 0 or top_p < 1.0 or min_p > 0.0:
        for row in drawn.nonzero().flatten().tolist():
            thresholds[row] = sampling_threshold(rows[row], top_k, top_p, min_p)
    logprobs = torch.log_softmax(rows.double().masked_fill(rows < thresholds, -torch.inf), dim=1)
    for row in (~drawn).nonzero().flatten().tolist():
        logprobs[row] = -torch.inf
        logprobs[row, _argmax(logits[row])] = 0.0
    return logprobs


def _cut(row: Tensor, lanes: LaneState, lane: int) -> bool:
    """Whether the lane ends before this draw, because the model is too uncertain of what comes."""
    cut = float(lanes.entropy_cut[lane])
    return cut < math.inf and int(lanes.steps[lane]) >= int(lanes.least_tokens[lane]) and entropy(row) >= cut


def _draw(row: Tensor, lanes: LaneState, lane: int) -> int:
    scaled = _scaled(row, lanes.temperature[lane : lane + 1])
    if scaled is not None:
        threshold = sampling_threshold(
            scaled, int(lanes.top_k[lane]), float(lanes.top_p[lane]), float(lanes.min_p[lane])
        )
        words = philox.token_words(
            int(lanes.seeds[lane]), int(lanes.steps[lane]), int(lanes.attempts[lane]), int(lanes.streams[lane]),
            row.numel(),
        )
        noise = torch.from_numpy(philox.gumbel(words)).float().to(row.device)  # [vocab]
        row = torch.where(scaled >= threshold, scaled + noise, -torch.inf)
    return _argmax(row)


def _scaled(row: Tensor, temperature: Tensor) -> Tensor | None:
    """row / temperature float32 [1]; None where the draw is the argmax of `row`: at 0, or where the quotient overflows.
    """
    scaled = row / temperature if temperature > 0 else None
    return scaled if scaled is not None and math.isfinite(scaled.max().item()) else None


def _argmax(row: Tensor) -> int:
    """The lowest token id of the largest."""
    return int((row == row.max()).nonzero()[0])


def _check(logits: Tensor, lanes: LaneState) -> None:
    if logits.dim() != 2 or logits.dtype != torch.float32 or logits.shape[0] != lanes.done.shape[0]:
        raise ValueError(
            f"sample_step: logits are {logits.dtype} {list(logits.shape)}, expected float32 "
            f"[{lanes.done.shape[0]}, vocab]"
        )
    open_lanes = lanes.done == 0
    if bool((open_lanes & ((lanes.steps < 0) | (lanes.steps >= lanes.out_tokens.shape[1]))).any()):
        raise ValueError(
            f"sample_step: a lane that is not done has no column left in out_tokens {list(lanes.out_tokens.shape)}; "
            "set its max_tokens to at most the number of columns"
        )
