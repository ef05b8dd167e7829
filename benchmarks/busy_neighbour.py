"""What one busy process beside it leaves of the engine's speed: plain sampling, with as many threads as CPUs.

    python benchmarks/busy_neighbour.py

On two CPUs a fair share is two thirds; threads that wait for one that is not running would keep far less.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import stars

TOKENS, REPEATS = 256, 9


def tokens_per_second(engine: stars.Engine) -> float:
    """Of one plain completion."""
    begin = time.perf_counter()
    engine.generate("This film was", stars.SamplingParams(max_tokens=TOKENS, ignore_eos=True, seed=1), use_tqdm=False)
    return TOKENS / (time.perf_counter() - begin)


def main() -> None:
    engine = stars.Engine(Path(stars.__file__).parent / "demo_models" / "lm")
    tokens_per_second(engine)
    alone, beside = [], []
    for _ in range(REPEATS):
        alone.append(tokens_per_second(engine))
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
            time.sleep(0.2)
            beside.append(tokens_per_second(engine))
            neighbour.kill()
    ratio = statistics.median(b / a for a, b in zip(alone, beside, strict=True))
    print(f"alone {statistics.median(alone):.0f} tokens/s, beside one busy process {statistics.median(beside):.0f}: "
          f"{ratio:.2f} of it")


if __name__ == "__main__":
    main()
