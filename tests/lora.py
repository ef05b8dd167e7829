"""Adapters of tiny models, written as peft writes them, and what they make of a base: by the formula, in torch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*QKVO, "gate_proj", "up_proj", "down_proj")


def write_adapter(directory: Path, base: Path, modules: Sequence[str] = ALL, rank: int = 3, alpha: float = 5.0,
                  seed: int = 0, named: str | None = None, whole: dict[str, torch.Tensor] | None = None,
                  ranks: dict[str, int] | None = None, dtype: torch.dtype = torch.float32, scale: float = 0.3,
                  **config: Any) -> Path:
    """An adapter of these modules of every layer of `base`; `whole`: tensors of modules that were trained whole; ranks:
    of modules that have another one than `rank`; named: as the base, in place of its path."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in sorted(load_file(base / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.split(".")[-1] in modules:
            rows, columns = weight.shape
            own = (ranks or {}).get(module.split(".")[-1], rank)
            for part, shape in (("A", (own, columns)), ("B", (rows, own))):
                matrix = torch.randn(shape, generator=generator) * scale / math.sqrt(shape[1])
                tensors[f"base_model.model.{module}.lora_{part}.weight"] = matrix.to(dtype)
    tensors |= {f"base_model.model.{name}": tensor for name, tensor in (whole or {}).items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": named or str(base), "r": rank,
        "lora_alpha": alpha, "target_modules": list(modules), "bias": "none", "use_dora": False, "use_rslora": False,
        "fan_in_fan_out": False, "init_lora_weights": True, "rank_pattern": ranks or {}, "alpha_pattern": {},
        "modules_to_save": None, "lora_dropout": 0.05, "inference_mode": True} | config
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def merge(adapter: Path, base: Path, directory: Path) -> Path:
    """The model W + scale * B A, formed in float64 and stored in float32."""
    shutil.copytree(base, directory)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    low = load_file(adapter / "adapter_model.safetensors")
    merged = load_file(base / "model.safetensors")
    for name, down in low.items():
        own = name.removeprefix("base_model.model.")
        if ".lora_A." in own:
            module = own.replace(".lora_A.weight", "")
            patterns = settings["alpha_pattern"]
            alpha = next((patterns[one] for one in patterns if module.endswith(one)), settings["lora_alpha"])
            rank = down.shape[0]
            scale = alpha / (math.sqrt(rank) if settings["use_rslora"] else rank)
            delta = scale * (low[name.replace("lora_A", "lora_B")].double() @ down.double())
            merged[f"{module}.weight"] = (merged[f"{module}.weight"].double() + delta).float()
        elif ".lora_B." not in own:
            merged[own] = down
    save_file({name: tensor.contiguous() for name, tensor in merged.items()}, directory / "model.safetensors",
              metadata={"format": "pt"})
    return directory
