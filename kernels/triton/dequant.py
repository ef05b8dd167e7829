"""Blocks of a quantised weight as numbers of the activations' type, on their way into tl.dot.

    fp8    e4m3: the bits move to their places in a 16-bit float, whose exponent is then off by a constant: one product
    int8   the bits become the fraction of a 16-bit float of a known exponent: one sum
    int4   the same, of two nibbles of a byte, and a product with the scale of their group

Loads are of the stored bytes, sixteen adjacent ones a thread, so that they are asked for ahead and asynchronously as
those of 16-bit weights are. What follows runs in registers, on values that lie where the matrix instruction wants them,
four bytes at a time: written in PTX, since what Triton makes of a cast takes up to three times the instructions (and
a unit that converts one number of sixteen lanes a cycle). No instruction needs more than sm_80, e4m3 neither.

Numbers are exact but for int4's product with a scale: both are rounded to the activations' type, 2^-9 of a weight each
in bfloat16. e4m3's two codes of NaN, 0x7f and 0xff, become 480 and -480: whoever reads weights refuses them. Scales of
whole rows are no concern of these: they are applied to float32 sums, at the end of a product.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def kernel_scheme(scheme: str) -> str:
    """What a kernel is told of a scheme: never the name of one of Triton's types.

    Where a kernel is compiled ahead of its launch, Triton writes down what it is compiled for, and reads a string that
    is such a name back as the type. "int8" then equals no string of the kernel's, which becomes another one, and is
    kept under the key of the right one.
    """
    return scheme if scheme == "none" else f"{scheme} weight"


# lop3 0xea is (a & b) | c. A prmt takes bytes by number: 0 to 3 of its first operand, 4 to 7 of its second.

_FP8 = """{{
    .reg .b32 p, q, m, z;
    mov.b32 z, 0x80008000;
    prmt.b32 p, $2, 0, 0x1404;
    prmt.b32 q, $2, 0, 0x3424;
    shr.u32 m, p, {shift};
    and.b32 m, m, {mask};
    lop3.b32 p, p, z, m, 0xea;
    shr.u32 m, q, {shift};
    and.b32 m, m, {mask};
    lop3.b32 q, q, z, m, 0xea;
    mov.b32 m, {factor};
    fma.rn.{kind} $0, p, m, z;
    fma.rn.{kind} $1, q, m, z;
}}"""
"""The sign, and exponent and fraction where the type has them; times 2^120, in float16 2^8."""

_FP8_BF16 = tl.constexpr(_FP8.format(kind="bf16x2", shift=4, mask="0x07f007f0", factor="0x7b807b80"))
_FP8_FP16 = tl.constexpr(_FP8.format(kind="f16x2", shift=1, mask="0x3f803f80", factor="0x5c005c00"))

_INT8_BF16 = tl.constexpr("""{
    .reg .b32 p, q, a, b, m, n;
    mov.b32 m, 0x43004300;
    mov.b32 n, 0xbf80bf80;
    prmt.b32 p, $2, 0, 0x4140;
    prmt.b32 q, $2, 0, 0x4342;
    lop3.b32 a, p, 0x007f007f, m, 0xea;
    lop3.b32 b, p, 0x00800080, m, 0xea;
    fma.rn.bf16x2 $0, b, n, a;
    lop3.b32 a, q, 0x007f007f, m, 0xea;
    lop3.b32 b, q, 0x00800080, m, 0xea;
    fma.rn.bf16x2 $1, b, n, a;
}""")
"""128 and the seven low bits, less 128 or, where the sign is set, 256."""

_INT8_FP16 = tl.constexpr("""{
    .reg .b32 p, q, m;
    xor.b32 p, $2, 0x80808080;
    mov.b32 m, 0x64646464;
    prmt.b32 q, p, m, 0x4342;
    prmt.b32 p, p, m, 0x4140;
    mov.b32 m, 0xe480e480;
    add.f16x2 $0, p, m;
    add.f16x2 $1, q, m;
}""")
"""1024 + 128 and the number, less 1152."""

_INT4 = """{{
    .reg .b32 p, q, s, m, n, z;
    mov.b32 m, {one};
    mov.b32 n, {known};
    mov.b32 z, {zero};
    shr.u32 s, $4, 4;
    prmt.b32 p, $4, s, 0x4440;
    prmt.b32 q, $4, s, 0x5551;
    lop3.b32 p, p, 0x000f000f, n, 0xea;
    lop3.b32 q, q, 0x000f000f, n, 0xea;
    fma.rn.{kind} $0, p, m, z;
    fma.rn.{kind} $1, q, m, z;
    prmt.b32 p, $4, s, 0x6662;
    prmt.b32 q, $4, s, 0x7773;
    lop3.b32 p, p, 0x000f000f, n, 0xea;
    lop3.b32 q, q, 0x000f000f, n, 0xea;
    fma.rn.{kind} $2, p, m, z;
    fma.rn.{kind} $3, q, m, z;
}}"""
"""128 (in float16: 1024) and the nibble, less that and the zero; the even column in the low half of each result."""

_INT4_BF16 = tl.constexpr(_INT4.format(kind="bf16x2", one="0x3f803f80", known="0x43004300", zero="0xc308c308"))
_INT4_FP16 = tl.constexpr(_INT4.format(kind="f16x2", one="0x3c003c00", known="0x64006400", zero="0xe408e408"))
_STEPS_BF16 = tl.constexpr(_INT4.format(kind="bf16x2", one="0x3f803f80", known="0x43004300", zero="0xc300c300"))
_STEPS_FP16 = tl.constexpr(_INT4.format(kind="f16x2", one="0x3c003c00", known="0x64006400", zero="0xe400e400"))
"""With zeros of their own: 0 to 15."""


@triton.jit
def load_block(weight, scales, zeros, feature, present, start, IN_FEATURES: tl.constexpr, BLOCK_INNER: tl.constexpr,
               FULL: tl.constexpr, SCHEME: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr):
    """Rows `feature` of a weight, columns from `start` on, as [features, BLOCK_INNER] of the activations' DTYPE.

    Zero where a row is not `present` (FULL: all are) and beyond IN_FEATURES. SCHEME is as `kernel_scheme` has it: of
    "none" the weight is of DTYPE itself, else it is a QuantWeight's, fp8 as uint8, without the scales of whole rows.
    zeros: None where there are none. `start` is a multiple of BLOCK_INNER; a group is a multiple of it or the other way
    round. In the interpreter numbers are float32.
    """
    if SCHEME == "none":
        return _load(weight, feature, present, start, IN_FEATURES, BLOCK_INNER, FULL)
    elif SCHEME == "int4 weight":
        stored = _load(weight, feature, present, start // 2, IN_FEATURES // 2, BLOCK_INNER // 2, FULL)
        steps = _nibbles(stored, zeros is not None, DTYPE)
        GROUPS: tl.constexpr = (BLOCK_INNER + GROUP - 1) // GROUP
        WIDTH: tl.constexpr = BLOCK_INNER // GROUPS
        steps = tl.reshape(steps, (steps.shape[0], GROUPS, WIDTH))
        if zeros is not None:
            zero = _load_groups(zeros, feature, present, start // GROUP, IN_FEATURES // GROUP, GROUPS, FULL)
            steps -= zero.to(steps.dtype)[:, :, None]
        scale = _load_groups(scales, feature, present, start // GROUP, IN_FEATURES // GROUP, GROUPS, FULL)
        return tl.reshape(steps * scale.to(steps.dtype)[:, :, None], (steps.shape[0], BLOCK_INNER))
    else:
        stored = _load(weight, feature, present, start, IN_FEATURES, BLOCK_INNER, FULL)
        return _bytes(stored, SCHEME, DTYPE)


@triton.jit
def _load(matrix, row, present, start, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """[rows, BLOCK] of a matrix with COLUMNS columns; zero where it ends."""
    column = start + tl.arange(0, BLOCK)
    at = matrix + row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    if COLUMNS % BLOCK != 0:
        return tl.load(at, mask=present[:, None] & (column < COLUMNS)[None, :], other=0)
    elif FULL:
        return tl.load(at)
    else:
        return tl.load(at, mask=present[:, None], other=0)


@triton.jit
def _load_groups(matrix, row, present, start, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """As `_load`. Numbers of two bytes come in pairs where they can: what is less than four is not loaded ahead."""
    kind: tl.constexpr = matrix.dtype.element_ty
    if kind.primitive_bitwidth == 16 and BLOCK % 2 == 0 and COLUMNS % 2 == 0:
        pairs = matrix.to(tl.pointer_type(tl.int32), bitcast=True)
        pair = _load(pairs, row, present, start // 2, COLUMNS // 2, BLOCK // 2, FULL)
        low = pair.to(tl.int16).to(kind, bitcast=True)
        high = (pair >> 16).to(tl.int16).to(kind, bitcast=True)
        numbers = tl.reshape(tl.join(low, high), (pair.shape[0], BLOCK))
    else:
        numbers = _load(matrix, row, present, start, COLUMNS, BLOCK, FULL)
    return numbers


@triton.jit
def _bytes(stored, SCHEME: tl.constexpr, DTYPE: tl.constexpr):
    """Numbers of one byte each."""
    tl.static_assert(SCHEME == "int8 weight" or SCHEME == "fp8 weight")
    if _INTERPRETED or DTYPE == tl.float32:
        if SCHEME == "int8 weight":
            numbers = stored.to(tl.float32)
        else:
            bits = stored.to(tl.int32)
            numbers = ((bits & 0x80) << 24 | (bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 2.0**120
    elif DTYPE == tl.bfloat16:
        code: tl.constexpr = _INT8_BF16 if SCHEME == "int8 weight" else _FP8_BF16
        numbers = tl.inline_asm_elementwise(code, "=r,=r,r", [stored], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        half: tl.constexpr = _INT8_FP16 if SCHEME == "int8 weight" else _FP8_FP16
        numbers = tl.inline_asm_elementwise(half, "=r,=r,r", [stored], dtype=tl.float16, is_pure=True, pack=4)
    return numbers


@triton.jit
def _nibbles(stored, ZEROS: tl.constexpr, DTYPE: tl.constexpr):
    """[rows, 2 * bytes]: the steps from zero of two columns a byte; with ZEROS, those from the least value."""
    if _INTERPRETED or DTYPE == tl.float32:
        zero: tl.constexpr = 0 if ZEROS else 8
        low = ((stored & 15).to(tl.int32) - zero).to(tl.float32)
        high = ((stored >> 4).to(tl.int32) - zero).to(tl.float32)
    else:
        wide: tl.constexpr = _STEPS_BF16 if ZEROS else _INT4_BF16
        narrow: tl.constexpr = _STEPS_FP16 if ZEROS else _INT4_FP16
        code: tl.constexpr = wide if DTYPE == tl.bfloat16 else narrow
        # A pair of neighbours at a time: taken apart for Triton, and one register again for the matrix instruction.
        pair = tl.inline_asm_elementwise(code, "=r,=r,=r,=r,r", [stored], dtype=tl.int32, is_pure=True, pack=4)
        low = pair.to(tl.int16).to(DTYPE, bitcast=True)
        high = (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.reshape(tl.join(low, high), (stored.shape[0], 2 * stored.shape[1]))
