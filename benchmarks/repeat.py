"""The same figures in several processes: how far they depend on where the machine happens to put threads and memory.

    python benchmarks/repeat.py 8 token,round      writes results/cpu-repeated.json

On virtual machines the two cores may lie near each other or far apart, and may move: operations of a few microseconds
then cost several times as much, because their data travels between the cores.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import RESULTS

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Runs run_cpu.py in processes of its own and writes each figure's ratios, with their median and range."""
    count, only = int(sys.argv[1]), sys.argv[2]
    ratios: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run.json"
        for _ in range(count):
            subprocess.run([sys.executable, str(HERE / "run_cpu.py"), "--only", only, "--dtypes", "float32",
                            "--output", str(output)], check=True, stdout=subprocess.DEVNULL)
            run = json.loads(output.read_text())
            for figure in run["figures"]:
                ratios.setdefault(figure["name"], []).append(round(figure["ratio"], 3))
    figures = [{"name": name, "median": statistics.median(values), "least": min(values), "most": max(values),
                "ratios": values} for name, values in ratios.items()]
    (RESULTS / "cpu-repeated.json").write_text(
        json.dumps({"machine": run["machine"], "processes": count, "only": only, "figures": figures}, indent=1) + "\n")
    for figure in figures:
        print(f"{figure['name']:50} median {figure['median']:.2f}, {figure['least']:.2f} to {figure['most']:.2f}")


if __name__ == "__main__":
    main()
