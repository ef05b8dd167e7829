"""Rotary position embeddings: the supported kinds, their parameters and the tables of cosines and sines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from stars.errors import ModelError
from stars.model.files import is_finite, shown

T = TypeVar("T", int, float)
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")

_MAX = 1e12
"""Beyond it and below its inverse, frequencies of float32 overflow; no checkpoint has a number near either."""

# What to do about the kinds that are refused. Keys already in the cache are rotated by the frequencies of the moment
# they were written, so kinds whose frequencies change with the length of the text cannot be continued from a cache.
_REFUSED = {
    "dynamic": "its frequencies change with the text's length, which a KV cache cannot follow; use a checkpoint with "
    "yarn, or remove rope_scaling and stay within max_position_embeddings",
}


@dataclass(frozen=True)
class RopeConfig:
    """Parameters of the rotation, as in transformers' `rope_parameters`; what a kind does not use is left at None.

    The kind "none" is of layers that do not rotate. Of longrope `long` says which of its two sets of factors is taken:
    transformers takes the long ones once a text exceeds original_max_position_embeddings. Keys in a cache keep the
    rotation that they were written with, so it is chosen once, by the longest text that there may be (`reaching`).
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    long: bool = False
    partial_rotary_factor: float = 1.0

    def rotary_dim(self, head_dim: int) -> int:
        """How many of a head's dimensions are rotated: the first ones."""
        return int(head_dim * self.partial_rotary_factor)

    def reaching(self, positions: int | None) -> RopeConfig:
        """The rotation for texts of up to `positions` tokens; None: of a length that the model was trained on."""
        if self.rope_type != "longrope":
            return self
        return replace(self, long=positions is not None and positions > _given(self.original_max_position_embeddings))

    def context_length(self, max_position_embeddings: int) -> int:
        """Tokens that the rotation is made for, by what config.json gives as max_position_embeddings.

        Checkpoints of yarn name there either the length before stretching or that after it, so the longer of the two
        counts. Those of linear name the length before it (transformers' advice, and how vLLM reads it), unless they
        name that one apart. Those of llama3 name the length that the model is made for, which is not a multiple of the
        factor: it counts unless it is no longer than the length before stretching. Those of longrope have two, by which
        of its factors are taken.
        """
        if self.rope_type in ("default", "none"):
            return max_position_embeddings
        if self.rope_type == "longrope":
            original = _given(self.original_max_position_embeddings)
            return max_position_embeddings if self.long else min(original, max_position_embeddings)
        original = self.original_max_position_embeddings or max_position_embeddings
        if self.rope_type == "llama3" and original < max_position_embeddings:
            return max_position_embeddings
        return max(max_position_embeddings, int(min(original * _given(self.factor), 2.0**53)))

    def __str__(self) -> str:
        if self.rope_type == "none":
            return self.rope_type
        scale = f", factor {self.factor:g}" if self.factor is not None else ""
        if self.rope_type == "longrope":
            original = _given(self.original_max_position_embeddings)
            scale = ", long factors" if self.long else f", short factors up to {original} tokens"
        if self.partial_rotary_factor != 1:
            scale += f", {self.partial_rotary_factor:g} of each head"
        return f"{self.rope_type} (theta {self.rope_theta:g}{scale})"


def parse_rope(config: Mapping[str, Any], max_position_embeddings: int, where: str, partial: bool = False,
               yarn_is_longrope: bool = False) -> RopeConfig:
    """Reads the rotation of all layers from a config.json of either dialect.

    The newer one has `rope_parameters` with everything inside; the older one `rope_theta` at the top and
    `rope_scaling` with `rope_type` or `type`. partial: whether the family rotates parts of heads, yarn_is_longrope:
    whether it had that name for it. Raises ModelError, naming `where`, for a kind that is not supported.
    """
    parameters = _object(config.get("rope_scaling") or config.get("rope_parameters"), where)
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ModelError(
            f"{where} has rope parameters of its own for each layer type, which is not supported: "
            "use a checkpoint with one set for all layers"
        )
    if yarn_is_longrope and (parameters.get("rope_type") or parameters.get("type")) in ("su", "yarn"):
        parameters = {**parameters, "rope_type": "longrope"}
    return _parse(parameters, config, max_position_embeddings, where, partial)


def parse_ropes(config: Mapping[str, Any], max_position_embeddings: int, where: str) -> dict[str, RopeConfig]:
    """As `parse_rope`, of a family whose full and sliding layers have rotations of their own, by the type of layer.

    The newer dialect has an object for each in `rope_parameters`; the older one `rope_theta` and `rope_scaling` of full
    layers, and `rope_local_base_freq` of sliding ones.
    """
    given = _object(config.get("rope_parameters"), where)
    if given and not any(isinstance(value, dict) for value in given.values()):
        raise ModelError(f"{where} has one set of rope_parameters where each type of layer needs its own: give "
                         "full_attention and sliding_attention")
    full = {"rope_theta": config.get("rope_theta"), **_object(given.get("full_attention"), where),
            **_object(config.get("rope_scaling"), where)}
    sliding = {"rope_theta": config.get("rope_local_base_freq"), **_object(given.get("sliding_attention"), where)}
    return {name: _parse(parameters, config, max_position_embeddings, where, False)
            for name, parameters in (("full_attention", full), ("sliding_attention", sliding))}


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value or {}, dict):
        raise ModelError(f"{where} has rope parameters that are not an object: repair config.json")
    return value or {}


def _parse(parameters: Mapping[str, Any], config: Mapping[str, Any], max_position_embeddings: int, where: str,
           partial: bool) -> RopeConfig:
    """One rotation; what its parameters leave out is at the top of config.json."""
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        advice = f"use a checkpoint with one of {', '.join(ROPE_TYPES)}"
        advice = _REFUSED.get(rope_type, advice) if isinstance(rope_type, str) else advice
        raise ModelError(f"{where} uses rope type {shown(rope_type)}, which is not supported: {advice}")
    share = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    share = 1.0 if share is None else share
    if not is_finite(share) or not 0 < share <= 1:
        raise ModelError(f"{where} has partial_rotary_factor = {shown(share)} where a number above 0 and at most 1 is "
                         "needed: repair config.json")
    if share != 1 and not partial:
        raise ModelError(
            f"{where} rotates only a part of each head (partial_rotary_factor {shown(share)}), which a model of its "
            "family does not: use a checkpoint that rotates whole heads"
        )
    theta = parameters.get("rope_theta", config.get("rope_theta"))
    theta = 10000.0 if theta is None else theta
    values: dict[str, Any] = {"rope_type": rope_type, "rope_theta": _number(theta, "rope_theta", where),
                              "partial_rotary_factor": float(share)}
    if rope_type == "default":
        return RopeConfig(**values)
    original = config.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    if original is None and rope_type != "linear":
        original = max_position_embeddings
    if original is not None:
        original = _number(original, "original_max_position_embeddings", where)
        if original < 1:
            raise ModelError(f"{where} has rope original_max_position_embeddings = {original:g} where a positive "
                             "integer is needed: repair config.json")
        values["original_max_position_embeddings"] = int(original)
    factor = parameters.get("factor")
    if factor is None and rope_type in ("yarn", "longrope"):
        factor = max_position_embeddings / values["original_max_position_embeddings"]
    values["factor"] = _number(factor, "factor", where)
    if rope_type == "longrope":
        for name in ("short_factor", "long_factor"):
            values[name] = _numbers(parameters.get(name), name, where)
        if parameters.get("attention_factor") is not None:
            values["attention_factor"] = _number(parameters["attention_factor"], "attention_factor", where)
        elif values["factor"] > 1 and values["original_max_position_embeddings"] < 2:
            raise ModelError(f"{where} has rope original_max_position_embeddings = 1, which longrope cannot stretch: "
                             "repair config.json")
    if rope_type == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            values[name] = _number(parameters.get(name), name, where)
        if abs(values["low_freq_factor"] - values["high_freq_factor"]) < 1e-6:
            raise ModelError(f"{where} has rope low_freq_factor equal to high_freq_factor: repair config.json")
    if rope_type == "yarn":
        for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
            # transformers takes 0 for beta_fast and beta_slow as not given
            if parameters.get(name) is not None and (parameters[name] or not name.startswith("beta")):
                values[name] = _number(parameters[name], name, where, positive=not name.startswith("mscale"))
        values["truncate"] = bool(parameters.get("truncate", True))
        if values["rope_theta"] <= 1:
            raise ModelError(f"{where} has rope_theta = {theta:g}, which yarn cannot stretch: repair config.json")
        if not _MAX**-1 < abs(_attention_factor(RopeConfig(**values))) < _MAX:
            raise ModelError(f"{where} has rope mscale and mscale_all_dim that cancel out: repair config.json")
    return RopeConfig(**values)


def _number(value: Any, name: str, where: str, positive: bool = True) -> float:
    if not is_finite(value) or (positive and value <= 0):
        raise ModelError(f"{where} has rope {name} = {shown(value)} where a positive number is needed: repair "
                         "config.json")
    if value and not _MAX**-1 < abs(value) < _MAX:
        raise ModelError(f"{where} has rope {name} = {shown(value)}, too far from 1 to give a rotation: repair "
                         "config.json")
    return float(value)


def _numbers(value: Any, name: str, where: str) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ModelError(f"{where} has rope {name} = {shown(value)} where a list of numbers is needed: repair "
                         "config.json")
    return tuple(_number(one, name, where) for one in value)


def check_head_dim(rope: RopeConfig, head_dim: int, where: str) -> None:
    """Raises ModelError where a head has no such part, or longrope's factors are not one for each pair of it."""
    dim = rope.rotary_dim(head_dim)
    if dim < 2 or dim % 2:
        raise ModelError(f"{where} rotates {dim} dimensions of each head (partial_rotary_factor "
                         f"{rope.partial_rotary_factor:g} of head_dim {head_dim}), and pairs are rotated: repair "
                         "config.json")
    for name, factors in (("short_factor", rope.short_factor), ("long_factor", rope.long_factor)):
        if rope.rope_type == "longrope" and len(factors) != dim // 2:
            raise ModelError(f"{where} has {len(factors)} numbers in rope {name} for {dim // 2} pairs of a head's "
                             "dimensions: repair config.json")


def head_order(rope: RopeConfig, head_dim: int) -> list[int] | None:
    """The dimensions of a head in the order that pairs are rotated in, i with i + head_dim / 2; None: as they are.

    Where only the first dimensions are rotated, as halves of their own, the others fill up both halves, and their pairs
    are turned by nothing. Queries and keys in one order have the scores that they have in any other.
    """
    dim = rope.rotary_dim(head_dim)
    if dim == head_dim:
        return None
    middle = (head_dim + dim) // 2
    return [*range(dim // 2), *range(dim, middle), *range(dim // 2, dim), *range(middle, head_dim)]


def _given(parameter: T | None) -> T:
    """A parameter that rotations of this kind have, as `parse_rope` has seen to."""
    assert parameter is not None
    return parameter


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Angle per position of each pair of dimensions that is rotated, float32 [rotary_dim / 2], and the factor on
    cosines and sines.

    Formulas and order of operations are those of transformers' modeling_rope_utils, so that the bits agree: linear is
    position interpolation (Chen et al., arXiv 2306.15595), llama3 the rule published with Llama 3.1, yarn
    Peng et al., arXiv 2309.00071, longrope Ding et al., arXiv 2402.13753.
    """
    dim = rope.rotary_dim(head_dim)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim  # [dim / 2]
    if rope.rope_type == "none":
        return torch.zeros_like(exponents), 1.0
    base_frequencies = 1.0 / (rope.rope_theta**exponents)  # [dim / 2]
    if rope.rope_type == "linear":
        return base_frequencies / _given(rope.factor), 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, base_frequencies), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, dim, rope.rope_theta**exponents)
    if rope.rope_type == "longrope":
        factors = torch.tensor(rope.long_factor if rope.long else rope.short_factor, dtype=torch.float32)
        return 1.0 / (factors * rope.rope_theta**exponents), _longrope_attention_factor(rope)
    return base_frequencies, 1.0


def _longrope_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    factor = _given(rope.factor)
    original = _given(rope.original_max_position_embeddings)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended."""
    length, factor = _given(rope.original_max_position_embeddings), _given(rope.factor)
    low, high = _given(rope.low_freq_factor), _given(rope.high_freq_factor)
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > length / low, frequencies / factor, frequencies)
    share = (length / wavelengths - low) / (high - low)
    blended = (1 - share) * stretched / factor + share * stretched
    between = (wavelengths >= length / high) & (wavelengths <= length / low)
    return torch.where(between, blended, stretched)


def _yarn(rope: RopeConfig, head_dim: int, powers: Tensor) -> tuple[Tensor, float]:
    """Interpolated and original frequencies blended by a ramp over the dimensions; cosines and sines are scaled."""
    low = _rotations_to_dim(rope.beta_fast, rope, head_dim)
    high = _rotations_to_dim(rope.beta_slow, rope, head_dim)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    frequencies = 1.0 / (_given(rope.factor) * powers) * (1 - keep) + 1.0 / powers * keep
    return frequencies, _attention_factor(rope)


def _attention_factor(rope: RopeConfig) -> float:
    """Yarn's factor on cosines and sines; 0 where it would have to be divided by 0."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    factor = _given(rope.factor)
    if rope.mscale and rope.mscale_all_dim:
        divisor = _mscale(factor, rope.mscale_all_dim)
        return _mscale(factor, rope.mscale) / divisor if divisor else 0.0
    return _mscale(factor, 1.0)


def _rotations_to_dim(rotations: float, rope: RopeConfig, head_dim: int) -> float:
    """The dimension whose wavelength turns `rotations` times within the original context length."""
    length = _given(rope.original_max_position_embeddings)
    return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_tables(
    rope: RopeConfig, head_dim: int, max_positions: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, float32 [max_positions, head_dim / 2] each, with the kind's factor in them;
    of pairs that are not rotated 1 and 0.
    """
    frequencies, scale = inverse_frequencies(rope, head_dim)
    positions = torch.arange(max_positions, dtype=torch.float32)  # exact up to 2**24
    angles = positions[:, None] * frequencies[None, :]  # [max_positions, head_dim / 2]
    cos, sin = angles.cos(), angles.sin_()
    if scale != 1.0:
        cos, sin = cos.mul_(scale), sin.mul_(scale)
    still = head_dim // 2 - cos.shape[1]
    if still:
        cos, sin = torch.nn.functional.pad(cos, (0, still), value=1.0), torch.nn.functional.pad(sin, (0, still))
    return cos.to(device), sin.to(device)
