"""The normalisation of a reward head, as OpenRLHF writes it into config.json: reward = (raw - mean) / std."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

from stars.errors import ModelError
from stars.model.loaded import settings_beside
from stars.model.source import TensorSource, plain

STATISTICS = ("mean", "std")
"""Keys of config.json, and names of one-element tensors that older checkpoints hold."""
AGREEMENT = 2.0**-7  # of a tensor that was stored as bfloat16 with the number in config.json


class Normalisation(NamedTuple):
    """reward = (raw - mean) / std."""

    mean: float
    std: float


def read_normalisation(checkpoint: TensorSource) -> Normalisation | None:
    """What the directory of `checkpoint` asks for; None leaves the raw logit.

    `normalize_reward` of config.json decides: true takes mean and std, from config.json or from tensors of these
    names, false leaves the logit raw. Without it the logit is raw too, as OpenRLHF has it, and a warning says so where
    there is a mean or std that would change it. Raises ModelError where one is missing, of a wrong kind, or differs
    between the two places.
    """
    where = checkpoint.directory / "config.json"
    config = settings_beside(checkpoint)
    wanted = config.get("normalize_reward")
    if wanted is None:
        _warn_if_unused(config, checkpoint)
        return None
    if not isinstance(wanted, bool):
        raise ModelError(f"{where} has normalize_reward = {wanted!r}: set it to true, or to false for the raw logit")
    if not wanted:
        return None
    mean, std = (_statistic(config, checkpoint, name) for name in STATISTICS)
    if std <= 0:
        raise ModelError(f"{where} has normalize_reward and std = {std:g}, which must be positive: repair it, or set "
                         "normalize_reward to false for the raw logit")
    return Normalisation(mean, std)


def _statistic(config: dict[str, Any], checkpoint: TensorSource, name: str) -> float:
    where = checkpoint.directory / "config.json"
    stated, stored = _stated(config, name), _stored(checkpoint, name)
    if stated is None:
        if stored is not None:
            return stored
        kind = "has no" if config.get(name) is None and name not in checkpoint.tensors else "needs one finite number as"
        raise ModelError(f"{where} has normalize_reward and {kind} {name}: add the mean and std of the rewards to "
                         "config.json, or set normalize_reward to false for the raw logit")
    if stored is not None and abs(stated - stored) > AGREEMENT * max(abs(stated), abs(stored)):
        raise ModelError(f"{where} has {name} = {stated:g} and the tensor {name} beside it is {stored:g}: correct "
                         "config.json, or save the model without that tensor")
    return stated


def _stated(config: dict[str, Any], name: str) -> float | None:
    """The number in config.json; None where it is absent or none. A list of one number is that number."""
    value = config.get(name)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON's integers have any length
        return None


def _stored(checkpoint: TensorSource, name: str) -> float | None:
    if name not in checkpoint.tensors or checkpoint.tensors[name].size != 1:
        return None
    value = float(plain(checkpoint, name).item())
    return value if math.isfinite(value) else None


def _warn_if_unused(config: dict[str, Any], checkpoint: TensorSource) -> None:
    neutral = {"mean": 0.0, "std": 1.0}
    unused = [name for name in STATISTICS for value in (_stated(config, name), _stored(checkpoint, name))
              if value is not None and value != neutral[name]]
    if unused:
        warnings.warn(f"{checkpoint.directory} has a {unused[0]} of rewards and config.json does not say "
                      "normalize_reward, so its rewards are raw logits: set it to true or false", stacklevel=2)
