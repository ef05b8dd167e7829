"""What `calibrate` measures, how policies take it, and where it warns of a reward that is not comparable."""

from __future__ import annotations

import copy
import json
import math
import pickle

import numpy as np
import pytest

import stars
from stars.calibration import BETA_OF_SPREAD, Calibration, PlainSample
from toy import ToyModel, toy_engine

PROMPTS = [{"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": [2, 2]}]
PARAMS = stars.SamplingParams(max_tokens=24, seed=5, ignore_eos=True)


def engine(fn):
    return toy_engine(ToyModel(vocab=9, seed=2), stars.FunctionReward(
        lambda prompt, responses: [float(fn(ids)) for ids in responses], inputs="ids"))


def weighed(ids):
    """A mean, whose prefixes lie where finished texts do."""
    return np.mean([[0.3, -1.0, 2.0, 0.1, -0.4, 1.5, -2.0, 0.9, 0.0][token] for token in ids]) if ids else 0.0


def test_the_figures_are_those_of_the_samples():
    """Every figure again, by numpy, from plain samples that were cut and scored by hand."""
    found = engine(weighed).calibrate(PROMPTS, PARAMS, quantile=0.8, num_samples=12, segment_size=4)
    outputs = engine(weighed).generate(PROMPTS, stars.SamplingParams(max_tokens=24, seed=5, ignore_eos=True, n=12),
                                       stars.BlockwiseBestOfK(k=1, segment_size=4), use_tqdm=False)
    texts = [[completion.token_ids for completion in output.outputs] for output in outputs]
    rewards = np.array([[weighed(ids) for ids in own] for own in texts])
    assert float(found) == found.reward_threshold == pytest.approx(np.quantile(rewards, 0.8))
    assert found.spread == pytest.approx(np.sqrt(rewards.var(axis=1, ddof=1).mean()))
    assert found.beta == BETA_OF_SPREAD * found.spread and found.mean == pytest.approx(rewards.mean())
    assert (found.samples, found.prompts, found.quantile) == (24, 2, 0.8)
    assert list(found.correlations) == list(found.drifts) == [4, 8, 16]
    for tokens in (4, 8, 16):
        early = np.array([[weighed(ids[:tokens]) for ids in own] for own in texts])
        assert found.correlations[tokens] == pytest.approx(np.corrcoef(early.ravel(), rewards.ravel())[0, 1])
        assert found.drifts[tokens] == pytest.approx((early - rewards).mean() / found.spread)
        assert found.rises[tokens] == pytest.approx(np.sign(rewards - early).mean())
    assert found.correlations[4] < found.correlations[16]
    assert found.quantiles[0.5] == pytest.approx(np.median(rewards)) and found.quantiles[1.0] == rewards.max()
    assert found.warning is None


@pytest.mark.parametrize(("fn", "said"), [
    (len, "spreads below those of finished texts"),
    (lambda ids: sum(token % 2 for token in ids), "spreads below those of finished texts"),
    (lambda ids: -len(ids), "spreads above those of finished texts"),
    (lambda ids: sum(pair == (1, 1) for pair in zip(ids, ids[1:], strict=False)), "4 tokens nearly always rise"),
    (lambda ids: -sum(pair == (1, 1) for pair in zip(ids, ids[1:], strict=False)), "4 tokens nearly always fall"),
    (lambda ids: ids[-1] if ids else 0, "hardly foretell"),
], ids=["a length", "a count", "a penalty on length", "a rare word", "a penalty on a rare word", "the last token"])
def test_a_reward_that_is_not_comparable_is_said(fn, said):
    """A length, counts of a token and of what is rare, whose drift is small, a reward of the last token alone."""
    with pytest.warns(UserWarning, match=said):
        engine(fn).calibrate(PROMPTS, PARAMS, num_samples=12, segment_size=4)


def test_it_is_the_float_of_before_and_what_policies_take():
    found = engine(weighed).calibrate(PROMPTS, PARAMS, num_samples=6)
    assert isinstance(found, float) and f"{found:.3f}" == f"{float(found):.3f}" and found + 1 == float(found) + 1
    policy = stars.STARS(reward_threshold=found, beta="auto")
    assert policy == stars.STARS(reward_threshold=float(found), beta=found.beta)
    assert type(policy.reward_threshold) is type(policy.beta) is float
    assert stars.STARS(reward_threshold=found).beta == 0.7
    with pytest.raises(stars.RequestError, match='STARS.beta="auto" needs a calibration'):
        stars.STARS(reward_threshold=1.0, beta="auto")
    with pytest.raises(stars.RequestError, match="STARS.beta is 'much', it must be"):
        stars.STARS(reward_threshold=found, beta="much")
    with pytest.raises(AttributeError, match="cannot be changed"):
        found.beta = 1.0


def test_it_is_saved_and_copied_whole(tmp_path):
    found = Calibration.measure(
        [[PlainSample(1.0, {4: 0.0}), PlainSample(2.0, {4: 0.0}), PlainSample(3.5, {4: 0.0})]], 0.5)
    assert math.isnan(found.correlations[4])  # the prefixes are constant
    found.save(tmp_path / "c.json")
    json.loads((tmp_path / "c.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    for same in (Calibration.load(tmp_path / "c.json"), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert float(same) == 2.0 and repr(same) == repr(found)
        facts, given = vars(same), vars(found)
        assert {name: value for name, value in facts.items() if name != "correlations"} == {
            name: value for name, value in given.items() if name != "correlations"}
        assert math.isnan(same.correlations[4])


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": "stars-calibration"}', "null", "[" * 100_000,
                                  '{"format": "stars-calibration", "reward_threshold": "1"}'])
def test_a_file_that_is_no_calibration(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(stars.RequestError, match="c.json is no calibration: write one with"):
        Calibration.load(tmp_path / "c.json")


@pytest.mark.parametrize("name, value", [("mean", 10**400), ("correlations", {"4": 10**400}), ("samples", math.inf),
                                         ("drifts", {}), ("correlations", {"8": 1.0}), ("rises", {})])
def test_a_calibration_with_a_number_that_is_none(tmp_path, name, value):
    samples = [PlainSample(float(index), {4: index % 2.0}) for index in range(3)]
    record = Calibration.measure([samples], 0.5).record()
    (tmp_path / "c.json").write_text(json.dumps(record | {name: value}))
    with pytest.raises(stars.RequestError, match="c.json is no calibration: write one with"):
        Calibration.load(tmp_path / "c.json")


def test_of_few_samples():
    """One sample of each prompt: the spread is that of all; one in all: there is none, and nothing is compared."""
    ones = Calibration.measure([[PlainSample(1.0, {})], [PlainSample(3.0, {})]], 0.5)
    assert ones.spread == pytest.approx(math.sqrt(2.0)) and ones.correlations == {}
    few = Calibration.measure([[PlainSample(float(r), {4: 0.0}) for r in range(15)]], 0.5)
    assert few.drifts[4] < -1.0 and few.warning is None  # as many may differ by chance
    one = Calibration.measure([[PlainSample(1.0, {4: 1.0})]], 0.5)
    assert one.spread == one.beta == 0.0 and one.correlations == {} and one.warning is None
    rewards = (-math.inf, 1.0, 2.0)
    infinite = Calibration.measure([[PlainSample(reward, {4: 1.0}) for reward in rewards]], 0.9)
    assert infinite.spread == pytest.approx(math.sqrt(0.5)) and float(infinite) == pytest.approx(1.8)
    assert infinite.quantiles[0.1] == infinite.quantiles[0.25] == -math.inf and infinite.correlations == {}
