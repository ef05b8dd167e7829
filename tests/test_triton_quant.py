"""Products with quantised weights on a GPU: the loads of every scheme, in the interpreter and, their PTX, by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from stars.kernels.quant import QuantWeight, dequantize, quantize
from triton_process import INTERPRETED, run_in_interpreter

if INTERPRETED:
    import triton
    import triton.language as tl

    from stars.kernels.triton import dequant

    @triton.jit
    def block_kernel(weight, scales, zeros, out, rows, start, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
                     BLOCK: tl.constexpr, FULL: tl.constexpr, SCHEME: tl.constexpr, GROUP: tl.constexpr):
        row = tl.arange(0, ROWS)
        block = dequant.load_block(weight, scales, zeros, row, row < rows, start, COLUMNS, BLOCK, FULL, SCHEME, GROUP,
                                   tl.bfloat16)
        tl.store(out + row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], block)


SCHEMES = [("fp8", 0, False), ("int8", 0, False), ("int4", 32, False), ("int4", 128, False), ("int4", 32, True),
           ("int4", 128, True)]
NAMES = [f"{scheme}-{group}{' zeros' if zeros else ''}" for scheme, group, zeros in SCHEMES]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(quant: QuantWeight) -> torch.Tensor:
    return quant.values.view(torch.uint8) if quant.scheme == "fp8" else quant.values


# -- loads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme, group, asymmetric", SCHEMES, ids=NAMES)
def test_a_block_is_that_of_the_dequantised_matrix(scheme, group, asymmetric):
    """Scales of groups are applied, those of rows are not; beyond the rows and columns that there are lies zero."""
    for columns, block in ((384, 128), (384, 256), (640, 64)):
        quant = quantize(numbers(13, columns), scheme, group, asymmetric)
        wanted = dequantize(quant if group else quant._replace(scales=torch.ones(13)))
        for start in range(0, columns, block):
            out = torch.full((16, block), torch.nan)
            block_kernel[(1,)](stored(quant), quant.scales, quant.zeros, out, 13, start, COLUMNS=columns, ROWS=16,
                               BLOCK=block, FULL=False, SCHEME=scheme, GROUP=group)
            there = wanted[:, start : start + block]
            assert torch.equal(out[:13, : there.shape[1]], there)
            assert bool((out[13:] == 0).all()) and bool((out[:, there.shape[1] :] == 0).all())


def test_every_number_of_eight_bits():
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(2, 128)
    finite = (every & 0x7F) != 0x7F  # the two that are no numbers
    for scheme, dtype in (("fp8", torch.float8_e4m3fn), ("int8", torch.int8)):
        out = torch.empty(2, 128)
        block_kernel[(1,)](every if scheme == "fp8" else every.view(dtype), None, None, out, 2, 0, COLUMNS=128, ROWS=2,
                           BLOCK=128, FULL=True, SCHEME=scheme, GROUP=0)
        assert torch.equal(out[finite], every.view(dtype).float()[finite])


# -- the PTX of the loads, which the interpreter does not run -----------------------------------------------------


def as_number(bits: np.ndarray, kind: str) -> np.ndarray:
    """float64 of 16-bit patterns."""
    dtype = torch.bfloat16 if kind == "bf16x2" else torch.float16
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(dtype).double().numpy()


def as_bits(number: np.ndarray, kind: str) -> np.ndarray:
    dtype = torch.bfloat16 if kind == "bf16x2" else torch.float16
    rounded = torch.from_numpy(number).to(dtype)
    assert np.array_equal(rounded.double().numpy(), number), "a result would have been rounded"
    return rounded.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)


def halves(function, kind: str, *words: np.ndarray) -> np.ndarray:
    """`function` of float64 applied to both halves of 32-bit registers."""
    low, high = (as_bits(function(*(as_number(word >> shift & 0xFFFF, kind) for word in words)), kind)
                 for shift in (0, 16))
    return low | high << 16


def prmt(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    both = [a >> 8 * i & 0xFF for i in range(4)] + [b >> 8 * i & 0xFF for i in range(4)]
    chosen = [selector >> 4 * i & 0xF for i in range(4)]
    assert max(chosen) < 8  # no sign is repeated
    return sum(both[which] << 8 * i for i, which in enumerate(chosen))


def run_ptx(code: str, outputs: int, word: np.ndarray) -> list[np.ndarray]:
    """The output registers of a block of inline PTX with one 32-bit input, for every entry of `word`."""
    registers = {f"${outputs}": word}
    for line in code.strip().strip("{}").split(";"):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        op, _, rest = line.partition(" ")
        target, *names = [name.strip() for name in rest.split(",")]
        values = [registers[name] if not re.match(r"\d", name) else np.full_like(word, int(name, 0)) for name in names]
        name, *kinds = op.split(".")
        if name == "prmt":
            result = prmt(values[0], values[1], int(names[2], 0))
        elif name == "lop3":
            assert names[3] == "0xea"
            result = values[0] & values[1] | values[2]
        elif name == "fma":
            result = halves(lambda a, b, c: a * b + c, kinds[-1], *values)
        elif name == "add":
            result = halves(lambda a, b: a + b, kinds[-1], *values)
        else:
            result = {"mov": lambda a: a, "shr": lambda a, b: a >> b, "and": lambda a, b: a & b,
                      "xor": lambda a, b: a ^ b}[name](*values)
        registers[target] = result.astype(np.uint32)
    return [registers[f"${index}"] for index in range(outputs)]


def unpacked(registers: list[np.ndarray], kind: str) -> torch.Tensor:
    """Numbers in the order of the elements: [entries, 2 * registers]."""
    columns = [as_number(register >> shift & 0xFFFF, kind) for register in registers for shift in (0, 16)]
    return torch.from_numpy(np.stack(columns, 1))


def words() -> tuple[np.ndarray, torch.Tensor]:
    """Four bytes a register, every byte at every place."""
    bytes_ = torch.stack([torch.arange(256).roll(shift) for shift in (0, 1, 77, 128)], 1).to(torch.uint8)
    return bytes_.numpy().view(np.uint32)[:, 0].copy(), bytes_


def kinds() -> list[tuple[str, str]]:
    return [("bf16x2", "BF16"), ("f16x2", "FP16")]


def test_the_ptx_of_eight_bits():
    word, bytes_ = words()
    for kind, name in kinds():
        ints = unpacked(run_ptx(getattr(dequant, f"_INT8_{name}").value, 2, word), kind)
        assert torch.equal(ints, bytes_.view(torch.int8).double())
        floats = unpacked(run_ptx(getattr(dequant, f"_FP8_{name}").value, 2, word), kind)
        wanted = bytes_.view(torch.float8_e4m3fn).double()
        number = wanted.isfinite()
        assert number.sum() == 4 * 254 and torch.equal(floats[number], wanted[number])
        assert torch.equal(floats[number].signbit(), wanted[number].signbit())


def test_the_ptx_of_four_bits():
    word, bytes_ = words()
    steps = torch.stack((bytes_ & 15, bytes_ >> 4), 2).view(256, 8).double()  # columns in their order
    for kind, name in kinds():
        assert torch.equal(unpacked(run_ptx(getattr(dequant, f"_STEPS_{name}").value, 4, word), kind), steps)
        assert torch.equal(unpacked(run_ptx(getattr(dequant, f"_INT4_{name}").value, 4, word), kind), steps - 8)


run_in_interpreter(globals())
