"""`stars generate`: prompts in, text or JSON rows out; a row is written the moment its request finishes."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from stars.cli import options
from stars.cli.rows import Row, error_row, result_row, rows_of_arguments, rows_of_file
from stars.cli.terminal import one_line, terminal_width, visible
from stars.errors import RequestError, StarsError
from stars.outputs import RequestOutput
from stars.trace import dumps, trace_header, trace_lines

CALIBRATION_PROMPTS, CALIBRATION_SAMPLES, CALIBRATION_QUANTILE = 8, 16, 0.9


def generate(args: argparse.Namespace) -> int:
    """Runs the command; 1 if any row failed, 130 after Ctrl-C, with the rows that had finished kept."""
    params = options.sampling_params(args)
    options.policy(args, reward_threshold=0.0)  # refused before any file is touched; a measured threshold comes later
    _check_files(args)
    rows = rows_of_file(args.input, args.chat) if args.input else rows_of_arguments(args.prompts, args.chat)
    with contextlib.ExitStack() as stack:
        rows_file = _open(stack, "-" if args.json else args.output)
        trace_file = _open(stack, args.trace)
        engine = options.build_engine(args)
        policy = options.policy(args, _measured_threshold(args, engine, rows, params))
        if trace_file is not None:
            trace_file.write(trace_header())
        sink = RowSink(rows_file) if rows_file is not None else TextSink(rows)

        def trace(output: RequestOutput) -> None:
            if trace_file is not None:
                trace_file.write(trace_lines(output, engine.tokenizer, params))
                trace_file.flush()

        def finish(row: Row, output: RequestOutput) -> None:
            sink.result(row, output)
            trace(output)

        if args.stream:
            interrupted, failed = _stream(engine, rows[0], params, policy, trace)
            finished = 0
        else:
            interrupted, finished, failed = _run(engine, rows, params, policy, finish, sink.error, not args.no_progress)
            sink.close()
    if interrupted:
        if not args.stream:
            where = f" in {args.output}" if args.output else ""
            print(f"stars: interrupted: {finished} of {len(rows)} rows had finished and were kept{where}",
                  file=sys.stderr)
        return 130
    if failed and len(rows) > 1:
        print(f"stars: {failed} of {len(rows)} rows failed", file=sys.stderr)
    return 1 if failed else 0


def _run(engine, rows: list[Row], params, policy, finish, fail, progress: bool) -> tuple[bool, int, int]:
    """Runs all rows side by side; (whether it was interrupted, rows finished, rows failed)."""
    waiting = iter(rows)
    running: dict[str, Row] = {}
    room = 2 * engine.config.max_num_seqs  # enough waiting for the engine to choose from, and no more in memory
    finished = failed = 0
    with _interrupts() as interrupted, _progress_bar(len(rows), progress) as bar:
        while not interrupted:
            while len(running) < room and (row := next(waiting, None)) is not None:
                try:
                    if row.error is not None:
                        raise RequestError(row.error)
                    running[engine.add_request(row.prompt, params, policy, request_id=str(row.index))] = row
                except StarsError as error:
                    fail(row, str(error))
                    failed += 1
                    bar.update()
            if not running:
                break
            for output in engine.step():
                if output.finished:
                    row = running.pop(output.request_id)
                    finish(row, output)
                    finished += 1
                    failed += any(completion.error is not None for completion in output.outputs)
                    bar.update()
        for request_id in running:
            engine.abort(request_id)
        return bool(running), finished, failed


def _stream(engine, row: Row, params, policy, trace) -> tuple[bool, int]:
    """Prints committed text as it comes; (whether it was interrupted, 1 if it failed)."""
    written = 0
    output = None
    with _interrupts() as interrupted:
        for output in engine.stream(row.prompt, params, policy):
            text = output.outputs[0].text
            if text is None:
                text = "".join(f"{token} " for token in output.outputs[0].token_ids)
            print(_for_terminal(text[written:]), end="", flush=True)
            written = max(written, len(text))
            if interrupted:
                break
    print(flush=True)
    if not output.finished:
        print("stars: interrupted: the text above is what had been committed", file=sys.stderr)
        return True, 0
    trace(output)
    error = output.outputs[0].error
    if error is not None:
        print(f"stars: error: {error}", file=sys.stderr)
    return False, int(error is not None)


class RowSink:
    """Writes one JSON row a request, each at once, so that whatever stops the run later leaves it whole."""

    def __init__(self, file: IO[str]):
        self.file = file
        self.ascii_only = "utf" not in (file.encoding or "utf8").lower()

    def result(self, row: Row, output: RequestOutput) -> None:
        """A finished request."""
        self._write(result_row(row, output))

    def error(self, row: Row, message: str) -> None:
        """A row that could not run."""
        self._write(error_row(row, message))

    def close(self) -> None:
        """Nothing is held back."""

    def _write(self, record: dict[str, Any]) -> None:
        self.file.write(dumps(record, ascii_only=self.ascii_only) + "\n")
        self.file.flush()


class TextSink:
    """Prints texts in the order of the prompts, each with a heading where there are several."""

    def __init__(self, rows: list[Row]):
        self.rows = rows
        self.ready: dict[int, str] = {}
        self.next = 0

    def result(self, row: Row, output: RequestOutput) -> None:
        """A finished request."""
        texts = []
        for completion in output.outputs:
            text = completion.text
            if text is None:
                text = " ".join(map(str, completion.token_ids))
            if len(output.outputs) > 1:
                reward = "" if completion.reward is None else f", reward {completion.reward:.3f}"
                text = f"--- completion {completion.index}{reward}\n{text}"
            texts.append(text)
            if completion.error is not None:
                self._complain(row, completion.error)
        self._put(row, "\n".join(texts))

    def error(self, row: Row, message: str) -> None:
        """A row that could not run."""
        self._complain(row, message)
        self._put(row, "")

    def close(self) -> None:
        """Prints what waited for rows that never finished."""
        for index in sorted(self.ready):
            self._print(index)

    def _put(self, row: Row, text: str) -> None:
        self.ready[row.index] = text
        while self.next in self.ready:
            self._print(self.next)
            self.next += 1

    def _print(self, index: int) -> None:
        text = self.ready.pop(index)
        if len(self.rows) > 1:
            print(f"==> {index}: {one_line(self.rows[index].label, terminal_width() - 10)}")
        if text:
            print(_for_terminal(text), flush=True)

    def _complain(self, row: Row, message: str) -> None:
        sys.stdout.flush()
        which = f"prompt {row.index}: " if len(self.rows) > 1 else ""
        print(f"stars: error: {which}{' '.join(message.split())}", file=sys.stderr)


def _measured_threshold(args: argparse.Namespace, engine, rows: list[Row], params) -> float | None:
    """The threshold for where the flags give none: a quantile of plain samples on the first prompts that can run."""
    if not options.needs_threshold(args):
        return None
    import numpy as np

    rewards: list[float] = []
    measured = 0
    for row in rows:
        if row.error is None and measured < CALIBRATION_PROMPTS:
            # A prompt that cannot run gets its own error row later.
            with contextlib.suppress(StarsError):
                rewards += engine.sample_rewards(row.prompt, params, CALIBRATION_SAMPLES)
                measured += 1
    if not rewards:
        return 0.0  # no prompt can run, and each row is about to say why
    threshold = float(np.quantile(rewards, CALIBRATION_QUANTILE))
    print(f"stars: reward threshold {threshold:.4g}: the {CALIBRATION_QUANTILE:g} quantile of {len(rewards)} plain "
          f"samples on {measured} prompt{'s' if measured > 1 else ''}; fix it with --reward-threshold", file=sys.stderr)
    return threshold


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C makes non-empty, so that the step under way can end; a second Ctrl-C raises at once."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # started in the background of a script: leave it so
        yield seen
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _progress_bar(total: int, wanted: bool):
    from tqdm import tqdm

    return tqdm(total=total, desc="Prompts", dynamic_ncols=True, disable=not (wanted and sys.stderr.isatty()))


def _open(stack: contextlib.ExitStack, path: str | None) -> IO[str] | None:
    if path is None:
        return None
    return sys.stdout if path == "-" else stack.enter_context(open(path, "w", encoding="utf8"))


def _check_files(args: argparse.Namespace) -> None:
    """An output must not overwrite the input, nor the trace the output."""
    files = {"--input": args.input, "--output": args.output, "--trace": args.trace}
    named = [(flag, path) for flag, path in files.items() if path not in (None, "-")]
    for index, (flag, path) in enumerate(named):
        for other, taken in named[:index]:
            if Path(path).resolve() == Path(taken).resolve() and (Path(path).is_file() or not Path(path).exists()):
                raise RequestError(f"{flag} and {other} are both {path}: name another file")


def _for_terminal(text: str) -> str:
    return visible(text) if sys.stdout.isatty() else text

