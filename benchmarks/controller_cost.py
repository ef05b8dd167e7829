"""What libstars' segment controller and page ledger cost a host without Python, in microseconds of a round.

    python benchmarks/controller_cost.py [runs]      writes results/controller-cost.json

controller_cost.cpp, 256 requests of 16 lanes, is built against the library that the package has, and run several times.
Of each way of using them the quickest run counts, of that the first quartile over its rounds: others may be at work on
the machine. Beside it stands what the binding in Python takes, one request of 16 lanes a round.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, Figure, describe_machine, print_table, write_json

from stars.bindings import libstars
from stars.bindings.controller import Controller, Fed

AIM = 200.0  # microseconds of a round
COMPILER_FLAGS = ["-std=c++20", "-O2"]


def built(folder: Path) -> Path:
    """The driver."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None or not libstars.available():
        raise SystemExit("controller_cost.py needs libstars and a C++ compiler: install them, and the package again")
    library, program = libstars.library_path().resolve(), folder / "controller_cost"
    subprocess.run([compiler, *COMPILER_FLAGS, "-I", ROOT / "bindings", ROOT / "benchmarks" / "controller_cost.cpp",
                    "-o", program, library, f"-Wl,-rpath,{library.parent}"], check=True)
    return program


def measured(runs: int) -> list[dict[str, Any]]:
    """The driver's lines, each of the run in which its way took the least."""
    best: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = built(Path(folder))
        for _ in range(runs):
            ran = subprocess.run([program], check=True, capture_output=True, text=True)
            for row in map(json.loads, ran.stdout.splitlines()):
                if row["name"] not in best or row["wall_us"][0] < best[row["name"]]["wall_us"][0]:
                    best[row["name"]] = row
    return list(best.values())


def in_python(rounds: int = 4000) -> float:
    """Microseconds that a round of one request takes: next, feed of 16 results, commit."""
    controller = Controller(max_tokens=1 << 20, reward_threshold=math.inf, alpha=1.0, segment_size=8, max_attempts=16)
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        drawn = controller.next(16)
        controller.feed([Fed(one.attempt, 8, False, 0.5) for one in drawn])
        controller.commit()
        times.append(1e6 * (time.perf_counter() - begin))
    return statistics.quantiles(times, n=4)[0]


def main() -> None:
    """Measures, prints and writes."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    rows = measured(runs)
    figures = []
    for row in rows:
        wall, lanes = row["wall_us"][0], row["requests"] * row["lanes"]
        figures.append(Figure(row["name"], wall, "us", "200 us", AIM, wall / AIM, "<= 1.0",
                              detail={**row, "ns_a_lane": 1e3 * wall / lanes}))
    figures.append(Figure("the binding in Python, one request of 16 lanes", in_python(), "us"))
    print_table(figures)
    write_json(RESULTS / "controller-cost.json", describe_machine(),
               {"runs": runs, "requests": rows[0]["requests"], "lanes": rows[0]["lanes"], "context": 1032,
                "page_size": 16, "segment_size": 16, "compiler_flags": COMPILER_FLAGS,
                "load_average_after": [round(load, 2) for load in os.getloadavg()]}, figures)


if __name__ == "__main__":
    main()
