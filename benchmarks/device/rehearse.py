"""Every kernel that a stage's parts launch, compiled side by side before any of them is timed."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from record import Record, Settings, seconds_left
from timing import rehearsal


def compile_first(record: Record, settings: Settings, measures: Sequence[Callable[[Record], object]]) -> None:
    """Calls each of `measures` once with a record that nobody reads, launching nothing that is not compiled.

    Before anything of this process has touched the GPU. On the CPU there is nothing to compile.
    """
    if settings.dry:
        return
    from compile_pool import Pool  # which needs Triton

    begin = time.perf_counter()
    pool = Pool()
    try:
        import torch

        pool.arch = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
        # Nothing is timed here, so nothing of it is to be read in a log.
        with (tempfile.TemporaryDirectory() as folder, pool.recording(), rehearsal(), open(os.devnull, "w") as nowhere,
              contextlib.redirect_stdout(nowhere)):
            for measure in measures:
                try:
                    measure(Record(Path(folder) / "rehearsal.json", "rehearsal"))
                except Exception:  # its turn comes again, and then it counts
                    traceback.print_exc()
        pool.wait(0.5 * seconds_left())
        record.fact(f"{record.content['stage']}: kernels compiled ahead",
                    {"kernels": len(pool.tasks), "seconds": round(time.perf_counter() - begin, 2)})
    finally:
        pool.close()
