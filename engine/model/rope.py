"""Rotary position embeddings: the supported kinds, their parameters and the tables of cosines and sines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from stars.errors import ModelError
from stars.model.files import is_finite, shown

T = TypeVar("T", int, float)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_MAX = 1e12
"""Beyond it and below its inverse, frequencies of float32 overflow; no checkpoint has a number near either."""

# What to do about the kinds that are refused. Keys already in the cache are rotated by the frequencies of the moment
# they were written, so kinds whose frequencies change with the length of the text cannot be continued from a cache.
_REFUSED = {
    "dynamic": "its frequencies change with the text's length, which a KV cache cannot follow; use a checkpoint with "
    "yarn, or remove rope_scaling and stay within max_position_embeddings",
    "longrope": "its frequencies change with the text's length, which a KV cache cannot follow; use a checkpoint with "
    "yarn or llama3 scaling",
}


@dataclass(frozen=True)
class RopeConfig:
    """Parameters of the rotation, as in transformers' `rope_parameters`; what a kind does not use is left at None."""

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

    def context_length(self, max_position_embeddings: int) -> int:
        """Tokens that the rotation is made for, by what config.json gives as max_position_embeddings.

        Checkpoints of yarn name there either the length before stretching or that after it, so the longer of the two
        counts. Those of linear name the length before it (transformers' advice, and how vLLM reads it), unless they
        name that one apart. Those of llama3 name the length that the model is made for, which is not a multiple of the
        factor: it counts unless it is no longer than the length before stretching.
        """
        if self.rope_type == "default":
            return max_position_embeddings
        original = self.original_max_position_embeddings or max_position_embeddings
        if self.rope_type == "llama3" and original < max_position_embeddings:
            return max_position_embeddings
        return max(max_position_embeddings, int(min(original * _given(self.factor), 2.0**53)))

    def __str__(self) -> str:
        scale = f", factor {self.factor:g}" if self.factor is not None else ""
        return f"{self.rope_type} (theta {self.rope_theta:g}{scale})"


def parse_rope(config: dict[str, Any], max_position_embeddings: int, where: str) -> RopeConfig:
    """Reads the rotation from a config.json of either dialect.

    The newer one has `rope_parameters` with everything inside; the older one `rope_theta` at the top and
    `rope_scaling` with `rope_type` or `type`. Raises ModelError, naming `where`, for a kind that is not supported.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise ModelError(f"{where} has rope parameters that are not an object: repair config.json")
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ModelError(
            f"{where} has rope parameters of its own for each layer type, which is not supported: "
            "use a checkpoint with one set for all layers"
        )
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        advice = f"use a checkpoint with one of {', '.join(ROPE_TYPES)}"
        advice = _REFUSED.get(rope_type, advice) if isinstance(rope_type, str) else advice
        raise ModelError(f"{where} uses rope type {shown(rope_type)}, which is not supported: {advice}")
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ModelError(
            f"{where} rotates only a part of each head (partial_rotary_factor {shown(partial)}), which none of the "
            "supported families does: use a checkpoint that rotates whole heads"
        )
    theta = parameters.get("rope_theta", config.get("rope_theta"))
    theta = 10000.0 if theta is None else theta
    values: dict[str, Any] = {"rope_type": rope_type, "rope_theta": _number(theta, "rope_theta", where)}
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
    if factor is None and rope_type == "yarn":
        factor = max_position_embeddings / values["original_max_position_embeddings"]
    values["factor"] = _number(factor, "factor", where)
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


def _given(parameter: T | None) -> T:
    """A parameter that rotations of this kind have, as `parse_rope` has seen to."""
    assert parameter is not None
    return parameter


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Angle per position of each pair of dimensions, float32 [head_dim / 2], and the factor on cosines and sines.

    Formulas and order of operations are those of transformers' modeling_rope_utils, so that the bits agree: linear is
    position interpolation (Chen et al., arXiv 2306.15595), llama3 the rule published with Llama 3.1, yarn
    Peng et al., arXiv 2309.00071.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim  # [head_dim / 2]
    base_frequencies = 1.0 / (rope.rope_theta**exponents)  # [head_dim / 2]
    if rope.rope_type == "linear":
        return base_frequencies / _given(rope.factor), 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, base_frequencies), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, head_dim, rope.rope_theta**exponents)
    return base_frequencies, 1.0


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
    """Cosines and sines of every position, float32 [max_positions, head_dim / 2] each, with yarn's factor in them."""
    frequencies, scale = inverse_frequencies(rope, head_dim)
    positions = torch.arange(max_positions, dtype=torch.float32)  # exact up to 2**24
    angles = positions[:, None] * frequencies[None, :]  # [max_positions, head_dim / 2]
    cos, sin = angles.cos(), angles.sin_()
    if scale != 1.0:
        cos, sin = cos.mul_(scale), sin.mul_(scale)
    return cos.to(device), sin.to(device)
