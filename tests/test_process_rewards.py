"""Process rewards: what is read at the step tags of a text is what transformers and torch say of the whole text.

However the response grew, was cut, forked or taken up again, and wherever steps end: inside a segment, several in one,
between two whose tokens are halves of the separator, or in a token that holds the next step's beginning too.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from functools import partial
from pathlib import Path

import pytest

import stars
from building import PADDED, config_of
from process_models import FORMATS, scores_at, source_of, step_scores, write_process_model
from stars.cli import main
from stars.errors import RequestError, RewardError
from stars.model.loader import load_model
from stars.model.tokenizer import load_tokenizer
from stars.prompt import parse_prompt
from stars.reward.base import Candidate
from stars.target import CPU, CUDA
from test_methods_outside import Breed
from test_reencoding import Words
from toy import ToyModel, toy_engine

TOLERANCE = 2e-5  # of probabilities, float32; between steps of these random models they differ by 1e-2 and more
CONFIG = config_of(cache_tokens=1024, page_size=4, max_num_seqs=4, max_num_lanes=8, max_segment_size=4)
PROMPT = "The quick fox"
TEXTS = ("", "\n", "\n\n", " a", " a\n", " a\n\n", " a.\n\nThe", " a.\n\n\n\n \n\nb\n\n", "\n\n a dog\n", "b\n\n\nc",
         " one.\n\nTwo\n\nThree.\n\nThe 4th\n\n5\n\n6\n\nseven\n\neight\n\n9")
PIECES = ("\n", "\n\n", ".\n\n", " dog", " sleeps.", "The", " over\n\nit", "\n", "", " 3\n\n\n\n4\n\n")
AGGREGATES = {"last": lambda scores: scores[-1], "min": min, "prod": math.prod, "mean": lambda s: sum(s) / len(s)}

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def lm(tiny_model):
    return load_tokenizer(tiny_model(family="llama", tokenizer=True, chat_template=True))


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("process")
    return {kind: write_process_model(root / kind, source_of(tiny_model, kind), kind) for kind in FORMATS}


def bound(model, lm, config=CONFIG, **options) -> stars.ProcessReward:
    reward = stars.ProcessReward(model, **({"template": "raw"} | options))
    reward.bind(lm, lm.vocab_size, config)
    return reward


def opened(reward, lm, given=PROMPT):
    prompt = parse_prompt(given, lm, 10**6)
    reward.check(prompt, 30)
    session = reward.open(prompt, 30)
    reward.start([session])
    return session


def score(reward, session, *texts: str, final: bool = False) -> list:
    return reward.score([Candidate(session, [], text, final) for text in texts])


def all_free(reward) -> None:
    reward.check_integrity()
    cache = reward.cache
    assert (cache.num_free_pages, cache.num_free_slabs) == (cache.num_pages, cache.num_slabs)


def near(value: float):
    return pytest.approx(value, abs=TOLERANCE)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_rewards_of_whole_texts(models, lm, kind, aggregate):
    """Each format as its model's card computes it, and every aggregate; an unfinished step is read like any other."""
    reward = bound(models[kind], lm, aggregate=aggregate)
    session = opened(reward, lm)
    for text, one in zip(TEXTS, score(reward, session, *TEXTS), strict=True):
        scores = step_scores(models[kind], PROMPT, text, True)
        assert one.reward == near(AGGREGATES[aggregate](scores)), text
        reward.discard(one.handle)
    assert len(scores) == 9 and max(scores) - min(scores) > 0.1
    reward.close(session)
    all_free(reward)


def test_tokens_go_over_the_ends_of_steps(models):
    """What the formats above must keep apart: this tokenizer does not, where it is given the text as it stands."""
    tokenizer = load_tokenizer(models["token"])
    ends = [tokenizer.decode([token]) for token in tokenizer.encode("a.\n\nThe\n\nb", add_special_tokens=False)]
    assert ".\n\nThe" in ends and "\n\n" in ends


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("target", [CPU, CPU._replace(reward_lag=CUDA.reward_lag), PADDED],
                         ids=["lagging", "whole", "padded"])
def test_scores_of_a_response_that_grows(models, lm, kind, target):
    """Segments of any ends, three candidates at a time, forks, cuts, and texts taken up in chunks: scores of tags that
    stay are kept, and every reward is that of the whole text."""
    reward = bound(models[kind], lm, dataclasses.replace(CONFIG, target=target._replace(chunk=7)), aggregate="prod")
    draw = random.Random(FORMATS.index(kind))
    held = {id(session): (session, "") for session in [opened(reward, lm)]}
    run = full = read = 0
    for place in range(24):
        key = draw.choice(list(held))
        session, text = held[key]
        texts = [text + "".join(draw.choices(PIECES, k=draw.randrange(1, 4))) for _ in range(3)]
        scored = score(reward, session, *texts)
        for one, whole in zip(scored, texts, strict=True):
            scores = step_scores(models[kind], PROMPT, whole, True)
            assert one.reward == near(math.prod(scores)), whole
            run, full, read = run + one.tokens_run, full + one.tokens_full, read + len(scores)
        if place % 4 == 1 and len(held) < 3:
            fork = reward.fork(session)
            assert reward.reserve(fork, 30)
            reward.commit([(fork, scored[0].handle), (session, scored[2].handle)])
            held[id(fork)], held[key] = (fork, texts[0]), (session, texts[2])
            reward.discard(scored[1].handle)
        elif place % 4 == 2:  # a part of a candidate, which nobody scored, of which the session may be told
            for one in scored:
                reward.discard(one.handle)
            cut = texts[1][: len(text) + 2]
            if place % 8 == 2:
                while not reward.resume_in_chunks(session, [], cut, 7).done:
                    pass
            held[key] = session, cut
        else:
            reward.commit([(session, scored[0].handle)])
            held[key] = session, texts[0]
            reward.discard(scored[1].handle)
            reward.discard(scored[2].handle)
        for session, text in list(held.values()):
            if len(text) > 80:
                reward.close(session)
                held.pop(id(session))
                fresh = opened(reward, lm)
                held[id(fresh)] = fresh, ""
        reward.check_integrity()
    assert run < full / 2 and read > 150
    for session, _ in held.values():
        reward.close(session)
    all_free(reward)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("lag", [CPU.reward_lag, CUDA.reward_lag])
def test_what_no_slab_holds(models, lm, kind, lag):
    """Longer candidates run in pages of their own, finished responses in the session's: tags there are read, too, also
    where another prompt has offered such pages. Their scores are the same after a commit, and after a resumption."""
    config = dataclasses.replace(CONFIG, target=CPU._replace(reward_lag=lag, chunk=11))
    reward = bound(models[kind], lm, config, aggregate="mean")

    def mean(text: str) -> float:
        scores = step_scores(models[kind], PROMPT, text, True)
        return sum(scores) / len(scores)

    long = TEXTS[-1] + " zq" * 14 + ".\n\nzq"
    session, told = opened(reward, lm), opened(reward, lm)
    other = opened(reward, lm, PROMPT + TEXTS[-1].replace("\n\n", "<extra_0>"))
    first, same = score(reward, session, long, long)
    assert first.handle.slab is None and first.reward == same.reward == near(mean(long))
    reward.commit([(session, first.handle)])
    reward.discard(same.handle)
    while not reward.resume_in_chunks(told, [], long, 11).done:
        pass
    assert told.committed == session.committed and dict(told.scores) == near(dict(session.scores))
    assert len(told.scores) >= 9
    for holder in (session, told):
        [more] = score(reward, holder, long + " on\n\n", final=True)
        assert more.reward == near(mean(long + " on\n\n")) and more.tokens_run < 30
        reward.discard(more.handle)
        [last] = score(reward, holder, TEXTS[-1] + "\n\n" + "qz" * 20 + "\n\nzq", final=True)
        assert last.reward == near(mean(TEXTS[-1] + "\n\n" + "qz" * 20 + "\n\nzq"))
        reward.commit([(holder, last.handle)])
    for holder in (session, told, other):
        reward.close(holder)
    all_free(reward)


def test_a_tag_where_the_same_token_was_none_is_read(models, lm, copied):
    """A tokenizer that takes two texts for one, of which only one has a step's end: nothing in the pages differs."""
    directory = copied(models["token"])
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFKC"}}))
    reward, tokenizer = bound(directory, lm, step_separator="...", aggregate="mean"), load_tokenizer(directory)
    session = opened(reward, lm)
    [first] = score(reward, session, " a\u2026 dog")
    reward.commit([(session, first.handle)])
    assert not session.scores
    dots, ids = tokenizer.encode("...", add_special_tokens=False), tokenizer.encode(PROMPT)
    places = []
    for step in (" a", " dog sleeps"):
        ids += tokenizer.encode(step, add_special_tokens=False) + dots
        places.append(len(ids) - 1)
    assert session.committed[: places[0] + 1] == ids[: places[0] + 1]
    [one] = score(reward, session, " a... dog sleeps")
    assert one.reward == near(sum(scores_at(directory, ids, places)) / 2)


@pytest.mark.parametrize("target", [CPU, PADDED], ids=["plain", "padded"])
def test_more_readings_than_a_pass_holds(models, lm, target, monkeypatch):
    """Two lanes, whose passes read eight: of eleven steps three are read in a pass of their own, over the same rows,
    beside the other candidate's."""
    reward = bound(models["mlp"], lm, config_of(target=target, cache_tokens=256, max_num_seqs=1, max_num_lanes=2,
                                                max_segment_size=16), aggregate="min")
    assert reward._passes.max_readings == 8
    passes, session, texts = [], opened(reward, lm), ("\n\n".join("abcdefghijk"), "\n\n".join("abc"))
    run = reward._passes._run
    monkeypatch.setattr(reward._passes, "_run", lambda spans, *args, **options: (
        passes.append([len(span.reads) for span in spans]), run(spans, *args, **options)))
    one, other = score(reward, session, *texts)
    assert passes == [[8], [3, 3]]
    wanted = [step_scores(models["mlp"], PROMPT, text, True) for text in texts]
    assert [len(scores) for scores in wanted] == [11, 3]
    assert one.reward == near(min(wanted[0])) and other.reward == near(min(wanted[1]))
    assert list(one.handle.scores.values()) == near(wanted[0][:-1])
    reward.discard(other.handle)
    reward.commit([(session, one.handle)])
    [more] = score(reward, session, texts[0] + "\n\nl")
    assert passes[2:] == [[2]]
    assert more.reward == near(min(step_scores(models["mlp"], PROMPT, texts[0] + "\n\nl", True)))


def test_a_score_that_is_no_number_is_not_lost():
    """A minimum would pass over it."""
    for aggregate in AGGREGATES:
        reward = stars.ProcessReward("nowhere", aggregate=aggregate)
        assert math.isnan(reward.aggregate_of([0.5, math.nan, 0.25]))
        assert reward.aggregate_of([0.5, 0.25, 0.75]) == AGGREGATES[aggregate]([0.5, 0.25, 0.75])


def test_scores_ahead_are_those_of_a_pass(models, lm):
    """Candidates that the host knows, prepared while others run: the same numbers, and nothing for what must wait."""
    reward = bound(models["mlp"], lm, dataclasses.replace(CONFIG, target=PADDED), aggregate="mean")
    session, texts = opened(reward, lm), (" a\n\nb", " a.\n\nThe\n\n", " c")
    wanted = score(reward, session, *texts)
    ahead = reward.score_ahead([Candidate(session, [], text) for text in texts])
    ahead.launch()
    for one, other in zip(ahead.results(), wanted, strict=True):
        assert one.reward == near(other.reward) and one.handle.scores == near(dict(other.handle.scores))
        reward.discard(one.handle)
        reward.discard(other.handle)
    many = [Candidate(session, [], "a\n\nb\n\nc\n\nd\n\ne\n\nf\n\ng\n\n") for _ in range(6)]
    assert reward.score_ahead(many) is None  # 42 readings where a pass holds 32
    reward.close(session)
    all_free(reward)


def test_messages_in_the_models_own_template(models, lm):
    """A class that is trained on turns reads them so, with the system's prompt that the messages give."""
    messages = [{"role": "system", "content": "step by step"}, {"role": "user", "content": "what is a dog?"}]
    reward = stars.ProcessReward(models["mlp"])
    reward.bind(lm, lm.vocab_size, CONFIG)
    assert reward.format.template == "chat"
    for given, turns in (({"messages": messages}, messages), ("a dog?", [{"role": "user", "content": "a dog?"}])):
        before, _ = load_tokenizer(models["mlp"]).split_template(turns)
        session = opened(reward, lm, given)
        for text in TEXTS[:6]:
            [one] = score(reward, session, text)
            assert one.reward == near(step_scores(models["mlp"], before, text, False)[-1])
            reward.discard(one.handle)
        reward.close(session)


def test_tags_that_stand_in_the_text(models, lm):
    """A language model that writes them; a prompt that has some; where there is none, the closing's is read."""
    reward = bound(models["shepherd"], lm, insert_tag=False, step_end=" ки", aggregate="mean")
    given = "Say ки after each step."
    session, tokenizer = opened(reward, lm, given), load_tokenizer(models["shepherd"])
    for text, closing in ((" a ки\nb ки\n", ""), (" a ки\nb", " ки"), ("", " ки"), (" a", " ки"), ("\n", " ки")):
        ids = tokenizer.encode(given + (text if text.strip() else "") + closing)
        places = [place for place, token in enumerate(ids) if token == tokenizer.encode("ки")[-1]][1:]
        scores = scores_at(models["shepherd"], ids, places)
        [one] = score(reward, session, text)
        assert one.reward == near(sum(scores) / len(scores)), text
        reward.discard(one.handle)


def test_the_same_tokenizer_and_the_other_label(models, lm):
    """A language model of the same vocabulary writes tokens that go over the ends of steps: its text is what counts."""
    own = load_tokenizer(models["mlp"])
    good, bad = bound(models["mlp"], own), bound(models["mlp"], own, good_label=0)
    session, other = opened(good, own), opened(bad, own)
    ids = own.encode("a.\n\nThe dog", add_special_tokens=False)
    [one], [two] = (reward.score([Candidate(holder, ids, own.decode(ids))])
                    for reward, holder in ((good, session), (bad, other)))
    assert one.reward == near(step_scores(models["mlp"], PROMPT, "a.\n\nThe dog", True)[-1])
    assert two.reward == near(1 - one.reward)
    decoder = load_model(models["mlp"], head="reward")
    given = bound(decoder, lm, tokenizer=own)
    [three] = score(given, opened(given, lm), "a.\n\nThe dog")
    assert three.reward == near(one.reward)


def test_formats_that_the_models_class_says(models, lm, tmp_path):
    found = {kind: bound(models[kind], lm, template=None).format for kind in FORMATS}
    assert found["mlp"] == ("\n\n", "<extra_0>", "<extra_0>", True, "chat")
    assert found["token"] == ("\n\n", None, "\n\n", True, "auto")
    assert found["shepherd"] == ("\n", "ки", " ки\n", True, "raw")
    assert bound(models["mlp"], lm, step_separator="\n", step_tag=None).format == ("\n", None, "\n", True, "raw")
    assert bound(models["token"], lm, step_tag="ки", step_end=" ки.").format == ("\n\n", "ки", " ки.", True, "raw")
    for kind in ("mlp", "token"):  # as a directory, as the command line gives it
        engine = toy_engine(ToyModel(vocab=5, seed=1), models[kind], tokenizer=Words("abcde"))
        assert isinstance(engine.reward, stars.ProcessReward)


def test_inspect_says_how_steps_are_read(models, capsys):
    said = {"mlp": r"split at '\n\n', <extra_0> after each, and read there; template chat",
            "token": r"split at '\n\n', read at its last token; template auto", "shepherd": None}
    for kind, line in said.items():
        assert main(["inspect", str(models[kind])]) == 0
        rows = dict(row.split(maxsplit=1) for row in capsys.readouterr().out.splitlines() if row.startswith("steps "))
        assert rows.get("steps") == line


# -- through the engine -----------------------------------------------------------------------------------------------

WORDS = [" the dog", " sleeps", ".", "\n", "\n\n", " so.\n\nThe", " 3"]
STARS = stars.STARS(segment_size=3, max_attempts=4, alpha=0.5, beta=0.05, reward_threshold=0.6, width=2)


def engine_of(directory: Path, words=WORDS, reward=None, **options) -> stars.Engine:
    """A random language model whose tokens are words and halves of separators."""
    model = ToyModel(vocab=len(words), seed=3, positions=128, eos=())
    reward = stars.ProcessReward(directory, template="raw", aggregate="min") if reward is None else reward
    return toy_engine(model, reward, tokenizer=Words(words), **({"max_num_seqs": 6, "max_num_lanes": 24} | options))


def assert_rewards(output: stars.RequestOutput, directory: Path, words=WORDS) -> tuple[int, int]:
    """Every reward of `output` is that of its text; how many rewards and readings there were."""
    prompt, rewards, read = "".join(words[i] for i in output.prompt_token_ids), 0, 0
    for completion in output.outputs:
        assert completion.error is None
        before = ""
        for segment in completion.segments:
            for attempt in segment.attempts:
                if attempt.reward is not None:
                    text = before + "".join(words[i] for i in attempt.token_ids)
                    scores = step_scores(directory, prompt, text, True)
                    assert attempt.reward == near(min(scores)), text
                    rewards, read = rewards + 1, read + len(scores)
            before += "".join(words[i] for i in segment.token_ids)
    return rewards, read


@pytest.mark.parametrize("kind", FORMATS)
def test_methods_of_every_shape(models, kind):
    """A threshold, the best of a block, whole responses, and a population that forks and is cut and continued."""
    engine = engine_of(models[kind])
    prompts = [{"prompt_token_ids": [1, 0]}, {"prompt_token_ids": [5]}]
    for policy in (STARS, stars.BlockwiseBestOfK(segment_size=4, k=3), stars.BestOfN(n=3), stars.Sample(score=True)):
        for output in engine.generate(prompts, stars.SamplingParams(max_tokens=12, seed=4), policy, use_tqdm=False):
            rewards, read = assert_rewards(output, models[kind])
            if policy is STARS:
                assert rewards > 4 and read > 1.2 * rewards
                assert output.prompt_reward == near(min(step_scores(models[kind], "".join(
                    WORDS[i] for i in output.prompt_token_ids), "", True)))
                assert output.metrics.rm_tokens_scored < output.metrics.rm_tokens_full_rescore / 2
    [output] = engine.generate(prompts[:1], stars.SamplingParams(max_tokens=11, seed=2), Breed(), use_tqdm=False)
    [completion] = output.outputs
    assert completion.error is None
    assert completion.reward == near(min(step_scores(models[kind], " sleeps the dog", completion.text, True)))
    engine.check_integrity()
    all_free(engine.reward)


def test_the_same_text_at_every_width_and_where_responses_give_way(models):
    """Deterministic: widths 1, 3 and 8, alone and beside others, and in a cache from which responses are put out and
    taken up again, whose tags' scores are then found anew."""
    directory = models["token"]
    engine = engine_of(directory, deterministic=True)
    scarce = engine_of(directory, deterministic=True, cache_tokens=180)
    prompts = [{"prompt_token_ids": [place % 7, 0, 4]} for place in range(4)]
    params = [stars.SamplingParams(max_tokens=20, seed=seed, n=2) for seed in range(4)]

    def texts(engine, width: int) -> list:
        outputs = engine.generate(prompts, params, dataclasses.replace(STARS, width=width), use_tqdm=False)
        assert all(completion.error is None for output in outputs for completion in output.outputs)
        return [outputs, [[(completion.token_ids, [segment.reward for segment in completion.segments])
                           for completion in output.outputs] for output in outputs]]

    _, wanted = texts(engine, 1)
    assert texts(engine, 8)[1] == texts(engine, 3)[1] == wanted
    [alone] = engine.generate(prompts[2], params[2], STARS, use_tqdm=False)
    assert [completion.token_ids for completion in alone.outputs] == [ids for ids, _ in wanted[2]]
    outputs, got = texts(scarce, 3)
    assert got == wanted and sum(output.metrics.num_preemptions for output in outputs) > 1
    all_free(scarce.reward)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    (dict(aggregate="sum"), "ProcessReward.aggregate is 'sum', it must be one of 'last', 'min', 'prod', 'mean'"),
    (dict(aggregate=[]), "ProcessReward.aggregate is []"),
    (dict(step_separator=""), "ProcessReward.step_separator is '', it must be text, or left out"),
    (dict(step_tag=3), "ProcessReward.step_tag is 3, it must be text of one token, or None for the separator"),
    (dict(step_end=""), "ProcessReward.step_end is ''"),
    (dict(good_label=2), "ProcessReward.good_label is 2, it must be 0 or 1"),
    (dict(good_label=0, head="score"), "ProcessReward.good_label=0 is about the two labels of a directory's head"),
    (dict(insert_tag=False, step_tag=None), "ProcessReward.insert_tag=False says that tags stand in the response"),
    (dict(template="qwen"), 'ProcessReward.template is \'qwen\', it must be "auto", "chat" or "raw"'),
    (dict(head=7), "ProcessReward.head is 7"),
])
def test_what_is_refused_when_a_reward_is_made(models, options, message):
    with pytest.raises(RewardError) as caught:
        stars.ProcessReward(models["mlp"], **options)
    assert message in str(caught.value)


def test_what_is_refused_when_an_engine_is_built(models, lm, tiny_model, copied):
    def refused(message: str, model, tokenizer=lm, **options) -> None:
        reward = stars.ProcessReward(model, **options)
        with pytest.raises(RewardError) as caught:
            reward.bind(tokenizer, lm.vocab_size, CONFIG)
        assert message in str(caught.value)

    refused("the step tag '<step>' makes 6 tokens of the reward model's vocabulary, and one is read: give a step_tag",
            models["mlp"], step_tag="<step>")
    refused("ProcessReward.step_end is 'x', it must have the step tag '<extra_0>' in it", models["mlp"], step_end="x")
    refused("ProcessReward.step_end is about a step tag, and this model is read at the separator", models["token"],
            step_end="x")
    refused("ProcessReward.insert_tag=False is about a step tag", models["token"], insert_tag=False)
    untagged = tiny_model(family="qwen2", head="reward", labels=2, tokenizer=True)
    directory = copied(untagged)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen2ForProcessRewardModel"]}))
    refused("the step tag '<extra_0>' makes", directory)
    refused("the step tag 'ки' makes 4 tokens", tiny_model(family="llama", tokenizer=True))
    scalar = tiny_model(family="qwen2", head="reward", tokenizer=True)
    refused("has a reward head of one label where the steps' bad and good ones are needed", scalar)
    with pytest.raises(RewardError, match="gives no probability of a label: use a model with two labels, say which"):
        bound(load_model(scalar, head="reward"), lm, tokenizer=load_tokenizer(scalar))
    (bare := copied(models["mlp"]) / "tokenizer.json").unlink()
    refused("the process reward model has no tokenizer.json, and steps are found in text", bare.parent)
    refused("the model has no tokenizer.json", models["mlp"], tokenizer=None)


def test_a_tag_that_is_lost_ends_its_request_alone(models, copied):
    """A word of the language model's merges with the tag behind it: whoever writes it ends with what was committed,
    and everybody else as if alone."""
    directory = copied(models["mlp"])
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": len(tokenizer["model"]["vocab"]) + 2,
                                                                      "content": "zq<extra_0>"})
    path.write_text(json.dumps(tokenizer))
    words = [*WORDS[:6], "zq"]
    engine = engine_of(directory, words)
    prompts = [{"prompt_token_ids": [0]}, {"prompt_token_ids": [1]}] * 4
    params = [stars.SamplingParams(max_tokens=9, seed=seed) for seed in range(8)]
    outputs = engine.generate(prompts, params, STARS, use_tqdm=False)
    ended = [output.outputs[0] for output in outputs]
    failed = [one for one in ended if one.finish_reason == "error"]
    assert 0 < len(failed) < 8 and {one.finish_reason for one in ended} == {"error", "length"}
    assert any(one.token_ids for one in failed), "none had committed anything"
    for one in failed:
        assert "the step tag '<extra_0>' stands" in one.error and "give a step_end around the tag" in one.error
        assert len(one.token_ids) % 3 == 0 and one.text == "".join(words[i] for i in one.token_ids)
    for output, one, prompt, single in zip(outputs, ended, prompts, params, strict=True):
        [alone] = engine.generate(prompt, single, STARS, use_tqdm=False)
        assert (alone.outputs[0].token_ids, alone.outputs[0].error) == (one.token_ids, one.error)
        if one.error is None:
            assert_rewards(output, directory, words)
    engine.check_integrity()
    all_free(engine.reward)


RAISING = ("{{ bos_token }}{% for message in messages %}{% if 'sing' in message['content'] %}"
           "{{ raise_exception('no songs') }}{% endif %}{{ message['content'] }}{% endfor %}")
SUNG = [*WORDS[:6], " sing"]
CHATS = {"process": partial(stars.ProcessReward, aggregate="min"),
         "causal": partial(stars.CausalReward, template="chat", head={"rows": [0, 1]})}


@pytest.fixture(scope="module")
def singing(models, tmp_path_factory) -> Path:
    directory = shutil.copytree(models["mlp"], tmp_path_factory.mktemp("singing") / "model")
    (directory / "chat_template.jinja").write_text(RAISING)
    return directory


@pytest.mark.parametrize("kind", CHATS)
def test_a_template_that_raises(singing, kind):
    """For its prompt it is refused before a token is drawn. Where it raises later, as what it reads changes, the
    request ends with an error, and nobody else's."""
    engine = engine_of(singing, SUNG, CHATS[kind](singing))
    params = stars.SamplingParams(max_tokens=6, seed=1)
    with pytest.raises(stars.StarsError, match="no songs"):
        engine.add_request({"prompt_token_ids": [6, 1]}, params, STARS)
    assert not engine.has_unfinished_requests()
    for name, prompt in (("first", [0, 1]), ("second", [1, 5])):
        engine.add_request({"prompt_token_ids": prompt}, params, STARS, request_id=name)
    raising(engine.reward.tokenizer, WORDS[0], lambda: True)
    done = {}
    while engine.has_unfinished_requests():
        done |= {output.request_id: output.outputs[0] for output in engine.step() if output.finished}
    assert done["first"].finish_reason == "error" and "no songs today" in done["first"].error
    assert not done["first"].token_ids
    assert done["second"].finish_reason == "length" and done["second"].error is None
    engine.check_integrity()
    all_free(engine.reward)


@pytest.mark.parametrize("kind", CHATS)
def test_a_template_that_raises_for_a_response_that_comes_back(singing, kind):
    """It gave way to others, whose texts are as ever: what it had committed is returned with the error."""
    prompts = [{"prompt_token_ids": [place % 6, 0, 4]} for place in range(4)]
    params = [stars.SamplingParams(max_tokens=24, seed=seed) for seed in range(4)]

    def run(raises: bool) -> dict[str, stars.CompletionOutput]:
        engine = engine_of(singing, SUNG, CHATS[kind](singing), cache_tokens=200, max_num_seqs=4)
        for place, prompt in enumerate(prompts):
            engine.add_request(prompt, params[place], STARS, request_id=str(place))
        done: dict[str, stars.CompletionOutput] = {}
        if raises:
            raising(engine.reward.tokenizer, SUNG[2], lambda: "2" in done and done["2"].token_ids)
        while engine.has_unfinished_requests():
            done |= {output.request_id: output.outputs[0] for output in engine.step()}
        engine.check_integrity()
        all_free(engine.reward)
        return done

    wanted, got = run(False), run(True)
    assert all(one.finish_reason == "length" for one in wanted.values())
    for name in "013":
        assert (got[name].token_ids, got[name].error) == (wanted[name].token_ids, None)
    last = got["2"]
    assert last.finish_reason == "error" and "no songs today" in last.error
    assert 0 < len(last.token_ids) < 24 and last.token_ids == wanted["2"].token_ids[: len(last.token_ids)]
    assert last.text == "".join(SUNG[i] for i in last.token_ids)


def raising(tokenizer, start: str, now) -> None:
    """Its template raises from here on for prompts that begin so, whenever now() says so."""
    split = tokenizer.split_template

    def sometimes(messages, **options):
        if messages[0]["content"].startswith(start) and now():
            raise stars.TokenizerError("the template raised: no songs today")
        return split(messages, **options)

    tokenizer.split_template = sometimes


def test_a_prompt_that_nothing_decodes_is_refused(models, lm):
    reward = bound(models["mlp"], lm)
    prompt = parse_prompt({"prompt_token_ids": [5, 6]}, lm, 10**6)._replace(text=None)
    with pytest.raises(RequestError, match="cannot be decoded for the reward model's vocabulary"):
        reward.check(prompt, 8)


def test_a_response_without_a_tag_that_it_should_have_written(models, lm):
    """Read at the closing while it grows; an error of its request once it has ended, with what was committed."""
    reward = bound(models["shepherd"], lm, insert_tag=False, step_end=" ки")
    session = opened(reward, lm, "Say.")
    growing, ended, tagged = reward.score([Candidate(session, [], text, ended=ended) for text, ended in (
        (" a", False), (" a", True), (" a ки", True))])
    assert 0.0 <= growing.reward <= 1.0 and 0.0 <= tagged.reward <= 1.0
    assert isinstance(ended.reward, RewardError) and "has ended without a step tag 'ки'" in str(ended.reward)

    words = [" the", " ки", " fox"]
    engine = engine_of(models["shepherd"], words, stars.ProcessReward(
        models["shepherd"], template="raw", insert_tag=False, step_end=" ки"))
    policy = dataclasses.replace(STARS, reward_threshold=-math.inf, width=1)
    params = [stars.SamplingParams(max_tokens=most, seed=1) for most in (24, 4)]
    with pytest.warns(UserWarning, match="1 of 2"):
        whole, bare = engine.generate([{"prompt_token_ids": [0]}, {"prompt_token_ids": [2]}], params, policy,
                                      use_tqdm=False)
    assert whole.outputs[0].error is None and " ки" in whole.outputs[0].text and len(whole.outputs[0].token_ids) == 24
    [bare] = bare.outputs
    assert bare.finish_reason == "error" and "without a step tag" in bare.error
    assert len(bare.token_ids) == 3 and " ки" not in bare.text  # the first segment stands
    engine.check_integrity()
