"""libstars with a number of threads of the test's choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from stars.bindings import libstars


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, libstars spreads operations over `count` threads, though the machine may have fewer CPUs."""
    before = libstars.num_threads()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STARS_USABLE_CPUS", str(count))  # else more threads than CPUs are not to be had
            libstars.set_num_threads(count)
        assert libstars.num_threads() == count
        yield
    finally:
        libstars.set_num_threads(before)
