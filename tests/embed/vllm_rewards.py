"""Rewards that the tests name to vLLM, as module:attribute."""

from __future__ import annotations

import math

from stars.reward.function import FunctionReward
from toy import table_reward

TABLE = table_reward(seed=9)
seen: list[tuple[list[int], list[int]]] = []
"""Prompt and response of each candidate, in the order asked; empty responses, of r(x), with them."""


def judge(prompt: list[int], responses: list[list[int]]) -> list[float]:
    """The table, and what goes wrong where a prompt begins with 4."""
    seen.extend((list(prompt), list(response)) for response in responses)
    if prompt[:2] == [4, 0]:
        raise ValueError("no")
    if prompt[:2] == [4, 1]:
        return [math.nan] * len(responses)
    return [TABLE(response) for response in responses]


by_ids = FunctionReward(judge, inputs="ids")
