"""benchmarks/train_lora_reward.py: how dialogues are read and split, what is learnt, stored and counted."""

from __future__ import annotations

import gzip
import json
import math
import random
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import stars
from stars.model.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script, which lies on no path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
        import train_lora_reward

        yield train_lora_reward


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model(tokenizer=True, chat_template=True, vocab=311)


DIALOGUE = ("\n\nHuman: Hello there \n\nAssistant: Good day.\n\nHow are you?\n\nHuman\n\nHuman: Fine\n\nHuman:\n\n"
            "Assistant:")


def test_turns_lose_the_names_that_follow_them(script):
    assert script.turns_of(DIALOGUE.replace("\n\nHuman:\n\nAssistant:", "\n\nAssistant:")) == [
        {"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Good day.\n\nHow are you?"},
        {"role": "user", "content": "Fine"}]
    assert script.cleaned(" Yes.\n\nHuman: \n\nHuman") == "Yes." and script.cleaned("a\n\nHuman rights") == (
        "a\n\nHuman rights")
    for broken in ("\n\nHuman: Hello", "\n\nHuman: a\n\nAssistant: b", "Assistant:"):
        with pytest.raises(ValueError, match="does not end with an open turn of the assistant"):
            script.turns_of(broken)


def test_dialogues_of_one_first_turn_are_in_one_third(script):
    """And the thirds are thirds: of 6,000 within five standard deviations of 2,000."""
    def messages(number: int, *more: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text} for text in (f"question {number}", *more)]

    found = [script.third(messages(number)) for number in range(6000)]
    assert found[:50] == [script.third(messages(number, "and", "more")) for number in range(50)]
    for name in script.THIRDS:
        assert abs(found.count(name) - 2000) < 5 * math.sqrt(6000 * 2 / 9)
    kept = sum(script.checks(messages(number)) for number in range(6000))
    assert abs(kept - 750) < 5 * math.sqrt(6000 * 7 / 64)


def write_pairs(script, folder: Path) -> None:
    rows = [{"prompt": f"\n\nHuman: number {n}?\n\nAssistant:", "chosen": f" Yes {n}\n\nHuman", "rejected": " No."}
            for n in range(40)]
    rows += [{**rows[0], "chosen": " \n\nHuman:"}, {**rows[0], "chosen": " No.\n\nHuman"},
             {"prompt": "\n\nHuman: " + "a long story " * 200 + "\n\nAssistant:", "chosen": "x", "rejected": "y"}]
    for name in script.FILES.values():
        with gzip.open(folder / name, "wt", encoding="utf8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)


def test_pairs_are_read_as_the_engine_reads_them(script, model, tmp_path):
    tokenizer = load_tokenizer(model)
    write_pairs(script, tmp_path)
    thirds, left_out = script.read_pairs(tmp_path, tokenizer)
    assert left_out == {"a reply is empty": 2, "both replies are the same": 2, "the last turn is too long": 2}
    assert sum(map(len, thirds.values())) == 80 and all(thirds[name] for name in script.THIRDS)
    pair = thirds["report"][0]
    messages = next(messages for n in range(40) for messages in [[{"role": "user", "content": f"number {n}?"}]]
                    if script.prompt_ids(messages, tokenizer) == pair.prompt)
    engine = stars.Engine(model)
    output = engine.generate({"messages": messages}, stars.SamplingParams(max_tokens=1), use_tqdm=False)[0]
    assert output.prompt_token_ids == pair.prompt
    assert tokenizer.decode(pair.chosen).strip().startswith("Yes ") and tokenizer.decode(pair.rejected).strip() == "No."
    assert tokenizer.eos_token_id not in pair.chosen + pair.rejected


def test_long_dialogues_lose_their_first_turns(script, model):
    tokenizer = load_tokenizer(model)
    turns = [{"role": role, "content": f"{n} " + "words " * 25} for n in range(9) for role in ("user", "assistant")]
    del turns[-1]
    whole = [tokenizer.encode(tokenizer.split_template(turns[2 * n :])[0], add_special_tokens=False) for n in range(9)]
    kept = next(n for n in range(9) if len(whole[n]) <= script.LONGEST_PROMPT)
    assert 0 < kept < 8 and script.prompt_ids(turns, tokenizer) == whole[kept]
    assert len(script.reply_ids("word " * 2000, tokenizer)) == script.LONGEST_REPLY


# -- training ---------------------------------------------------------------------------------------------------------


def pairs_of(script, count: int, seed: int = 0) -> list:
    """Random ones, of which the chosen reply has many tokens 200 and the rejected one many 201."""
    chance = random.Random(seed)

    def reply(token: int) -> list[int]:
        return [token if chance.random() < 0.5 else chance.randrange(10, 190) for _ in range(chance.randrange(1, 40))]

    return [script.Pair(chance.choice(list(script.FILES)), [chance.randrange(10, 190) for _ in range(
        chance.randrange(3, 20))], reply(200), reply(201)) for _ in range(count)]


@pytest.fixture(scope="module")
def scorer(script, model):
    made = script.new_scorer(model, 3, 6.0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    for weight in made.trained:
        weight.data.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    return made


def test_rewards_of_beginnings_are_those_of_texts_that_end_there(script, scorer):
    """Padding on the right is seen by nobody, and a cut beyond the end reads the whole reply."""
    pairs, cuts = pairs_of(script, 2), [[1, 5, 500]] * 2
    with torch.no_grad():
        found = script.rewards_at(scorer, pairs, cuts)
        for at, pair in enumerate(pairs):
            for side, reply in enumerate((pair.chosen, pair.rejected)):
                for place, length in enumerate((500, 1, 5, 500)):
                    ids = torch.tensor([pair.prompt + reply[:length]])
                    hidden = scorer.body(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
                    assert abs(found[side, at, place] - scorer.head[0] @ hidden) < 1e-4
    assert found.shape == (2, 2, 4)


def test_the_loss_is_bradley_and_terrys(script):
    assert math.isclose(script.preference_loss(torch.zeros(2, 3, 5)).item(), math.log(2), rel_tol=1e-6)
    rewards = torch.tensor([[[2.0, 1.0, 3.0]], [[0.0, 1.0, 4.0]]])  # whole: 2 ahead; cut: level, and 1 behind
    expected = math.log1p(math.exp(-2)) / 2 + (math.log(2) + math.log1p(math.exp(1))) / 4
    assert math.isclose(script.preference_loss(rewards).item(), expected, rel_tol=1e-6)


def test_cuts_are_within_both_replies(script):
    chance = random.Random(1)
    for pair in pairs_of(script, 200):
        shorter = min(len(pair.chosen), len(pair.rejected))
        cuts = script.random_cuts(pair, chance)
        assert len(cuts) == script.CUTS
        assert all(min(script.SHORTEST_CUT, max(1, shorter - 1)) <= cut <= max(1, shorter - 1) for cut in cuts)


def test_batches_hold_every_pair_once(script):
    pairs = pairs_of(script, 23)
    for chance in (None, random.Random(0)):
        groups = script.batches(pairs, 4, chance)
        assert sorted(map(len, groups)) == [3, 4, 4, 4, 4, 4]
        assert sorted(id(pair) for group in groups for pair in group) == sorted(map(id, pairs))
    lengths = [pair.length for group in script.batches(pairs, 4) for pair in group]
    assert lengths == sorted(lengths)


def test_a_planted_preference_is_learnt_and_the_engine_reads_what_is_stored(script, model, tmp_path):
    """From the same text the stored adapter gives the rewards that were measured, in float32 both."""
    made = script.new_scorer(model, 3, 6.0, torch.device("cpu"))
    training, held_out = pairs_of(script, 40, seed=1), pairs_of(script, 24, seed=2)
    options = Namespace(seed=0, batch=8, epochs=4.0)
    facts, learnt = script.train(made, training, held_out, 3e-2, 600.0, options, "test")
    assert facts["steps"] == 20 and facts["passes"] == 4.0 and len(facts["checks"]) == script.CHECKS
    best = min(facts["checks"], key=lambda check: check["held_out_loss"])
    assert (facts["best_step"], facts["held_out_loss"]) == (best["step"], best["held_out_loss"])
    script.take(made, learnt)
    rewards = script.scored(made, held_out, 16)
    assert script.figures_of(rewards, held_out)["whole"]["accuracy"] > 0.8

    script.save(made, tmp_path / "reward", 3, 6.0, "org/base")
    reward = stars.LoraReward(tmp_path / "reward")
    engine = stars.Engine(model, reward)
    params = stars.SamplingParams(max_tokens=9, seed=1, ignore_eos=True)
    output = engine.generate({"messages": [{"role": "user", "content": "The"}]}, params, stars.Sample(score=True),
                             use_tqdm=False)[0]
    pair = script.Pair("helpful", output.prompt_token_ids, output.outputs[0].token_ids, output.prompt_token_ids)
    with torch.no_grad():
        expected = script.rewards_at(made, [pair], [[]])[0, 0, 0].item()
    assert abs(output.outputs[0].reward - expected) < 1e-4 * max(1.0, abs(expected))


def test_a_budget_of_seconds_ends_a_run(script, model):
    made = script.new_scorer(model, 2, 4.0, torch.device("cpu"))
    facts, _ = script.train(made, pairs_of(script, 8), pairs_of(script, 4), 1e-3, 1e-9, Namespace(
        seed=0, batch=4, epochs=1000.0), "test")
    assert facts["steps"] == 1 and len(facts["checks"]) == 1


# -- figures ----------------------------------------------------------------------------------------------------------


def test_intervals_are_wilsons(script):
    """Their ends are the shares of which what was found is 1.96 standard deviations away."""
    for right, count in ((50, 100), (1, 7), (880, 1522), (0, 10), (10, 10)):
        for end in script.wilson(right, count):
            assert math.isclose((right / count - end) ** 2, script.Z**2 * end * (1 - end) / count, abs_tol=1e-12)
    low, high = script.wilson(50, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)


def test_figures_leave_out_what_cannot_be_told_apart(script):
    same = list(range(20))
    pairs = [script.Pair("helpful", [1], [*same, 30], [*same, 31, 32]), script.Pair("harmless", [1], [5], [6, 7]),
             script.Pair("harmless", [1], [8, 9], [9])]
    rewards = {id(pairs[0]): [[2.0, 0.0, 2.0, 2.0], [1.0, 0.0, 1.0, 1.0]],
               id(pairs[1]): [[0.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0]],
               id(pairs[2]): [[5.0, 5.0, 5.0, 5.0], [4.0, 4.0, 4.0, 4.0]]}
    found = script.figures_of(rewards, pairs)
    assert [found[name]["right"] for name in ("whole", "16", "32", "64")] == [2, 1, 2, 2]
    assert [found[name]["pairs"] for name in ("whole", "16", "whole, helpful", "whole, harmless")] == [3, 2, 1, 2]
    assert found["mean_reward"] == 2.5
    other = {key: [[row[0] for _ in row] for row in reversed(rows)] for key, rows in rewards.items()}
    facts = script.report({"reward": rewards, "judge": other}, pairs)
    assert facts["reward agrees with judge"]["right"] == 0 and facts["judge"]["whole"]["right"] == 1
    assert (facts["the longer reply"]["right"], facts["the longer reply"]["pairs"]) == (1, 3)
    assert script.accuracy([]) == {"pairs": 0}
