"""The command line: `stars generate`, `calibrate`, `inspect`, `trace`, `demo` and `info`.

Arguments are checked before anything heavy is imported. Every error of the package ends in one sentence on stderr and
exit code 1; wrong arguments give 2, Ctrl-C 130, a reader that went away 141.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from stars import __version__
from stars.cli import options
from stars.errors import StarsError

EXIT_FAILED, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; argparse exits by itself on wrong arguments."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal of another encoding must not stop a run over one character
            stream.reconfigure(errors="replace")
    args = build_parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = args.run(args)
            sys.stdout.flush()
            return code
        except StarsError as error:
            return _fail(str(error))
        except BrokenPipeError:
            # What is still buffered has no reader either: let the interpreter's own flush at exit go nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_BROKEN_PIPE
        except OSError as error:
            return _fail(f"{error.filename}: {error.strerror}" if error.filename is not None else str(error))
        except KeyboardInterrupt:
            print("stars: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """All commands with their flags; `args.run(args)` is the command's body."""
    parser = argparse.ArgumentParser(
        prog="stars", description="Decodes with a language model while a reward model watches, segment by segment.")
    parser.add_argument("--version", action="version", version=f"stars {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _generate(_command(commands, "generate", "complete prompts, from arguments or a JSONL file"))
    _calibrate(_command(commands, "calibrate", "measure a reward threshold on prompts"))
    _inspect(_command(commands, "inspect", "say what a model directory holds, without loading it"))
    _trace(_command(commands, "trace", "look at a trace that generate wrote"))
    _demo(_command(commands, "demo", "plain sampling beside STARS on the shipped pair of models"))
    _info(_command(commands, "info", "versions, the C++ library and the CPU"))
    return parser


def _command(commands, name: str, summary: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")


def _generate(parser: argparse.ArgumentParser) -> None:
    def run(args: argparse.Namespace) -> int:
        options.check_policy(parser, args)
        _check_streaming(parser, args)
        from stars.cli.generate import generate

        return generate(args)

    parser.usage = "stars generate [--model DIR] [--reward DIR] [options] (PROMPT ... | --input FILE)"
    options.add_prompts(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="FILE", help="write one JSON row per prompt to FILE, - for stdout")
    output.add_argument("--json", action="store_true", help="the same rows on stdout")
    output.add_argument("--stream", action="store_true", help="print committed text as it comes (one prompt)")
    output.add_argument("--trace", metavar="FILE", help="write every attempt to FILE, for `stars trace`")
    output.add_argument("--no-progress", action="store_true", help="no progress bar")
    options.add_models(parser)
    options.add_sampling(parser, with_n=True)
    options.add_policy(parser)
    options.add_engine(parser)
    parser.set_defaults(run=run)


def _check_streaming(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.json and args.output:
        parser.error("--json writes to stdout: give it or --output")
    if args.stream and (args.json or args.output or args.input or len(args.prompts) != 1):
        parser.error("--stream prints the text of one prompt argument: leave out --input, --output and --json")
    if args.stream and (args.n or 1) != 1:
        parser.error("--stream prints one completion: leave out --n")


def _calibrate(parser: argparse.ArgumentParser) -> None:
    def run(args: argparse.Namespace) -> int:
        from stars.cli.calibrate import calibrate

        options.check_models(parser, args, needs_reward=True)
        return calibrate(args)

    parser.usage = "stars calibrate [--model DIR --reward DIR] [options] (PROMPT ... | --input FILE)"
    options.add_prompts(parser)
    parser.add_argument("--quantile", type=float, default=0.9, help="of the rewards of plain samples (%(default)s)")
    parser.add_argument("--num-samples", type=int, default=16, metavar="N",
                        help="plain samples of each prompt (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    options.add_models(parser)
    options.add_sampling(parser, with_n=False)
    options.add_engine(parser)
    parser.set_defaults(run=run)


def _inspect(parser: argparse.ArgumentParser) -> None:
    def run(args: argparse.Namespace) -> int:
        from stars.cli.inspect import inspect

        return inspect(args)

    parser.add_argument("directory", metavar="DIR", help="a model in Hugging Face format")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def _trace(parser: argparse.ArgumentParser) -> None:
    def show(args: argparse.Namespace) -> int:
        from stars.cli.trace import show

        return show(args)

    def html(args: argparse.Namespace) -> int:
        from stars.cli.trace import html

        return html(args)

    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = _command(commands, "show", "print a trace: accepted text plain, rejected text struck through")
    command.add_argument("file", metavar="FILE", help="a trace, - for stdin")
    command.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="terminal colours (auto)")
    command.add_argument("--attempts", action="store_true", help="every attempt, with its whole text")
    command.set_defaults(run=show)
    command = _command(commands, "html", "write a trace as one self-contained page")
    command.add_argument("file", metavar="FILE", help="a trace, - for stdin")
    command.add_argument("-o", "--output", metavar="FILE", help="the page (FILE with .html), - for stdout")
    command.set_defaults(run=html)


def _demo(parser: argparse.ArgumentParser) -> None:
    def run(args: argparse.Namespace) -> int:
        from stars.demo import demo

        return demo(args)

    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens of each review (%(default)s)")
    parser.add_argument("--quantile", type=float, default=0.9,
                        help="of plain samples' rewards, taken as threshold (%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of all random numbers (%(default)s)")
    parser.add_argument("--trace", metavar="FILE", help="write every attempt to FILE, for `stars trace`")
    parser.add_argument("--no-color", action="store_true", help="marks instead of colours")
    parser.set_defaults(run=run)


def _info(parser: argparse.ArgumentParser) -> None:
    def run(args: argparse.Namespace) -> int:
        from stars.cli.info import info

        return info(args)

    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def _fail(message: str) -> int:
    sys.stdout.flush()
    print("stars: error: " + " ".join(message.split()), file=sys.stderr)
    return EXIT_FAILED


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print("stars: warning: " + " ".join(str(message).split()), file=sys.stderr)
