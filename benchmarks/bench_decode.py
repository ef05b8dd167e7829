"""The main timings under pytest-benchmark: `pytest benchmarks/bench_decode.py --benchmark-only`.

Each benchmark's extra_info holds tokens per call. The side-by-side figures with ratios are run_cpu.py's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from common import DEMO_LM, DEMO_RM, forced_accept, load_prompts, set_threads
from hf_stars import HFStars
from products import recorded
from speed import SEED, Setup, directory, uniforms

import stars

TOKENS = int(os.environ.get("STARS_BENCH_TOKENS", "128"))
ROUNDS = int(os.environ.get("STARS_BENCH_ROUNDS", "10"))
ACCEPT = 0.3


@pytest.fixture(scope="module")
def setup() -> Setup:
    set_threads(min(2, os.cpu_count() or 1))
    return Setup(directory(DEMO_LM), directory(DEMO_RM), "float32", load_prompts(None, 32), TOKENS, ROUNDS)


def run(benchmark, function, tokens: int) -> None:
    benchmark.extra_info["tokens"] = tokens
    benchmark.pedantic(function, rounds=ROUNDS, warmup_rounds=2, iterations=1)


@pytest.mark.benchmark(group="plain, one prompt")
def test_plain(benchmark, setup):
    run(benchmark, lambda: setup.sample(0), TOKENS)


@pytest.mark.benchmark(group="plain, one prompt")
def test_plain_products_alone(benchmark, setup):
    with recorded(setup.engine) as record:
        setup.sample(0)
    run(benchmark, lambda: setup.floor.run(record.passes), TOKENS)


@pytest.mark.benchmark(group="plain, one prompt")
def test_generate_of_transformers(benchmark, setup):
    lm, ids = setup.hf_pair[0], torch.tensor([setup.prompt_ids(0)])

    @torch.inference_mode()
    def generate():
        lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8, top_k=40, top_p=1.0,
                    min_new_tokens=TOKENS, max_new_tokens=TOKENS, pad_token_id=0)

    run(benchmark, generate, TOKENS)


@pytest.mark.benchmark(group="STARS, one prompt, accept 0.3")
@pytest.mark.parametrize("width", [1, 8, None])
def test_stars(benchmark, setup, width):
    with forced_accept(ACCEPT):
        run(benchmark, lambda: setup.ours(0, setup.policy(width)), TOKENS)


@pytest.mark.benchmark(group="STARS, one prompt, accept 0.3")
def test_stars_products_alone(benchmark, setup):
    with forced_accept(ACCEPT), recorded(setup.engine) as record:
        setup.ours(0, setup.policy(8))
    run(benchmark, lambda: setup.floor.run(record.passes), TOKENS)


@pytest.mark.benchmark(group="STARS, one prompt, accept 0.3")
@pytest.mark.parametrize("width", [1, 8])
def test_stars_on_transformers(benchmark, setup, width):
    loop, uniform = HFStars(*setup.hf_pair, width=width), uniforms(SEED)
    run(benchmark, lambda: loop.generate(setup.prompt_ids(0), setup.params(0), setup.policy(width), accept_rate=ACCEPT,
                                         uniform=uniform), TOKENS)


@pytest.mark.benchmark(group="32 prompts")
@pytest.mark.parametrize("policy", ["plain", "STARS"])
def test_32_prompts_at_once(benchmark, setup, policy):
    chosen = stars.Sample() if policy == "plain" else setup.policy(None)
    prompts, params = setup.prompts, [setup.params(index) for index in range(len(setup.prompts))]
    with forced_accept(ACCEPT):
        run(benchmark, lambda: setup.engine.generate(prompts, params, chosen, use_tqdm=False), TOKENS * len(prompts))
