"""What was captured, launched one by one and compiled in a stretch of an engine's work."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

from stars.kernels.graph import Graphs


@contextmanager
def counted():
    """Counts, inside: graphs captured, parts of steps launched one by one, kernels compiled."""
    seen: Counter[str] = Counter()
    replay, capture = Graphs._replay, Graphs._capture

    def noted_replay(self, part, rare):
        def launched() -> None:
            seen["launched"] += part.launches > 1  # not a copy of rows
            part.call()

        replay(self, part._replace(call=launched), rare)

    def noted_capture(self, call):
        before = seen["launched"]
        graph = capture(self, call)
        seen["launched"] = before  # these were captured, not launched
        seen["captured"] += 1
        return graph

    Graphs._replay, Graphs._capture = noted_replay, noted_capture
    try:
        with _compiles(seen):
            yield seen
    finally:
        Graphs._replay, Graphs._capture = replay, capture


@contextmanager
def _compiles(seen: Counter[str]):
    try:
        from triton import knobs
    except ImportError:
        yield
        return
    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = lambda **_: seen.update(compiled=1)
        yield
