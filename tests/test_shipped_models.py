"""What ships beside the pair: a guide that raises the reward and a small model, found by the names of policies."""

from __future__ import annotations

import json
import math
import random
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

import stars
from stars.cli import main
from stars.cli.options import shipped_heads, shipped_models, shipped_pair
from stars.plan import Fixed, Lanes, Model, Plan, Score
from stars.rules import Always

LM, RM = shipped_pair()
DEMO = LM.parent
OPENINGS = [f"{who} {verb} {what}" for who in ("My brother", "I", "Nobody here") for verb in ("saw", "rented")
            for what in ("this film", "it because", "the sequel, which")]


class Drafted:
    """Plain sampling of a named model, scored at the end."""

    def __init__(self, name: str):
        self.name = name

    def plan(self) -> Plan:
        return Plan(Model(self.name), Fixed(16), Lanes(1), Score("end"), Always())


@pytest.fixture(scope="module")
def train_guide() -> ModuleType:
    """The script, which lies on no path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
        import train_guide

        yield train_guide


def test_only_what_a_policy_uses_is_loaded_beside_the_pair():
    guide, small = DEMO / "guide", DEMO / "small"
    for policy, models in (
            (stars.STARS(reward_threshold=1.0), {}), (stars.TokenGuidance(), {"guide": guide}),
            (stars.TokenGuidance(reference="lm"), {"guide": guide}), (Drafted("small"), {"small": small}),
            (stars.TokenGuidance(reference="reference"), {"guide": guide, "reference": LM}), (Drafted("mine"), {})):
        assert shipped_models(policy) == models and shipped_heads(policy) == {}


def test_a_name_stands_for_nothing_beside_a_model_of_ones_own(capsys):
    assert main(["generate", "This film was", "--model", str(LM), "--policy", "token-guidance"]) == 1
    assert "there is no model named 'guide'" in capsys.readouterr().err


def test_the_implicit_reward_of_shipped_models_by_their_names(capsys, tmp_path, monkeypatch):
    """The guide's ratio for STARS; a directory of that name comes first, and beside another model there are none."""
    monkeypatch.chdir(tmp_path)
    flags = ["generate", "This film was", "--reward-implicit", "guide", "lm", "--reward-threshold", "0.2",
             "--max-tokens", "6", "--seed", "2", "--no-progress", "--json"]
    assert main(flags) == 0
    engine = stars.Engine(LM, stars.ImplicitReward(DEMO / "guide", LM))
    [output] = engine.generate("This film was", stars.SamplingParams(max_tokens=6, seed=2),
                               stars.STARS(reward_threshold=0.2), use_tqdm=False)
    row = json.loads(capsys.readouterr().out)["outputs"][0]
    assert row["token_ids"] == output.outputs[0].token_ids
    assert row["reward"] == pytest.approx(output.outputs[0].reward, abs=1e-5)
    assert main([*flags, "--model", str(LM)]) == 1
    assert "guide is not a directory here" in capsys.readouterr().err
    (tmp_path / "guide").mkdir()
    assert main(flags) == 1
    assert "guide has no config.json" in capsys.readouterr().err


def test_the_guide_raises_the_reward_and_further_with_a_larger_weight():
    """Means of 36 texts, whose rewards spread by 1.9: a difference of two means has a standard error of 0.45 at most.
    On other openings, and 128 tokens, the guide's mean was 2.2 above the language model's."""
    engine = stars.Engine(LM, RM, models={"guide": DEMO / "guide"}, max_num_seqs=64, max_num_lanes=64)
    params = stars.SamplingParams(temperature=0.8, top_k=40, max_tokens=48, seed=11, n=2)

    def mean(policy: stars.TokenGuidance) -> float:
        outputs = engine.generate(OPENINGS, params, policy, use_tqdm=False)
        rewards = [one.reward for output in outputs for one in output.outputs]
        assert len(rewards) == 36
        return sum(rewards) / len(rewards)

    plain, guided, further = (mean(stars.TokenGuidance(reference="lm", weight=weight, score=True))
                              for weight in (0.0, 1.0, 2.0))
    assert guided > plain + 0.9 and further > guided, (plain, guided, further)


def test_the_small_model_is_small_and_says_what_the_language_model_does():
    """Nearer to its teacher's texts than a table of how often tokens come could be, and of its tokens."""
    files = {path.name: path.stat().st_size for path in (DEMO / "small").iterdir()}
    assert files["model.safetensors"] < 3_000_000
    assert (DEMO / "small" / "tokenizer.json").read_bytes() == (LM / "tokenizer.json").read_bytes()
    engine = stars.Engine(LM, stars.ImplicitReward(DEMO / "small", LM), dtype="float32",
                          models={"small": DEMO / "small"})
    params = stars.SamplingParams(temperature=1.0, max_tokens=48, seed=3, n=2)
    outputs = [one for output in engine.generate(OPENINGS, params, stars.Sample(score=True), use_tqdm=False)
               for one in output.outputs]
    tokens = sum(len(one.token_ids) for one in outputs)
    # Nats by token: log p of the language model, less that of the small one.
    lost = -sum(one.reward for one in outputs) / tokens
    own = -sum(one.cumulative_logprob for one in outputs) / tokens
    counts = torch.bincount(torch.tensor([token for one in outputs for token in one.token_ids])).double()
    unigram = -sum(count * math.log(count / tokens) for count in counts.tolist() if count) / tokens
    assert 0.0 < lost and own + lost < unigram


def adapted(train_guide: ModuleType, seed: int):
    """The language model with adapters of random numbers."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM.from_pretrained(LM, dtype=torch.float32)
    return model, train_guide.adapt(model, rank=3, alpha=6.0)


def test_what_is_trained_is_what_the_engine_runs(train_guide, tmp_path):
    """The log-ratio that DPO's loss is made of, by the script in transformers, and as the engine's implicit reward of
    the adapter that the script wrote: tens of tokens in float32, the adapter's numbers of bfloat16 in both."""
    model, adapters = adapted(train_guide, 0)
    for adapter in adapters.values():
        torch.nn.init.normal_(adapter.B, std=0.02)
    train_guide.save(adapters, tmp_path / "guide", rank=3, alpha=6.0)
    (tmp_path / "lm").symlink_to(LM)  # beside it, as the adapter says
    params = stars.SamplingParams(max_tokens=23, seed=5, n=3)
    [output] = stars.Engine(LM, stars.ImplicitReward(tmp_path / "guide", LM), dtype="float32").generate(
        "Two brothers inherit", params, stars.Sample(score=True), use_tqdm=False)
    pairs = [train_guide.Pair(output.prompt_token_ids, one.token_ids, one.token_ids) for one in output.outputs]
    with torch.no_grad():
        found = train_guide.ratios(model, adapters, pairs)[0].tolist()
    assert found == pytest.approx([one.reward for one in output.outputs], abs=1e-3)
    assert max(map(abs, found)) > 0.5, "adapters that change nothing show nothing"


def test_dpo_begins_at_the_language_model_and_learns_a_pair(train_guide):
    """Without a step the log-ratios are 0 and the loss is log 2; with eight, the chosen response gains on the other."""
    model, adapters = adapted(train_guide, 1)
    pairs = [train_guide.Pair([1, 500, 300], [700, 800, 2], [900, 650, 410, 77])]
    assert train_guide.ratios(model, adapters, pairs).tolist() == [[0.0], [0.0]]
    options = Namespace(method="dpo", beta=0.1, rate=1e-2)
    facts = train_guide.train(model, adapters, list(train_guide.dpo_batches(pairs, 4, random.Random(0))) * 8, options)
    assert facts["steps"] == 8 and facts["loss_of_the_first_25_steps"] < math.log(2)
    chosen, rejected = train_guide.ratios(model, adapters, pairs).tolist()
    assert chosen[0] > rejected[0] + 1.0
