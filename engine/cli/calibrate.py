"""`stars calibrate`: a reward threshold for these prompts, and how the rewards of plain samples lie."""

from __future__ import annotations

import argparse
import sys

from stars.cli import options
from stars.cli.rows import rows_of_arguments, rows_of_file
from stars.errors import RequestError
from stars.line_file import check_writable
from stars.trace.json_lines import dumps, plain

NAMES = {0.0: "min", 0.5: "median", 1.0: "max"}


def calibrate(args: argparse.Namespace) -> int:
    """Runs the command; the first prompt that cannot run ends it."""
    params = options.sampling_params(args)
    quantile = options.checked_quantile(args.quantile)
    if args.num_samples < 1:
        raise RequestError(f"num_samples is {args.num_samples}, it must be at least 1")
    if args.save is not None:
        check_writable(args.save)
    rows = rows_of_file(args.input, args.chat) if args.input is not None else rows_of_arguments(args.prompts, args.chat)
    if not rows:
        raise RequestError(f"{args.input} holds no prompts: give at least one")
    for row in rows:
        if row.error is not None:
            raise RequestError(row.error)
    engine = options.build_engine(args)
    progress = not args.no_progress and sys.stderr.isatty()
    found = engine.calibrate([row.prompt for row in rows], params, quantile, args.num_samples, progress,
                             args.segment_size)
    if args.save is not None:
        found.save(args.save)
    if args.json:
        print(dumps(plain(found.record())))
        return 0
    print(f"reward_threshold  {found.reward_threshold:.4f}   ({quantile:g} quantile of {found.samples} plain samples, "
          f"{found.prompts} prompt{'s' if found.prompts > 1 else ''})")
    print("rewards seen      " + "   ".join(f"{NAMES.get(level, f'{level:.0%}')} {value:.3f}"
                                            for level, value in found.quantiles.items()))
    print(f"spread            {found.spread:.4f}   (standard deviation of one prompt's samples; beta=auto: "
          f"{found.beta:.4g})")
    if found.correlations:
        print("prefixes          " + "   ".join(
            f"{tokens} tokens: correlation {value:.2f}, drift {found.drifts[tokens]:+.2f}"
            for tokens, value in found.correlations.items()))
    return 0
