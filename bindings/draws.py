"""The counter-based generator of `stars.kernels.philox`, as libstars draws from it."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from stars.bindings.library import check_status, loaded

_BITS_64, _BITS_32 = 2**64 - 1, 2**32 - 1


def philox(seed: int, c0: int, c1: int, c2: int, c3: int) -> tuple[int, int, int, int]:
    """The four words of one block."""
    words = (ctypes.c_uint32 * 4)()
    check_status(loaded().stars_philox(seed & _BITS_64, c0, c1, c2, c3, words))
    return words[0], words[1], words[2], words[3]


def accept_uniform(seed: int, attempt: int, segment: int, sample: int) -> float:
    """The uniform of the accept test of one attempt."""
    return float(loaded().stars_accept_uniform(seed & _BITS_64, attempt, segment, sample))


def gumbel(seed: int, position: int, attempt: int, stream: int, vocab_size: int) -> Tensor:
    """float32 [vocab_size] token noise of one draw, as sample_step uses it."""
    noise = torch.empty(vocab_size)
    check_status(loaded().stars_gumbel(seed & _BITS_64, position, attempt, stream & _BITS_32, vocab_size,
                                       noise.data_ptr()))
    return noise
