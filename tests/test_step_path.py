"""How many rooms one round walks through: files of the package that run in one `Engine.step`, and changes between them.

Counted on the shipped pair, on the CPU, in a step in which nothing is new: one request under STARS with four lanes, all
shapes recorded before, the segment accepted. Every call of one of the package's functions is noted in order (a resumed
generator is a call too); a change is a call in another file than the last one noted. kernels/ counts as one file, and
so does bindings/: how an operation or a recorded pass runs inside is not the loop's path. Before rules, groups and
targets had rooms of their own, this came to 20 files and 129 changes.

Run as a program it prints the path.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest

import stars
from stars.cli.options import shipped_pair

MAX_FILES = 26
"""15 was aimed at. It was 20 when the queue, the proposal, scores, the judgement and the commit of a round, and what a
reward model scores, stood in three files instead of eight. Users and their shares, units, metrics, and what is shown of
a text have files of their own since."""
CHANGES_BEFORE = 160
INLINED = {"<listcomp>", "<dictcomp>", "<setcomp>"}  # no calls of their own from Python 3.12 on
ENGINE = Path(stars.__file__).resolve().parent
FOLDED = {Path(stars.kernels.__file__).resolve().parent: "kernels/",
          Path(stars.bindings.__file__).resolve().parent: "bindings/"}


class Call(NamedTuple):
    room: str  # a file of engine/, or the folder kernels/ or bindings/
    function: str


def room_of(filename: str) -> str | None:
    """The room of a source file; None outside the package."""
    path = Path(filename).resolve()
    for folder in path.parents:
        if folder in FOLDED:
            return FOLDED[folder]
        if folder == ENGINE:
            return f"engine/{path.relative_to(folder).as_posix()}"
    return None


def path_of_a_step() -> list[Call]:
    """The package's calls of the third step of a request, in order."""
    engine = stars.Engine(*shipped_pair())
    params = stars.SamplingParams(temperature=0.8, top_k=40, max_tokens=128, seed=1)
    engine.add_request("This film was", params, stars.STARS(segment_size=16, reward_threshold=-100.0, width=4))
    before = [engine.step() for _ in range(2)][-1]
    called: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_name not in INLINED:
            called.append((frame.f_code.co_filename, frame.f_code.co_name))

    outer = sys.getprofile()
    sys.setprofile(note)
    try:
        after = engine.step()
    finally:
        sys.setprofile(outer)
    [[was], [now]] = before[0].outputs, after[0].outputs
    assert len(now.token_ids) == len(was.token_ids) + 16 and now.segments[-1].accepted and not after[0].finished
    rooms = {filename: room_of(filename) for filename in {filename for filename, _ in called}}
    return [Call(room, function) for filename, function in called if (room := rooms[filename]) is not None]


def changes_of(calls: list[Call]) -> list[tuple[str, str]]:
    """(from, to) of every change of room, the first one's `from` being empty."""
    rooms = ["", *(call.room for call in calls)]
    return [(old, new) for old, new in zip(rooms, rooms[1:], strict=False) if old != new]


def test_the_path_of_a_step_is_short():
    calls = path_of_a_step()
    files, changes = {call.room for call in calls}, changes_of(calls)
    assert {"engine/engine.py", "engine/round.py", "kernels/"} <= files  # the profile saw the step
    assert len(files) <= MAX_FILES, f"{len(files)} files run in one step: {', '.join(sorted(files))}"
    assert len(changes) < CHANGES_BEFORE, f"{len(changes)} changes of file in one step: {Counter(changes)}"


def test_changes_are_counted_from_call_to_call():
    calls = [Call(room, "f") for room in ("a", "a", "b", "a", "c", "c", "b")]
    assert changes_of(calls) == [("", "a"), ("a", "b"), ("b", "a"), ("a", "c"), ("c", "b")]


@pytest.mark.parametrize("filename, room", [
    (stars.__file__, "engine/__init__.py"),
    (str(Path(stars.__file__).parent / "model" / "decoder.py"), "engine/model/decoder.py"),
    (stars.kernels.__file__, "kernels/"),
    (str(Path(stars.kernels.__file__).parent / "triton" / "linear.py"), "kernels/"),
    (stars.bindings.__file__, "bindings/"),
    (__file__, None),
])
def test_rooms(filename, room):
    assert room_of(filename) == room


if __name__ == "__main__":
    path = path_of_a_step()
    ways = changes_of(path)
    print(f"{len({call.room for call in path})} files, {len(ways)} changes\n")
    for room, count in Counter(call.room for call in path).most_common():
        names = Counter(call.function for call in path if call.room == room)
        print(f"{count:4} calls  {room}: " + ", ".join(f"{name} {times}" for name, times in names.items()))
    print("\nchanges, the most frequent first")
    for (old, new), count in Counter(ways).most_common():
        print(f"{count:4}  {old or 'the caller'} -> {new}")
    print("\nthe path")
    last = ""
    for call in path:
        if call.room != last:
            print(f"{call.room}")
        print(f"    {call.function}")
        last = call.room
