"""Planted errors in what a causal reward model reads: re-encoded texts, closing tokens, templates, ids it lacks.

The reward model is a toy with a tokenizer of its own, so every score has an expected value in float64.
"""

from __future__ import annotations

import dataclasses
import json

import pytest

import stars
from building import PADDED, config_of, work_as
from stars.errors import RequestError, RewardError
from stars.model.tokenizer import load_tokenizer
from stars.prompt import Prompt
from stars.reward.base import Candidate
from stars.target import CPU, CUDA
from tiny_models import write_tokenizer
from toy import ToyModel, facts, table_reward, toy_engine

BOS, EOS = 1, 0
VOCAB = 30
RM = ToyModel(vocab=VOCAB, seed=6, head="reward", positions=24)
TOLERANCE = 1e-4  # rewards of order 1, float32
CONFIG = config_of(cache_tokens=256, page_size=4, max_num_seqs=2, max_num_lanes=4, max_segment_size=4)


class Pairs:
    """Letters a to e in pairs from the end of the text on: one letter more and all pairs are others."""

    has_chat_template, eos_token_id = True, EOS

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        letters = ["abcde".index(letter) for letter in text]
        odd = [2 + letters[0]] if len(letters) % 2 else []
        pairs = zip(letters[len(odd) :: 2], letters[len(odd) + 1 :: 2], strict=True)
        return [BOS] * add_special_tokens + odd + [7 + (5 * a + b) % (VOCAB - 6) for a, b in pairs]

    def split_template(self, messages: list[dict]) -> tuple[str, str]:
        return "".join(message["content"] for message in messages) + "ee", "d"

    def same_vocabulary(self, other) -> bool:
        return self is other


def bound(lm_tokenizer=None, **options) -> stars.CausalReward:
    """A reward model bound to a language model of another vocabulary, unless it is given its tokenizer."""
    config = options.pop("config", CONFIG)
    reward = stars.CausalReward(RM.decoder(), tokenizer=options.pop("tokenizer", Pairs()), **options)
    reward.bind(lm_tokenizer or Pairs(), VOCAB, config)
    return reward


def opened(reward: stars.CausalReward, prompt: Prompt):
    reward.check(prompt, 8)
    session = reward.open(prompt, 8)
    reward.start([session])
    return session


def test_a_committed_token_that_changes_afterwards_is_scored_again():
    reward = bound()
    session = opened(reward, Prompt("abc", [2], "abc"))
    text, changed = "", 0
    for added in ("de", "a", "cc", "b", "bd", "a", "e"):
        candidates = [text + added, text + "e"]
        scored = reward.score([Candidate(session, [], candidate) for candidate in candidates])
        for candidate, one in zip(candidates, scored, strict=True):
            ids = reward.tokenizer.encode("abc" + candidate)
            assert one.reward == pytest.approx(RM.reward(ids), abs=TOLERANCE)
        ids = reward.tokenizer.encode("abc" + candidates[0])
        changed += ids[: len(session.committed)] != session.committed
        reward.discard(scored[1].handle)
        reward.commit([(session, scored[0].handle)])
        assert session.committed == ids[:-1] and session.table.length == len(ids) - 1
        reward.check_integrity()
        text += added
    assert changed == 4  # each odd addition changed what was committed
    reward.close(session)
    assert reward.cache.num_free_pages == reward.cache.num_pages


def test_an_id_outside_the_vocabulary_is_that_candidates_error():
    """The last id of the vocabulary is scored, the first behind it is refused, and its neighbours never notice."""
    class Plain(Pairs):
        def encode(self, text, add_special_tokens=True):
            return [VOCAB if letter == "z" else VOCAB - 1 if letter == "y" else "abcde".index(letter)
                    for letter in text]

    reward = bound(tokenizer=Plain())
    session = opened(reward, Prompt("abc", [2], "abc"))
    last, outside, neighbour = reward.score([Candidate(session, [], text) for text in ("y", "z", "e")])
    assert last.reward == pytest.approx(RM.reward([0, 1, 2, VOCAB - 1]), abs=TOLERANCE)
    assert neighbour.reward == pytest.approx(RM.reward([0, 1, 2, 4]), abs=TOLERANCE)
    assert isinstance(outside.reward, RewardError) and outside.handle is None
    assert str(outside.reward).startswith(f"token id {VOCAB} is outside the reward model's vocabulary of {VOCAB}")
    for one in (last, neighbour):
        reward.discard(one.handle)
    assert reward.cache.num_free_slabs == reward.cache.num_slabs
    with pytest.raises(RequestError, match=f"token id {VOCAB} is outside"):
        reward.check(Prompt("az", [2], "az"), 4)


MESSAGES = [{"role": "user", "content": "abc"}]


@pytest.mark.parametrize("template, given, special, prefix", [
    ("raw", "abca", True, "abca"),  # text gets what the tokenizer puts around texts
    ("raw", MESSAGES, False, "abca"),  # as the language model's template rendered them, which holds its special tokens
    ("auto", "abca", True, "abca"),
    ("auto", MESSAGES, False, "abcee"),  # in the reward model's own template
    ("chat", "abca", False, "abcaee"),
])
def test_what_a_template_makes_of_prompts_in_another_vocabulary(template, given, special, prefix):
    reward = bound(template=template)
    session = opened(reward, Prompt(given, [2], "abca"))
    [scored] = reward.score([Candidate(session, [], "bd")])
    ids = reward.tokenizer.encode(prefix + "bd", add_special_tokens=special)
    assert scored.reward == pytest.approx(RM.reward(ids), abs=TOLERANCE)


@pytest.mark.parametrize("template, prefix", [("raw", [5, 9]), ("auto", Pairs().encode("abcee", False))])
def test_what_a_template_makes_of_messages_in_the_same_vocabulary(template, prefix):
    tokenizer = Pairs()
    reward = bound(tokenizer, tokenizer=tokenizer, template=template)
    session = opened(reward, Prompt(MESSAGES, [5, 9], "anything"))
    [scored] = reward.score([Candidate(session, [8, 3], None)])
    assert scored.reward == pytest.approx(RM.reward([*prefix, 8, 3]), abs=TOLERANCE)


@pytest.mark.parametrize("close, closing", [("none", []), ("eos", [EOS]), ("template", Pairs().encode("d", False))])
def test_closing_tokens_are_scored_counted_and_dropped(close, closing):
    """They take their place in the context, and the next score does not see those of the score before."""
    tokenizer = Pairs()
    reward = bound(tokenizer, tokenizer=tokenizer, template="chat", close=close)
    prompt = Prompt("abc", [5], "abc")
    prefix = tokenizer.encode("abcee", False)
    most = 24 - len(prefix) - len(closing)
    reward.check(prompt, most)
    with pytest.raises(RequestError, match="make 25 tokens for the reward model, whose context is 24"):
        reward.check(prompt, most + 1)
    session = reward.open(prompt, most)
    reward.start([session])
    response: list[int] = []
    for added in ([8, 3, 9], [4], [2, 2]):
        response += added
        [scored] = reward.score([Candidate(session, list(response), None)])
        assert scored.reward == pytest.approx(RM.reward(prefix + response + closing), abs=TOLERANCE)
        reward.commit([(session, scored.handle)])
        assert session.table.length == len(prefix) + len(response) - 1


def test_the_eos_that_closes_is_the_tokenizers():
    tokenizer = Pairs()
    tokenizer.eos_token_id = 3
    reward = bound(tokenizer, tokenizer=tokenizer, close="eos")
    assert reward.decoder.config.eos_token_ids == (EOS,)
    [scored] = reward.score([Candidate(opened(reward, Prompt("abc", [5, 9], "abc")), [8], None)])
    assert scored.reward == pytest.approx(RM.reward([5, 9, 8, 3]), abs=TOLERANCE)


def test_ids_of_added_tokens_are_a_part_of_the_vocabulary(tmp_path):
    """The same splits and as many tokens, of which the last is another: not the same; one more beside them is."""
    loaded = {}
    for name, added in (("ours", {"mask_token": "<one>"}), ("others", {"mask_token": "<two>"}),
                        ("more", {"cls_token": "<one>", "mask_token": "<two>"})):
        write_tokenizer(tmp_path / name)
        path = tmp_path / name / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | added))
        loaded[name] = load_tokenizer(tmp_path / name)
    ours, others, more = loaded.values()
    assert ours.vocab_size == others.vocab_size == more.vocab_size - 1
    assert ours.encode("<one>", add_special_tokens=False) == others.encode("<two>", add_special_tokens=False)
    assert not ours.same_vocabulary(others) and not others.same_vocabulary(ours)
    assert ours.same_vocabulary(more) and not more.same_vocabulary(ours) and not others.same_vocabulary(more)


def test_responses_share_an_encoders_batch():
    reward = stars.EncoderReward("a directory that is not read here", batch_size=8)
    assert [reward.lanes_per_pass(16, responses) for responses in (1, 2, 3, 8, 9, 100)] == [8, 4, 2, 1, 1, 1]


def test_candidates_fill_a_pass():
    """On a GPU the rows it is made for and no more, closing tokens counted; on the CPU up to the first beyond."""
    tokens, responses = (1, 13, 16, 31, 32, 33, 128, 200), (1, 3, 64)

    def lanes(target, close="none"):
        reward = bound(close=close, config=dataclasses.replace(CONFIG, target=target))
        if close == "template":
            assert reward.framing.longest_closing == 0  # until a prompt was rendered
            opened(reward, Prompt([{"role": "user", "content": "ab"}], [5], None))
        return [[reward.lanes_per_pass(count, among) for count in tokens] for among in responses]

    assert lanes(CPU) == lanes(CPU, "eos") == [[32, 3, 2, 2, 1, 1, 1, 1], [11, 1, 1, 1, 1, 1, 1, 1], [1] * 8]
    gpu = PADDED._replace(ridge_rows=CUDA.ridge_rows)
    assert lanes(gpu) == [[128, 9, 8, 4, 4, 3, 1, 1], [42, 3, 2, 1, 1, 1, 1, 1], [2, 1, 1, 1, 1, 1, 1, 1]]
    assert lanes(gpu, "eos") == lanes(gpu, "template") == [
        [64, 9, 7, 4, 3, 3, 1, 1], [21, 3, 2, 1, 1, 1, 1, 1], [1] * 8]
    assert lanes(gpu._replace(reward_lag=1)) == lanes(gpu, "eos")


class Letters:
    """Token k is the letter k of the alphabet, for both models."""

    has_chat_template, bos_token_id, eos_token_id = False, None, None

    def encode(self, text, add_special_tokens=True):
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(ord("a") + token) for token in ids)

    def same_vocabulary(self, other):
        return self is other


@pytest.mark.parametrize("stop", [(), ("b",), ("bc", "dd")])
def test_segments_with_stop_strings_are_scored_as_they_are_cut(monkeypatch, stop):
    """Behind a draft on a GPU the tokens behind a stop string are there: such requests wait for the host."""
    lm, rm, letters = ToyModel(seed=4, eos=()), ToyModel(seed=5, head="reward"), Letters()
    params = stars.SamplingParams(max_tokens=12, seed=3, n=6, stop=stop)
    policy = stars.STARS(segment_size=4, max_attempts=4, alpha=0.5, beta=0.5, reward_threshold=1.0, width=4)

    def run():
        engine = toy_engine(lm, stars.CausalReward(rm.decoder(), tokenizer=letters), tokenizer=letters)
        [output] = engine.generate("ea", params, policy, use_tqdm=False)
        engine.check_integrity()
        return output

    def rewards(output):
        for completion in output.outputs:
            before: list[int] = []
            for segment in completion.segments:
                for attempt in segment.attempts:
                    if attempt.reward is not None:
                        yield attempt.reward, rm.reward([4, 0, *before, *attempt.token_ids])
                before = before + segment.token_ids

    on_host = run()
    work_as(monkeypatch, PADDED)
    behind = run()
    for ours, expected in rewards(behind):
        assert ours == pytest.approx(expected, abs=TOLERANCE)
    assert [c.text for c in behind.outputs] == [c.text for c in on_host.outputs]
    assert any(completion.finish_reason == "stop" for completion in behind.outputs) == bool(stop)


def test_equally_good_responses_and_the_counts_of_an_argmax():
    """The earliest of equals wins; blockwise, every attempt counts and one a segment is accepted."""
    reward = stars.FunctionReward(lambda prompt, responses: [1.0] * len(responses), inputs="ids")
    engine = toy_engine(ToyModel(seed=4, eos=()), reward)
    params = stars.SamplingParams(max_tokens=8, seed=3)
    [first] = engine.generate({"prompt_token_ids": [1, 2]}, params, stars.Sample(), use_tqdm=False)
    [best] = engine.generate({"prompt_token_ids": [1, 2]}, params, stars.BestOfN(5), use_tqdm=False)
    assert best.outputs[0].token_ids == first.outputs[0].token_ids
    attempts = best.outputs[0].segments[0].attempts
    assert [attempt.accepted for attempt in attempts] == [True, False, False, False, False]
    assert len({str(attempt.token_ids) for attempt in attempts}) == 5

    engine = toy_engine(ToyModel(seed=4, eos=()), stars.FunctionReward(
        lambda prompt, responses: list(map(table_reward(2), responses)), inputs="ids"))
    [blocks] = engine.generate({"prompt_token_ids": [1, 2]}, params, stars.BlockwiseBestOfK(4, 3), use_tqdm=False)
    metrics = blocks.metrics
    assert (metrics.segments, metrics.attempts, metrics.attempts_counted, metrics.accepted) == (3, 12, 12, 3)
    assert [segment.winner for segment in blocks.outputs[0].segments] != [3, 3, 3]
    assert facts(blocks) == facts(engine.generate({"prompt_token_ids": [1, 2]}, params, stars.BlockwiseBestOfK(4, 3),
                                                  use_tqdm=False)[0])
