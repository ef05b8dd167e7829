"""What the reward's addresses answer, for the OpenAPI description alone: answers are built as dictionaries."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class RewardUsage(BaseModel):
    """Tokens of the reward model, where it has some; 0 otherwise."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: Literal[0]
    prompt_tokens_details: None


class RewardReply(BaseModel):
    """What all of them have."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: RewardUsage


class ScoreItem(BaseModel):
    """Of one response."""

    index: int
    object: Literal["score"]
    score: float | None = Field(description="null for a reward of -inf, which rejects")


class ScoreReply(RewardReply):
    """The answer of /score."""

    data: list[ScoreItem]


class ClassifyItem(BaseModel):
    """Of one text."""

    index: int
    label: str
    probs: list[float | None]
    num_classes: Literal[1]


class ClassifyReply(RewardReply):
    """The answer of /classify."""

    data: list[ClassifyItem]


class PoolingItem(BaseModel):
    """Of one text."""

    index: int
    object: Literal["pooling"]
    data: list[float | None] | list[list[float | None]] | str = Field(description="a text is float32, in base64")


class PoolingReply(RewardReply):
    """The answer of /pooling."""

    data: list[PoolingItem]


class CalibrationReply(BaseModel):
    """The answer of /v1/calibrate: saved as a file it is what `--calibration` takes."""

    format: Literal["stars-calibration"]
    reward_threshold: float
    quantile: float
    spread: float = Field(description="standard deviation of the rewards of one prompt's samples")
    beta: float = Field(description='of beta="auto"')
    correlations: dict[str, float | None] = Field(description="of rewards of prefixes with those at the end, by tokens")
    drifts: dict[str, float | None]
    rises: dict[str, float | None]
    quantiles: dict[str, float | None]
    mean: float
    samples: int
    prompts: int
    warning: str | None = Field(description="why thresholds for prefixes mean little with this reward")
