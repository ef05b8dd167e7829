"""Every policy by its name on the command line, on the shipped pair, and the table of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import stars
from stars.cli import main
from stars.cli.methods import all_methods, table
from stars.cli.options import shipped_pair
from stars.policies import POLICIES

README = Path(__file__).resolve().parents[1] / "README.md"
GENERATE = ["generate", "This film was", "--max-tokens", "9", "--seed", "3", "--json"]
THRESHOLD = ["--reward-threshold", "0.5"]
SETTINGS = {
    "stars": (["--set", "segment_size=4", "--set", "beta=0.25", "--set", "exhaust=relax:0.5", "--set", "barrier=true"],
              dict(segment_size=4, beta=0.25, exhaust="relax:0.5", barrier=True)),
    "cards": (["--set", "entropy_threshold=2.5", "--set", "option=hard"], dict(entropy_threshold=2.5, option="hard")),
    "sample": (["--set", "score=true"], dict(score=True)),
    "best-of-n": (["--set", "n=3"], dict(n=3)),
    "blockwise": (["--set", "k=[3, 2]", "--set", "segment_size=4"], dict(k=(3, 2), segment_size=4)),
    "rejection-sampling": (["--set", "max_attempts=3", "--beta", "0.25"], dict(max_attempts=3, beta=0.25)),
    "speculative-rejection": (["--set", "n=4", "--set", "segment_size=2"], dict(n=4, segment_size=2)),
    "segment-beam": (["--set", "beams=2", "--set", "candidates=3"], dict(beams=2, candidates=3)),
    "particle-filter": (["--set", "particles=3", "--set", "resampling=systematic"],
                        dict(particles=3, resampling="systematic")),
    "args": (["--set", "topk=4", "--set", "weight=2.5"], dict(topk=4, weight=2.5)),
    "rad": (["--set", "topk=4", "--set", "clamp=False"], dict(topk=4, clamp=False)),
    "token-guidance": (["--set", "guide=lm", "--set", "weight=0.5", "--set", "lm_weight=1", "--set", "score=true"],
                       dict(guide="lm", weight=0.5, lm_weight=1.0, score=True)),
    "mara": (["--set", "topk=7", "--set", "score=true"], dict(topk=7, score=True)),
}
"""Parameters of each policy as they are typed, and as Python has them."""


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_runs_by_its_name(capsys, name):
    """The same text as from Python, with what was set in force."""
    typed, given = SETTINGS[name]
    fields = next(method.parameters for method in all_methods() if method.name == name)
    assert set(given) <= set(fields) and all(given[key] != fields[key] for key in given), "nothing would be seen"
    threshold = "reward_threshold" in fields
    assert main([*GENERATE, "--policy", name, *typed, *(THRESHOLD if threshold else [])]) == 0
    row = json.loads(capsys.readouterr().out)
    policy = POLICIES[name](**given, **(dict(reward_threshold=0.5) if threshold else {}))
    heads = {"agent": Path(stars.__file__).parent / "demo_models/agent/model.safetensors"}
    engine = stars.Engine(*shipped_pair(), heads=heads if name == "mara" else None)
    [output] = engine.generate("This film was", stars.SamplingParams(max_tokens=9, seed=3), policy, use_tqdm=False)
    assert row["outputs"][0]["text"] == output.outputs[0].text
    assert row["outputs"][0]["reward"] == pytest.approx(output.outputs[0].reward, abs=1e-5)
    assert row["metrics"]["attempts_counted"] == output.metrics.attempts_counted


def test_a_calibration_is_saved_and_given(capsys, tmp_path):
    """The threshold and the beta that were measured, and the same text as with them given as numbers."""
    path = str(tmp_path / "c.json")
    assert main(["calibrate", "This film was", "--max-tokens", "40", "--num-samples", "4", "--seed", "2", "--save",
                 path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    saved = json.loads(Path(path).read_text())
    assert saved["reward_threshold"] == pytest.approx(found["reward_threshold"], abs=1e-9)
    assert set(found["correlations"]) == {"16", "32"} and found["beta"] == pytest.approx(0.1 * found["spread"])
    assert main([*GENERATE, "--calibration", path, "--beta", "auto", "--segment-size", "4"]) == 0
    auto = json.loads(capsys.readouterr().out)
    assert main([*GENERATE, f"--beta={saved['beta']!r}", f"--reward-threshold={saved['reward_threshold']!r}",
                 "--set", "segment_size=4"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert auto["outputs"] == numbers["outputs"]
    assert auto["metrics"]["attempts_counted"] == numbers["metrics"]["attempts_counted"]


@pytest.mark.parametrize(("flags", "code", "word"), [
    (["--policy", "stars", "--set", "gamma=1"], 2, "gamma"), (["--set", "beta"], 2, "KEY=VALUE"),
    (["--set", "beta=0.1", "--beta", "0.2"], 2, "beta is given twice"),
    (["--policy", "best-of-n", "--set", "n=2", "--best-of", "3"], 2, "n is given twice"),
    (["--policy", "best-of-n", "--calibration", "c.json"], 2, "--calibration"),
    (["--calibration", "c.json", "--reward-threshold", "1"], 2, "--calibration"),
    (["--calibration", "absent.json"], 1, "absent.json"), (["--set", "beta=much"], 1, "STARS.beta is 'much'"),
    (["--reward-threshold", "1", "--beta", "auto"], 1, "needs a calibration"),
    (["--set", "segment_size=[1,2]"], 1, "STARS.segment_size is (1, 2)"),
    (["--policy", "rejection-sampling", "--set", "exhaust=back_up"], 1, "RejectionSampling.plan()"),
    (["--reward-set", "close=eos", "--reward-close", "eos"], 2, "close is given twice"),
    (["--reward-set", "closes=eos"], 1, "is read as a CausalReward, which has no closes: it has head, template, close"),
    (["--reward-set", "aggregate=worst"], 1, "ProcessReward.aggregate is 'worst'"),
])
def test_parameters_that_do_not_fit(capsys, flags, code, word):
    try:
        found = main([*GENERATE, *flags])
    except SystemExit as exit_:
        found = exit_.code
    out, err = capsys.readouterr()
    assert found == code and not out and word in err.splitlines()[-1]


def test_the_readme_has_the_table_that_the_code_makes(capsys):
    assert main(["methods"]) == 0 and capsys.readouterr().out == table() + "\n"
    assert table() in README.read_text(encoding="utf8")
    assert main(["methods", "cards"]) == 0 and "H >= `entropy_threshold`" in capsys.readouterr().out
    assert main(["methods", "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)["methods"]
    assert [method["name"] for method in methods] == list(POLICIES) and all(method["summary"] for method in methods)
