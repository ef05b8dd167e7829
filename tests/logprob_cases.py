"""Draws for tests of `top_logprobs`, and the comparison of a faster one with the reference."""

from __future__ import annotations

from collections.abc import Callable

import torch

from stars.kernels.top_logprobs import top_logprobs_reference
from stars.kernels.types import TopLogprobs


def make_draws(seed: int, lanes: int, vocab: int, most: int = 5, steps: int = 3, own: bool = True
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TopLogprobs]:
    """Logits with many ties, what lanes drew from them, and columns filled with what nobody may leave there.

    Of every six lanes one wants nothing, one only its rank, one was read already, one drew a token of no logits.
    """
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(lanes, vocab, generator=draw) * 3
    logits[::2] = (logits[::2] * 2).round() / 2  # ties, zeros of both signs among them
    logits[torch.rand(lanes, vocab, generator=draw) < 0.1] = -torch.inf
    logits[:, vocab // 2] = 1.5

    def ints(values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    wanted = ints([(most, -1, 0, 1, most + 4, most)[lane % 6] for lane in range(lanes)])
    drawn = ints([1 + lane % steps for lane in range(lanes)])
    told = drawn - 1
    told[3::6] = drawn[3::6]
    tokens = torch.randint(0, vocab, (lanes, steps), generator=draw, dtype=torch.int32)
    tokens[4::6] = logits[4::6].argmax(1, keepdim=True).int()
    tokens[5::12] = -1
    return logits, drawn, tokens, TopLogprobs(
        wanted, told, torch.full((lanes, steps), -7, dtype=torch.int32),
        torch.full((lanes, steps, most), -7, dtype=torch.int32), torch.full((lanes, steps, most), 9.0),
        torch.full((lanes, steps), 9.0) if own else None)


def hard_draws() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TopLogprobs]:
    """Rows of zeros of both signs, -inf, huge numbers, and what is no distribution, with the token in the middle."""
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([
        [0.0, -0.0, 1.0, -0.0, 0.0, 1.0, -1.0], [-inf, 2.0, -inf, -inf, -3.0, -inf, -inf], [-inf] * 7,
        [0.0, nan, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0, -nan, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0, inf, 1.0, 2.0, 3.0, 4.0, 5.0],
        [3.0] * 7, [-1e38, -2e38, 3e38, 1e-45, -1e-45, 0.0, -3e38]])
    ones = torch.ones(len(logits), dtype=torch.int32)
    return logits, ones, ones.unsqueeze(1) * 3, TopLogprobs(
        ones * 7, ones * 0, ones.unsqueeze(1) * -7, torch.full((len(logits), 1, 7), -7, dtype=torch.int32),
        torch.full((len(logits), 1, 7), 9.0), torch.full((len(logits), 1), 9.0))


def copy_of(top: TopLogprobs) -> TopLogprobs:
    """The same values in memory of their own."""
    return TopLogprobs(*(None if tensor is None else tensor.clone() for tensor in top))


def assert_same_top(run: Callable, logits: torch.Tensor, steps: torch.Tensor, tokens: torch.Tensor, top: TopLogprobs
                    ) -> TopLogprobs:
    """Ranks and tokens to the letter, log-probabilities within 1e-5 as the sampler's; what is not told is left as it
    was. Returns the reference's."""
    ours, wanted, before = copy_of(top), copy_of(top), logits.clone()
    run(logits, steps, tokens, ours)
    assert torch.equal(logits.nan_to_num(1e9), before.nan_to_num(1e9))
    top_logprobs_reference(logits, steps, tokens, wanted)
    for name in ("told", "ranks", "token_ids"):
        assert torch.equal(getattr(ours, name), getattr(wanted, name)), (name, getattr(ours, name),
                                                                         getattr(wanted, name))
    for name in ("logprobs", "own"):
        if getattr(ours, name) is not None:
            torch.testing.assert_close(getattr(ours, name), getattr(wanted, name), rtol=1e-6, atol=1e-5,
                                       equal_nan=True)
    return wanted
