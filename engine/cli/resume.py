"""`stars generate --resume`: what an output file holds already, and bringing it in line with the input."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from stars.cli.rows import Row, key_of, prompt_of
from stars.errors import RequestError
from stars.line_file import LineFile
from stars.trace import FORMAT, VERSION
from stars.trace.json_lines import dumps, loads


class Resumption:
    """The rows of an earlier run that count: finished without an error, and of a prompt that is still asked.

    Rows are matched by the input's "id" where it has one, else by index. Nothing is written before `trim`. Raises
    RequestError for files that an earlier run of this input cannot have left, OSError where one cannot be read.
    """

    def __init__(self, rows: Sequence[Row], output: str, trace: str | None):
        self.rows = _by_key(rows)
        self.output, self.trace = output, trace
        self.lines: dict[int, int] = {}  # lines of the output to be kept, from 0: the row's index in this input
        self.moved: dict[str, str] = {}  # request ids of those rows in the trace: what they are in this input
        self.done: set[tuple[str, Any]] = set()
        self.size = 0  # of the output when it was read
        self.digest = hashlib.sha256()  # of the same bytes
        self.traced: dict[str, str] = {}  # `moved` by the ids that the trace has
        self.clean = True  # every line is kept as it stands
        for path in (output, trace):
            if path is not None and os.path.exists(path) and not os.path.isfile(path):
                raise RequestError(f"{path} is not a file that can be read again: --resume needs one")
        if os.path.exists(output):
            with open(output, "rb") as file:
                for number, line in enumerate(file):
                    self._read(number, line)
                    self.size += len(line)
                    self.digest.update(line)
        if trace is not None and os.path.exists(trace):
            with open(trace, "rb") as file:
                header = _read_header(file.readline(), trace)
            # A kill between the two files: the trace has made a move that this very output has still before it.
            ahead = header.get("moved") if header.get("rows") == self.digest.hexdigest() else None
            ahead = ahead if isinstance(ahead, dict) else {}
            self.traced = {ahead.get(old, old): new for old, new in self.moved.items()}

    def trim(self, output: LineFile, trace: LineFile | None) -> None:
        """Leaves the rows that count, each under the index it has now, and what the trace holds of them."""
        for file in (output, trace):
            if file is not None and not file.owned:
                raise RequestError(f"{file.name} is where stdout or stderr goes: --resume needs a file of its own")
        if output.size() != self.size:
            raise RequestError(f"{output.name} has changed since it was read, so another run is writing to it: wait "
                               "for it, and run again")
        rewritten = ([trace] if trace is not None and trace.size() else []) + ([] if self.clean else [output])
        for file in rewritten:
            if os.fstat(file.fd).st_nlink > 1:
                raise RequestError(f"{file.name} has another name, a hard link, and --resume would part the two: "
                                   "remove one, or work on a copy")
        if trace is not None and trace.size():
            trace.replace(self._kept_records(trace.name))
        if not self.clean:
            output.replace(self._kept_rows())

    def _read(self, number: int, line: bytes) -> None:
        whole = line.endswith(b"\n")
        record = _row_of(line)
        if record is None and (whole or not line.startswith(b"{")):
            raise RequestError(f"{self.output}, line {number + 1}, is not a row that generate wrote: --resume goes on "
                               "with such rows only, so name another file")
        if record is None or not whole or not _is_done(record):
            self.clean = False
            return
        key = key_of(record, record["index"])
        row = self.rows.get(key)
        named = f"{self.output}, line {number + 1}: {key[0]} {dumps(key[1])}"
        if row is None:
            raise RequestError(f"{named} is not in the input: --resume needs the input of the earlier run, which may "
                               "have grown")
        if prompt_of(row.given) != prompt_of(record):
            raise RequestError(f"{named} was made from another prompt than the input has now: --resume needs the input "
                               "of the earlier run, which may have grown")
        if key in self.done:
            raise RequestError(f"{named} is there a second time: remove one of the two lines")
        self.done.add(key)
        self.lines[number] = row.index
        self.moved[str(record["index"])] = str(row.index)
        self.clean = self.clean and row.index == record["index"]

    def _kept_rows(self) -> Iterator[bytes]:
        with open(self.output, "rb") as file:
            for number, line in enumerate(file):
                if number in self.lines:
                    yield _changed(line, index=self.lines[number])

    def _kept_records(self, trace: str) -> Iterator[bytes]:
        with open(trace, "rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):  # a kill cut it short
                    return
                if number == 0:
                    yield self._header(line)
                    continue
                moved = self.traced.get(self._request_id(number, line))
                if moved is not None:
                    yield _changed(line, request_id=moved)

    def _header(self, line: bytes) -> bytes:
        """The trace's first line, which says of which output and how its requests have moved: the trace is replaced
        first, and a kill may come before the output is."""
        record = {name: value for name, value in loads(line).items() if name not in ("rows", "moved")}
        moved = {old: new for old, new in self.moved.items() if old != new}
        if moved:
            record.update(rows=self.digest.hexdigest(), moved=moved)
        return (dumps(record) + "\n").encode("utf8")

    def _request_id(self, number: int, line: bytes) -> str:
        try:
            request_id: str = loads(line)["request_id"]
            return request_id
        except (ValueError, TypeError, KeyError):
            raise RequestError(f"{self.trace}, line {number + 1}, is no record of a trace: name another file") from None


def _by_key(rows: Sequence[Row]) -> dict[tuple[str, Any], Row]:
    found: dict[tuple[str, Any], Row] = {}
    for row in rows:
        if row.key in found:
            raise RequestError(f"rows {found[row.key].index} and {row.index} of the input have the same id "
                               f"{dumps(row.key[1])}: --resume needs ids that differ")
        found[row.key] = row
    return found


def _row_of(line: bytes) -> dict[str, Any] | None:
    """The row on a line; None where there is none, or half of one."""
    try:
        record = loads(line)
    except ValueError:
        return None
    ours = isinstance(record, dict) and type(record.get("index")) is int and isinstance(record.get("outputs"), list)
    return record if ours and all(isinstance(output, dict) for output in record["outputs"]) else None


def _is_done(record: dict[str, Any]) -> bool:
    return bool(record["outputs"]) and "error" not in record and all(
        output.get("finish_reason") in ("stop", "length", "refused") for output in record["outputs"])


def _read_header(line: bytes, trace: str) -> dict[str, Any]:
    """The first line of a trace, nothing where it is half of one; RequestError for any other."""
    if not line.endswith(b"\n") and dumps({"type": "trace"})[:-1].encode().startswith(line[:10]):
        return {}
    try:
        header = loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (FORMAT, VERSION):
        raise RequestError(f"{trace}, line 1, is not the beginning of a trace of version {VERSION}: --resume goes on "
                           "with such a trace only, so name another file")
    return header


def _changed(line: bytes, **fields: Any) -> bytes:
    record = loads(line)
    if all(record.get(name) == value for name, value in fields.items()):
        return line
    return (dumps({**record, **fields}) + "\n").encode("utf8")
