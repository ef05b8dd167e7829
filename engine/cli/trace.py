"""`stars trace show` and `stars trace html`: two views of a trace file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stars.cli.terminal import Style, terminal_width, wants_color
from stars.errors import TraceError
from stars.trace import TraceRequest, read_trace


def show(args: argparse.Namespace) -> int:
    """Prints the trace."""
    from stars.trace_show import legend_lines, request_lines

    style = Style(wants_color(args.color, sys.stdout))
    width = terminal_width()
    requests = _read(args.file)
    for request in requests:
        print("\n".join(request_lines(request, style, width, args.attempts)), end="\n\n")
    print("\n".join(legend_lines(requests, style, width)))
    return 0


def html(args: argparse.Namespace) -> int:
    """Writes the page."""
    from stars.trace_html import page

    name = "stdin" if args.file == "-" else Path(args.file).name
    text = page(_read(args.file), name)
    target = args.output or ("-" if args.file == "-" else str(Path(args.file).with_suffix(".html")))
    if target == "-":
        sys.stdout.buffer.write(text.encode("utf8"))
        return 0
    if args.file != "-" and Path(target).resolve() == Path(args.file).resolve():
        raise TraceError(f"{target} is the trace itself: name another file with -o")
    Path(target).write_text(text, encoding="utf8")
    print(target)
    return 0


def _read(file: str) -> list[TraceRequest]:
    return read_trace(sys.stdin.buffer) if file == "-" else read_trace(file)
