"""The command line: `stars generate`, `calibrate`, `serve`, `inspect`, `trace`, `demo`, `methods`, `convert-head`,
`bench serve` and `info`.

Arguments are checked before anything heavy is imported. Every error of the package ends in one sentence on stderr and
exit code 1, a value that a flag cannot have among them. Arguments that cannot be read or do not go together give 2,
Ctrl-C 130, SIGTERM 143, a reader that went away 141.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO, TypeVar

from stars.cli import options
from stars.cli.serve_options import add_serving
from stars.cli.signals import Terminated, termination
from stars.errors import StarsError
from stars.line_file import FULL
from stars.policies import POLICIES
from stars.version import __version__

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

Parser = TypeVar("Parser", bound=argparse.ArgumentParser)
EXIT_FAILED, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE, EXIT_TERMINATED = 1, 130, 141, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; argparse exits by itself on wrong arguments."""
    _prepare_streams()
    try:
        try:
            return _run(argv)
        except SystemExit:  # argparse, after --help or over wrong arguments
            sys.stdout.flush()
            raise
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except OSError as error:
        return _fail(_in_words(error))
    finally:
        for stream in (sys.stdout, sys.stderr):
            _settle(stream)


def _run(argv: Sequence[str] | None) -> int:
    """The command's exit code; what it failed by has been said on stderr."""
    args = build_parser().parse_args(argv)
    with warnings.catch_warnings(), termination():
        warnings.showwarning = _show_warning
        try:
            code: int = args.run(args)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            raise
        except StarsError as error:
            return _fail(str(error))
        except OSError as error:
            return _fail(_in_words(error))
        except KeyboardInterrupt as error:
            print("stars: interrupted", file=sys.stderr)
            return EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED


def _prepare_streams() -> None:
    """Streams that a terminal of another encoding does not stop, and that are there even where they were closed."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf8")
    if sys.stdout is None:  # what is written to it fails, as it does for every program
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf8")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _settle(stream: TextIO) -> None:
    """Lets what `stream` cannot get rid of go nowhere, so that the interpreter's own flush at exit is silent."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


class _Parser(argparse.ArgumentParser):
    """One that does not pass over a reader that went away, or a disk that is full."""

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        (file or sys.stderr).write(message or "")


def build_parser() -> argparse.ArgumentParser:
    """All commands with their flags; `args.run(args)` is the command's body."""
    parser = _Parser(
        prog="stars", description="Decodes with a language model while a reward model watches, segment by segment.",
        epilog="Exit codes: 0 all went well, 1 something failed and was said on stderr (a value out of range "
               "too), 2 arguments that cannot be read or do not go together, 130 Ctrl-C, 143 SIGTERM, 141 the "
               "reader of stdout or stderr went away.")
    parser.add_argument("--version", action="version", version=f"stars {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _generate(_command(commands, "generate", "complete prompts, from arguments or a JSONL file"))
    _calibrate(_command(commands, "calibrate", "measure a reward threshold on prompts"))
    _serve(_command(commands, "serve", "answer OpenAI's API over HTTP, with a page to try it"))
    _inspect(_command(commands, "inspect", "say what a model directory or GGUF file holds, without loading it"))
    _trace(_command(commands, "trace", "look at a trace that generate wrote"))
    _demo(_command(commands, "demo", "plain sampling beside STARS on the shipped pair of models, or on a chat model"))
    _methods(_command(commands, "methods", "the policies, what each asks of the loop, and their parameters"))
    _convert_head(_command(commands, "convert-head", "write the pickled actor of MARA's code as a safetensors file"))
    _bench(_command(commands, "bench", "measure a server"))
    _info(_command(commands, "info", "versions, the C++ library and the CPU"))
    return parser


def _command(commands: argparse._SubParsersAction[Parser], name: str, summary: str) -> Parser:
    return commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")


def _generate(parser: argparse.ArgumentParser) -> None:
    def run(args: argparse.Namespace) -> int:
        options.check_prompts(parser, args)
        options.check_policy(parser, args)
        _check_output(parser, args)
        from stars.cli.generate import generate

        return generate(args)

    parser.usage = "stars generate [--model DIR] [--reward DIR] [options] (PROMPT ... | --input FILE)"
    options.add_prompts(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="FILE", help="write one JSON row per prompt to FILE as it finishes, - for "
                        "stdout; what FILE held is replaced, once the models and the threshold are there")
    output.add_argument("--resume", action="store_true", help="go on with --output (and --trace) after a kill or an "
                        "interrupt: finished rows stay and are skipped, by \"id\" where the input has one, else by "
                        "index; rows that ended in an error are run again. Give the same flags as before")
    output.add_argument("--json", action="store_true", help="the same rows on stdout")
    output.add_argument("--stream", action="store_true", help="print committed text as it comes (one prompt)")
    output.add_argument("--trace", metavar="FILE", help="write every attempt to FILE, for `stars trace`, just as rows "
                        "are written")
    output.add_argument("--no-progress", action="store_true", help="no progress bar")
    options.add_models(parser)
    options.add_sampling(parser, with_n=True)
    options.add_policy(parser)
    options.add_engine(parser)
    parser.set_defaults(run=run)


def _check_output(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.json and args.output is not None:
        parser.error("--json writes to stdout: give it or --output")
    if args.resume and (args.output in (None, "-") or args.trace == "-"):
        parser.error("--resume goes on with the rows of a file: give it as --output FILE, and no trace to stdout")
    if args.stream and (args.json or args.output is not None or args.input is not None or len(args.prompts) != 1):
        parser.error("--stream prints the text of one prompt argument: leave out --input, --output and --json")
    if args.stream and (args.n or 1) != 1:
        parser.error("--stream prints one completion: leave out --n")


def _calibrate(parser: argparse.ArgumentParser) -> None:
    def run(args: argparse.Namespace) -> int:
        from stars.cli.calibrate import calibrate

        options.check_prompts(parser, args)
        options.check_models(parser, args, needs_reward=True)
        return calibrate(args)

    parser.usage = "stars calibrate [--model DIR --reward DIR] [options] (PROMPT ... | --input FILE)"
    options.add_prompts(parser)
    parser.add_argument("--quantile", type=float, default=0.9, help="of the rewards of plain samples (%(default)s)")
    parser.add_argument("--num-samples", type=int, default=16, metavar="N",
                        help="plain samples of each prompt (%(default)s)")
    parser.add_argument("--segment-size", type=int, default=16, metavar="B", help="prefixes of B, 2B, 4B, … tokens are "
                        "compared with finished texts (%(default)s)")
    parser.add_argument("--save", metavar="FILE", help="write it as JSON, for --calibration FILE of `stars generate` "
                        "and `stars serve`")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    options.add_models(parser)
    options.add_sampling(parser, with_n=False)
    options.add_engine(parser)
    parser.set_defaults(run=run)


def _serve(parser: argparse.ArgumentParser) -> None:
    def run(args: argparse.Namespace) -> int:
        options.check_policy(parser, args, alone=False)
        from stars.cli.serve import serve

        return serve(args)

    parser.usage = "stars serve [--model DIR] [--reward DIR] [options]"
    add_serving(parser)
    options.add_models(parser)
    options.add_policy(parser)
    options.add_engine(parser)
    parser.set_defaults(run=run)


def _inspect(parser: argparse.ArgumentParser) -> None:
    def run(args: argparse.Namespace) -> int:
        from stars.cli.inspect import inspect

        return inspect(args)

    parser.add_argument("directory", metavar="DIR", help="a model in Hugging Face format, a GGUF file, or a name of "
                        "the Hugging Face hub")
    options.add_reward_head(parser, "looked at as a reward model with this head: ")
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

    parser.add_argument("--chat", metavar="TEXT", help="a message to SmolLM2-135M-Instruct, which `make chat` fetches, "
                        "in place of film reviews by the shipped pair")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens of each review (64), or of the reply (128)")
    parser.add_argument("--quantile", type=float, default=0.9,
                        help="of plain samples' rewards, taken as threshold (%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of all random numbers (%(default)s)")
    parser.add_argument("--trace", metavar="FILE", help="write every attempt to FILE, for `stars trace`")
    parser.add_argument("--no-color", action="store_true", help="marks instead of colours")
    parser.set_defaults(run=run)


def _methods(parser: argparse.ArgumentParser) -> None:
    def run(args: argparse.Namespace) -> int:
        from stars.cli.methods import methods

        return methods(args)

    parser.add_argument("name", nargs="?", choices=tuple(POLICIES), metavar="NAME",
                        help="all that there is to say of one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def _convert_head(parser: argparse.ArgumentParser) -> None:
    def run(args: argparse.Namespace) -> int:
        from stars.cli.convert_head import convert_head

        return convert_head(args)

    parser.add_argument("source", metavar="IN", help="the actor's state dict, as torch.save wrote it: tensors are read "
                        "from it, and nothing else")
    parser.add_argument("target", metavar="OUT", help="the safetensors file to be written, for Engine(heads=…)")
    parser.set_defaults(run=run)


def _info(parser: argparse.ArgumentParser) -> None:
    def run(args: argparse.Namespace) -> int:
        from stars.cli.info import info

        return info(args)

    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def _bench(parser: argparse.ArgumentParser) -> None:
    from stars.cli.bench import add_serve, check_serve

    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = _command(commands, "serve", "send load to an endpoint of OpenAI's API and say how it was answered")

    def run(args: argparse.Namespace) -> int:
        from stars.cli.bench import serve

        check_serve(command, args)
        return serve(args)

    add_serve(command)
    command.set_defaults(run=run)


def _fail(message: str) -> int:
    with contextlib.suppress(OSError):  # said below, where it is not what failed
        sys.stdout.flush()
    print("stars: error: " + " ".join(message.split()), file=sys.stderr)
    return EXIT_FAILED


def _in_words(error: OSError) -> str:
    if error.filename is None and error.errno in (*FULL, errno.EBADF):  # only what print wrote has no name
        return f"stdout: {error.strerror}"
    return f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int,
                  file: TextIO | None = None, line: str | None = None) -> None:
    print("stars: warning: " + " ".join(str(message).split()), file=sys.stderr)
