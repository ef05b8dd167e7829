"""The tensors of a GGUF file under their Hugging Face names, as they are stored."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from stars.errors import ModelError
from stars.kernels.quant import QuantWeight, dequantize, of_blocks, rows
from stars.kernels.quant_blocks import BlockScheme
from stars.model.gguf_config import ROTATION, architecture_of
from stars.model.gguf_header import StoredTensor, read_header
from stars.model.source import BLOCKS, TensorInfo, layers_of

_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "cls.output": "score"}
_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
_OWN = {
    "gemma2": {"ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
               "post_ffw_norm": "post_feedforward_layernorm"},
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
}
_OWN["gemma3"] = _OWN["gemma2"]
"""What an architecture calls otherwise than llama does."""
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(.+)\.(weight|bias)")
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GGUFFile:
    """The tensors of one GGUF file, which stays mapped; what is read are views of it wherever the order of rows is
    that of Hugging Face.

    Raises ModelError for a damaged file and for an architecture that is not supported.
    """

    def __init__(self, path: Path):
        self.directory = path
        self.shards = [path.name]
        self._header = read_header(path)
        self._architecture = architecture_of(self._header)
        self._stored: dict[str, StoredTensor] = {}
        for given, tensor in self._header.tensors.items():
            if given not in ROTATION:
                name = _translated(given, self._architecture)
                if name in self._stored:
                    raise ModelError(f"{path} has {name} under two names: use another file")
                self._stored[name] = tensor
        self.tensors = {name: TensorInfo(tensor.shape, tensor.kind, path.name)
                        for name, tensor in self._stored.items()}

    @property
    def num_layers(self) -> int:
        """Layers that there are tensors of."""
        return layers_of(self.tensors)

    def read(self, name: str) -> Tensor | QuantWeight:
        """A tensor as it is stored, a view of the file or a copy in another order; vectors are plain."""
        stored = self._stored[name]
        if stored.kind not in BLOCKS:
            raise ModelError(f"{name} of {self.directory} is stored as {stored.kind}, which is not read: use a file in "
                             "another type")
        values = torch.frombuffer(self._header.data, dtype=torch.uint8, count=stored.nbytes, offset=stored.at)
        if stored.kind in _PLAIN:
            plain = values.view(_PLAIN[stored.kind]).view(stored.shape)
            index = self._order(name, stored.shape[0])
            if self._architecture in ("gemma2", "gemma3") and "norm" in name:
                return plain.float() - 1  # these norms multiply by 1 + weight, and the files hold that sum
            return plain if index is None else plain[index]
        blocks = of_blocks(values.view(stored.shape[0] if len(stored.shape) > 1 else 1, -1),
                           cast(BlockScheme, stored.kind.lower()))
        if len(stored.shape) == 1:
            return dequantize(blocks)[0]
        index = self._order(name, stored.shape[0])
        return blocks if index is None else rows(blocks, index)

    def file_of(self, name: str) -> Path:
        """The file."""
        return self.directory

    def _order(self, name: str, count: int) -> Tensor | None:
        """The rows of the file in the order of Hugging Face; None: they are in it.

        llama's queries and keys are rotated in adjacent pairs in these files, and in halves of a head elsewhere.
        """
        part = name.split(".")[-2]
        if self._architecture != "llama" or part not in ("q_proj", "k_proj"):
            return None
        keys = ["llama.attention.head_count"] if part == "q_proj" else ["llama.attention.head_count_kv",
                                                                       "llama.attention.head_count"]
        heads = next((number for number in map(self._header.integer, keys) if number is not None), 0)
        if heads < 1 or count % (2 * heads):
            raise ModelError(f"{name} of {self.directory} has {count} rows, which are not those of {heads} heads: use "
                             "another file")
        return torch.arange(count).view(heads, count // heads // 2, 2).transpose(1, 2).reshape(-1)


def _translated(name: str, architecture: str) -> str:
    """The Hugging Face name of a tensor; its own where it has none."""
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    layer, part, kind = match.groups()
    if layer is None:
        return f"{_MODEL[part]}.{kind}" if part in _MODEL else name
    part = _OWN.get(architecture, {}).get(part) or _LAYER.get(part)
    return name if part is None else f"model.layers.{layer}.{part}.{kind}"
