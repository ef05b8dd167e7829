"""Peak memory of one long context, and start-up, each in a process of its own.

As a command it is that process: `memory.py engine|hf --model DIR --reward DIR --lanes N` prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SEGMENT = 16
START_UP = """
import json, sys, time, torch
begin = time.perf_counter()
import stars
for name in stars.__all__:
    getattr(stars, name)
imported = time.perf_counter()
stars.Engine(*sys.argv[1:3])
print(json.dumps([imported - begin, time.perf_counter() - imported, "transformers" in sys.modules]))
"""


def memory_figures(model: str, reward: str, threads: int, context: int = 1024, lanes: int = 32) -> Iterator:
    """f. Peak memory beyond the loaded models: many lanes beside one, and beside the loop on transformers."""
    from common import Figure

    with tempfile.TemporaryDirectory() as scratch:
        pair = [str(_lengthen(Path(path), Path(scratch) / name, context + 8 * SEGMENT))
                for path, name in ((model, "lm"), (reward, "rm"))]

        def run(kind: str, rows: int) -> dict:
            return _child([str(Path(__file__).resolve()), kind, "--model", pair[0], "--reward", pair[1], "--lanes",
                           str(rows), "--context", str(context), "--threads", str(threads)])

        many, one = run("engine", lanes), run("engine", 1)
        loop, loop_one = run("hf", lanes), run("hf", 1)
    lane_kb = 1024 * (many["work_mb"] - one["work_mb"]) / (lanes - 1)
    yield Figure(f"memory of a lane at {context} tokens of context", lane_kb, "KB", "its keys and values alone",
                 many["segment_kb"], lane_kb / many["segment_kb"],
                 detail={"formula": "(peak at 32 lanes - peak at 1) / 31; floor: B LM + B + 1 RM tokens of the cache"})
    yield Figure(f"working memory, {lanes} lanes", many["work_mb"], "MB", "1 lane", one["work_mb"],
                 many["work_mb"] / one["work_mb"], detail={"context": context})
    yield Figure(f"working memory, {lanes} lanes", many["work_mb"], "MB", f"loop on transformers, {lanes} rows",
                 loop["work_mb"], many["work_mb"] / loop["work_mb"],
                 detail={"loop at 1 row": loop_one["work_mb"], "context": context})
    yield Figure("peak memory of the process", many["peak_mb"], "MB", f"loop on transformers, {lanes} rows",
                 loop["peak_mb"], many["peak_mb"] / loop["peak_mb"], detail={"1 lane": one["peak_mb"]})


def start_up_figures(model: str, reward: str, repeats: int = 3) -> Iterator:
    """g. `import stars` and all its names with torch loaded, and building an engine."""
    from common import Figure

    runs = [_child(["-c", START_UP, model, reward]) for _ in range(repeats)]
    yield Figure("import stars and all its names (torch loaded)", 1e3 * statistics.median(run[0] for run in runs), "ms",
                 detail={"imports transformers": runs[0][2]})
    yield Figure("Engine(model, reward)", 1e3 * statistics.median(run[1] for run in runs), "ms")


def _child(arguments: list[str]):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{arguments[0]} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _lengthen(source: Path, target: Path, positions: int) -> Path:
    """A copy of a model that takes `positions` positions; what it says there does not matter here."""
    shutil.copytree(source, target)
    path = target / "config.json"
    config = json.loads(path.read_text())
    config["max_position_embeddings"] = max(positions, config["max_position_embeddings"])
    path.write_text(json.dumps(config))
    return target


# -- the child process ------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["engine", "hf"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--reward", required=True)
    parser.add_argument("--lanes", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    from common import set_threads

    import stars

    set_threads(options.threads)
    # All attempts of two rounds are rejected, so that every lane is drafted and scored and the best seen is committed.
    params = stars.SamplingParams(max_tokens=2 * SEGMENT, ignore_eos=True, seed=1, top_k=40)
    policy = stars.STARS(SEGMENT, options.lanes, reward_threshold=float("inf"), width=options.lanes)
    prompt = [7 + index % 1000 for index in range(options.context)]
    if options.kind == "engine":
        engine = stars.Engine(options.model, options.reward)
        configs = [engine.model_config, engine.reward.decoder.config]

        def run() -> None:
            engine.generate({"prompt_token_ids": prompt}, params, policy, use_tqdm=False)
    else:
        from hf_stars import HFStars, load_pair

        loop = HFStars(*load_pair(options.model, options.reward), width=options.lanes, rm_lanes=options.lanes)
        configs = []

        def run() -> None:
            loop.generate(prompt, params, policy)

    loaded, loading_peak = _resident_mb(), _peak_mb()
    reset = _reset_peak()
    run()
    peak = _peak_mb()
    segment = sum(2 * config.num_layers * config.num_kv_heads * config.head_dim * 4 * (SEGMENT + extra)
                  for extra, config in enumerate(configs))
    print(json.dumps({"loaded_mb": loaded, "peak_mb": max(peak, loading_peak), "work_mb": peak - loaded,
                      "peak_was_reset": reset, "segment_kb": segment / 1024}))


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _reset_peak() -> bool:
    """Forgets the peak of loading, where the kernel allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def _peak_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
