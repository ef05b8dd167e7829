"""`stars bench serve`: sends load to an endpoint of OpenAI's API and says how it was answered."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from stars.arguments import shown
from stars.errors import RequestError
from stars.line_file import check_writable

if TYPE_CHECKING:
    from stars.bench.load import Run
    from stars.bench.workload import Entry

ENDPOINTS = {"/v1/completions": "openai", "/v1/chat/completions": "openai-chat"}
"""What may be measured, and vLLM's name of such a backend."""
GOALS = ("ttft", "tpot", "e2el")
LATENCIES = {"ttft": "time to first segment", "itl": "between segments", "tpot": "per token after the first",
             "e2el": "whole answer"}
BUSY, LAG_MS, LATE = 0.8, 20.0, 0.01  # share of a core, 99th percentile, share of requests: the client was too slow


def add_serve(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    where = parser.add_argument_group("where")
    where.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="(%(default)s)")
    where.add_argument("--endpoint", choices=tuple(ENDPOINTS), default="/v1/completions", help="(%(default)s)")
    where.add_argument("--model", metavar="NAME", help="(the first of /v1/models)")
    where.add_argument("--api-key-env", metavar="VAR", help="the environment variable that holds the key")
    where.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds of one request (%(default)s)")
    when = parser.add_argument_group("when")
    when.add_argument("--num-prompts", type=int, metavar="N", help="requests (100; of a trace all)")
    when.add_argument("--request-rate", type=float, metavar="R", help="requests a second, as a Poisson process; inf "
                      "sends all at once (inf)")
    when.add_argument("--burstiness", type=float, metavar="K", help="gaps have the gamma distribution of this shape: "
                      "below 1 they come in bursts, above 1 more evenly (1)")
    when.add_argument("--max-concurrency", type=int, metavar="N", help="requests under way at once; with a rate of inf "
                      "so many clients, each of which asks again once it was answered")
    when.add_argument("--trace", metavar="FILE", help='JSON lines of {"timestamp": seconds, "prompt" or "messages" or '
                      '"prompt_tokens": number, "max_tokens": number}, sent when they were recorded')
    when.add_argument("--num-warmups", type=int, default=0, metavar="N", help="requests before those that are measured "
                      "(%(default)s)")
    what = parser.add_argument_group("what")
    what.add_argument("--input", metavar="FILE", help='prompts: JSON lines of texts or of objects with "prompt", '
                      '"messages" or "prompt_token_ids" (.jsonl), or a text with one a line; .gz of either')
    what.add_argument("--random-input-len", type=int, metavar="N", help="made-up prompts of N words, each about a "
                      "token, where no file is given (64)")
    what.add_argument("--random-output-len", type=int, metavar="N", help="the same as --max-tokens, by vLLM's name")
    what.add_argument("--max-tokens", type=int, metavar="N", help="of each answer (what the server takes)")
    what.add_argument("--temperature", type=float, metavar="T", help="(what the server takes)")
    what.add_argument("--ignore-eos", action="store_true", help="answers of max-tokens, of servers that know it")
    what.add_argument("--seed", type=int, default=0, metavar="S", help="of arrivals and made-up prompts (%(default)s)")
    what.add_argument("--request-seeds", action="store_true", help="requests carry seeds: S, S + 1, …")
    what.add_argument("--extra-body", type=_object, default={}, metavar="JSON", help="further fields of every request, "
                      """such as '{"stars": {"policy": "plain"}}'""")
    told = parser.add_argument_group("what is said")
    told.add_argument("--goodput", nargs="+", default=[], type=_goal, metavar="NAME:MS", help="requests a second that "
                      f"meet all of these: {', '.join(GOALS)}, in milliseconds")
    told.add_argument("--save", metavar="FILE", help="the figures as JSON, with vLLM's keys, - for stdout")
    told.add_argument("--save-detailed", action="store_true", help="and each request's times and text")
    told.add_argument("--plot", metavar="FILE", help="latencies over time and by percentile, as SVG")
    told.add_argument("--no-progress", action="store_true", help="no progress bar")


def check_serve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program over flags that do not go together."""
    given = {"--trace": args.trace, "--input": args.input, "--random-input-len": args.random_input_len}
    sources = [flag for flag, value in given.items() if value is not None]
    if len(sources) > 1:
        parser.error(f"{' and '.join(sources)} both give the prompts: leave out one")
    if args.trace is not None and (args.request_rate is not None or args.burstiness is not None):
        parser.error("--trace says when requests are sent: leave out --request-rate and --burstiness")
    if args.max_tokens is not None and args.random_output_len is not None:
        parser.error("--random-output-len is --max-tokens: give one")
    if args.save_detailed and args.save is None:
        parser.error("--save-detailed says what --save FILE has: give a file")
    if args.ignore_eos and args.max_tokens is None and args.random_output_len is None and args.trace is None:
        parser.error("--ignore-eos needs --max-tokens, else answers have no end")


def serve(args: argparse.Namespace) -> int:
    """Runs the command."""
    if find_spec("aiohttp") is None:
        raise RequestError("stars bench serve needs aiohttp: pip install 'stars-engine[bench]'")
    _check_values(args)
    for path in (args.save, args.plot):
        if path is not None:
            check_writable(path)
    from tqdm import tqdm

    from stars.bench.figures import details, figures, header
    from stars.bench.load import Target, send_load
    from stars.trace.json_lines import dumps, plain

    entries, warmups = _load(args)
    common: dict[str, Any] = {} if args.temperature is None else {"temperature": args.temperature}
    target = Target(args.base_url, args.endpoint, args.model, _key(args.api_key_env), args.timeout,
                    args.max_concurrency, common | ({"ignore_eos": True} if args.ignore_eos else {}) | args.extra_body,
                    args.seed if args.request_seeds else None)
    with tqdm(total=len(entries), desc="Requests", dynamic_ncols=True,
              disable=args.no_progress or not sys.stderr.isatty()) as progress:
        run = asyncio.run(send_load(target, entries, warmups, progress.update))
    found = header(run, backend=ENDPOINTS[args.endpoint], endpoint=args.endpoint,
                   request_rate=None if args.trace is not None else args.request_rate or math.inf,
                   burstiness=args.burstiness or 1.0, max_concurrency=args.max_concurrency)
    found |= figures(run, dict(args.goodput))
    if args.save is not None:
        _write(args.save, dumps(plain(found | (details(run) if args.save_detailed else {}))) + "\n")
    if args.plot is not None:
        from stars.bench.run_plot import run_plot

        title = f"{run.model}: {_rate(found)}"
        _write(args.plot, run_plot(title, run.answers, run.duration, _lines(found)[:3]))
    said = sys.stderr if args.save == "-" else sys.stdout
    print("\n".join([*_lines(found), *_table(found)]), file=said)
    for warning in warnings_of(found, args.max_concurrency is None):
        print(f"stars: {warning}", file=sys.stderr)
    if not found["completed"]:
        raise RequestError(f"none of {len(entries)} requests was answered: {_first_error(run)}")
    return 0


def warnings_of(found: dict[str, Any], open_loop: bool) -> list[str]:
    """What says that it was the client that was slow."""
    late = found["sent_late"] / max(1, found["sent"])
    told = [f"it used {found['client_cpu_share']:.0%} of a core"] if found["client_cpu_share"] > BUSY else []
    told += [f"its event loop was {found['p99_loop_lag_ms']:.0f} ms late (99th percentile)"] if (
        found["p99_loop_lag_ms"] or 0.0) > LAG_MS else []
    told += [f"{late:.0%} of the requests were sent late"] if open_loop and late > LATE else []
    return [f"the client may have been what these figures show: {', '.join(told)}"] if told else []


def _load(args: argparse.Namespace) -> tuple[list[Entry], list[Entry]]:
    """The requests that are measured, and those before them, of prompts that come after theirs."""
    from stars.bench.workload import Entry, made_up, poisson, read_prompts, read_trace

    max_tokens = args.max_tokens if args.max_tokens is not None else args.random_output_len
    count, warm = args.num_prompts, args.num_warmups
    if args.trace is not None:
        entries = read_trace(args.trace, max_tokens, args.seed)[:count]
        return entries, [Entry(0.0, prompt, max_tokens or 16) for prompt in made_up(16, warm, args.seed)]
    count = count or 100
    prompts: list[Any] = made_up(args.random_input_len or 64, count + warm, args.seed) if args.input is None else (
        read_prompts(args.input))
    before = [Entry(0.0, prompts[(count + index) % len(prompts)], max_tokens) for index in range(warm)]
    return poisson(prompts, count, args.request_rate or math.inf, args.burstiness or 1.0, args.seed, max_tokens), before


def _check_values(args: argparse.Namespace) -> None:
    """RequestError for a value out of range."""
    address = urlsplit(args.base_url)
    if address.scheme not in ("http", "https") or not address.netloc:
        raise RequestError(f"--base-url is {shown(args.base_url)}, it must be an address such as http://127.0.0.1:8000")
    for name in ("num_prompts", "max_concurrency", "random_input_len", "random_output_len", "max_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise RequestError(f"--{name.replace('_', '-')} is {getattr(args, name)}, it must be 1 or more")
    for name in ("request_rate", "burstiness", "timeout"):
        if getattr(args, name) is not None and not getattr(args, name) > 0.0:
            raise RequestError(f"--{name.replace('_', '-')} is {getattr(args, name)}, it must be above 0")
    for name in ("num_warmups", "seed"):
        if getattr(args, name) < 0:
            raise RequestError(f"--{name.replace('_', '-')} is {getattr(args, name)}, it must be 0 or more")


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise RequestError(f"--api-key-env: the environment has no {variable}: set it to the key")
    return os.environ[variable]


def _lines(found: dict[str, Any]) -> list[str]:
    """What was sent, what came of it, and how well the client kept up."""
    lengths = [f"{kind} of {one['min']} to {one['max']} tokens (median {one['median']})" for kind, one in (
        ("prompts", found["input_tokens"]), ("answers", found["output_tokens"])) if one["median"] is not None]
    counts = [f"{found['completed']} completed", f"{found['refused']} refused (429, 503)", f"{found['failed']} failed"]
    rates = [f"{found['request_throughput']:.3g} requests/s"]
    rates += [f"{found['output_throughput']:.4g} tokens/s"] if found["output_throughput"] is not None else []
    rates += [f"goodput {found['request_goodput']:.3g} requests/s"] if found["request_goodput"] is not None else []
    # In a closed loop a request waits for its turn: it is not late.
    slip = f", requests {found['p99_slip_ms'] or 0.0:.1f} ms late" if found["max_concurrency"] is None else ""
    lines = [f"{found['sent']} sent at {_rate(found)} in {found['duration']:.1f} s: {', '.join(counts)}; "
             f"{', '.join(rates)}",
             "; ".join([*lengths, f"client: {found['client_cpu_share']:.0%} of a core, event loop "
                        f"{found['p99_loop_lag_ms'] or 0.0:.1f} ms late{slip} (99th percentile)"])]
    if found.get("mean_accept_rate") is not None:
        lines.append(f"accept rate {found['mean_accept_rate']:.3f}, {found['mean_attempts']:.1f} attempts a request")
    return lines + [f"{count} failed: {error}" for error, count in found["failures"].items()]


def _table(found: dict[str, Any]) -> list[str]:
    """Latencies in milliseconds."""
    columns = ("mean", "std", "p50", "p90", "p99")
    rows = [f"{'milliseconds':<28}" + "".join(f"{column:>10}" for column in columns)]
    for name, words in LATENCIES.items():
        values = [found[f"{column}_{name}_ms"] for column in columns]
        rows.append(f"{words:<28}" + "".join(f"{'-' if value is None else f'{value:.1f}':>10}" for value in values))
    return rows


def _rate(found: dict[str, Any]) -> str:
    rate = found["request_rate"]
    words = "the trace's times" if rate == "trace" else "once" if rate == "inf" else f"{rate:g} requests/s"
    return words if found["max_concurrency"] is None else f"{words}, {found['max_concurrency']} under way at most"


def _first_error(run: Run) -> str:
    return next((answer.error for answer in run.answers if answer.error is not None), "no error was told")


def _write(path: str, text: str) -> None:
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text, encoding="utf8")


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


_object.__name__ = "JSON object"  # what argparse calls it in its errors


def _goal(text: str) -> tuple[str, float]:
    name, sign, value = text.partition(":")
    if name not in GOALS or not sign or not 0.0 <= float(value) < math.inf:
        raise ValueError("no goal")
    return name, float(value)


_goal.__name__ = f"goal ({', '.join(GOALS)}; such as {GOALS[0]}:500)"  # argparse calls the value so
