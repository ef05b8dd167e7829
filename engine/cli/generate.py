"""`stars generate`: prompts in, text or JSON rows out; a row is written the moment its request finishes."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stars.calibration import Calibration, PlainSample
from stars.cli import options
from stars.cli.resume import Resumption
from stars.cli.rows import Row, error_row, result_row, rows_of_arguments, rows_of_file
from stars.cli.signals import noted_interrupts
from stars.cli.terminal import one_line, terminal_width, visible
from stars.errors import RequestError, StarsError
from stars.line_file import ADVICE, LineFile, StreamLines, check_writable, identity, open_lines
from stars.outputs import RequestOutput
from stars.trace import trace_header, trace_lines
from stars.trace.json_lines import dumps

if TYPE_CHECKING:
    from tqdm import tqdm

    from stars.engine import Engine
    from stars.plan import Policy
    from stars.sampling import SamplingParams

CALIBRATION_PROMPTS, CALIBRATION_SAMPLES, CALIBRATION_QUANTILE = 8, 16, 0.9
GO_ON = "every line in it is whole, so make room and go on with --resume"


def generate(args: argparse.Namespace) -> int:
    """Runs the command; 1 if any row failed, 128 and the signal's number after Ctrl-C (130) or SIGTERM (143), with the
    rows that had finished kept."""
    params = options.sampling_params(args)
    saved = Calibration.load(args.calibration) if args.calibration is not None else None
    if saved is not None and saved.warning is not None:
        print(f"stars: warning: {saved.warning}", file=sys.stderr)
    # Refused before any file is touched; with what is measured it is made once more.
    unmeasured = options.policy(args, 0.0 if saved is None else saved)
    _check_files(args)
    rows = rows_of_file(args.input, args.chat) if args.input is not None else rows_of_arguments(args.prompts, args.chat)
    earlier = Resumption(rows, args.output, args.trace) if args.resume else None
    waiting = rows if earlier is None else [row for row in rows if row.key not in earlier.done]
    if earlier is not None:
        print(f"stars: {len(rows) - len(waiting)} of {len(rows)} rows are done in {args.output}", file=sys.stderr)
    engine: Engine | None = None
    policy: Policy | None = None
    if waiting or earlier is None:
        engine = options.build_engine(args, unmeasured)
        # On the same rows as in the earlier run, so that a seeded run goes on with the same threshold.
        policy = options.policy(args, saved if saved is not None else _measured(args, engine, rows, params))
    if args.stream:
        assert engine is not None  # the parser refuses --resume with --stream
        return _stream(args, engine, rows[0], params, policy)
    # Nothing was written up to here: what is at fault in the arguments or the models leaves older files as they are.
    with contextlib.ExitStack() as stack:
        rows_file, trace_file = _open_files(stack, args, earlier)
        sink = RowSink(rows_file) if rows_file is not None else TextSink(rows)

        def finish(row: Row, output: RequestOutput) -> None:
            assert engine is not None
            if trace_file is not None:  # first: a row that is there is done, and its trace is there, too
                trace_file.write(trace_lines(output, engine.tokenizer, params))
            sink.result(row, output)

        interrupted, finished, failed = _run(engine, waiting, params, policy, finish, sink.error, not args.no_progress)
        sink.close()
    if interrupted:
        where = f" in {args.output}" if args.output is not None else ""
        kept = len(rows) - len(waiting) + finished
        print(f"stars: interrupted: {kept} of {len(rows)} rows had finished and were kept{where}", file=sys.stderr)
        return 128 + interrupted
    if failed and len(rows) > 1:
        print(f"stars: {failed} of {len(rows)} rows failed", file=sys.stderr)
    return 1 if failed else 0


def _run(engine: Engine | None, rows: list[Row], params: SamplingParams, policy: Policy | None,
         finish: Callable[[Row, RequestOutput], None], fail: Callable[[Row, str], None],
         progress: bool) -> tuple[int, int, int]:
    """Runs all rows side by side; (the signal that interrupted it or 0, rows finished, rows failed).

    engine: None where there are no rows.
    """
    waiting = list(reversed(rows))
    running: dict[str, Row] = {}
    finished = failed = 0
    with noted_interrupts() as interrupted, _progress_bar(len(rows), progress) as bar:
        while (waiting or running) and not interrupted:
            assert engine is not None
            # Enough waiting for the engine to choose from, and no more in memory.
            while waiting and len(running) < 2 * engine.config.max_num_seqs:
                row = waiting.pop()
                try:
                    if row.error is not None:
                        raise RequestError(row.error)
                    running[engine.add_request(row.prompt, params, policy, request_id=str(row.index))] = row
                except StarsError as error:
                    fail(row, str(error))
                    failed += 1
                    bar.update()
            for output in engine.step() if running else ():
                if output.finished:
                    row = running.pop(output.request_id)
                    finish(row, output)
                    finished += 1
                    failed += any(completion.error is not None for completion in output.outputs)
                    bar.update()
        if engine is not None:
            for request_id in running:
                engine.abort(request_id)
        return interrupted[0] if waiting or running else 0, finished, failed


def _stream(args: argparse.Namespace, engine: Engine, row: Row, params: SamplingParams, policy: Policy | None) -> int:
    """Prints committed text as it comes; the command's exit code."""
    outputs = engine.stream(row.prompt, params, policy)
    written = 0
    output = None
    with contextlib.ExitStack() as stack:
        _, trace_file = _open_files(stack, args, None)
        with noted_interrupts() as interrupted:
            for output in outputs:
                text = output.outputs[0].text
                if text is None:
                    text = " ".join(map(str, output.outputs[0].token_ids))
                print(_for_terminal(text[written:]), end="", flush=True)
                written = max(written, len(text))
                if interrupted:
                    break
        print(flush=True)
        assert output is not None  # a stream ends with a finished output
        if not output.finished:
            print("stars: interrupted: the text above is what had been committed", file=sys.stderr)
            return 128 + interrupted[0]
        if trace_file is not None:
            trace_file.write(trace_lines(output, engine.tokenizer, params))
    error = output.outputs[0].error
    if error is not None:
        print(f"stars: error: {' '.join(error.split())}", file=sys.stderr)
    return int(error is not None)


class RowSink:
    """Writes one JSON row a request, each at once, so that whatever stops the run later leaves it whole."""

    def __init__(self, file: LineFile | StreamLines):
        self.file = file
        self.failure: tuple[Row, str] | None = None  # the first row that failed, and why
        self.ascii_only = file.name == "stdout" and "utf" not in (sys.stdout.encoding or "utf8").lower()

    def result(self, row: Row, output: RequestOutput) -> None:
        """A finished request."""
        record = result_row(row, output)
        self._note(row, record.get("error"))
        self._write(record)

    def error(self, row: Row, message: str) -> None:
        """A row that could not run."""
        self._note(row, message)
        self._write(error_row(row, message))

    def close(self) -> None:
        """Says why the first row failed that did: the others' reasons are in their rows."""
        if self.failure is not None:
            row, message = self.failure
            print(f"stars: error: row {row.index}: {' '.join(message.split())}", file=sys.stderr)

    def _note(self, row: Row, message: str | None) -> None:
        if message is not None and self.failure is None:
            self.failure = (row, message)

    def _write(self, record: dict[str, Any]) -> None:
        self.file.write(dumps(record, self.ascii_only) + "\n")


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
            print(f"==> {index}: {one_line(self.rows[index].label, terminal_width() - 10)}", flush=True)
        if text:
            print(_for_terminal(text), flush=True)

    def _complain(self, row: Row, message: str) -> None:
        sys.stdout.flush()
        which = f"prompt {row.index}: " if len(self.rows) > 1 else ""
        print(f"stars: error: {which}{' '.join(message.split())}", file=sys.stderr)


def _measured(args: argparse.Namespace, engine: Engine, rows: list[Row], params: SamplingParams) -> float | None:
    """The calibration for where the flags give no threshold: plain samples on the first prompts that can run."""
    if not options.needs_calibration(args):
        return None
    samples: list[list[PlainSample]] = []
    for row in rows:
        if row.error is None and len(samples) < CALIBRATION_PROMPTS:
            # A prompt that cannot run gets its own error row later.
            with contextlib.suppress(StarsError):
                samples += engine.plain_samples(row.prompt, params, CALIBRATION_SAMPLES)
    if not samples:
        return 0.0  # no prompt can run, and each row is about to say why
    calibration = Calibration.measure(samples, CALIBRATION_QUANTILE)
    prompts = f"{calibration.prompts} prompt{'s' if calibration.prompts > 1 else ''}"
    print(f"stars: reward threshold {calibration.reward_threshold:.4g}: the {CALIBRATION_QUANTILE:g} quantile of "
          f"{calibration.samples} plain samples on {prompts}; fix it with --reward-threshold or --calibration",
          file=sys.stderr)
    if calibration.warning is not None:
        print(f"stars: warning: {calibration.warning}", file=sys.stderr)
    return calibration


def _progress_bar(total: int, wanted: bool) -> tqdm:
    from tqdm import tqdm

    return tqdm(total=total, desc="Prompts", dynamic_ncols=True, disable=not (wanted and sys.stderr.isatty()))


def _open_files(stack: contextlib.ExitStack, args: argparse.Namespace,
                earlier: Resumption | None) -> tuple[LineFile | StreamLines | None, LineFile | StreamLines | None]:
    """(rows, trace), each None where it is not asked for, ready for the next line."""
    advice = GO_ON if args.output not in (None, "-") else ADVICE

    def opened(path: str | None) -> LineFile | StreamLines | None:
        if path is None:
            return None
        file = open_lines(path, advice)
        stack.callback(file.close)
        return file

    rows_file, trace_file = opened("-" if args.json else args.output), opened(args.trace)
    if earlier is not None:
        assert isinstance(rows_file, LineFile) and not isinstance(trace_file, StreamLines)  # --resume goes with files
        earlier.trim(rows_file, trace_file)
    for file in (rows_file, trace_file):
        if file is not None and earlier is None:
            file.clear()
    if trace_file is not None and (earlier is None or trace_file.size() == 0):
        trace_file.write(trace_header())
    return rows_file, trace_file


def _check_files(args: argparse.Namespace) -> None:
    """No output may stand in the place of the input or of another output, and each must be writable."""
    stdin, stdout = 0, 1
    files = (("--input", args.input, stdin), ("--output", "-" if args.json else args.output, stdout),
             ("--trace", args.trace, stdout))
    named: list[tuple[str, str, Any]] = []
    for flag, path, stream in files:
        if path is None:
            continue
        file = identity(stream if path == "-" else path)
        for other, taken, its in named:
            if (file is not None and file == its) or (path == taken == "-" and other != "--input"):
                raise RequestError(f"{flag} {path} and {other} {taken} are one file: name another one")
        if flag != "--input":
            check_writable(path)
        named.append((flag, path, file))


def _for_terminal(text: str) -> str:
    return visible(text) if sys.stdout.isatty() else text

