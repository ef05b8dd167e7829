"""ctypes over libstars (stars.h)."""

from __future__ import annotations


class Program:
    """A recorded list of operations."""


def available() -> bool:
    """Whether libstars was built and can be loaded."""
    return False
