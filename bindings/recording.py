"""Programs: operations recorded once over tensors at fixed addresses, replayed as one call of libstars.

Any thread may record; a recording belongs to its thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from weakref import ref

import torch
from torch import Tensor

from stars.bindings.library import check_status, last_error, loaded
from stars.bindings.params import Fields, address, tensors

_recordings: dict[int, ref[Program]] = {}
"""By the thread that records; empty nearly always, so that an operation asks no more than that. Weak: a recording that
an interrupt left here ends with its program."""


class Program:
    """A list of operations over tensors at fixed addresses, replayed as one call; made by `record`."""

    def __init__(self, executes: bool = True) -> None:
        self.executes = executes  # whether what is recorded runs as it comes
        self._handle = loaded().stars_program_create()
        if not self._handle:
            raise MemoryError(last_error())
        self._operations = 0
        # Whose memory must outlive the program: of the tensors that lie in it, one. All of them, thousands, would make
        # every collection of Python's garbage as long as a round.
        self._kept: dict[int, Tensor] = {}
        self._whole = True  # False: something ran in between that no program can hold

    def __len__(self) -> int:
        """Operations recorded; 0 where something ran in between that no program can hold, see `leave_out`."""
        return self._operations if self._whole else 0

    def run(self, times: int, done: Tensor) -> int:
        """Runs the operations up to `times` times, until all of `done` int32 are non-zero; returns how often.

        Raises RuntimeError where `leave_out` was called while they were recorded.
        """
        if not self._whole:
            raise RuntimeError("a program that left out an operation was run; call its operations one by one")
        pointer = address("run", "done", done, torch.int32, done.shape)
        ran = int(loaded().stars_program_run(self._handle, times, pointer, done.numel()))
        if ran < 0:
            check_status(-ran)
        return ran

    def add(self, op: int, params: ctypes.Structure, fields: Fields) -> None:
        """Appends an operation, whose `params` were filled from `fields`."""
        check_status(loaded().stars_program_add(self._handle, op, ctypes.byref(params)))
        self._operations += 1
        for tensor in tensors(fields):
            self._kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)

    def leave_out(self) -> None:
        """As the function of this name, for this program."""
        if not self.executes:
            self.run(1, torch.zeros(1, dtype=torch.int32))
            self.executes = True
        self._whole = False

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            loaded().stars_program_destroy(self._handle)


@contextmanager
def record(execute: bool = True) -> Iterator[Program]:
    """Inside, every operation of this thread is executed and also appended to the program that this yields.

    execute: False: not executed before the program is run, or `leave_out` is called, which executes those so far. So
    the first run of a step is shorter: the cores do not wait for the host between two operations.
    """
    thread = get_ident()
    if _recorded_program() is not None:
        raise RuntimeError("a program is being recorded already; recordings do not nest")
    program = Program(execute)
    own = ref(program)
    try:
        _recordings[thread] = own
        yield program
    finally:
        if _recordings.get(thread) is own:
            del _recordings[thread]


def run(op: int, params: ctypes.Structure, fields: Fields) -> None:
    """Runs an operation, whose `params` were filled from `fields`, and appends it to the program that this thread
    records, where it does."""
    program = _recorded_program() if _recordings else None
    if program is None or program.executes:
        check_status(loaded().stars_call(op, ctypes.byref(params)))
    if program is not None:
        program.add(op, params, fields)


def leave_out() -> None:
    """Says that this thread runs an operation that libstars does not have: what it records cannot be replayed."""
    program = _recorded_program() if _recordings else None
    if program is not None:
        program.leave_out()


def _recorded_program() -> Program | None:
    """The one that this thread records."""
    recording = _recordings.get(get_ident())
    return None if recording is None else recording()
