"""Checkpoints whose matrices are stored in 4 or 8 bits: compressed-tensors, fp8, AWQ and GPTQ, as QuantWeights.

Only weights are: a checkpoint that was made for activations of 8 bits, too, is computed with those of 16 or 32 bits,
and scales of its activations are not read. Which layers are quantised, and how, is told by their tensors.

    compressed-tensors  X.weight int8 or float8 [out, in], X.weight_scale [out, 1] or [1]; or X.weight_packed int32
                        [out, in * bits / 32], X.weight_scale [out, groups], X.weight_zero_point int32
                        [out * bits / 32, groups]
    awq                 X.qweight int32 [in, out / 8], X.qzeros int32 [groups, out / 8], X.scales [groups, out]
    gptq                X.qweight int32 [in * bits / 32, out], X.qzeros int32 [groups, out * bits / 32],
                        X.scales [groups, out], X.g_idx int32 [in]
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from stars.errors import ModelError
from stars.kernels.quant import QuantWeight
from stars.model.checkpoint import Checkpoint
from stars.model.files import printed
from stars.model.quantised_config import Storage
from stars.model.source import TensorInfo, layers_of
from stars.model.unpacking import awq_columns, fp8, in_pairs, int4, int8, nibbles, shared_columns

AGAIN = "copy the model again, or quantise it again"
NARROW = {"weight": ("I8", "F8_E4M3"), "weight_packed": ("I32",), "qweight": ("I32",)}
"""Tensors by which a module is known to be quantised, and their types."""
BESIDE = {"weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale",
          "input_zero_point", "qweight", "qzeros", "scales", "g_idx"}
"""What a quantised module has of tensors that are not among a model's; scales of activations are not read."""
FLOATS = ("F16", "BF16", "F32")


class QuantisedCheckpoint:
    """The tensors of a quantised checkpoint under the names and with the shapes of the plain one.

    Raises ModelError for tensors that do not fit together, and for groups of columns that no product takes.
    """

    def __init__(self, checkpoint: Checkpoint, storage: Storage):
        self.directory, self.shards = checkpoint.directory, checkpoint.shards
        self._checkpoint, self._storage = checkpoint, storage
        self._held = held = checkpoint.tensors
        modules: dict[str, str] = {}  # and the tensor that holds the bits
        for name, info in held.items():
            module, _, part = name.rpartition(".")
            if info.dtype in NARROW.get(part, ()) and module:
                modules[module] = part
        self._modules = modules
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in held.items():
            module, _, part = name.rpartition(".")
            if module not in modules or part not in BESIDE:
                self.tensors[name] = info
            elif part == modules[module]:
                self.tensors[f"{module}.weight"] = self._info(module, part)
        if not modules:
            raise ModelError(f"{self.directory} says that it is quantised with {storage.method}, and no tensor is: use "
                             "config.json of the same checkpoint")

    @property
    def num_layers(self) -> int:
        """Layers that there are tensors of."""
        return layers_of(self.tensors)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor's bits."""
        return self._checkpoint.file_of(self._stored(name))

    def read(self, name: str) -> Tensor | QuantWeight:
        """A tensor as it is stored, or a QuantWeight of exactly its numbers; ModelError where they are none."""
        module = name.removesuffix(".weight")
        if module not in self._modules or module == name:
            return self._checkpoint.read(name)
        try:
            quant = self._quantised(module)
        except ValueError as error:
            raise ModelError(f"{printed(name)} of {self.directory} has {error}: {AGAIN}") from error
        if not bool(quant.scales.isfinite().all()):
            raise ModelError(f"{printed(name)} of {self.directory} has scales that are NaN or infinite: {AGAIN}")
        return quant

    def _stored(self, name: str) -> str:
        module = name.removesuffix(".weight")
        return f"{module}.{self._modules[module]}" if module != name and module in self._modules else name

    # -- headers ------------------------------------------------------------------------------------------------------

    def _info(self, module: str, part: str) -> TensorInfo:
        """Shape and scheme of a quantised module, once its tensors fit together."""
        info = self._held[f"{module}.{part}"]
        if len(info.shape) != 2:
            raise self._odd(module, part)
        if part == "qweight":
            return self._of_autos(module, info)
        if part == "weight":
            return self._of_bytes(module, info)
        return self._of_words(module, info)

    def _of_bytes(self, module: str, info: TensorInfo) -> TensorInfo:
        """compressed-tensors' int8 and float8."""
        rows, columns = info.shape
        scales = self._part(module, "weight_scale", FLOATS)
        if f"{module}.weight_zero_point" in self._held and info.dtype == "I8":
            zeros = self._checkpoint.read(f"{module}.weight_zero_point")
            if bool(zeros.any()):
                raise ModelError(f"{module} of {self.directory} has int8 weights with zero points, which is not "
                                 "supported: use a symmetric checkpoint")
        if info.dtype == "F8_E4M3":
            if scales.size not in (1, rows):
                raise self._odd(module, "weight_scale")
            return TensorInfo((rows, columns), "FP8", info.shard)
        if scales.size in (1, rows):
            return self._eight_bits(module, rows, columns, 1, info.shard)
        if len(scales.shape) != 2 or scales.shape[0] != rows:
            raise self._odd(module, "weight_scale")
        return self._eight_bits(module, rows, columns, scales.shape[1], info.shard)

    def _of_words(self, module: str, info: TensorInfo) -> TensorInfo:
        """compressed-tensors' packed integers; the shape is a tensor of its own, which is read at once."""
        scales = self._part(module, "weight_scale", FLOATS)
        self._part(module, "weight_shape", ("I64", "I32"))
        shape = self._checkpoint.read(f"{module}.weight_shape").flatten().tolist()
        rows = info.shape[0]
        if len(shape) != 2 or shape[0] != rows or len(scales.shape) != 2 or scales.shape[0] != rows or shape[1] < 1:
            raise self._odd(module, "weight_shape")
        columns, groups = shape[1], scales.shape[1]
        self._check_order(module, "weight_g_idx", columns, groups)
        if info.shape[1] * 8 == columns:
            zeros = self._held.get(f"{module}.weight_zero_point")
            if zeros is None and self._storage.zeros:
                raise self._odd(module, "weight_zero_point")
            if zeros is not None and (zeros.dtype, zeros.shape) not in (
                    ("I32", (-(-rows // 8), groups)), ("I8", (rows, groups))):
                raise self._odd(module, "weight_zero_point")
            return self._four_bits(module, rows, columns, groups, info.shard)
        if info.shape[1] * 4 == columns:
            if f"{module}.weight_zero_point" in self._held:
                raise ModelError(f"{module} of {self.directory} has weights of 8 bits with zero points, which is not "
                                 "supported: use a symmetric checkpoint")
            return self._eight_bits(module, rows, columns, groups, info.shard)
        raise self._odd(module, "weight_packed")

    def _of_autos(self, module: str, info: TensorInfo) -> TensorInfo:
        """AWQ and GPTQ."""
        method, bits = self._storage.method, self._storage.bits
        scales = self._part(module, "scales", FLOATS)
        if len(scales.shape) != 2 or not scales.shape[0]:
            raise self._odd(module, "scales")
        each = 32 // bits if bits else 0
        groups, rows = scales.shape
        columns = info.shape[0] * (each if method == "gptq" else 1)
        if method not in ("awq", "gptq") or info.shape[1] != (rows if method == "gptq" else rows // 8) or rows % each:
            raise self._odd(module, "qweight")
        if self._part(module, "qzeros", ("I32",)).shape != (groups, rows // each):
            raise self._odd(module, "qzeros")
        self._check_order(module, "g_idx", columns, groups)
        if bits == 8:
            return self._eight_bits(module, rows, columns, groups, info.shard)
        return self._four_bits(module, rows, columns, groups, info.shard)

    def _check_order(self, module: str, part: str, columns: int, groups: int) -> None:
        """Raises ModelError unless the groups of columns are adjacent ones, where a tensor says which they are."""
        order = self._held.get(f"{module}.{part}")
        if order is None:
            return
        if order.dtype not in ("I32", "I64") or order.shape != (columns,) or not groups or (
                columns % groups):
            raise self._odd(module, part)
        if not torch.equal(self._checkpoint.read(f"{module}.{part}").long(),
                           torch.arange(columns) // (columns // groups)):
            raise ModelError(f"{module} of {self.directory} has columns in the order of their activations (desc_act, "
                             "actorder), which is not supported: use a checkpoint that was quantised without, or its "
                             "model before")

    def _four_bits(self, module: str, rows: int, columns: int, groups: int, shard: str) -> TensorInfo:
        group = shared_columns(columns, groups) if groups and columns % groups == 0 else 0
        if not group:
            raise self._groups(module, columns, groups)
        return TensorInfo((rows, columns), f"INT4-{group}", shard)

    def _eight_bits(self, module: str, rows: int, columns: int, groups: int, shard: str) -> TensorInfo:
        if groups == 1:
            return TensorInfo((rows, columns), "INT8", shard)
        if not groups or columns % groups or columns // groups % 32:
            raise self._groups(module, columns, groups)
        return TensorInfo((rows, columns), "Q8_0", shard)

    def _groups(self, module: str, columns: int, groups: int) -> ModelError:
        return ModelError(f"{module} of {self.directory} has {columns} columns in {groups} groups, and groups of a "
                          "multiple of 32 columns are read: use a checkpoint of group_size 32, 64 or 128")

    def _part(self, module: str, part: str, dtypes: tuple[str, ...]) -> TensorInfo:
        info = self._held.get(f"{module}.{part}")
        if info is None or info.dtype not in dtypes:
            raise self._odd(module, part)
        return info

    def _odd(self, module: str, part: str) -> ModelError:
        info = self._held.get(f"{module}.{part}")
        found = "is not there" if info is None else f"is {info.dtype} {list(info.shape)}"
        return ModelError(f"{printed(module)}.{part} of {self.directory} {found}, which does not fit a module that is "
                          f"quantised with {self._storage.method}: {AGAIN}")

    # -- contents -----------------------------------------------------------------------------------------------------

    def _quantised(self, module: str) -> QuantWeight:
        part = self._modules[module]
        words = self._checkpoint.read(f"{module}.{part}")
        rows = self.tensors[f"{module}.weight"].shape[0]
        if part == "qweight":
            scales = self._checkpoint.read(f"{module}.scales").t()  # [out, groups]
            return self._awq(module, words, scales) if self._storage.method == "awq" else self._gptq(
                module, words, scales)
        scales = self._checkpoint.read(f"{module}.weight_scale")
        scales = scales.view(rows, -1) if scales.numel() > 1 or rows == 1 else scales.view(1, 1).expand(rows, 1)
        if words.dtype == torch.float8_e4m3fn:
            return fp8(words, scales.flatten())
        if words.dtype == torch.int8:
            return int8(words, scales)
        if self.tensors[f"{module}.weight"].dtype.startswith("INT4"):
            return int4(words.contiguous().view(torch.uint8), scales, self._zeros(module, rows))
        return int8(_less_128(words.contiguous().view(torch.uint8)), scales)

    def _zeros(self, module: str, rows: int) -> Tensor | None:
        """compressed-tensors' zeros of 4 bits, uint8 [out, groups]: packed down the rows, or plain and signed."""
        name = f"{module}.weight_zero_point"
        if name not in self._held:
            return None
        stored = self._checkpoint.read(name)
        if stored.dtype == torch.int8:
            return (stored + 8).to(torch.uint8)
        return nibbles(stored.t())[:, :rows].t().contiguous()

    def _awq(self, module: str, words: Tensor, scales: Tensor) -> QuantWeight:
        zeros = awq_columns(self._checkpoint.read(f"{module}.qzeros")).t().contiguous()
        return int4(in_pairs(awq_columns(words).t()), scales, zeros)

    def _gptq(self, module: str, words: Tensor, scales: Tensor) -> QuantWeight:
        stored, less_one = self._checkpoint.read(f"{module}.qzeros"), self._storage.less_one
        values = words.t().contiguous().view(torch.uint8)  # each word holds columns that are adjacent
        if self._storage.bits == 8:
            zeros = stored.contiguous().view(torch.uint8) + int(less_one)
            if bool((zeros != 128).any()):
                raise ValueError("8 bits with zeros of their own, which are not supported")
            return int8(_less_128(values), scales)
        zeros = (nibbles(stored) + int(less_one) & 15).t().contiguous()
        return int4(values, scales, zeros)


def _less_128(values: Tensor) -> Tensor:
    """uint8 with a zero of 128 as int8: the highest bit is turned."""
    return (values ^ 128).view(torch.int8)
