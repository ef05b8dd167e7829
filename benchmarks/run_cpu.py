"""Measures everything on the CPU, side by side in one process, and writes benchmarks/results/cpu.json.

    python benchmarks/run_cpu.py [--quick] [--only token,round] [--quality] [--model DIR --reward DIR]
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import (
    DEMO_LM,
    DEMO_RM,
    RESULTS,
    ROOT,
    Figure,
    describe_machine,
    load_prompts,
    print_table,
    set_threads,
    write_json,
)
from memory import memory_figures, start_up_figures
from operations import operations
from quality import QUALITY
from speed import FIGURES, Setup, directory

APART = ("token", "generate", "loops")
"""Figures measured again with bfloat16 models."""


def main() -> None:
    options = _parse()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    set_threads(options.threads or min(2, cores))
    logging.getLogger("transformers").setLevel(logging.ERROR)
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, load {machine['load_average']}, "
          f"commit {machine['commit']}", flush=True)
    if machine["load_average"][0] > 0.5 * machine["cores"]:
        print("WARNING: the machine is busy, the figures will be too", flush=True)
    if machine["isa"] == "torch references":
        print("WARNING: libstars is not there, the torch references are measured", flush=True)
    model, reward = directory(options.model), directory(options.reward)
    setups = {dtype: Setup(
        model, reward, dtype, load_prompts(options.prompts, 32), options.tokens, options.repeats,
        compiled=options.compiled) for dtype in options.dtypes}
    figures: list[Figure] = []

    def measure(name: str, produce) -> None:
        if options.only and name not in options.only:
            return
        begin = time.perf_counter()
        found = list(produce())
        figures.extend(found)
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
        print_table(found)

    for dtype, setup in setups.items():
        for name, figure in FIGURES.items():
            if dtype == options.dtypes[0] or name in APART:
                measure(name, lambda figure=figure, setup=setup: _labelled(figure(setup), setup, options.dtypes[0]))
    first = setups[options.dtypes[0]]
    measure("operations", lambda: operations(first))
    measure("memory", lambda: memory_figures(model, reward, machine["threads"]))
    measure("start-up", lambda: start_up_figures(model, reward))
    if options.quality:
        for name, figure in QUALITY.items():
            measure(name, lambda figure=figure: figure(first))
    machine["load_average_at_end"] = [round(load, 2) for load in os.getloadavg()]
    settings = vars(options) | {"model": model, "reward": reward}
    output = Path(settings.pop("output"))
    settings["prompts"] = options.prompts or "built-in openings"
    for key in ("model", "reward"):
        settings[key] = "shipped pair" if settings[key] == directory(DEMO_LM if key == "model" else DEMO_RM) else \
            Path(settings[key]).name
    write_json(output, machine, settings, figures)
    print_table(figures)
    print(f"\nwritten to {options.output}")


def _labelled(figures, setup: Setup, first: str):
    for one in figures:
        if setup.dtype != first:
            one.name += f", {setup.dtype}"
            one.aim = ""
        yield one


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few tokens and repeats: whether it runs, not how fast")
    parser.add_argument("--tokens", type=int, help="new tokens of every response (128)")
    parser.add_argument("--repeats", type=int, help="repeats of every figure (15)")
    parser.add_argument("--threads", type=int, help="of torch and libstars alike (2, or the cores there are)")
    parser.add_argument("--model", default=str(DEMO_LM), help="directory of the language model (the shipped one)")
    parser.add_argument("--reward", default=str(DEMO_RM), help="directory of the reward model (the shipped one)")
    parser.add_argument("--prompts", help='JSONL file, plain or .gz, with the field "prompt" (built-in openings)')
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--only", type=lambda text: text.split(","), help=(
        f"comma-separated: {', '.join(FIGURES)}, operations, memory, start-up, {', '.join(QUALITY)}"))
    parser.add_argument("--quality", action="store_true", help="rewards at equal tokens, and how often texts differ")
    parser.add_argument("--compiled", action="store_true", help="generate with a static cache and torch.compile too")
    parser.add_argument("--output", default=None, help="where the JSON goes (benchmarks/results/cpu.json)")
    options = parser.parse_args()
    options.tokens = options.tokens or (32 if options.quick else 128)
    options.repeats = options.repeats or (2 if options.quick else 15)
    default = ROOT / ".benchmarks" / "cpu-quick.json" if options.quick else RESULTS / "cpu.json"
    options.output = options.output or str(default)
    return options


if __name__ == "__main__":
    main()
