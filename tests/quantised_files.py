"""Quantised checkpoints of tiny models, packed here bit by bit as their formats say, and what they stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # the columns of the nibbles of a word, from its lowest
IGNORED = ("layers.1.self_attn.k_proj", "layers.0.mlp.up_proj")


class Packing(NamedTuple):
    """How the matrices of a checkpoint are stored."""

    method: str
    bits: int = 4
    group: int = 0  # 0: all of a row
    zeros: bool = False
    form: str = ""  # of compressed-tensors and gptq
    scales: torch.dtype = torch.float16
    whole: bool = False  # one scale for the matrix

    def __str__(self) -> str:
        return f"{self.method} {self.form} {self.bits}-{self.group}{' zeros' if self.zeros else ''}"


def words(fields: np.ndarray, bits: int) -> torch.Tensor:
    """int32 [rows, n] of unsigned fields [rows, n * 32 / bits], the first of a word in its lowest bits."""
    each = 32 // bits
    rows, count = fields.shape
    padded = np.zeros((rows, -(-count // each) * each), dtype=np.uint32)
    padded[:, :count] = fields
    found = np.zeros((rows, padded.shape[1] // each), dtype=np.uint32)
    for place in range(each):
        found |= padded[:, place::each] << np.uint32(bits * place)
    return torch.from_numpy(found.view(np.int32).copy())


def packed(matrix: torch.Tensor, how: Packing, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(the tensors of a module behind its name, the matrix in float32 that they stand for)."""
    rows, columns = matrix.shape
    draw = np.random.default_rng(seed)
    group = how.group or columns
    groups = columns // group
    half = 1 << how.bits - 1
    if how.form in ("float-quantized", "fp8"):
        scales = torch.tensor([0.011]) if how.whole else torch.from_numpy(draw.uniform(0.001, 0.004, (rows, 1))).to(
            how.scales)
        values = (matrix / scales.float() * 0.05).to(torch.float8_e4m3fn)
        beside = {"input_scale": torch.ones(1)} if how.whole else {}
        return {"weight": values, "weight_scale": scales} | beside, values.float() * scales.float()
    fields = draw.integers(0, 2 * half, (rows, columns)).astype(np.uint32)  # every code there is
    zeros = draw.integers(0, 16, (rows, groups)) if how.zeros else np.full((rows, groups), half)
    scales = torch.from_numpy(draw.uniform(0.2, 0.8, (rows, groups)) / half / 10).to(how.scales)  # [out, groups]
    if how.whole:
        scales = scales[:1].expand(rows, 1)
    numbers = torch.from_numpy(fields.astype(np.int64) - zeros.repeat(group, axis=1)).float() * (
        scales.float().repeat_interleave(group, dim=1))
    if how.method == "awq":
        order = [8 * word + place for word in range(rows // 8) for place in AWQ_COLUMNS]
        return {"qweight": words(fields.T[:, order], 4), "qzeros": words(zeros.T[:, order], 4),
                "scales": scales.t().contiguous()}, numbers
    if how.method == "gptq":
        stored = (zeros - (how.form == "gptq")) % (2 * half)
        return {"qweight": words(fields, how.bits).t().contiguous(), "qzeros": words(stored.T, how.bits),
                "scales": scales.t().contiguous(), "g_idx": torch.arange(columns, dtype=torch.int32) // group}, numbers
    if how.form == "int-quantized":
        scales = scales[:1, 0].contiguous() if how.whole else scales
        return {"weight": torch.from_numpy(fields.astype(np.int64) - half).to(torch.int8),
                "weight_scale": scales.contiguous()}, numbers
    tensors = {"weight_packed": words(fields, how.bits), "weight_scale": scales.contiguous(),
               "weight_shape": torch.tensor([rows, columns])}
    if how.zeros:
        tensors["weight_zero_point"] = words(zeros.T, 4).t().contiguous()
    return tensors, numbers


def settings(how: Packing) -> dict[str, Any]:
    """The quantization_config."""
    if how.method in ("awq", "gptq"):
        return {"quant_method": how.method, "bits": how.bits, "group_size": how.group or -1, "desc_act": False} | (
            {"version": "gemm", "zero_point": True} if how.method == "awq" else {"checkpoint_format": how.form})
    if how.method == "fp8":
        return {"quant_method": "fp8", "activation_scheme": "static"}
    weights = {"num_bits": how.bits, "type": "float" if how.form == "float-quantized" else "int",
               "symmetric": not how.zeros, "strategy": "tensor" if how.whole else "group" if how.group else "channel",
               "group_size": how.group or None}
    return {"quant_method": how.method, "format": how.form, "ignore": ["lm_head", *IGNORED], "kv_cache_scheme": None,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}}


def write_quantised(directory: Path, target: Path, how: Packing) -> tuple[Path, Path]:
    """The model in DIRECTORY with matrices of random codes in TARGET, and beside it a plain one of the same numbers.

    Two modules are ignored: each shares a product with quantised ones."""
    stored, numbers = {}, {}
    for index, (name, tensor) in enumerate(sorted(load_file(directory / "model.safetensors").items())):
        module = name.removesuffix(".weight")
        if not module.endswith("_proj") or module.endswith(IGNORED):
            stored[name] = numbers[name] = tensor
            continue
        parts, numbers[name] = packed(tensor, how, index)
        stored |= {f"{module}.{part}": one for part, one in parts.items()}
    plain = target.with_name(target.name + "-plain")
    for place, tensors in ((target, stored), (plain, numbers)):
        shutil.copytree(directory, place, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file({name: one.contiguous() for name, one in tensors.items()}, place / "model.safetensors",
                  metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": settings(how)}))
    return target, plain
