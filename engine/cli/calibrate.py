"""`stars calibrate`: a reward threshold for these prompts, and how the rewards of plain samples lie."""

from __future__ import annotations

import argparse
import sys

from stars.cli import options
from stars.cli.rows import rows_of_arguments, rows_of_file
from stars.errors import RequestError
from stars.trace.json_lines import dumps, plain

SHOWN = (("min", 0.0), ("10 %", 0.1), ("25 %", 0.25), ("median", 0.5), ("75 %", 0.75), ("90 %", 0.9), ("max", 1.0))


def calibrate(args: argparse.Namespace) -> int:
    """Runs the command; the first prompt that cannot run ends it."""
    params = options.sampling_params(args)
    quantile = options.checked_quantile(args.quantile)
    if args.num_samples < 1:
        raise RequestError(f"num_samples is {args.num_samples}, it must be at least 1")
    rows = rows_of_file(args.input, args.chat) if args.input is not None else rows_of_arguments(args.prompts, args.chat)
    if not rows:
        raise RequestError(f"{args.input} holds no prompts: give at least one")
    for row in rows:
        if row.error is not None:
            raise RequestError(row.error)
    engine = options.build_engine(args)
    import numpy as np

    progress = not args.no_progress and sys.stderr.isatty()
    rewards = engine.sample_rewards([row.prompt for row in rows], params, args.num_samples, use_tqdm=progress)
    threshold = float(np.quantile(rewards, quantile))
    quantiles = {name: float(np.quantile(rewards, level)) for name, level in SHOWN}
    if args.json:
        levels = {f"{level:g}": quantiles[name] for name, level in SHOWN}
        print(dumps(plain({"reward_threshold": threshold, "quantile": quantile, "quantiles": levels,
                           "mean": float(np.mean(rewards)), "samples": len(rewards), "prompts": len(rows)})))
        return 0
    print(f"reward_threshold  {threshold:.4f}   ({quantile:g} quantile of {len(rewards)} plain samples, "
          f"{len(rows)} prompt{'s' if len(rows) > 1 else ''})")
    print("rewards seen      " + "   ".join(f"{name} {value:.3f}" for name, value in quantiles.items()))
    return 0
