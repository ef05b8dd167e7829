"""What quantised matrices of files become on a GPU: the same numbers, or ones rounded once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stars import kernels
from stars.kernels.gpu_schemes import ROWS, numbers, served
from stars.kernels.quant import QuantWeight, check, dequantize, of_blocks, quantize
from stars.kernels.quant_blocks import LAYOUTS
from stars.model import reader
from stars.target import CUDA

BLOCKS = sorted(LAYOUTS)


def blocks(scheme: str, rows: int, count: int, seed: int = 0) -> QuantWeight:
    """Random blocks whose scales are ordinary numbers of either sign."""
    layout, draw = LAYOUTS[scheme], torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (rows, count, layout.nbytes), generator=draw).to(torch.uint8)
    at = [208] if scheme == "q6_k" else [0] if scheme in ("q8_0", "q4_0", "q5_0") else [0, 2]
    for first in at:
        scale = torch.randn(rows, count, 1, generator=draw) * 0.01
        values[:, :, first : first + 2] = scale.half().contiguous().view(torch.uint8)
    return of_blocks(values.flatten(1), scheme)


def test_q4_0_is_int4_of_the_same_numbers():
    quant = blocks("q4_0", 5, 3)
    [four] = served([quant], torch.bfloat16)
    check(four)
    assert four.name == "int4-32" and four.nbytes == quant.nbytes
    assert torch.equal(dequantize(four), dequantize(quant)) and bool((four.scales < 0).any())


@pytest.mark.parametrize("scheme", [scheme for scheme in BLOCKS if scheme != "q4_0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_blocks_are_numbers_that_are_rounded_once(scheme, dtype):
    quant = blocks(scheme, 5, 2)
    [found] = served([quant], dtype)
    assert torch.equal(found, dequantize(quant).to(dtype)) and found.dtype == dtype


def test_a_part_of_the_rows_at_a_time():
    quant = blocks("q8_0", 2 * ROWS + 3, 1)
    assert torch.equal(numbers(quant, torch.float32), dequantize(quant))


def test_parts_are_of_one_scheme_or_all_numbers():
    """As the queries, keys and values of one product; of a file in Q4_K_M those of values are in Q6_K."""
    four, other, plain = blocks("q4_0", 3, 8), blocks("q6_k", 2, 1), torch.randn(4, 256)
    assert [part.scheme for part in served([four, four], torch.bfloat16)] == ["int4", "int4"]
    for parts in ([four, other], [four, plain], [plain, other]):
        found = served(parts, torch.float16)
        assert all(isinstance(part, torch.Tensor) and part.dtype == torch.float16 for part in found)
        wide = [dequantize(part) if not isinstance(part, torch.Tensor) else part for part in parts]
        assert torch.equal(torch.cat(found), torch.cat(wide).half())


def test_what_is_looked_up_is_numbers_or_int8():
    eight, four = quantize(torch.randn(3, 64), "int8"), blocks("q4_0", 3, 2)
    assert served([eight], torch.bfloat16, looked_up=True) == [eight]
    [found] = served([four], torch.bfloat16, looked_up=True)
    assert torch.equal(found, dequantize(four).bfloat16())


def test_scales_of_wide_groups_take_four_bytes():
    """A tile of 64 columns would have two of them, which are not loaded ahead."""
    for group, kind in ((32, torch.float16), (64, torch.float32), (128, torch.float32)):
        [found] = served([quantize(torch.randn(3, 128), "int4", group)], torch.bfloat16)
        assert found.scales.dtype == kind


class Stored:
    """A source of quantised and plain matrices."""

    directory, shards, num_layers = Path("stored"), ["stored"], 0

    def __init__(self, **tensors):
        self._tensors = {f"{name}.weight": tensor for name, tensor in tensors.items()}
        self.tensors = dict.fromkeys(self._tensors)

    def read(self, name: str):
        return self._tensors[name]

    def file_of(self, name: str) -> Path:
        return self.directory


def test_what_a_model_on_a_gpu_is_read_as(monkeypatch):
    """Products of one scheme stay in it, a mixture and a table are numbers; on the CPU blocks stay as they are."""
    four, six = blocks("q4_0", 3, 8, seed=1), blocks("q6_k", 2, 1, seed=2)
    source = Stored(q=four, k=four, v=six, embed_tokens=four)
    given = []
    monkeypatch.setattr(kernels, "pack_rows", lambda parts, *others: given.append(parts))
    for target in (CUDA, None):
        if target is not None:
            monkeypatch.setattr(reader, "target_of", lambda device: CUDA)
        read = reader.Reader(source, {name: name for name in source.tensors}, "bfloat16", torch.device("cpu"), False)
        for layers in (("q", "k"), ("q", "v"), ("embed_tokens",)):
            read.matrix(*layers)
        monkeypatch.undo()
        monkeypatch.setattr(kernels, "pack_rows", lambda parts, *others: given.append(parts))
    assert [getattr(part, "scheme", "") or str(part.dtype)[6:] for parts in given for part in parts] == [
        "int4", "int4", "bfloat16", "bfloat16", "bfloat16", "q4_0", "q4_0", "q4_0", "q6_k", "q4_0"]
    assert torch.equal(given[1][1], dequantize(six).bfloat16())
    assert torch.equal(given[2][0], dequantize(four).bfloat16())
