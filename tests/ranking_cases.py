"""Lanes for tests of `top_tokens`, and the comparison of a faster one with the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from stars.kernels.top_tokens import top_tokens_reference
from stars.kernels.types import Ranking

CASES = {
    "no filter": {}, "top_k": dict(top_k=4), "top_p": dict(top_p=0.6), "min_p": dict(min_p=0.2),
    "all, cooler": dict(top_k=6, top_p=0.9, min_p=0.05, temperature=0.7), "hotter": dict(top_p=0.7, temperature=1.9),
    "top_k beyond the ranks": dict(top_k=20, top_p=0.9), "temperature 0": dict(top_k=2, temperature=0.0),
    "z overflows": dict(top_k=2, top_p=0.5, min_p=0.5, temperature=2e-38),
}
"""Filters; those of the last two cases keep everything."""


def make_ranking(lanes: int, most: int, ranks: Sequence[int], temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, min_p: float = 0.0) -> Ranking:
    """A ranking of `lanes` lanes with the same filters, columns filled with what nobody may leave there."""
    def of(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((lanes,), value, dtype=dtype)

    return Ranking(torch.tensor(ranks, dtype=torch.int32), of(temperature, torch.float32), of(top_k, torch.int32),
                   of(top_p, torch.float32), of(min_p, torch.float32),
                   torch.full((lanes, most), -7, dtype=torch.int32), torch.full((lanes, most), 9.0))


def hard_rows() -> tuple[torch.Tensor, tuple[int, ...]]:
    """Logits with ties, zeros of both signs, -inf and what is no number; and how many tokens each lane wants."""
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([
        [0.0, -0.0, 1.0, -0.0, 0.0, 1.0, -1.0], [-inf, 2.0, -inf, -inf, -3.0, -inf, -inf], [-inf] * 7,
        [0.0, nan, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0, inf, 1.0, 2.0, 3.0, 4.0, 5.0], [3.0] * 7,
        [-1e38, -2e38, 3e38, 1e-45, -1e-45, 0.0, -3e38]])
    return logits, (7, 5, 2, 3, 3, 4, 9)


def assert_same_ranking(top_tokens: Callable, logits: torch.Tensor, ranking: Ranking, filters: bool = True) -> None:
    """Tokens to the letter; log-probabilities within 1e-5, as the sampler's. Lanes that want nothing get no token."""
    ours, wanted = (Ranking(*(tensor.clone() for tensor in ranking)) for _ in range(2))
    top_tokens(logits.clone(), ours, filters)
    top_tokens_reference(logits, wanted, filters)
    some = ranking.ranks > 0
    assert torch.equal(ours.token_ids[some], wanted.token_ids[some]), (ours.token_ids, wanted.token_ids)
    torch.testing.assert_close(ours.logprobs[some], wanted.logprobs[some], rtol=1e-6, atol=1e-5, equal_nan=True)
    assert (ours.token_ids[~some] < 0).all()
