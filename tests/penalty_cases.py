"""Lanes with penalties, for tests of what applies them."""

from __future__ import annotations

import numpy as np
import torch

from sampler_lanes import make_lanes
from stars.kernels.types import LaneState, Penalties


def make_penalties(draw: np.random.Generator, lanes: int, vocab: int, max_entries: int) -> Penalties:
    """Lanes that share histories two by two, some of them empty, with penalties of which some are off."""
    history, start, count = [], [], []
    for lane in range(lanes):
        if lane % 2 == 0:
            tokens = np.flatnonzero(draw.random(vocab) < draw.random() * max_entries / vocab)
            begin = len(history)
            history += [(int(token), int(draw.integers(0, 4))) for token in tokens]
        start.append(begin)
        count.append(len(history) - begin)

    def numbers(values) -> torch.Tensor:
        return torch.tensor(draw.choice(np.array(values, np.float32), lanes))

    return Penalties(
        torch.tensor(history + [(0, 0)], dtype=torch.int32), torch.tensor(start, dtype=torch.int32),
        torch.tensor(count, dtype=torch.int32), numbers([1.0, 0.7, 1.3, 2.0]), numbers([0.0, 0.3, -1.1, 2.0]),
        numbers([0.0, -0.4, 1.7]))


def make_case(seed: int, lanes: int, vocab: int, steps: int = 7,
              max_entries: int = 40) -> tuple[torch.Tensor, LaneState, Penalties]:
    """Logits [lanes, vocab], lanes that drew 0 to `steps` tokens (words of the history among them), penalties."""
    draw = np.random.default_rng(seed)
    penalties = make_penalties(draw, lanes, vocab, max_entries)
    state = make_lanes(lanes, max_steps=max(1, steps))
    state.done.copy_(torch.tensor(draw.random(lanes) < 0.2))
    for lane in range(lanes):
        state.steps[lane] = int(draw.integers(0, steps + 1))
        begin, count = int(penalties.start[lane]), int(penalties.count[lane])
        familiar = penalties.history[begin : begin + count, 0].tolist()
        words = [int(draw.choice(familiar if familiar and draw.random() < 0.5 else np.arange(vocab)[:9]))
                 for _ in range(state.out_tokens.shape[1])]
        state.out_tokens[lane] = torch.tensor(words)
    logits = torch.tensor(draw.normal(size=(lanes, vocab)) * 3, dtype=torch.float32)
    logits[draw.random((lanes, vocab)) < 0.05] = -torch.inf
    return logits, state, penalties


def make_strange_case() -> tuple[torch.Tensor, LaneState, Penalties]:
    """Two lanes of a vocabulary of 11 whose histories and drawn tokens lie outside it, but for token 3 of each."""
    logits, state, penalties = make_case(0, lanes=2, vocab=11)
    state.done.zero_()
    state.steps.fill_(2)
    state.out_tokens[:, :2] = torch.tensor([[-1, 11], [1 << 30, 3]])
    return logits, state, penalties._replace(
        history=torch.tensor([[-5, 1], [3, 1], [99, 2]], dtype=torch.int32),
        start=torch.tensor([0, 1], dtype=torch.int32), count=torch.tensor([3, 2], dtype=torch.int32),
        frequency=torch.tensor([1.0, 2.0]))
