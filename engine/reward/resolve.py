"""What may be given as a reward: a Reward, a callable, or a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stars.errors import RewardError
from stars.model.bases import is_adapter, is_of_own_model
from stars.model.families import FAMILIES
from stars.model.files import is_file, read_json
from stars.model.head_files import TWO_LABELS
from stars.model.loaded import LoadedModel, taken
from stars.model.location import located
from stars.reward.base import Reward
from stars.reward.causal import CausalReward
from stars.reward.encoder import EncoderReward
from stars.reward.function import FunctionReward
from stars.reward.lora import LoraReward
from stars.reward.process import ProcessReward


def resolve_reward(reward: Any) -> Reward | None:
    """The Reward that `reward` stands for: itself, a callable, or a model directory: an encoder, a model that
    judges steps, or one that judges responses, of which a model of transformers may be given itself; or an adapter that
    makes one of the engine's own model.

    Raises RewardError for anything else, ModelError for a directory that holds no model.
    """
    if reward is None or isinstance(reward, Reward):
        return reward
    reward = taken(reward)
    if isinstance(reward, LoadedModel):
        kind = reward.settings.get("model_type")
        if kind not in FAMILIES:
            raise RewardError(f"reward is a {reward.name} of transformers, and encoders are loaded from directories: "
                              "write it with save_pretrained(DIR), its tokenizer beside it, and give DIR")
        return ProcessReward(reward) if reward.name.endswith(TWO_LABELS) else CausalReward(reward)
    if isinstance(reward, (str, Path)):
        reward = located(reward)
        path = Path(reward) / "config.json"
        if is_file(path):
            config = read_json(path)
            kind, names = config.get("model_type"), config.get("architectures")
            if not isinstance(kind, str) or kind not in FAMILIES:
                return EncoderReward(reward)
            if isinstance(names, list) and any(isinstance(name, str) and name.endswith(TWO_LABELS) for name in names):
                return ProcessReward(reward)
        if is_adapter(Path(reward)) and is_of_own_model(Path(reward)):
            return LoraReward(reward)
        return CausalReward(reward)
    if isinstance(reward, type) and issubclass(reward, Reward):
        raise RewardError(f"reward is the class {reward.__name__}: give an object of it")
    if callable(reward):
        return FunctionReward(reward)
    raise RewardError(f"reward is {type(reward).__name__}, it must be a model directory, a callable or a stars.Reward")
