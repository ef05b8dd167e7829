"""The most probable tokens of every lane on a GPU; what is found is said in `stars.kernels.top_tokens`.

Torch's selection does the work, over keys of 64 bits that no two tokens share: the logit's place in the order of the
float32 numbers above, what is left of the id below. So ties and order are exact, whichever way torch goes. The sums of
exponentials, and the thresholds of the filters, are those of `sample_step`, by its kernels. Nothing waits for the host,
and what is as large as the logits lies in memory that is kept, so that all of it can be captured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from stars.kernels.top_tokens import selection_rows
from stars.kernels.triton.sample_filters import SAMPLE, bracket_kernel, collect_kernel, list_block, select_kernel
from stars.kernels.triton.sample_step import SCAN_WARPS, TILE, scan_kernel, shared_workspace
from stars.kernels.types import Ranking

COLUMNS = 16
"""Of the tokens that a draw would write, which nobody does here: with 1 or an odd number Triton compiled these kernels
once more, as the width of a draft's segments is mostly a multiple of 16."""


class Scratch(NamedTuple):
    """Of as many lanes as are selected from at once."""

    bits: Tensor  # int32 [rows, vocab]
    keys: Tensor  # int64 [rows, vocab]
    places: Tensor  # int64 [vocab] what is left of the ids: the lowest is the largest


_scratch: dict[tuple[torch.device, int], list[Scratch]] = {}
_idle: dict[torch.device, list[Tensor]] = {}


def _scratch_of(rows: int, vocab: int, device: torch.device) -> Scratch:
    """Kept and grown as `shared_workspace` is, and allocated outside of captures as that is."""
    kept = _scratch.setdefault((device, vocab), [])
    if not kept or len(kept[-1].keys) < rows:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"top_tokens: a graph is being captured and there is no room for {rows} lanes: run this "
                               "size before")
        places = torch.arange(vocab - 1, -1, -1, dtype=torch.int64, device=device)
        kept.append(Scratch(torch.empty(rows, vocab, dtype=torch.int32, device=device),
                            torch.empty(rows, vocab, dtype=torch.int64, device=device), places))
    return kept[-1]


def _zeros(count: int, device: torch.device) -> Tensor:
    """int64 [at least count] zeros, for what the kernels of a draw read of a lane that nothing is drawn for."""
    kept = _idle.setdefault(device, [])
    if not kept or len(kept[-1]) < count:
        kept.append(torch.zeros(count, dtype=torch.int64, device=device))
    return kept[-1]


def top_tokens(logits: Tensor, ranking: Ranking, filters: bool = True) -> None:
    """As `stars.kernels.top_tokens`. Lanes that want no token are computed, too, and get none."""
    count, vocab = logits.shape
    if logits.dtype != torch.float32 or logits.stride(1) != 1 or len(ranking.ranks) != count:
        raise ValueError(f"top_tokens: logits are {logits.dtype} {list(logits.shape)} with strides {logits.stride()}, "
                         f"expected float32 [{len(ranking.ranks)}, vocab] with adjacent columns")
    if not count:
        return
    most = ranking.token_ids.shape[1]
    thresholds, highest, log_sum = _normalise(logits, ranking, filters)
    wanted = torch.arange(most, device=logits.device) < ranking.ranks.unsqueeze(1)  # [lanes, most]
    step = selection_rows(vocab)
    scratch = _scratch_of(min(count, step), vocab, logits.device)
    for first in range(0, count, step):
        rows = slice(first, min(count, first + step))
        tokens = _select(logits[rows], scratch, min(most, vocab))  # int64 [rows, most or fewer]
        x = logits[rows].gather(1, tokens)
        kept = wanted[rows, : tokens.shape[1]] & (x > -torch.inf) & highest[rows].isfinite()
        if filters:  # a lane without filters, or whose z overflows, has a threshold of -inf
            z = x / ranking.temperature[rows].unsqueeze(1)
            kept &= (z >= thresholds[rows]) | (thresholds[rows] == -torch.inf)
        ranking.token_ids[rows].fill_(-1)
        ranking.logprobs[rows].fill_(-torch.inf)
        logprobs = x - highest[rows] - log_sum[rows]
        ranking.token_ids[rows, : tokens.shape[1]].copy_(torch.where(kept, tokens, -1))
        ranking.logprobs[rows, : tokens.shape[1]].copy_(torch.where(kept, logprobs, -torch.inf))


def _select(logits: Tensor, scratch: Scratch, count: int) -> Tensor:
    """int64 [lanes, count]: the tokens of the largest logits, in order."""
    rows = len(logits)
    bits, keys = scratch.bits[:rows], scratch.keys[:rows]
    torch.add(logits, 0.0, out=bits.view(torch.float32))  # -0 becomes 0
    keys.copy_(bits)
    bits.bitwise_right_shift_(31).bitwise_and_(0x7FFFFFFF)  # of the negative, what turns their order round
    keys.bitwise_xor_(bits).bitwise_left_shift_(32).add_(scratch.places)
    return torch.topk(keys, count, dim=1).indices


def _normalise(logits: Tensor, ranking: Ranking, filters: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(least z that is kept, largest logit, log of the sum of exp(logit - largest)) float32 [lanes, 1]."""
    count, vocab = logits.shape
    space = shared_workspace(count, vocab, logits.device)
    tiles, stride = triton.cdiv(vocab, TILE), logits.stride(0)
    zeros = _zeros(count, logits.device)
    none = zeros.view(torch.int32)
    # Without filters a temperature of 0 spares the noise.
    temperature = ranking.temperature if filters else none.view(torch.float32)
    scan_kernel[(tiles, count)](
        logits, stride, none, none, COLUMNS, temperature, ranking.top_k, ranking.top_p, ranking.min_p, zeros, none,
        none, space.highest, space.total, space.weighted, space.ceiling, VOCAB=vocab, TILES=tiles, TILE=TILE,
        FILTERS=filters, CUTS=False, num_warps=SCAN_WARPS)
    highest_of_tile = space.highest[:count]
    highest = highest_of_tile.amax(1, keepdim=True)  # NaN where one is
    log_sum = (space.total[:count] * (highest_of_tile - highest).exp()).sum(1, keepdim=True).log()
    if not filters:
        return highest, highest, log_sum
    bracket_kernel[(count,)](
        logits, stride, none, none, COLUMNS, temperature, ranking.top_k, ranking.top_p, ranking.min_p, space.highest,
        space.ceiling, space.mode, space.bounds, space.count, space.mass, VOCAB=vocab, TILES=tiles,
        TILES_BLOCK=triton.next_power_of_2(tiles), SAMPLE=SAMPLE, num_warps=8)
    collect_kernel[(tiles, count)](
        logits, stride, temperature, ranking.top_k, ranking.top_p, space.mode, space.bounds, space.count, space.mass,
        space.values, VOCAB=vocab, TILE=TILE, num_warps=4)
    select_kernel[(count,)](
        logits, stride, temperature, ranking.top_k, ranking.top_p, space.mode, space.bounds, space.count, space.mass,
        space.values, VOCAB=vocab, BLOCK=list_block(vocab), num_warps=8)
    filtered = space.mode[:count].unsqueeze(1) != 0
    return torch.where(filtered, space.bounds[:count, 3:], -torch.inf), highest, log_sum
