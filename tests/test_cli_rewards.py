"""Rewards on the command line: sums of models, and a model behind a server."""

from __future__ import annotations

import json

import pytest

import stars
from reward_server import hangs_up, reward_of, serving

pytestmark = pytest.mark.usefixtures("one_torch_thread")

FLAGS = ["--max-tokens", "8", "--seed", "3", "--max-num-lanes", "8", "--max-num-seqs", "4", "--cache-tokens", "512",
         "--no-progress", "--json"]
STARS = ["--segment-size", "4", "--max-attempts", "3", "--reward-threshold", "1", "--alpha", "0.5"]
PROMPT = "The dog"


def row_of(out: str) -> dict:
    [line] = out.splitlines()
    return json.loads(line)["outputs"][0]


def test_a_sum_of_models(run, pair, tiny_model):
    """Weights belong to the rewards in their order, and are 1 where none is given."""
    other = str(tiny_model(family="qwen2", head="reward", tokenizer=True, chat_template=True))
    params = stars.SamplingParams(max_tokens=8, seed=3)
    for weights in ((), ("0.25", "-2")):
        flags = [word for weight in weights for word in ("--reward-weight", weight)]
        code, out, err = run("generate", PROMPT, *pair, "--reward", other, *flags, *FLAGS, *STARS)
        assert code == 0, err
        parts = list(zip((pair[3], other), map(float, weights or (1, 1)), strict=True))
        engine = stars.Engine(pair[1], stars.WeightedReward(parts), max_num_lanes=8, max_num_seqs=4, cache_tokens=512)
        [direct] = engine.generate(PROMPT, params, stars.STARS(4, 3, 0.5, reward_threshold=1.0), use_tqdm=False)
        found = row_of(out)
        assert found["token_ids"] == direct.outputs[0].token_ids
        assert found["reward"] == pytest.approx(direct.outputs[0].reward, abs=1e-5)


def test_a_model_behind_a_server(run, pair, monkeypatch):
    """Alone, and weighed against one that is here; with its key, its name and its API."""
    monkeypatch.setenv("RM_KEY", "sk-0123456789")
    with serving() as server:
        flags = ["--reward-url", server.url, "--reward-model", "rm", "--reward-key-env", "RM_KEY", "--reward-label",
                 "0", "--reward-timeout", "5", "--reward-retries", "0", "--reward-api", "classify"]
        code, out, err = run("generate", PROMPT, *pair[:2], *flags, *FLAGS, *STARS)
        assert code == 0, err
        found = row_of(out)
        assert found["reward"] == reward_of((PROMPT + found["text"]).rstrip("\ufffd"))
        assert {body["model"] for body in server.bodies} == {"rm"} and server.bodies[0]["input"] == [PROMPT]
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-0123456789"}
        code, out, err = run("generate", PROMPT, *pair, "--reward-weight", "0", "--reward-weight", "2", *flags, *FLAGS,
                             "--policy", "sample", "--reward-template", "raw")
        found = row_of(out)
        assert found["reward"] == 2 * reward_of((PROMPT + found["text"]).rstrip("\ufffd"))
        code, out, err = run("calibrate", PROMPT, *pair[:2], *flags, *FLAGS[:4], "--num-samples", "2", "--json")
        assert code == 0 and json.loads(out)["samples"] == 2
        server.usual = hangs_up
        code, out, err = run("generate", PROMPT, *pair[:2], *flags, *FLAGS, *STARS)
        assert code == 1 and "sk-0123" not in out + err
        assert json.loads(out)["error"].startswith(f"the reward server at {server.url}/classify could not be reached")


def test_an_implicit_reward(run, pair, tiny_model):
    """Alone, with its parameters, and in a sum after a reward model, whose class has parameters of its own."""
    models = [str(tiny_model(tokenizer=True, chat_template=True, seed=seed)) for seed in (5, 6)]
    params, policy = stars.SamplingParams(max_tokens=8, seed=3), stars.STARS(4, 3, 0.5, reward_threshold=1.0)
    own = ["--reward-implicit", *models, "--reward-set", "beta=0.5", "--reward-set", "length_normalised=True"]
    implicit = [dict(beta=0.5, length_normalised=True), dict(beta=2.0)]
    for flags, made in (
            (own, lambda: stars.ImplicitReward(*models, **implicit[0])),
            (["--reward", pair[3], "--reward-implicit", *models, "--reward-set", "beta=2", "--reward-set", "close=eos",
              "--reward-weight", "0.5", "--reward-weight", "-1"], lambda: stars.WeightedReward([
                  (stars.CausalReward(pair[3], close="eos"), 0.5), (stars.ImplicitReward(*models, **implicit[1]), -1.0)
              ]))):
        code, out, err = run("generate", PROMPT, *pair[:2], *flags, *FLAGS, *STARS)
        assert code == 0, err
        engine = stars.Engine(pair[1], made(), max_num_lanes=8, max_num_seqs=4, cache_tokens=512)
        [direct] = engine.generate(PROMPT, params, policy, use_tqdm=False)
        found = row_of(out)
        assert found["token_ids"] == direct.outputs[0].token_ids
        assert found["reward"] == pytest.approx(direct.outputs[0].reward, abs=1e-5)
    code, out, err = run("calibrate", PROMPT, *pair[:2], *own, *FLAGS[:4], "--num-samples", "2", "--json")
    assert code == 0 and json.loads(out)["samples"] == 2


@pytest.mark.parametrize("flags, code, problem", [
    (["--reward-implicit", "one"], 2, "expected 2 arguments"),
    (["--reward-implicit", "a", "b", "--reward-close", "eos"], 2, "belong to --reward, which is not given, and "),
    (["--reward-implicit", "a", "b", "--reward-set", "alpha=1"], 2, "only as beta and length_normalised"),
    (["--reward-implicit", "a", "b", "--reward-set", "beta=0"], 1, "ImplicitReward.beta is 0, it must be"),
    (["--reward-implicit", "no/a", "no/b"], 1, "no/a is not a directory here"),
])
def test_flags_of_an_implicit_reward_that_do_not_go_together(run, pair, flags, code, problem):
    found, _, err = run("generate", PROMPT, *pair[:2], *flags, *FLAGS)
    assert found == code and problem in err


@pytest.mark.parametrize("flags, code, problem", [
    (["--reward-model", "rm"], 2, "belong to --reward-url, which is not given"),
    (["--reward-weight", "1", "--reward-weight", "2"], 2, "is given 2 times for 1 rewards: give it once for each"),
    (["--reward-url", "http://host", "--reward-weight", "1"], 2, "is given 1 times for 2 rewards"),
    (["--reward-weight", "nan"], 2, "invalid finite number value"),
    (["--reward-url", "nowhere"], 1, "RemoteReward.url is 'nowhere', it must be an address"),
    (["--reward-url", "http://host", "--reward-timeout", "0"], 1, "RemoteReward.timeout is 0"),
    (["--reward-url", "http://host", "--reward-key-env", "NO_SUCH_KEY"], 1, "there is none of that name"),
    (["--reward", "no/such"], 1, "no/such is not a directory here"),
])
def test_flags_that_do_not_go_together(run, pair, flags, code, problem):
    found, _, err = run("generate", PROMPT, *pair, *flags, *FLAGS)
    assert found == code and problem in err


def test_what_a_server_does_is_not_asked_of_it(run, pair):
    found, _, err = run("generate", PROMPT, *pair[:2], "--reward-url", "http://host", "--reward-close", "eos", *FLAGS)
    assert found == 2 and "--reward-close and --reward-set belong to --reward" in err
