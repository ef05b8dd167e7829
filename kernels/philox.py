"""The counter-based random numbers of the sampler: Philox4x32-10 and what is made of its words.

The law (every implementation, on every device, gives these words bit for bit):

- The generator is Philox4x32 with 10 rounds (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
  2011; the Random123 library holds the known-answer vectors).
- The key is the 64-bit seed, low word first.
- Counter word 0 is the vocabulary block b; the four words that come out belong to tokens 4b .. 4b + 3.
  Counter word 1 is the position in the segment, from 0.
  Counter word 2 is attempt | kind << 24; attempts count from 1; kind 0 is token noise, kind 1 the accept uniform, kind
  4 the noise of a token that is drawn after the kept ones of an attempt.
  Counter word 3 is segment index | sample index << 20.
- A word w gives the uniform u = ((w >> 8) + 0.5) / 2^24, which is never 0 and never 1.
- The accept uniform of an attempt is word 0 at counter words c0 = 0, c1 = 0 and kind 1.
- Token noise is standard Gumbel, g = -log(-log u), with -log u formed from k = w >> 8 as
  -log((k + 0.5) / 2^24) for k < 2^23 and -log1p(-(2^24 - k - 0.5) / 2^24) otherwise. In float32 the plain form rounds
  the largest u to 1 and the noise to infinity once in 2^24 words.

No request id, lane, batch position or width enters, so every schedule draws the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

KIND_TOKEN_NOISE = 0
KIND_ACCEPT = 1
KIND_RULE = 2  # further random numbers of a rule, for each attempt
KIND_GROUP = 3  # of a rule, for a group and round; attempt 0: of an exhaustion, for each attempt of a hypothesis
KIND_DRAW = 4  # noise of the token that is drawn after the kept ones of an attempt
MAX_ATTEMPT = (1 << 24) - 1
MAX_SEGMENT = (1 << 20) - 1
MAX_SAMPLE = (1 << 12) - 1

_ROUNDS = 10
_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: Sequence[ArrayLike], key: Sequence[ArrayLike]) -> Words:
    """Ten rounds of Philox4x32.

    Args:
        counter: four uint32 arrays (or ints) c0..c3 that broadcast together.
        key: two ints or uint32 arrays, low word first.

    Returns:
        Four uint32 arrays of the broadcast shape.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    key_0, key_1 = (np.asarray(word, dtype=np.uint64) for word in key)
    for index in range(_ROUNDS):
        round_key_0 = (key_0 + np.uint64(index * _WEYL_0)) & _LOW
        round_key_1 = (key_1 + np.uint64(index * _WEYL_1)) & _LOW
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0, c2 = (product_1 >> _HALF) ^ c1 ^ round_key_0, (product_0 >> _HALF) ^ c3 ^ round_key_1
        c1, c3 = product_1 & _LOW, product_0 & _LOW
    return c0.astype(np.uint32), c1.astype(np.uint32), c2.astype(np.uint32), c3.astype(np.uint32)


def uniform(words: ArrayLike) -> np.ndarray:
    """float64 uniforms ((w >> 8) + 0.5) / 2^24 of uint32 words, exact; between 2^-25 and 1 - 2^-25."""
    drawn: np.ndarray = ((np.asarray(words, dtype=np.uint32) >> np.uint32(8)).astype(np.float64) + 0.5) * 2.0**-24
    return drawn


def gumbel(words: ArrayLike) -> np.ndarray:
    """float64 standard Gumbel noise -log(-log u) of uint32 words."""
    numerator = (np.asarray(words, dtype=np.uint32) >> np.uint32(8)).astype(np.float64)
    upper = numerator >= 2.0**23
    near_one = -np.log1p(-(2.0**24 - numerator - 0.5) * 2.0**-24, where=upper, out=np.zeros_like(numerator))
    away = -np.log((numerator + 0.5) * 2.0**-24, where=~upper, out=np.zeros_like(numerator))
    noise: np.ndarray = -np.log(np.where(upper, near_one, away))
    return noise


def split_seed(seed: int) -> tuple[int, int]:
    """The key words (low, high) of a seed; negative seeds are read as the two's complement of 64 bits."""
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed {seed} does not fit in 64 bits; choose one between 0 and 2^64 - 1")
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF


def pack_attempt(attempt: int, kind: int) -> int:
    """Counter word 2: attempt | kind << 24."""
    if not 1 <= attempt <= MAX_ATTEMPT and not (attempt == 0 and kind == KIND_GROUP):
        raise ValueError(f"attempt {attempt} is outside 1..{MAX_ATTEMPT}; lower max_attempts")
    if kind not in (KIND_TOKEN_NOISE, KIND_ACCEPT, KIND_RULE, KIND_GROUP, KIND_DRAW):
        raise ValueError(f"kind {kind} of random number is unknown; use one of the KIND_ constants")
    return attempt | kind << 24


def pack_stream(segment: int, sample: int) -> int:
    """Counter word 3: segment | sample << 20, unsigned (an int32 tensor holds its bits).

    Raises:
        ValueError: segment not in 0..2^20 - 1 or sample not in 0..2^12 - 1.
    """
    if not 0 <= segment <= MAX_SEGMENT:
        raise ValueError(f"segment index {segment} is outside 0..{MAX_SEGMENT}; use longer segments or fewer tokens")
    if not 0 <= sample <= MAX_SAMPLE:
        raise ValueError(f"sample index {sample} is outside 0..{MAX_SAMPLE}; ask for at most {MAX_SAMPLE + 1} samples")
    return segment | sample << 20


def signed_seed(seed: int) -> int:
    """The int64 with the bits of a seed, for a tensor."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


def signed_stream(stream: int) -> int:
    """The int32 with the bits of counter word 3, for a tensor."""
    return stream - (1 << 32) if stream >> 31 else stream


def accept_uniform(seed: int, attempt: int, segment: int, sample: int) -> float:
    """The uniform of the accept test of one attempt: a float64, the same bits in every implementation."""
    from stars.bindings import libstars

    split_seed(seed), pack_attempt(attempt, KIND_ACCEPT), pack_stream(segment, sample)  # raise what is out of range
    if libstars.available():  # of one number, a hundredth of what numpy takes
        return libstars.accept_uniform(seed, attempt, segment, sample)
    return accept_uniform_reference(seed, attempt, segment, sample)


def accept_uniform_reference(seed: int, attempt: int, segment: int, sample: int) -> float:
    """As `accept_uniform`, in numpy."""
    counter = (0, 0, pack_attempt(attempt, KIND_ACCEPT), pack_stream(segment, sample))
    return float(uniform(philox4x32(counter, split_seed(seed))[0]))


def rule_uniforms(seed: int, kind: int, attempt: int, segment: int, sample: int, count: int) -> tuple[float, ...]:
    """`count` float64 uniforms for a rule. kind: KIND_RULE, or KIND_GROUP, where `attempt` is the round, from 1."""
    if not count:
        return ()
    blocks = np.arange((count + 3) // 4, dtype=np.uint32)
    words = philox4x32((blocks, 0, pack_attempt(attempt, kind), pack_stream(segment, sample)), split_seed(seed))
    return tuple(uniform(np.stack(words, axis=1).reshape(-1)[:count]).tolist())


def exhaust_uniform(seed: int, attempt: int, segment: int, sample: int) -> float:
    """The float64 uniform by which an exhaustion draws, of one attempt (from 1): word attempt - 1 of those of a group's
    round 0, where rounds of rules count from 1."""
    split_seed(seed), pack_attempt(attempt, KIND_ACCEPT)  # raise what is out of range
    block, word = divmod(attempt - 1, 4)
    counter = (block, 0, pack_attempt(0, KIND_GROUP), pack_stream(segment, sample))
    return float(uniform(philox4x32(counter, split_seed(seed))[word]))


def token_words(seed: int, position: int, attempt: int, stream: int, vocab_size: int,
                kind: int = KIND_TOKEN_NOISE) -> np.ndarray:
    """uint32 [vocab_size] words of the token noise of one draw; `stream` is counter word 3, signed or not."""
    blocks = np.arange((vocab_size + 3) // 4, dtype=np.uint32)  # [blocks]
    counter = (blocks, position, pack_attempt(attempt, kind), stream & 0xFFFFFFFF)
    return np.stack(philox4x32(counter, split_seed(seed)), axis=1).reshape(-1)[:vocab_size]


def gumbel_noise(seed: int, position: int, attempt: int, segment: int, sample: int, vocab_size: int) -> np.ndarray:
    """float32 [vocab_size] token noise of one draw, computed in float64 and rounded once."""
    words = token_words(seed, position, attempt, pack_stream(segment, sample), vocab_size)
    return gumbel(words).astype(np.float32)
