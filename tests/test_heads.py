"""Reward heads of every kind: found by their tensors, equal to formulas in float64 however the text got into the cache,
and refused by name where they do not fit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import stars
from building import PADDED, UNPADDED, config_of, work_as
from editing import edit_config, edit_tensors
from stars.errors import ModelError, RequestError, RewardError
from stars.kernels.dispatch import references_only
from stars.kernels.linear import Weight
from stars.model.loader import inspect_model, load_model
from stars.model.tokenizer import load_tokenizer
from stars.prompt import parse_prompt
from stars.reward import resolve_reward
from stars.reward.base import Candidate
from test_hostile_model import bad_values, good_or_refused
from tiny_heads import HEADS, HIDDEN, PATTERN, write_head

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TOLERANCE = 2e-4  # rewards of order 1 to 10 in float32, through two layers and up to four products
PROMPT = [1, 40, 3, 9, 33, 3, 9, 71, 15]  # with PATTERN twice
PLACE = 5  # of its last occurrence
OTHER = [1, 40, 3, 9, 33, 60]  # which begins as that does
GATED = ("gated", "quantiles")
FUSED = ("row", "row with bias", "value_head, normalised", "regression_head", "v_head of a file", "score model",
         "cost model", "cost model, as it is", "one of three", "vocabulary row")
"""Heads that end as a row, whose product the norm's kernel forms."""


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """written(kind): (directory, choice of the head, the reward of ids and the pattern's place)."""
    made = {}

    def get(kind: str):
        if kind not in made:
            directory = tmp_path_factory.mktemp("head")
            made[kind] = directory, *write_head(directory, kind, seed=3)
        return made[kind]

    return get


@pytest.fixture
def changed(written, tmp_path):
    """changed(kind): a copy of its directory, to be changed."""

    def copy(kind: str):
        return shutil.copytree(written(kind)[0], tmp_path / f"copy{len(list(tmp_path.iterdir()))}")

    return copy


@pytest.fixture(scope="session")
def model(tiny_model):
    return tiny_model(seed=5)  # without a tokenizer, as the reward models are: ids are passed through


def bound(directory, choice="auto", **sizes) -> stars.CausalReward:
    reward = stars.CausalReward(directory, head=choice)
    reward.bind(None, 97, config_of(**{"cache_tokens": 512, "page_size": 4, "max_segment_size": 5, **sizes}))
    return reward


def opened(reward: stars.CausalReward, ids: list[int]):
    prompt = parse_prompt({"prompt_token_ids": ids}, None, 97)
    reward.check(prompt, 30)
    session = reward.open(prompt, 30)
    assert reward.reserve(session, 30)
    return session


def started(reward: stars.CausalReward, ids: list[int]):
    session = opened(reward, ids)
    reward.start([session])
    return session


# -- equal to what is written out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_gives_its_formula(written, kind):
    """From scratch and growing; a fork, and two sessions of one beginning; what lies in no page and what does."""
    check_formula(written, kind)


@pytest.mark.parametrize("kind", ["row with bias", "mlp", "gated"])
def test_without_libstars(written, kind):
    with references_only():
        check_formula(written, kind)


def check_formula(written, kind: str) -> None:
    directory, choice, wanted = written(kind)
    reward = bound(directory, choice)
    assert isinstance(reward.decoder.score_head, Weight) == (kind in FUSED)
    session, other = started(reward, PROMPT), started(reward, OTHER)
    texts = [[20, 21, 22], [20, 50], [88]]
    for ids, place, held in ((PROMPT, PLACE, session), (OTHER, 2, other)):
        scored = reward.score([Candidate(held, text, None) for text in texts])
        for one, text in zip(scored, texts, strict=True):
            assert one.reward == pytest.approx(wanted(ids + text, place), abs=TOLERANCE)
        fork = reward.fork(held)
        reward.discard(scored[2].handle)
        assert reward.reserve(fork, 30)
        reward.commit([(held, scored[0].handle), (fork, scored[1].handle)])
        for holder, text in ((fork, texts[1]), (held, texts[0])):
            longer = text + list(range(30, 43))  # more than a slab holds
            [near, far] = reward.score([Candidate(holder, text + [9], None), Candidate(holder, longer, None)])
            assert near.reward == pytest.approx(wanted(ids + text + [9], place), abs=TOLERANCE)
            assert far.reward == pytest.approx(wanted(ids + longer, place), abs=TOLERANCE)
            reward.discard(near.handle)
            reward.discard(far.handle)
    rewards = [wanted(PROMPT + [token], PLACE) for token in (20, 21, 22)]
    assert max(rewards) - min(rewards) > 20 * TOLERANCE


@pytest.mark.parametrize("kind", ["mlp", "labels", "gated", "quantiles"])
@pytest.mark.parametrize("target", [None, UNPADDED, PADDED], ids=["cpu", "unpadded", "padded"])
def test_rewards_of_an_engine(written, model, monkeypatch, kind, target):
    """Of STARS, through drafts that are trailed, shared prompts, several widths, and requests that give way."""
    if target is not None:
        work_as(monkeypatch, target)
    directory, choice, wanted = written(kind)
    reward = stars.CausalReward(directory, head=choice)
    engine = stars.Engine(model, reward, cache_tokens=64, max_model_len=32, max_num_seqs=6, max_num_lanes=12,
                          max_segment_size=4, page_size=4)
    gave_way = []
    preempt = engine._scheduler._preempt
    monkeypatch.setattr(engine._scheduler, "_preempt", lambda unit: gave_way.append(unit) or preempt(unit))
    params = stars.SamplingParams(max_tokens=11, n=3, seed=2, ignore_eos=True)
    prompts = [{"prompt_token_ids": PROMPT}, {"prompt_token_ids": OTHER}, {"prompt_token_ids": PROMPT}]
    middle = wanted(PROMPT + [20], PLACE)
    policy = stars.STARS(segment_size=4, max_attempts=4, beta=0.5, reward_threshold=middle + 0.1, width=2)
    for output, (ids, place) in zip(engine.generate(prompts, params, policy, use_tqdm=False),
                                    [(PROMPT, PLACE), (OTHER, 2), (PROMPT, PLACE)], strict=True):
        for one in output.outputs:
            assert one.reward == pytest.approx(wanted(ids + one.token_ids, place), abs=TOLERANCE), one.finish_reason
    engine.check_integrity()
    assert gave_way


def test_a_gate_is_read_once_a_prompt_and_kept(written, monkeypatch):
    """One row for each prompt that is new, whatever its pages are shared with; none for siblings, forks and those that
    come back. Deterministic, its bits are the same alone and among others, in chunks and whole."""
    directory, choice, _ = written("gated")
    gates = []
    for chunk in (None, 5):
        reward = bound(directory, choice, deterministic=True, page_size=2, max_num_batched_tokens=chunk)
        rows: list[int] = []
        states = reward._passes.states
        monkeypatch.setattr(reward._passes, "states", lambda spans, states=states, rows=rows: (
            rows.append(len(spans)) or states(spans)))
        sessions = [opened(reward, ids) for ids in (PROMPT, OTHER, PROMPT[:8], [1, 3, 9])]
        waiting = list(sessions)
        while waiting:
            waiting = waiting[reward.start_in_chunks(waiting, chunk).done:]
        assert sum(rows) == 3, "PROMPT and what it begins with have their last pattern at one place"
        again, fork = started(reward, PROMPT), reward.fork(sessions[0])
        assert sum(rows) == 3 and again.gate == fork.gate == sessions[0].gate == sessions[2].gate
        alone = bound(directory, choice, deterministic=True)
        assert started(alone, OTHER).gate == sessions[1].gate != sessions[0].gate
        gates.append([session.gate for session in sessions])
        assert reward.cache.num_free_slabs == reward.cache.num_slabs
    assert gates[0] == gates[1]
    assert len(gates[0][0]) == 7 and sum(gates[0][0]) == pytest.approx(1.7, abs=1e-6)


def test_deterministic_rewards_do_not_depend_on_the_batch(written):
    for kind in ("mlp", *GATED):
        directory, choice, _ = written(kind)
        reward = bound(directory, choice, deterministic=True)
        session = started(reward, PROMPT)
        texts = [[20 + index, 50] for index in range(7)]
        together = [one.reward for one in reward.score([Candidate(session, text, None) for text in texts])]
        reward = bound(directory, choice, deterministic=True)
        session = started(reward, PROMPT)
        alone = []
        for text in texts:
            [one] = reward.score([Candidate(session, text, None)])
            reward.discard(one.handle)
            alone.append(one.reward)
        assert together == alone and len(set(alone)) == 7


def test_bfloat16_leaves_heads_in_float32(written):
    directory, choice, _ = written("gated")
    exact, rounded = load_model(directory, head="reward", reward_head=choice).score_head, load_model(
        directory, head="reward", reward_head=choice, dtype="bfloat16").score_head
    assert len(exact.products) == 4 and all(torch.equal(one.dense(), other.dense())
                                            for one, other in zip(exact.products, rounded.products, strict=True))


# -- found, chosen, shown ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
def test_inspect_shows_every_head(written, run, kind):
    directory, choice, _ = written(kind)
    flags = [] if choice == "auto" else ["--reward-head", choice if isinstance(choice, str) else json.dumps(choice)]
    code, out, _ = run("inspect", directory, "--json", *flags)
    facts = json.loads(out)
    head = facts["reward_head"]
    assert code == 0 and facts["head"] == "reward" and facts["loads"] and not facts["missing"] + facts["unexpected"]
    held = load_file(directory / "model.safetensors")
    if (directory / "value_head.safetensors").is_file():
        held |= load_file(directory / "value_head.safetensors")
    assert head["tensors"] == {name: list(held[name].shape) for name in head["tensors"]} != {}
    expected = {"gated": "gated", "quantiles": "quantiles", "labels": "labels", "vocabulary row": "vocabulary"}
    assert head["kind"] == expected.get(kind, head["kind"])
    assert head["pooling"] == ("step tags" if kind in ("labels", "mlp of labels") else "last token")
    assert (head["std"] is not None) == ("normalised" in kind or "model" in kind)
    assert head["sign"] == (-1 if kind == "cost model" else 1)
    code, out, _ = run("inspect", directory, *flags)
    assert code == 0 and all(name in out for name in list(head["tensors"])[:8]) and "head tensors" in out


def test_inspect_of_a_language_model_and_of_a_process_model(tiny_model, written, run):
    code, out, _ = run("inspect", tiny_model(), "--json")
    assert code == 0 and json.loads(out)["reward_head"] is None
    code, out, _ = run("inspect", written("mlp of labels")[0])
    assert code == 0 and "MLP, 2 labels, softmax of label 1" in out and "<extra_0> after each" in out
    head = json.loads(run("inspect", written("mlp of labels")[0], "--json")[1])["reward_head"]
    assert head["pooling"] == "step tags" and head["template"] == "chat"
    code, out, _ = run("inspect", written("quantiles")[0])
    assert code == 1 and "prompt_pattern" in out
    code, out, _ = run("inspect", tiny_model(), "--reward-head", "lm_head")
    assert code == 0 and "row 0 of the language model head" in out


def test_the_command_line_takes_a_head(written, model, run, pair, tmp_path):
    flags = ["--max-tokens", 3, "--seed", 1, "--policy", "sample", "--json", "--cache-tokens", 256]
    for kind in ("one of three", "mlp of labels"):
        directory = tmp_path / kind
        choice, wanted = write_head(directory, kind, tokenizer=True, chat_template=True)
        chosen = ["--reward-head", json.dumps(choice)] if choice != "auto" else ["--reward-close", "none"]
        code, out, err = run("generate", "The dog", *pair[:2], "--reward", directory, *chosen, *flags)
        if kind == "mlp of labels":
            assert code == 1 and "is read as a ProcessReward, which has no close: it has step_separator" in err
            continue
        output = json.loads(out)["outputs"][0]
        ids = load_tokenizer(directory).encode("The dog") + output["token_ids"]
        assert code == 0 and output["reward"] == pytest.approx(wanted(ids), abs=TOLERANCE)
    directory, choice, wanted = written("one of three")
    assert run("generate", "--input", "-", "--model", model, "--reward-head", "auto", *flags)[0] == 2
    code, _, err = run("generate", "The", "--model", model, "--reward", directory, "--reward-head", "heads", *flags)
    assert code == 1 and "CausalReward.head is 'heads'" in err
    code, _, err = run("generate", "The", "--model", model, "--reward", directory, "--reward-head", "{rows", *flags)
    assert code == 2 and "reward-head" in err


def test_values_of_files_beside_are_no_harm_to_a_language_model(written):
    """LlamaFactory leaves a value head beside policies, too."""
    directory, _, _ = written("v_head of a file")
    assert load_model(directory).head is not None
    assert inspect_model(directory, "lm").head == "lm" and inspect_model(directory).head == "reward"


def test_tied_rows_of_the_vocabulary(tiny_model):
    directory = tiny_model(tied=True, seed=4)
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    head = load_model(directory, head="reward", reward_head={"tensor": "lm_head", "rows": [5]}).score_head
    assert torch.equal(head.dense().float(), embedding[5:6])


def test_one_of_several_heads_is_chosen(changed):
    directory = changed("row")
    row = torch.ones(1, HIDDEN)
    edit_tensors(directory, v_head__weight=row, value_head__weight=2 * row)
    message = r"has 3 reward heads \(score, v_head, value_head\): choose one with head='score'"
    with pytest.raises(ModelError, match=message):
        load_model(directory, head="reward")
    assert not inspect_model(directory).reward_head
    for name, value in (("v_head", 1.0), ("value_head", 2.0), ("value_head.weight", 2.0)):
        choice = {"tensor": name} if "." in name else name
        head = load_model(directory, head="reward", reward_head=choice).score_head
        assert head.dense().float().eq(value).all()
    edit_tensors(directory, own__weight=3 * row)
    head = load_model(directory, head="reward", reward_head={"tensor": "own", "mean": 1, "std": 2}).score_head
    assert head.bias == -0.5 and head.dense().float().eq(1.5).all()
    edit_config(directory, value_head_prefix="own")
    with pytest.raises(ModelError, match="has 4 reward heads"):
        load_model(directory, head="reward")


# -- what does not fit ------------------------------------------------------------------------------------------------

AGAIN = "use config.json of the same checkpoint"
BAD = [
    ("mlp", {"score__2__weight": ..., "score__2__bias": ...}, {}, r"gives 36 labels \(score.0.weight is \[36, 36\]\)"),
    ("mlp", {"score__0__weight": ..., "score__0__bias": ...}, {}, "no reward head score.weight: use a checkpoint with "
     "architectures LlamaForSequenceClassification, or, if it is score.2.weight, say so"),
    ("mlp", {"score__1__weight": torch.zeros(36, 36)}, {}, "has products 0, 1, 2 of score where 0, 2, … are needed"),
    ("mlp", {"score__2__bias": ...}, {}, r"lacks 1 tensor \(score.2.bias\)"),
    ("mlp", {"score__2__weight": torch.zeros(1, 35)}, {}, r"score.2.weight of .* shape \[1, 35\] .* \[1, 36\] "
     r"\(1, rows of score.0.weight\): " + AGAIN),
    ("mlp", {"score__0__weight": torch.zeros(36, 40)}, {},
     r"score.0.weight of .* \[36, 40\] .* \[36, 36\] \(36, hidden_size\)"),
    ("mlp", {"score__0__weight": torch.zeros(36, 36).long()}, {}, "score.0.weight of .* is stored as I64"),
    ("mlp", {"score__2__more": torch.zeros(1)}, {}, r"has 1 tensor \(score.2.more\) that a llama model"),
    ("row", {"score__weight": torch.zeros(HIDDEN)}, {}, r"score.weight of .* shape \[36\] where .* \[1, 36\]"),
    ("row", {"score__weight": torch.zeros(1, 48)}, {}, r"score.weight of .* shape \[1, 48\] where .* \[1, 36\]"),
    ("row", {"score__weight": ..., "reward__weight": torch.zeros(1, HIDDEN)}, {}, "if it is reward.weight, say so"),
    ("row with bias", {"score__bias": torch.zeros(2)}, {}, r"score.bias of .* shape \[2\] where .* \[1\]"),
    ("labels", {}, {"architectures": ["LlamaForSequenceClassification"]},
     "gives 2 labels .* say which row it is with head"),
    ("labels", {}, {"normalize_reward": True, "mean": 0.0, "std": 2.0}, "has a reward after softmax, which is neither"),
    ("one of three", {}, {}, r"gives 3 labels \(score_head.weight is \[3, 36\]\) where a reward is one number"),
    ("score model", {"normalizer__var": torch.tensor([0.0])}, {}, "says do_normalize and it has no usable tensor "
     "normalizer.var of one number"),
    ("score model", {"normalizer__mean": ...}, {}, "no usable tensor normalizer.mean"),
    ("score model", {}, {"score_type": "joy"}, "score_type = 'joy' where reward, cost or critic"),
    ("score model", {}, {"do_normalize": 1}, "do_normalize = 1 where true or false"),
    ("gated", {"reward_transform_matrix": ...}, {}, r"lacks 1 tensor \(reward_transform_matrix\)"),
    ("gated", {"gating__logit_scale": ...}, {}, r"lacks 1 tensor \(gating.logit_scale\)"),
    ("gated", {"gating__layers__2__weight": torch.zeros(6, 11)}, {}, r"gating.layers.2.weight of .* \[6, 11\] .* "
     r"\[7, 11\] \(num_objectives, rows of gating.layers.1.weight\)"),
    ("gated", {"gating__layers__1__weight": torch.zeros(11, 12)}, {}, r"gating.layers.1.weight of .* \[11, 12\]"),
    ("gated", {f"gating__layers__{index}__weight": ... for index in range(3)}, {}, "and no gate of them"),
    ("gated", {}, {"num_objectives": 6}, "gives 6 objectives of 1 quantiles and regression_layer.weight has 7 rows"),
    ("gated", {}, {"num_objectives": "7"}, "num_objectives = '7' where a positive integer"),
    ("gated", {}, {"gating_temperature": 0}, "gating_temperature = 0, which must be positive"),
    ("gated", {}, {"gating_temperature": "warm"}, "gating_temperature = 'warm', which must be positive"),
    ("gated", {}, {"normalize_reward": True, "mean": 0.0, "std": 2.0}, "has a mean and std of rewards and a gate"),
    ("quantiles", {}, {"num_quantiles": 4},
     "gives 5 objectives of 4 quantiles and regression_layer.weight has 15 rows"),
    ("quantiles", {"gating__layers__2__running_var": torch.ones(3)}, {}, r"gating.layers.2.running_var of .* \[3\]"),
    ("quantiles", {"gating__layers__2__running_mean": ...}, {}, "lacks 1 tensor .gating.layers.2.running_mean"),
]


@pytest.mark.parametrize(("kind", "tensors", "config", "message"), BAD)
def test_a_head_that_does_not_fit_is_refused_by_name(written, changed, kind, tensors, config, message):
    directory = changed(kind)
    edit_tensors(directory, **tensors)
    edit_config(directory, **config)
    choice = {"prompt_pattern": list(PATTERN)} if kind in GATED else "auto"
    with pytest.raises(ModelError, match=message) as raised:
        load_model(directory, head="reward", reward_head=choice)
    assert "\n" not in str(raised.value)
    if kind in GATED and "no gate" in message:
        assert "logit_scale" not in inspect_model(directory, reward_head={"rows": [3]}).missing


@pytest.mark.parametrize(("kind", "keys"), [
    ("gated", ("num_objectives", "num_quantiles", "gating_temperature", "architectures")),
    ("score model", ("do_normalize", "score_type", "value_head_prefix", "id2label")),
    ("value_head, normalised", ("normalize_reward", "mean", "std", "value_head_prefix")),
])
@pytest.mark.filterwarnings("ignore:.*does not say normalize_reward")
def test_every_key_of_a_head_with_every_bad_value(written, changed, kind, keys):
    directory, choice = changed(kind), written(kind)[1]
    config = json.loads((directory / "config.json").read_text())
    for key in keys:
        for value in bad_values():
            (directory / "config.json").write_text(json.dumps({**config, key: value}))
            for read in (lambda: load_model(directory, head="reward", reward_head=choice),
                         lambda: inspect_model(directory, reward_head=choice)):
                good_or_refused(read)


@pytest.mark.parametrize(("choice", "message"), [
    ("heads", 'head is \'heads\', it must be "auto", one of score'),
    (3, 'head is 3, it must be "auto", the name of a tensor, or a dict'),
    ({"row": [0]}, "head has 'row', which is none of tensor, rows"),
    ({"tensor": ""}, "head.tensor is '', it must be the name of a tensor"),
    ({"rows": 0}, "head.rows is 0, it must be a list of row numbers"),
    ({"rows": []}, r"head.rows is \[\], it must be"),
    ({"rows": [True]}, r"head.rows is \[True\], it must be"),
    ({"rows": [1, 1]}, r"head.rows is \[1, 1\], it must be one row, or two"),
    ({"rows": [0, 1, 2]}, r"head.rows is \[0, 1, 2\], it must be one row, or two"),
    ({"activation": "relu"}, "head.activation is 'relu', it must be one of none, sigmoid, softmax"),
    ({"mean": 1.0}, "head has one of mean and std"),
    ({"mean": 1.0, "std": 0.0}, "head.std is 0.0, it must be a positive number"),
    ({"mean": float("nan"), "std": 1.0}, "head.mean is nan, it must be a number"),
    ({"sign": 0}, "head.sign is 0, it must be 1, or -1"),
    ({"prompt_pattern": ["<s>"]}, r"head.prompt_pattern is \['<s>'\], it must be a list of token ids"),
])
def test_choices_that_are_none(choice, message):
    with pytest.raises(RewardError, match="CausalReward." + message):
        stars.CausalReward("anywhere", head=choice)


@pytest.mark.parametrize(("kind", "choice", "message"), [
    ("row", "v_head", "has no tensor v_head.weight, and its heads are score: name another one"),
    ("row", {"rows": [1]}, r"head.rows is \[1\] and score.weight of .* has 1 rows"),
    ("row", {"activation": "softmax"}, 'head.activation is "softmax" and score.weight of .* has one row'),
    ("row", {"prompt_pattern": [1]}, "head.prompt_pattern is of a gate, and the head of .* has none"),
    ("row", {"temperature": 2}, "head.temperature is of a gate"),
    ("labels", {"sign": -1}, "has a reward after softmax, which is neither normalised nor of another sign"),
    ("vocabulary row", "auto", "no reward head score.weight: .* if it is a row of lm_head.weight, say so with head="),
    ("vocabulary row", {"tensor": "lm_head", "rows": [97]},
     r"head.rows is \[97\] and lm_head.weight of .* has 97 rows"),
    ("vocabulary row", {"tensor": "lm_head", "activation": "softmax"},
     "give two rows, the second of which is the good"),
    ("gated", "auto", "reads the prompt at tokens that are not known for this vocabulary of 97: say them with head"),
    ("gated", {"prompt_pattern": [97]}, "reads the prompt at tokens that are not known"),
    ("gated", {"prompt_pattern": [3], "activation": "sigmoid"}, "is weighted by a gate: leave it out"),
])
def test_choices_that_a_model_does_not_have(written, kind, choice, message):
    with pytest.raises(ModelError, match=message):
        load_model(written(kind)[0], head="reward", reward_head=choice)


def test_a_prompt_without_the_pattern_ends_its_request_alone(written, model):
    directory, choice, wanted = written("gated")
    engine = stars.Engine(model, stars.CausalReward(directory, head=choice), cache_tokens=256, max_model_len=64)
    params = stars.SamplingParams(max_tokens=4, seed=2, ignore_eos=True)
    policy = stars.Sample(score=True)
    bad = {"prompt_token_ids": [1, 40, 9, 3, 33]}
    with pytest.raises(RequestError, match=r"lacks the token ids \[3, 9\] at which its gate is read"):
        engine.generate(bad, params, policy, use_tqdm=False)
    [good] = engine.generate({"prompt_token_ids": OTHER}, params, policy, use_tqdm=False)
    assert good.outputs[0].reward == pytest.approx(wanted(OTHER + good.outputs[0].token_ids, 2), abs=TOLERANCE)


def test_a_head_of_nan_ends_requests_and_a_decoder_takes_no_other(changed, written, model):
    directory = changed("mlp")
    edit_tensors(directory, score__2__bias=lambda bias: bias * float("nan"))
    engine = stars.Engine(model, directory, cache_tokens=256, max_model_len=64)
    [output] = engine.generate({"prompt_token_ids": OTHER}, stars.SamplingParams(max_tokens=4, ignore_eos=True),
                               stars.Sample(score=True), use_tqdm=False)
    assert output.outputs[0].finish_reason == "error" and "NaN" in output.outputs[0].error
    decoder = load_model(written("mlp")[0], head="reward")
    assert stars.CausalReward(decoder).model is decoder
    with pytest.raises(RewardError, match="CausalReward.head belongs to a directory, and model is a Decoder"):
        stars.CausalReward(decoder, head="score")


@pytest.mark.parametrize("config", [
    {"architectures": ["DebertaV2PairRM"], "model_type": "deberta-v2"},
    {"architectures": ["LlamaForPairwiseRewardModel"]}, {"model_type": "pairrm"},
])
def test_pairwise_models_are_refused_by_name(changed, run, config):
    directory = changed("row")
    edit_config(directory, **config)
    message = "is of a pairwise model .* which compares two responses and has no reward of one"
    with pytest.raises(ModelError, match=message):
        reward = resolve_reward(directory)
        reward.bind(type("T", (), {"vocab_size": 97})(), 97, config_of())
    code, out, err = run("inspect", directory)
    assert code == 1 and "pairwise" in out + err
