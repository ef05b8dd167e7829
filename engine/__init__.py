"""STARS engine: alignment at decoding time, one language model and one reward model in one engine."""

from stars.engine import Engine
from stars.errors import (
    IntegrityError,
    ModelError,
    OutOfPages,
    RequestError,
    RewardError,
    StarsError,
    TokenizerError,
)
from stars.outputs import Attempt, CompletionOutput, Metrics, RequestOutput, Segment
from stars.policies import STARS, BestOfN, BlockwiseBestOfK, Sample
from stars.reward import CausalReward, EncoderReward, FunctionReward, Reward
from stars.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "Attempt",
    "BestOfN",
    "BlockwiseBestOfK",
    "CausalReward",
    "CompletionOutput",
    "EncoderReward",
    "Engine",
    "FunctionReward",
    "IntegrityError",
    "Metrics",
    "ModelError",
    "OutOfPages",
    "RequestError",
    "RequestOutput",
    "Reward",
    "RewardError",
    "STARS",
    "Sample",
    "SamplingParams",
    "Segment",
    "StarsError",
    "TokenizerError",
]
