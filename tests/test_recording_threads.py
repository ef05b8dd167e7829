"""Recordings, and comparisons with the references, belong to their thread."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stars import kernels
from stars.bindings import libstars, recording
from stars.kernels.dispatch import column, references_only
from stars.kernels.graph import Graphs, Part

pytestmark = pytest.mark.skipif(not libstars.available(), reason="libstars was not built")


def in_threads(*functions: Callable[[], None]) -> None:
    """Runs all at the same time; the first error, if any."""
    errors = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


class Machine:
    """A step that multiplies x [1, 4] by `factor`, in `operations` operations."""

    def __init__(self, factor: float, operations: int):
        self.x, self.y = torch.ones(1, 4), torch.empty(1, 4)
        self.weight, self.identity = kernels.pack(torch.eye(4) * factor), kernels.pack(torch.eye(4))
        self.operations = operations
        self.done = torch.zeros(1, dtype=torch.int32)

    def step(self, meet: Callable[[], None] = lambda: None) -> None:
        kernels.linear(self.x, self.weight, self.y)
        for _ in range(self.operations - 2):
            meet()
            kernels.linear(self.y, self.identity, self.y.clone())
        kernels.take_rows(self.y, torch.zeros(1, dtype=torch.int32), self.x)


def test_two_threads_record_and_replay_different_programs_at_the_same_time():
    meeting = threading.Barrier(2, timeout=60)
    machines, programs = (Machine(2.0, 6), Machine(3.0, 6)), [None, None]

    def run(which: int) -> None:
        machine = machines[which]
        with libstars.record() as program:
            machine.step(meeting.wait)  # after every operation of either comes one of the other
        programs[which] = program
        meeting.wait()
        assert program.run(3, machine.done) == 3

    in_threads(lambda: run(0), lambda: run(1))
    assert [len(program) for program in programs] == [6, 6]
    assert machines[0].x.tolist() == [[2.0**4] * 4] and machines[1].x.tolist() == [[3.0**4] * 4]
    # Programs may be replayed by any thread.
    assert programs[0].run(1, machines[0].done) == 1
    assert machines[0].x.tolist() == [[2.0**5] * 4] and machines[1].x.tolist() == [[3.0**4] * 4]


def test_what_is_only_recorded_runs_with_its_program():
    """Or as soon as something comes that no program can hold: what that reads has been written."""
    machine = Machine(2.0, 3)
    with libstars.record(execute=False) as program:
        machine.step()
    assert len(program) == 3 and machine.x.tolist() == [[1.0] * 4]
    assert program.run(2, machine.done) == 2 and machine.x.tolist() == [[4.0] * 4]
    with libstars.record(execute=False) as program:
        machine.step()
        assert machine.x.tolist() == [[4.0] * 4]
        libstars.leave_out()
        assert machine.x.tolist() == [[8.0] * 4]
        machine.step()
        assert machine.x.tolist() == [[16.0] * 4]
    assert len(program) == 0


def test_programs_do_not_lengthen_collections_of_garbage():
    """A server has hundreds, of hundreds of operations each: one tensor is kept of all that lie in the same memory."""
    machine = Machine(2.0, 3)
    with libstars.record() as program:
        for _ in range(100):
            kernels.linear(machine.x[:1], machine.weight, machine.y[0].view(1, 4))
    assert len(program) == 100 and len(program._kept) == 3


def test_an_operation_of_another_thread_is_not_recorded():
    machine, other = Machine(2.0, 3), Machine(5.0, 3)
    with libstars.record() as program:
        in_threads(other.step)
        machine.step()
        in_threads(other.step)
    assert len(program) == 3
    program.run(1, machine.done)
    assert machine.x.tolist() == [[4.0] * 4] and other.x.tolist() == [[25.0] * 4]


def test_graphs_of_two_threads_do_not_mix():
    """Twenty shapes each, first run and replay, side by side."""
    def run(factor: float, results: list[float]) -> None:
        graphs = Graphs()
        for shape in range(20):
            machine = Machine(factor, 3 + shape % 4)
            for _ in range(2):
                assert graphs.run([Part(shape, machine.step)], machine.done, 3) == 3
            results.append(machine.x[0, 0].item())

    results: tuple[list[float], list[float]] = ([], [])
    in_threads(lambda: run(2.0, results[0]), lambda: run(3.0, results[1]))
    assert results == ([2.0**6] * 20, [3.0**6] * 20)


def test_recordings_do_not_nest_in_a_thread_but_run_beside_each_other():
    def record() -> None:
        with libstars.record(), pytest.raises(RuntimeError, match="do not nest"), libstars.record():
            pass

    with libstars.record():
        in_threads(record, record)
        with pytest.raises(RuntimeError, match="do not nest"), libstars.record():
            pass
    assert not recording._recordings


TRACED = {"recording.py", "operations.py", "params.py", "library.py", "contextlib.py", "graph.py"}


def interrupt_at(count: int, function: Callable[[], None]) -> bool:
    """Calls it, with a KeyboardInterrupt at the `count`-th bytecode of what records; whether that came."""
    left = count

    def trace(frame, event, argument):
        nonlocal left
        frame.f_trace_opcodes = Path(frame.f_code.co_filename).name in TRACED
        if event == "opcode":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return left <= 0


def test_an_interrupt_anywhere_leaves_no_recording_behind():
    machine = Machine(2.0, 3)
    graphs = Graphs()

    def run() -> None:
        graphs.run([Part("shape", machine.step)], machine.done)

    count = 0
    while True:
        count += 1
        graphs = Graphs()
        if not interrupt_at(count, run):
            break
        # Operations outside are nobody's, a new recording is whole, and what was kept is too.
        machine.step()
        with libstars.record() as program:
            machine.step()
        assert len(program) == 3, count
        machine.x.fill_(1.0)
        graphs.run([Part("shape", machine.step)], machine.done)
        assert machine.x.tolist() == [[2.0] * 4], count
    assert count > 300  # all of it was seen


def test_references_only_is_for_one_thread():
    tensor, seen = torch.ones(1), {}
    inside, outside = threading.Event(), threading.Event()

    def compare() -> None:
        with references_only():
            inside.set()
            assert outside.wait(60)
            with references_only():
                seen["nested"] = column(tensor)
            seen["within"] = column(tensor)
        seen["after"] = column(tensor)

    def other() -> None:
        assert inside.wait(60)
        seen["other"] = column(tensor)
        outside.set()

    in_threads(compare, other)
    assert seen == {"nested": "reference", "within": "reference", "after": "cpu", "other": "cpu"}
