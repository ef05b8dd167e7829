"""The counter-based random numbers of `stars.kernels.philox` on the device: words bit for bit, noise within 4e-6.

A tile is [blocks, 4]: one Philox block a row, its four words the noise of four adjacent tokens. Noise costs two
logarithms; a bound on it, which is all that most tokens need, costs one (`log2_short`).
"""

from __future__ import annotations

import triton
import triton.language as tl

FAST = tl.constexpr(not triton.knobs.runtime.interpret)
"""Whether logarithms and exponentials are the card's own instructions; the interpreter has none."""

_LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Four uint32 words of Philox4x32-10; seed int64, counter words int32 of one shape or scalars.

    tl.philox forms the two halves of a product by two multiplications, which the assembler does not make one of.
    """
    k0 = seed.to(tl.uint32)
    k1 = (seed.to(tl.uint64) >> 32).to(tl.uint32)
    c0 = c0.to(tl.uint32, bitcast=True)
    c1 = c1.to(tl.uint32, bitcast=True)
    c2 = c2.to(tl.uint32, bitcast=True)
    c3 = c3.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        product_0 = c0.to(tl.uint64) * 0xD2511F53
        product_1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product_1.to(tl.uint32)
        c3 = product_0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def token_words(seed, position, attempt, stream, block):
    """uint32 [blocks, 4] words of the token noise of blocks `block` int32 [blocks]; the other four are scalars.

    Counter word 2 is the attempt alone, since the kind of token noise is 0.
    """
    w0, w1, w2, w3 = philox(seed, block, position, attempt, stream)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [blocks, 2, 2]: w0, w1, w2, w3 in memory order
    return tl.reshape(words, (block.shape[0], 4))


@triton.jit
def _log2(x):
    """Of normal positive float32, and 0. lg2.approx errs by 2^-22, from 2 on and below 1/2 relatively."""
    if FAST:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True,
                                         pack=1)
    else:
        return tl.log2(x)


@triton.jit
def _log(x):
    """Natural logarithm of normal positive float32, as good as `_log2`."""
    if FAST:
        return _LN_2 * _log2(x)
    else:
        return tl.log(x)


@triton.jit
def exp(x):
    """exp(x) of float32 x <= 0, what is denormal as 0: tl.exp is three instructions longer to keep it."""
    if FAST:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * _LOG2_E], dtype=tl.float32,
                                         is_pure=True, pack=1)
    else:
        return tl.exp(x)


@triton.jit
def gumbel(words):
    """Standard Gumbel noise -log(-log u), u = ((w >> 8) + 0.5) / 2^24, of uint32 words.

    Near u = 1 the inner logarithm is a series in v = 1 - u, which is exact in float32 where u is not. For v <= 1/16
    five terms err by v^5 / 6 = 2e-7 of the sum. Below, -log u >= 0.0645, so an error of 2^-22 * ln 2 in the logarithm
    and one of 2^-25 in u are 3e-6 of it; the outer logarithm adds 2e-7. In all the noise errs by less than 4e-6.
    """
    numerator = (words >> 8).to(tl.int32)
    v = ((1 << 24) - numerator).to(tl.float32) - 0.5
    v = v * 5.9604644775390625e-08
    u = (numerator.to(tl.float32) + 0.5) * 5.9604644775390625e-08
    series = v * (1.0 + v * (0.5 + v * (0.3333333333333333 + v * (0.25 + v * 0.2))))
    return -_log(tl.where(v <= 0.0625, series, -_log(u)))


@triton.jit
def log2_short(words):
    """log2 of v <= 1 - u, short of it by less than 2^-23, of uint32 words; -inf where v is 0.

    The noise -log(-log u) is at most -log(1 - u), and so at most -log2(v) * ln 2. For small 1 - u, which is what wins
    among many tokens, the two are nearly equal.
    """
    float_of_word = ((words >> 9) | 0x3F800000).to(tl.float32, bitcast=True)  # 1 + (word >> 9) / 2^23
    return _log2(1.99999988079071044921875 - float_of_word)  # the largest float below 2: exact
