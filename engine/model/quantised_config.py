"""What config.json says of a quantised checkpoint: which are read, and what to do about the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from stars.errors import ModelError
from stars.model.files import shown

METHODS = ("compressed-tensors", "fp8", "awq", "gptq")
FORMATS = ("int-quantized", "float-quantized", "pack-quantized", "naive-quantized")
"""Of compressed-tensors."""
PLAIN = "use its float32, bfloat16 or float16 model, with quantization=\"int8\" or \"int4\" if it is to be smaller"


class Storage(NamedTuple):
    """How the matrices of a checkpoint are stored."""

    method: str
    bits: int = 0  # of awq and gptq; the others' tensors say it
    less_one: bool = False  # gptq: zeros are stored less one
    zeros: bool = False  # compressed-tensors: every module of four bits has zeros of its own


def storage_of(config: Mapping[str, Any], where: str) -> Storage | None:
    """The storage that the object of config.json at `where` describes, None of a plain checkpoint; ModelError for one
    that is not read, by its scheme."""
    given = config.get("quantization_config") or config.get("compression_config")
    if not given:
        return None
    method = given.get("quant_method") if isinstance(given, dict) else None
    if not isinstance(method, str) or method not in METHODS:
        known = method if isinstance(method, str) and method.isprintable() else "an unnamed method"
        raise _refuse(where, known)
    if method == "awq":
        return _awq(given, where)
    if method == "gptq":
        return _gptq(given, where)
    return _compressed(given, method, where)


def _refuse(where: str, what: str, advice: str = PLAIN) -> ModelError:
    return ModelError(f"{where} is quantised with {what}, which is not supported: {advice}")


def _awq(given: Mapping[str, Any], where: str) -> Storage:
    bits, version = given.get("bits", given.get("w_bit", 4)), given.get("version", "gemm")
    if bits != 4 or isinstance(bits, bool):
        raise _refuse(where, f"awq of bits = {shown(bits)}")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise _refuse(where, f"awq in the layout version = {shown(version)}",
                      "use a checkpoint of version gemm, or its model before it was quantised")
    return Storage("awq", 4)


def _gptq(given: Mapping[str, Any], where: str) -> Storage:
    bits, form = given.get("bits"), given.get("checkpoint_format") or "gptq"
    if bits not in (4, 8) or isinstance(bits, bool):
        raise _refuse(where, f"gptq of bits = {shown(bits)}")
    if form not in ("gptq", "gptq_v2"):
        raise _refuse(where, f"gptq in the format {shown(form)}", "use a checkpoint of format gptq or gptq_v2")
    if given.get("is_marlin_format"):
        raise _refuse(where, "gptq in marlin's layout", "use a checkpoint of format gptq or gptq_v2")
    dynamic = given.get("dynamic")
    if dynamic and not (isinstance(dynamic, dict) and all(str(name).startswith("-:") for name in dynamic)):
        raise _refuse(where, "gptq whose modules differ (dynamic)")
    return Storage("gptq", int(bits), form == "gptq")


def _compressed(given: Mapping[str, Any], method: str, where: str) -> Storage:
    if method == "fp8":
        if given.get("weight_block_size"):
            raise _refuse(where, f"fp8 in blocks of {shown(given['weight_block_size'])}")
        if given.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
            raise _refuse(where, f"fp8 of fmt = {shown(given['fmt'])}")
        return Storage(method)
    form = given.get("format")
    groups = given.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    forms = [form, *(group.get("format") for group in groups if isinstance(group, dict))]
    odd = next((one for one in forms if one is not None and one not in (*FORMATS, "mixed-precision")), None)
    if odd is not None:
        raise _refuse(where, f"compressed-tensors in the format {shown(odd)}")
    if given.get("kv_cache_scheme"):
        raise _refuse(where, "compressed-tensors and a scheme for the KV cache, whose scales are not read")
    if given.get("transform_config"):
        raise _refuse(where, "compressed-tensors and transforms of the activations")
    sparse = given.get("sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format", "dense") != "dense":
        raise _refuse(where, f"compressed-tensors in the sparse format {shown(sparse['format'])}")
    symmetric: list[bool] = []
    for group in groups:
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            scheme = (weights.get("type", "int"), weights.get("num_bits"))
            if scheme not in (("int", 4), ("int", 8), ("float", 8)):
                raise _refuse(where, f"compressed-tensors of {shown(scheme[1])} bits of type {shown(scheme[0])}")
            if weights.get("strategy") not in (None, "tensor", "channel", "group"):
                raise _refuse(where, f"compressed-tensors by the strategy {shown(weights['strategy'])}")
            if weights.get("num_bits") == 4:
                symmetric.append(weights.get("symmetric", True) is not False)
    return Storage(method, zeros=bool(symmetric) and not any(symmetric))
