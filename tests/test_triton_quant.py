"""Products with quantised weights on a GPU: the loads of every scheme, in the interpreter and, their PTX, by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from stars.kernels.gpu_schemes import served
from stars.kernels.linear import Weight, as_stored
from stars.kernels.quant import QuantWeight, dequantize, quantize
from stars.kernels.types import Stream
from test_gpu_schemes import blocks
from test_triton_skinny import (
    EPS,
    Bounded,
    Heads,
    forced,
    numbers,
    product_of,
    rope_case,
    rstd_of,
    space_of,
    stream_of,
)
from triton_process import INTERPRETED, run_in_interpreter

if INTERPRETED:
    import triton
    import triton.language as tl

    from stars.kernels.triton import dequant, embedding, linear, skinny, tuned
    from stars.kernels.triton.tuned import Tile

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


def stored(quant: QuantWeight) -> torch.Tensor:
    return quant.values.view(torch.uint8) if quant.scheme == "fp8" else quant.values


# -- loads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme, group, asymmetric", SCHEMES, ids=NAMES)
def test_a_block_is_that_of_the_dequantised_matrix(scheme, group, asymmetric):
    """Scales of groups are applied, those of rows are not; beyond the rows and columns that there are lies zero."""
    for columns, block in ((384, 128), (384, 256), (640, 64)):
        quant = quantize(numbers(13, columns, seed=0), scheme, group, asymmetric)
        wanted = dequantize(quant if group else quant._replace(scales=torch.ones(13)))
        for start in range(0, columns, block):
            out = torch.full((16, block), torch.nan)
            block_kernel[(1,)](stored(quant), quant.scales, quant.zeros, out, 13, start, COLUMNS=columns, ROWS=16,
                               BLOCK=block, FULL=False, SCHEME=dequant.kernel_scheme(scheme), GROUP=group)
            there = wanted[:, start : start + block]
            assert torch.equal(out[:13, : there.shape[1]], there)
            assert bool((out[13:] == 0).all()) and bool((out[:, there.shape[1] :] == 0).all())


def test_every_number_of_eight_bits():
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(2, 128)
    finite = (every & 0x7F) != 0x7F  # the two that are no numbers
    for scheme, dtype in (("fp8", torch.float8_e4m3fn), ("int8", torch.int8)):
        out = torch.empty(2, 128)
        block_kernel[(1,)](every if scheme == "fp8" else every.view(dtype), None, None, out, 2, 0, COLUMNS=128, ROWS=2,
                           BLOCK=128, FULL=True, SCHEME=dequant.kernel_scheme(scheme), GROUP=0)
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


# -- products -----------------------------------------------------------------------------------------------------


def weight_of(out_features: int, in_features: int, scheme: str, group: int, asymmetric: bool, bias: bool = False,
              **options) -> Weight:
    matrix = numbers(out_features, in_features, seed=11) * in_features**-0.5
    matrix *= torch.logspace(-1, 1, out_features)[:, None]  # so that scales differ
    given = numbers(out_features, seed=12) if bias else None
    return as_stored(quantize(matrix, scheme, group, asymmetric), given, **options)


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def tiles_of(scheme: str, group: int, features: tuple[int, int]) -> list[Tile]:
    """Both orders of the operands, with and without splits, groups wider and narrower than a block."""
    wide = 256 if group == 128 else 64
    return [Tile(16, features[0], 64, 4, 2), Tile(32, features[1], wide, 2, 2, splits=3, swap=True)]


@pytest.mark.parametrize("scheme, group, asymmetric", SCHEMES, ids=NAMES)
def test_products_of_any_number_of_rows(scheme, group, asymmetric):
    """By the tiles that are chosen where no card was measured, through the operation's own entry."""
    weight = weight_of(37, 256, scheme, group, asymmetric, bias=True)
    for rows, dtype in zip((1, 17, 33, 130), (*DTYPES, torch.bfloat16), strict=True):
        x = numbers(rows, 256, seed=1, dtype=dtype)
        for out_dtype in {dtype, torch.float32} if rows == 17 else {dtype}:
            linear.linear(x, weight, out := torch.full((rows, 37), torch.nan, dtype=out_dtype))
            product_of(x, weight).holds(out)


@pytest.mark.parametrize("scheme, group, asymmetric", SCHEMES, ids=NAMES)
def test_every_end(scheme, group, asymmetric):
    """Schemes take turns with the types of activations."""
    hidden, rows = 128, 5
    for index in (0, 1):
        dtype = DTYPES[(index + (group == 32)) % 2]
        stream, space = stream_of(rows, hidden, dtype), space_of(1 << 14)
        head = weight_of(37, hidden, scheme, group, asymmetric, bias=index == 0)
        with forced("normed", head, tiles_of(scheme, group, (32, 64))[index]):
            skinny.linear_normed(stream, head, EPS, out := torch.full((rows, 37), torch.nan), space)
        product_of(stream.scaled, head, rstd_of(stream)).holds(out)

        up = weight_of(2 * 50, hidden, scheme, group, asymmetric)
        product = product_of(stream.scaled, up, rstd_of(stream))
        (gate, value), (off_gate, off_value) = (one.chunk(2, 1) for one in product)
        with forced("swiglu", up, tiles_of(scheme, group, (32, 64))[index]):
            skinny.linear_swiglu(stream, up, EPS, out := torch.full((rows, 50), torch.nan, dtype=dtype), space)
        exact = torch.nn.functional.silu(gate) * value
        Bounded(exact, 1.1 * off_gate * value.abs() + (gate.abs() + off_gate) * off_value
                + exact.abs() * 16 * 2.0**-24).holds(out)

        down, before = weight_of(hidden, 256, scheme, group, asymmetric, bias=index == 1), stream.residual.double()
        x = numbers(rows, 256, seed=7, dtype=dtype)
        product = product_of(x, down)
        with forced("residual", down, tiles_of(scheme, group, (32, 64))[index]):
            skinny.linear_residual(x, down, torch.ones(hidden), stream, space)
        Bounded(before + product.exact, product.bound + before.abs() * 2.0**-24).holds(stream.residual)
        squares = stream.residual.double().square().view(rows, -1, 32).sum(2)
        Bounded(squares, squares * 32 * 2.0**-24).holds(stream.squares)
        assert not space.tickets.any()


@pytest.mark.parametrize("scheme, group, asymmetric", SCHEMES, ids=NAMES)
def test_queries_keys_and_values(scheme, group, asymmetric):
    """At position 0, where nothing turns."""
    rows, hidden, shape = 5, 128, Heads(2, 1, 48)
    for index, dtype in enumerate(DTYPES[:2]):
        stream, space = stream_of(rows, hidden, dtype), space_of()
        batch, cos, sin, kv = rope_case(rows, shape, dtype, True)
        batch.positions.zero_()
        cos[0], sin[0] = 1.0, 0.0
        weight = weight_of(4 * 48, hidden, scheme, group, asymmetric, bias=index == 0)
        q = torch.full((rows, 2, 48), torch.nan, dtype=dtype)
        with forced("qkv", weight, tiles_of(scheme, group, (64, 32))[index]):
            skinny.qkv_rope(stream, weight, EPS, batch, cos, sin, kv, q, None, None, space)
        exact, off = (one.view(rows, 4, 48) for one in product_of(stream.scaled, weight, rstd_of(stream)))
        Bounded(exact[:, :2], off[:, :2]).holds(q)
        written = batch.slots >= 0
        slots = batch.slots[written].long()
        Bounded(exact[written, 2:3], off[written, 2:3]).holds(kv.k_slabs[slots])
        Bounded(exact[written, 3:], off[written, 3:]).holds(kv.v_slabs[slots])


@pytest.mark.parametrize("scheme, group, asymmetric", [("fp8", 0, False), ("int4", 128, True)])
def test_default_tiles_up_to_a_scoring_pass(scheme, group, asymmetric):
    """In exactly the room that `tuned.room` reserves for them."""
    hidden = 128
    down, head = (weight_of(*shape, scheme, group, asymmetric) for shape in ((hidden, 1152), (37, hidden)))
    space = space_of(*tuned.room(130, [tuned.Product("residual", down.scheme, hidden, 1152),
                                       tuned.Product("normed", head.scheme, 37, hidden)]))
    for rows in (1, 33, 130):
        stream, x = stream_of(rows, hidden, torch.bfloat16), numbers(rows, 1152, seed=rows, dtype=torch.bfloat16)
        before, product = stream.residual.double(), product_of(x, down)
        skinny.linear_residual(x, down, torch.ones(hidden), stream, space)
        Bounded(before + product.exact, product.bound + before.abs() * 2.0**-24).holds(stream.residual)
        skinny.linear_normed(stream, head, EPS, out := torch.full((rows, 37), torch.nan), space)
        product_of(stream.scaled, head, rstd_of(stream)).holds(out)


def test_rows_of_deterministic_weights_do_not_depend_on_their_company():
    weight = weight_of(37, 128, "int4", 32, False, deterministic=True)
    x = numbers(130, 128, seed=1, dtype=torch.bfloat16)
    linear.linear(x, weight, together := torch.full((130, 37), torch.nan))
    for first, rows in ((0, 1), (129, 1), (20, 17), (60, 64)):
        linear.linear(x[first : first + rows], weight, alone := torch.full((rows, 37), torch.nan))
        assert torch.equal(alone, together[first : first + rows])


def test_what_does_not_fit_is_refused():
    weight = weight_of(37, 384, "int8", 0, False)
    with pytest.raises(ValueError, match="rows of 64 beside a weight of 384"):
        linear.linear(torch.ones(5, 64), weight, torch.empty(5, 37))
    with pytest.raises(ValueError, match="out is \\[5, 36\\], expected \\[5, 37\\]"):
        linear.linear(torch.ones(5, 384), weight, torch.empty(5, 36))


# -- matrices of files, and tables that are looked up ---------------------------------------------------------------


def test_products_with_matrices_of_files():
    """Blocks of q4_0, and groups of 64 with zeros, as AWQ and GPTQ have them."""
    for quant in (blocks("q4_0", 37, 4), quantize(numbers(37, 128, seed=3), "int4", 64, asymmetric=True)):
        [four] = served([quant], torch.bfloat16)
        weight = as_stored(four)
        for rows, dtype in ((1, torch.bfloat16), (17, torch.float16), (33, torch.float32)):
            x = numbers(rows, 128, seed=rows, dtype=dtype)
            linear.linear(x, weight, out := torch.full((rows, 37), torch.nan, dtype=dtype))
            product_of(x, weight).holds(out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])  # to bfloat16 the interpreter cuts off
def test_rows_of_an_int8_table(dtype):
    """As numbers in float32, rounded once; NaN outside the vocabulary; and as the stream of a fused pass."""
    quant = quantize(numbers(19, 1056, seed=1), "int8")
    ids = torch.tensor([0, 18, -1, 7, 19], dtype=torch.int32)
    wanted = dequantize(quant, dtype)[ids.clamp(0, 18).long()]
    wanted[2], wanted[4] = torch.nan, torch.nan
    embedding.embedding(ids, as_stored(quant), out := torch.zeros(5, 1056, dtype=dtype))
    torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)
    stream = Stream(torch.zeros_like(out), torch.zeros_like(out), torch.zeros(5, 33))
    gain = torch.linspace(0.5, 2.0, 1056)
    skinny.embedding_scaled(ids, as_stored(quant), gain, stream)
    torch.testing.assert_close(stream.residual, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(stream.scaled, (wanted.float() * gain).to(dtype), rtol=0, atol=0, equal_nan=True)
    squares = wanted.float().square().view(5, 33, 32).sum(2)
    torch.testing.assert_close(stream.squares, squares, rtol=32 * 2.0**-24, atol=0, equal_nan=True)


def test_a_table_of_another_scheme_is_refused():
    quant = quantize(numbers(19, 64, seed=2), "int4", 32)
    out = torch.zeros(1, 64)
    with pytest.raises(ValueError, match="embedding: the table is int4-32"):
        embedding.embedding(torch.zeros(1, dtype=torch.int32), as_stored(quant), out)
    with pytest.raises(ValueError, match="embedding_scaled: the table is in int4-32"):
        skinny.embedding_scaled(torch.zeros(1, dtype=torch.int32), as_stored(quant), torch.ones(64),
                                Stream(out, out, torch.zeros(1, 2)))


run_in_interpreter(globals())
