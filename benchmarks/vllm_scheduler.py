"""What the scheduler for vLLM costs: the same requests under vLLM's own scheduler and under ours, in one process.

    PYTHON benchmarks/vllm_scheduler.py --model DIR [--reward DIR] [--repeats 6] [--out FILE]

PYTHON is the interpreter of an environment that has vLLM and this package (`make embed` makes one). One worker, whose
scheduler is exchanged between turns, so that weights, caches and threads are the same. CPU seconds of the process are
compared, on one thread. Beside them stands what the scheduler itself takes of each step, which other programs of the
machine disturb least; the clock's seconds are in the details.

"3 in 10 accepted" is the law with a reward that costs nothing and a threshold that this share passes. The engine runs
the same requests, in turns with vLLM, on as many threads.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1",
               "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

import torch
from common import RESULTS, compare, describe_machine, interleave, print_table, write_json
from vllm import LLM, SamplingParams
from vllm import __version__ as vllm_version
from vllm.v1.core.sched.scheduler import Scheduler

import stars

OURS = "stars.adapters.vllm_scheduler.StarsScheduler"
PROMPT_TOKENS, SEGMENT = 64, 16
ACCEPT_RATE, BETA = 0.3, 0.7
REJECTING = dict(reward_threshold=-BETA * math.log(ACCEPT_RATE), alpha=1.0, beta=BETA, segment_size=SEGMENT)
"""A law that accepts ACCEPT_RATE of the attempts whose reward is 0."""


def constant(prompt: str, responses: list[str]) -> list[float]:
    """A reward that costs nothing."""
    return [0.0] * len(responses)


class Meter:
    """CPU seconds inside a scheduler, and its steps."""

    def __init__(self, scheduler: Any):
        self.scheduler, self.seconds, self.steps = scheduler, 0.0, 0
        for name in ("schedule", "get_grammar_bitmask", "update_from_output"):
            setattr(scheduler, name, self._timed(getattr(scheduler, name), name == "schedule"))

    def _timed(self, call: Any, is_step: bool) -> Any:
        def timed(*args: Any) -> Any:
            begin = time.thread_time()
            result = call(*args)
            self.seconds += time.thread_time() - begin
            self.steps += is_step
            return result

        return timed


def prompts_of(requests: int, seed: int) -> list[dict[str, list[int]]]:
    """Prompts that no cache has."""
    generator = torch.Generator().manual_seed(seed)
    return [{"prompt_token_ids": torch.randint(1000, 5000, (PROMPT_TOKENS,), generator=generator).tolist()}
            for _ in range(requests)]


def engine_seconds(model: str, requests: int, tokens: int, policy: stars.STARS | None,
                   ) -> Callable[[int], float]:
    """Turns of the engine: CPU seconds of one."""
    engine = stars.Engine(model, reward=stars.FunctionReward(constant) if policy else None, dtype="bfloat16")
    params = [stars.SamplingParams(max_tokens=tokens, ignore_eos=True, seed=place) for place in range(requests)]

    def turn(index: int) -> float:
        prompts, cpu = prompts_of(requests, 1000 + index), time.process_time()
        engine.generate(prompts, params, policy=policy or stars.Sample(), use_tqdm=False)
        return time.process_time() - cpu

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a directory with a tokenizer")
    parser.add_argument("--reward", help="a reward model's directory; without, a function that returns 0")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm-scheduler.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    llm = LLM(options.model, enforce_eager=True, block_size=32, max_num_seqs=32, max_model_len=512, seed=0,
              scheduler_cls=OURS,
              additional_config={"stars_reward": options.reward or f"{Path(__file__).stem}:constant"})
    core: Any = llm.llm_engine.engine_core.engine_core
    ours = core.scheduler
    micros: dict[str, list[float]] = {}
    steps: dict[str, list[int]] = {}
    plain = Scheduler(ours.vllm_config, ours.kv_cache_config, ours.structured_output_manager, ours.block_size)

    def seconds(meter: Meter, law: dict[str, Any] | None, rows: dict[str, list[tuple[float, int]]], name: str,
                index: int) -> float:
        core.scheduler, meter.seconds, meter.steps = meter.scheduler, 0.0, 0
        prompts = prompts_of(options.requests, len(laws) * index + list(laws).index(name))
        params = [SamplingParams(max_tokens=options.tokens, ignore_eos=True, seed=place,
                                 extra_args=None if law is None else {"stars": law | {"seed": place}})
                  for place in range(options.requests)]
        clock, cpu = time.perf_counter(), time.process_time()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
        drawn = sum(output.kv_transfer_params["stars"]["tokens_drawn"] if law else options.tokens for output in outputs)
        rows.setdefault(name, []).append((clock, drawn))
        micros.setdefault(name, []).append(1e6 * meter.seconds / meter.steps)
        steps.setdefault(name, []).append(meter.steps)
        return cpu

    theirs_metered, ours_metered = Meter(plain), Meter(ours)
    laws = {"vLLM's scheduler": (theirs_metered, None), "ours, nobody asks": (ours_metered, None),
            "ours, all accepted": (ours_metered, dict(reward_threshold=float("-inf"), segment_size=SEGMENT)),
            "ours, 3 in 10 accepted": (ours_metered, REJECTING)}
    engines = {"engine, plain": None, "engine, 3 in 10 accepted": stars.STARS(**REJECTING)}
    rows: dict[str, list[tuple[float, int]]] = {}
    found = interleave({name: lambda index, name=name, row=row: seconds(*row, rows, name, index)
                        for name, row in laws.items()}
                       | {name: engine_seconds(options.model, options.requests, options.tokens, policy)
                          for name, policy in engines.items()}, options.repeats)
    total = options.requests * options.tokens
    against, *others = laws
    base = [total / one for one in found[against]]
    figures = [compare(f"{name}: tokens a CPU second", "token/s", [total / one for one in found[name]], against, base,
                       "" if name.endswith("in 10 accepted") else ">= 0.95",
                       drawn=[drawn for _, drawn in rows[name][1:]],
                       clock_seconds=[clock for clock, _ in rows[name][1:]]) for name in others]
    figures += [compare(f"{name}: inside the scheduler, a step", "us", micros[name][1:], against, micros[against][1:],
                        of_a_step=1e6 * sum(found[name]) / sum(steps[name][1:])) for name in others]
    figures += [compare(f"{name}: tokens a CPU second", "token/s", [total / one for one in found[name]], other,
                        [total / one for one in found[other]])
                for name, other in zip(engines, (against, "ours, 3 in 10 accepted"), strict=True)]
    figures[0].detail["plain_clock_seconds"] = [clock for clock, _ in rows[against][1:]]
    print_table(figures)
    config = json.loads((Path(options.model) / "config.json").read_text())
    write_json(options.out, describe_machine(), {
        "vllm": vllm_version, "model": config.get("_model_name_or_path", Path(options.model).name),
        "reward": options.reward and Path(options.reward).name,
        "requests": options.requests, "tokens": options.tokens, "prompt_tokens": PROMPT_TOKENS, "segment": SEGMENT,
        "repeats": options.repeats, "threads": 1, "eager": True, "load_average": os.getloadavg()}, figures)


if __name__ == "__main__":
    main()
