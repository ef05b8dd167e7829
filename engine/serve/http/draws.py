"""Random numbers for names and seeds. The system's own generator lets go of the interpreter's lock, which costs an
event loop milliseconds where an engine computes beside it."""

from __future__ import annotations

import os
import random

SEED_BITS = 53
"""Of a seed that is drawn here: as many as a number in JavaScript holds."""
_DRAWN = random.Random()
os.register_at_fork(after_in_child=_DRAWN.seed)  # else two processes would draw the same


def name() -> str:
    """32 digits that nothing else is called by."""
    return f"{_DRAWN.getrandbits(128):032x}"


def seed() -> int:
    """A seed of a request that has none."""
    return _DRAWN.getrandbits(SEED_BITS)
