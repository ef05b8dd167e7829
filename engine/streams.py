"""A second stream of the device, for work that does not depend on what is launched meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import torch

from stars.target import Target


class SideStream:
    """Runs two pieces of work side by side where the device has streams, one after the other elsewhere."""

    def __init__(self, target: Target):
        self._stream = torch.cuda.Stream() if target.own_memory else None

    def side_by_side(self, first: Callable[[], None], second: Callable[[], None]) -> None:
        """Calls both. What `second` launches waits for what was launched before `first`, not for what `first` launches;
        what is launched afterwards waits for both. They must write to nothing that the other one touches.

        Memory that torch hands out on the second stream is used there, or after this, so that it is never given to
        somebody else while it is read.
        """
        if self._stream is None:
            first()
            second()
            return
        main = torch.cuda.current_stream()
        self._stream.wait_stream(main)
        first()
        try:
            with torch.cuda.stream(self._stream):
                second()
        finally:
            main.wait_stream(self._stream)
