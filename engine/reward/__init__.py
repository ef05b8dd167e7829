"""What scores a candidate: reward models and callables behind one contract."""

from __future__ import annotations

from stars.reward.base import Reward
from stars.reward.cached import CachedReward
from stars.reward.causal import CausalReward
from stars.reward.encoder import EncoderReward
from stars.reward.function import FunctionReward
from stars.reward.implicit import ImplicitReward
from stars.reward.lora import LoraReward
from stars.reward.process import ProcessReward
from stars.reward.remote import RemoteReward
from stars.reward.resolve import resolve_reward
from stars.reward.weighted import WeightedReward

__all__ = ["CachedReward", "CausalReward", "EncoderReward", "FunctionReward", "ImplicitReward", "LoraReward",
           "ProcessReward", "RemoteReward", "Reward", "WeightedReward", "resolve_reward"]
