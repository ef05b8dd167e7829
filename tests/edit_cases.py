"""Lanes with edits, for tests of what applies them."""

from __future__ import annotations

import numpy as np
import torch

from sampler_lanes import make_lanes
from stars.kernels.types import Edits, LaneState

LENGTH = 5


def make_edits(draw: np.random.Generator, lanes: int, vocab: int, max_entries: int) -> Edits:
    """Lanes that share entries, words and masks two by two; some of each are empty."""
    entries: list[list[int]] = []
    words: list[list[int]] = []
    masks: list[np.ndarray] = []
    rows = []
    for lane in range(lanes):
        if lane % 2 == 0:
            start, first = len(entries), len(words)
            tokens = np.flatnonzero(draw.random(vocab) < draw.random() * max_entries / vocab)
            bias = np.float32(draw.normal(size=len(tokens)) * 5).astype(np.float32).view(np.int32)
            until = draw.choice([0, 0, 3, 9, 1 << 30], len(tokens))
            entries += [list(map(int, entry)) for entry in zip(tokens, until, bias, strict=True)]
            for _ in range(int(draw.integers(0, 12))):  # of few tokens, so that some follow
                size = int(draw.integers(2, LENGTH + 1))
                words.append([-1] * (LENGTH - size) + draw.integers(0, min(3, vocab), size - 1).tolist()
                             + [int(draw.integers(0, vocab))])
            mask = -1
            if draw.random() < 0.7:
                mask = len(masks)
                bits = draw.random((vocab + 31) // 32 * 32) < draw.choice([0.02, 0.5, 0.98, 1.0])
                masks.append(np.packbits(bits, bitorder="little").view("<i4").astype(np.int32))
        base = int(draw.integers(0, 12))
        tail = draw.integers(0, min(3, vocab), LENGTH - 1)
        tail[: max(0, LENGTH - 1 - base)] = -1
        rows.append((start, len(entries) - start, base, first, len(words) - first, mask, tail))
    start_, count, base_, first_, word_count, mask_row = (
        torch.tensor([row[index] for row in rows], dtype=torch.int32) for index in range(6))
    return Edits(
        torch.tensor(entries + [[0, 0, 0]], dtype=torch.int32), start_, count, base_,
        torch.tensor(words + [[-1] * (LENGTH - 1) + [0]], dtype=torch.int32), first_, word_count,
        torch.tensor(np.array([row[6] for row in rows]), dtype=torch.int32),
        torch.tensor(np.array([*masks, np.zeros((vocab + 31) // 32)]), dtype=torch.int32), mask_row)


def make_case(seed: int, lanes: int, vocab: int, steps: int = 7,
              max_entries: int = 40) -> tuple[torch.Tensor, LaneState, Edits]:
    """Logits [lanes, vocab], lanes that drew 0 to `steps` tokens, edits."""
    draw = np.random.default_rng(seed)
    edits = make_edits(draw, lanes, vocab, max_entries)
    state = make_lanes(lanes, max_steps=max(1, steps))
    state.done.copy_(torch.tensor(draw.random(lanes) < 0.2))
    state.steps.copy_(torch.tensor(draw.integers(0, steps + 1, lanes)))
    state.out_tokens.copy_(torch.tensor(draw.integers(0, min(3, vocab), state.out_tokens.shape)))
    logits = torch.tensor(draw.normal(size=(lanes, vocab)) * 3, dtype=torch.float32)
    logits[draw.random((lanes, vocab)) < 0.05] = -torch.inf
    return logits, state, edits


def make_strange_case() -> tuple[torch.Tensor, LaneState, Edits]:
    """Two lanes of a vocabulary of 11 whose entries and words lie outside it, but for tokens 3 and 4 of each."""
    logits, state, edits = make_case(0, lanes=2, vocab=11)
    state.done.zero_()
    logits.fill_(1.0)
    one = torch.tensor([1, 1], dtype=torch.int32)
    half = torch.tensor(0.5).view(torch.int32).item()
    words = torch.full((3, LENGTH), -1, dtype=torch.int32)
    words[:, -1] = torch.tensor([-1, 4, 1 << 30])
    return logits, state, edits._replace(
        entries=torch.tensor([[-5, 0, half], [3, 0, half], [99, 1 << 30, 0]], dtype=torch.int32), start=0 * one,
        count=3 * one, words=words, first_word=0 * one, word_count=3 * one, mask_row=-one)
