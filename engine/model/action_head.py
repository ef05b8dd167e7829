"""A head that accepts or rejects a candidate token by the language model's hidden state at it: a small MLP in float32.

Its file is a safetensors file of eight tensors, `ln`, `linear1`, `linear2` and `output_linear`, each with `.weight` and
`.bias`: the names of the published actor, whose pickle `convert_action_head` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stars.errors import ModelError, describe
from stars.kernels import pack
from stars.model.files import printed, shown
from stars.model.heads import RewardHead

PRODUCTS = ("linear1", "linear2", "output_linear")
NAMES = tuple(f"{part}.{kind}" for part in ("ln", *PRODUCTS) for kind in ("weight", "bias"))
ACTIONS = 2  # reject, accept
NORM_EPS = 1e-5  # torch's, which the file does not say


class ActionHead(NamedTuple):
    """softmax(output_linear(ReLU(linear2(ReLU(linear1(LayerNorm(h))))))): P(reject), P(accept), in float32."""

    norm: Tensor  # float32 [hidden]
    norm_bias: Tensor  # float32 [hidden]
    mlp: RewardHead  # whose reading is P(accept)

    def accept(self, hidden: Tensor) -> list[float]:
        """P(accept) of each row of hidden [rows, hidden], behind the language model's last norm. The bits of a row do
        not depend on the others where the head was loaded as deterministic."""
        normed = torch.nn.functional.layer_norm(hidden.float(), self.norm.shape, self.norm, self.norm_bias, NORM_EPS)
        accepted = torch.empty(hidden.shape[0], device=hidden.device)
        self.mlp.read(normed, self.mlp.room(hidden.shape[0], hidden.device), accepted)
        probabilities: list[float] = accepted.tolist()
        return probabilities


def load_action_head(file: str | Path, hidden_size: int, name: str, device: str = "cpu",
                     deterministic: bool = False) -> ActionHead:
    """The head in a safetensors file; ModelError where it is damaged, is something else, or reads another width than
    hidden_size. name: what an error calls it."""
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{name}: {shown(str(file))} cannot be read as safetensors ({describe(error)}): give a file "
                         "that `stars convert-head` or benchmarks/train_agent.py wrote") from error
    where = f"{name}: {shown(str(file))}"
    _check(tensors, where)
    width = tensors["ln.weight"].shape[0]
    if width != hidden_size:
        raise ModelError(f"{where} reads hidden states of {width} numbers and the language model's have {hidden_size}: "
                         "use the head of this model")
    own = {key: tensor.to(device, torch.float32) for key, tensor in tensors.items()}
    layers = tuple(pack(own[f"{part}.weight"], own[f"{part}.bias"], deterministic) for part in PRODUCTS)
    return ActionHead(own["ln.weight"], own["ln.bias"], RewardHead(layers, "softmax", label=1))


def save_action_head(tensors: Mapping[str, Tensor], file: str | Path) -> None:
    """Writes a head's tensors, in float32; ModelError where they are none of a head."""
    _check(tensors, "the head")
    try:
        save_file({name: tensors[name].detach().to("cpu", torch.float32).contiguous() for name in NAMES}, file)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{shown(str(file))} cannot be written ({describe(error)}): give another path") from error


def convert_action_head(source: str | Path, target: str | Path) -> tuple[int, int]:
    """Reads a pickled state dict of tensors, and of nothing else, and writes it as safetensors; its widths: of hidden
    states, and of the first product. ModelError."""
    try:
        held = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zip files each have their own
        raise ModelError(f"{shown(str(source))} cannot be read as a pickle of tensors alone "
                         f"({describe(error).splitlines()[0]}): give the actor's state dict as torch.save wrote it"
                         ) from error
    if not isinstance(held, Mapping):
        raise ModelError(f"{shown(str(source))} holds a {type(held).__name__}, it must hold the actor's state dict")
    _check(held, shown(str(source)))
    save_action_head(held, target)
    return held["ln.weight"].shape[0], held["linear1.weight"].shape[0]


def _check(tensors: Mapping[str, Any], where: str) -> None:
    """ModelError unless these are the tensors of one head, and numbers."""
    missing = [name for name in NAMES if name not in tensors]
    others = [name for name in tensors if name not in NAMES]
    if missing:
        raise ModelError(f"{where} lacks {missing[0]}: a head has {', '.join(NAMES)}")
    if others:
        raise ModelError(f"{where} has {printed(str(others[0]))}, which no head has: it has {', '.join(NAMES)}")
    for name in NAMES:
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ModelError(f"{name} of {where} is no tensor of floating point numbers: save the head again")
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{name} of {where} has numbers that are NaN or infinite: train or save the head again")
    width = tensors["ln.weight"].shape[-1] if tensors["ln.weight"].ndim else 0
    _check_shape(tensors, "ln.weight", (width,), where)
    _check_shape(tensors, "ln.bias", (width,), where)
    for part in PRODUCTS:
        matrix = tensors[f"{part}.weight"]
        rows = ACTIONS if part == PRODUCTS[-1] else matrix.shape[0] if matrix.ndim else 0
        _check_shape(tensors, f"{part}.weight", (rows, width), where)
        _check_shape(tensors, f"{part}.bias", (rows,), where)
        width = rows


def _check_shape(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], where: str) -> None:
    found = tuple(tensors[name].shape)
    if found != shape or not min(shape):
        raise ModelError(f"{name} of {where} has shape {list(found)} where the head's other tensors ask for "
                         f"{list(shape)}: save the head again")
