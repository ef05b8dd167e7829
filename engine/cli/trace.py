"""`stars trace show` and `stars trace html`: two views of a trace file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stars.cli.terminal import Style, terminal_width, wants_color
from stars.errors import TraceError
from stars.line_file import check_writable, open_lines, same_file
from stars.trace import TraceRequest, read_trace


def show(args: argparse.Namespace) -> int:
    """Prints the trace."""
    from stars.trace.show import legend_lines, request_lines

    style = Style(wants_color(args.color, sys.stdout))
    width = terminal_width()
    requests = _read(args.file)
    for request in requests:
        print("\n".join(request_lines(request, style, width, args.attempts)), end="\n\n")
    print("\n".join(legend_lines(requests, style, width)))
    return 0


def html(args: argparse.Namespace) -> int:
    """Writes the page."""
    from stars.trace.page import page

    target = args.output
    if target is None:
        target = "-" if args.file == "-" else str(Path(args.file).with_suffix(".html"))
    if same_file(0 if args.file == "-" else args.file, 1 if target == "-" else target):
        raise TraceError(f"{target} is the trace itself: name another file with -o")
    check_writable(target)
    text = page(_read(args.file), "stdin" if args.file == "-" else Path(args.file).name)
    with open_lines(target) as file:
        file.clear()
        file.write(text)
    if target != "-":
        print(target)
    return 0


def _read(file: str) -> list[TraceRequest]:
    if file != "-":
        return read_trace(file)
    if sys.stdin is None:
        raise TraceError("stdin is closed: give it a trace to read, or name a file")
    return read_trace(sys.stdin.buffer)
