"""Biases, bans and masks of single tokens through the engine: against transformers, at any width, for every policy."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from threading import Event, Timer

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.generation import logits_process

import law
import recorded_gpu
import stars
import stars.proposer
from building import PADDED, work_as
from law import FALSE_POSITIVE_RATE, MODEL, PROMPT, p_value
from stars.bindings import libstars
from stars.draft import Drafter, LaneSpec
from stars.edits import NOTHING_LEFT, Edited, bad_word_ids, edits_of, mask_of
from stars.helper import Helper
from stars.kernels.philox import pack_stream
from stars.policies import POLICIES
from stars.target import CPU
from test_bad_input import refused
from test_law_mara import HIDDEN, H, head_tensors
from test_padding import PROMPTS, setting
from toy import EOS, Digits, ToyModel, ids, table_reward, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

VOCAB = 37
LM = ToyModel(VOCAB, seed=2, layers=1, positions=128)
SMALL = ToyModel(VOCAB, seed=8, layers=1, positions=128)
RM = ToyModel(VOCAB, seed=5, layers=1, positions=128, head="reward", sharpness=1.5)
TABLE = table_reward(seed=3)
START = ids(6, VOCAB, seed=4)


class Letters:
    """A tokenizer of "a" to "z" (tokens 1 to 26) and " a" to " j" (27 to 36); a space before others is left out."""

    bos_token = bos_token_id = None
    has_chat_template = False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        found, spaced = [], False
        for letter in text:
            if letter != " ":
                place = ord(letter) - ord("a")
                found.append(27 + place if spaced and place < 10 else 1 + place)
            spaced = letter == " "
        return found

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(96 + token) if token < 27 else " " + chr(70 + token) for token in token_ids if token != EOS)


def engine(**options) -> stars.Engine:
    fn = stars.FunctionReward(lambda prompt, responses: [TABLE(one) for one in responses], inputs="ids")
    return toy_engine(LM, fn, **(dict(tokenizer=Letters()) | options))


def run(made: stars.Engine, params: stars.SamplingParams | list, policy=None, prompts: int = 1) -> list:
    outputs = made.generate([{"prompt_token_ids": START}] * prompts, params, policy, use_tqdm=False)
    made.check_integrity()
    return [completion for output in outputs for completion in output.outputs]


# -- against transformers -----------------------------------------------------------------------------------------


def processed(logits: np.ndarray, prompt: list[int], response: list[int], params: stars.SamplingParams,
              tokenizer) -> np.ndarray:
    """Logits as transformers' processors leave them. The response alone is searched for bad words, as in vLLM."""
    scores = torch.tensor(logits)[None]
    given, own = torch.tensor([prompt + response]), torch.tensor([response], dtype=torch.long)
    if params.logit_bias:
        scores = logits_process.SequenceBiasLogitsProcessor(
            [[[token], bias] for token, bias in params.logit_bias.items()])(given, scores)
    if params.min_tokens:
        scores = logits_process.MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, [EOS])(given, scores)
    words = [list(word) for word in bad_word_ids(params.bad_words, tokenizer, VOCAB)]
    if words:
        scores = logits_process.NoBadWordsLogitsProcessor(words)(own, scores)
    if params.allowed_token_ids is not None:
        scores = logits_process.PrefixConstrainedLogitsProcessor(
            lambda row, seen: list(params.allowed_token_ids), 1)(given, scores)
    return scores[0].numpy()


def some_edits(seed: int) -> dict:
    """Edits of every kind, or some of them."""
    draw = np.random.default_rng(seed)
    letters = [chr(97 + index) for index in range(26)]
    edits = dict(
        logit_bias={int(token): round(float(bias), 3) for token, bias in zip(
            draw.choice(VOCAB, 9, replace=False), draw.normal(size=9) * 3, strict=True)},
        min_tokens=int(draw.integers(1, 18)),
        bad_words=["".join(draw.choice(letters, draw.choice([1, 2, 2, 3]))) for _ in range(24)],
        allowed_token_ids=[EOS, *map(int, draw.choice(np.arange(1, VOCAB), 20, replace=False))])
    return {name: value for name, value in edits.items() if draw.random() < 0.7}


@pytest.mark.parametrize("seed", range(12))
def test_greedy_tokens_are_those_of_transformers(seed):
    """Token by token at temperature 0, in segments of three, so that words and minima go over their ends."""
    edits = some_edits(seed)
    if seed % 2:
        edits["logit_bias"] = {**edits.get("logit_bias", {}), EOS: 4.0}
    params = stars.SamplingParams(temperature=0.0, max_tokens=30, **edits)
    [completion] = run(engine(), params, stars.STARS(3, 2, 0.5, 0.5, 1.0))
    response: list[int] = []
    while len(response) < 30 and EOS not in response:
        logits = processed(LM.logits(START + response), START, response, params, Letters())
        response.append(int(np.argmax(logits)))
    assert completion.token_ids == response


def test_draws_are_those_of_transformers():
    """By distribution: the next token after every prefix; fails a correct engine once in 1e6 choices of the seed."""
    params = stars.SamplingParams(max_tokens=3, n=law.DRAWS // 2, seed=7, min_tokens=2, bad_words=["ac", "d", "dab"],
                                  logit_bias={1: 1.0, 3: 0.7, EOS: 0.8}, allowed_token_ids=[EOS, 1, 2, 3, 4])

    class Abc(Letters):
        """Without tokens that begin with a space."""

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return super().encode(text.replace(" ", ""))

    made = toy_engine(MODEL, tokenizer=Abc(), max_num_seqs=512, max_num_lanes=512, cache_tokens=1 << 14)
    [output] = made.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    seen: dict[tuple, Counter] = defaultdict(Counter)
    for completion in output.outputs:
        for place, token in enumerate(completion.token_ids):
            seen[tuple(completion.token_ids[:place])][token] += 1

    def exact(prefix: tuple) -> dict[int, float]:
        logits = processed(MODEL.logits(PROMPT + list(prefix)), PROMPT, list(prefix), params, Abc())
        weights = np.exp(logits - logits.max())
        return dict(enumerate(weights / weights.sum()))

    assert p_value(seen, exact) > FALSE_POSITIVE_RATE


def test_bad_words_are_tokenised_as_vllm_does():
    """Both as they begin a text and within one, where that is another first token and not one more."""
    def by_vllm(words: list[str]) -> list[list[int]]:
        found: list[list[int]] = []
        for word in words:
            for prefix in ("", " "):
                ids_ = Letters().encode(prefix + word.lstrip())
                if not prefix or ids_[0] != found[-1][0] and len(ids_) == len(found[-1]):
                    found.append(ids_)
        return found

    words = ["ab", "zoo", " cab", "a", "abc a", "q", "ab"]
    assert {tuple(word) for word in by_vllm(words)} == set(bad_word_ids(words, Letters(), VOCAB))
    class Table:
        """Of which vLLM passes over what begins with the same token, and what is one token more."""

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return {"x": [1, 2], " x": [1, 3], "y": [4], " y": [5, 4], "z": [6], " z": [7]}[text]

    assert bad_word_ids(["x", "y", "z"], Table(), VOCAB) == [(1, 2), (4,), (6,), (7,)]
    assert (27,) in bad_word_ids(["a"], Letters(), VOCAB) and len(bad_word_ids(["q"], Letters(), VOCAB)) == 1


# -- whatever is drawn --------------------------------------------------------------------------------------------


def violations(token_ids: list[int], params: stars.SamplingParams) -> list[str]:
    words = bad_word_ids(params.bad_words, Letters(), VOCAB)
    found = [str(word) for word in words for place in range(len(token_ids))
             if tuple(token_ids[place : place + len(word)]) == word]
    if EOS in token_ids[: params.min_tokens]:
        found.append("min_tokens")
    if params.allowed_token_ids is not None and set(token_ids) - set(params.allowed_token_ids):
        found.append("allowed_token_ids")
    return found


def policies(tmp_path) -> dict[str, object]:
    """One of each method of the package."""
    return {
        "stars": stars.STARS(3, 4, 0.2, 0.5, 1.0, width=3), "cards": stars.CARDS(2.8, 2, 7, 6, 0.5, 0.5, 1.2, width=2),
        "sample": stars.Sample(), "best-of-n": stars.BestOfN(3), "blockwise": stars.BlockwiseBestOfK(3, 4),
        "rejection-sampling": stars.RejectionSampling(2.0, 0.3, 4, width=2),
        "speculative-rejection": stars.SpeculativeRejection(3, 0.4, 4), "segment-beam": stars.SegmentBeam(2, 2, 4),
        "particle-filter": stars.ParticleFilter(3, 0.5, 4), "args": stars.ARGS(4, 1.0), "rad": stars.RAD(4, 2.0),
        "mara": stars.MARA(topk=7), "persona-judge": stars.PersonaJudge("1", "2"),
        "token-guidance": stars.TokenGuidance("small"),
        "rsd": stars.RewardGuidedSpeculation(reward_threshold=0.9, segment_size=4)}


def test_every_policy_keeps_to_the_edits_or_refuses_them(tmp_path):
    save_file(head_tensors(HIDDEN, H, seed=6, bias=-1.0), tmp_path / "agent.safetensors")
    made = engine(heads={"agent": str(tmp_path / "agent.safetensors")}, models={"small": SMALL.decoder()})
    methods = policies(tmp_path)
    assert set(methods) == set(POLICIES)
    for name, policy in methods.items():
        for seed in range(3):
            params = stars.SamplingParams(max_tokens=19, n=2, seed=seed, **{"min_tokens": 3} | some_edits(40 + seed))
            if name == "persona-judge":
                refused(stars.RequestError, "biases and bans", run, made, params, policy)
                continue
            for completion in run(made, params, policy):
                assert completion.error is None and completion.token_ids, name
                assert not violations(completion.token_ids, params), name
    gsi = stars.RewardGuidedSpeculation(reward_threshold=0.9, beta=2.0, segment_size=4, variant="gsi", n=3)
    for edits in (dict(logit_bias={3: 1.0}), dict(min_tokens=2), dict(bad_words=["a"]), dict(allowed_token_ids=[3])):
        refused(stars.RequestError, f"leave {next(iter(edits))} out", run, made, stars.SamplingParams(**edits), gsi)


def test_the_same_text_at_any_width_and_in_any_batch():
    """Edited requests beside others, of which none sees another's; at width 1 and 8; in few pages."""
    params = [stars.SamplingParams(max_tokens=18, seed=60 + seed, **(some_edits(seed) if seed % 3 else {}))
              for seed in range(7)]
    alone = [[completion.token_ids for completion in run(
        engine(deterministic=True), one, stars.STARS(4, 6, 0.2, 0.5, 1.5, width=1))] for one in params]
    assert len({tuple(tokens[0]) for tokens in alone}) >= 6
    for width, options in ((1, {}), (8, {}), (3, dict(max_num_seqs=2, max_num_lanes=5)), (4, dict(cache_tokens=128))):
        made = engine(deterministic=True, **options)
        together = run(made, params, stars.STARS(4, 6, 0.2, 0.5, 1.5, width=width), len(params))
        assert [[completion.token_ids] for completion in together] == alone, (width, options)


def test_a_stop_string_ends_nothing_before_min_tokens():
    """As in vLLM: one that is complete with the first min_tokens tokens is text like any other."""
    free = stars.SamplingParams(max_tokens=24, seed=5, min_tokens=24)
    [whole] = run(engine(), free, stars.STARS(3, 2, 0.5, 0.5, 1.0))
    for place in (2, 7, 12):
        stop = Letters().decode(whole.token_ids[place : place + 2]).strip()
        last = len(Letters().encode(whole.text[: whole.text.find(stop) + len(stop)]))  # tokens it is complete with
        for least in (0, last - 1, last, 24):
            params = dataclasses.replace(free, stop=stop, min_tokens=least, logit_bias={EOS: -100.0})
            [got] = run(engine(), params, stars.STARS(3, 2, 0.5, 0.5, 1.0))
            if least < last:
                assert got.finish_reason == "stop" and got.stop_reason == stop
                assert got.token_ids == whole.token_ids[:last] and got.text == whole.text[: whole.text.find(stop)]
            elif whole.text.count(stop) == 1:
                assert got.token_ids == whole.token_ids and got.text == whole.text
            assert got.finish_reason != "stop" or len(got.token_ids) > least


def test_min_tokens_bans_eos_though_it_is_ignored():
    """As vLLM does, and what stop_token_ids names as well."""
    params = stars.SamplingParams(max_tokens=8, min_tokens=5, ignore_eos=True, seed=1, stop_token_ids=[9],
                                  logit_bias={EOS: 60.0, 9: 50.0})
    [completion] = run(engine(), params)
    assert not {EOS, 9} & set(completion.token_ids[:5]) and completion.token_ids[5:] == [EOS] * 3


# -- what leaves nothing ------------------------------------------------------------------------------------------


def test_constraints_that_leave_nothing_say_so():
    """Where that comes up in a response; the one beside it goes on."""
    params = [stars.SamplingParams(max_tokens=9, seed=1, allowed_token_ids=[1, 2], bad_words=["aa", "ab", "ba", "bb"]),
              stars.SamplingParams(max_tokens=9, seed=1)]
    for policy in (stars.STARS(3, 2, 0.5, 0.5, 1.0), stars.ARGS(2, 1.0)):
        with pytest.warns(UserWarning, match="the constraints leave no token"):
            failed, other = run(engine(), params, policy, 2)
        assert failed.error == NOTHING_LEFT and failed.finish_reason == "error"
        assert other.error is None and len(other.token_ids) in range(1, 10)


@pytest.mark.parametrize(("edits", "message"), [
    (dict(bad_words=[" "]), "is no token"), (dict(bad_words=["a" * 17]), "17 tokens, the most is 16"),
    (dict(allowed_token_ids=[1], bad_words=["a"]), "ban all that could be drawn"),
    (dict(allowed_token_ids=[EOS], min_tokens=1), "allow other ids"),
    (dict(allowed_token_ids=[EOS, 5], stop_token_ids=[5], min_tokens=4), "allow other ids"),
    (dict(logit_bias={VOCAB: 1.0}), "outside the model's vocabulary"),
    (dict(allowed_token_ids=[VOCAB]), "outside the model's vocabulary"),
    (dict(bad_words=[chr(107 + index // 64) + chr(107 + index // 8 % 8) + chr(107 + index % 8) * (1 + index // 512)
                     for index in range(1100)]), "the most is 1024"),
])
def test_what_cannot_be_is_refused_at_the_door(edits, message):
    made = engine()
    refused(stars.RequestError, message, run, made, stars.SamplingParams(max_tokens=8, **edits))
    assert not made.has_unfinished_requests()


def test_bad_words_need_a_tokenizer():
    refused(stars.RequestError, "need a tokenizer", run, engine(tokenizer=None),
            stars.SamplingParams(max_tokens=8, bad_words=["a"]))


# -- lanes with a matcher -----------------------------------------------------------------------------------------


class NoDoubles:
    """Allows any token but the last one, of a vocabulary of `vocab`."""

    def __init__(self, last: int | None, vocab: int):
        self.seen, self.vocab = [last], vocab

    def fill(self, row: np.ndarray) -> None:
        row[:] = mask_of([token for token in range(self.vocab) if token != self.seen[-1]], self.vocab)

    def accept(self, token: int) -> None:
        self.seen.append(token)


@pytest.mark.parametrize("width", [1, 8])
def test_a_matcher_draws_what_the_same_bans_do(width, monkeypatch):
    """A language that bad words can say too: bit for bit, beside requests that have no matcher, most are rejected."""
    params = stars.SamplingParams(max_tokens=14, n=3, seed=3, bad_words=[2 * chr(96 + token) for token in range(1, 27)],
                                  logit_bias=dict.fromkeys(range(27, VOCAB), -100.0))
    policy = stars.STARS(4, 8, 0.2, 0.5, 3.0, width=width)
    wanted = run(engine(deterministic=True), params, policy)
    spec, matchers = stars.proposer.LaneSpec, []

    def matched(table, last, slab, max_tokens, seed, *rest, edits, **named):
        if edits is None:
            return spec(table, last, slab, max_tokens, seed, *rest, edits=edits, **named)
        matchers.append(NoDoubles(last if edits.base else None, VOCAB))
        return spec(table, last, slab, max_tokens, seed, *rest, edits=edits, **(named | dict(matcher=matchers[-1])))

    monkeypatch.setattr(stars.proposer, "LaneSpec", matched)
    others = stars.SamplingParams(max_tokens=14, n=2, seed=4)
    got = run(engine(deterministic=True), [dataclasses.replace(params, bad_words=None), others], policy, 2)
    assert [one.token_ids for one in got[:3]] == [one.token_ids for one in wanted]
    assert [one.cumulative_logprob for one in got[:3]] == [one.cumulative_logprob for one in wanted]
    assert got[3].token_ids == run(engine(deterministic=True), others, policy)[0].token_ids
    rate = sum(one.metrics.accepted for one in got[:3]) / sum(one.metrics.attempts_counted for one in got[:3])
    assert rate < 0.4 and len(matchers) >= 3 * 4


@pytest.mark.skipif(not libstars.available(), reason="libstars was not built")
def test_a_gpus_host_sends_what_is_asked_and_waits_for_what_was_drawn(monkeypatch):
    """Edits, matchers and neither in one batch, on a device with memory of its own: the CPU's texts."""
    work_as(monkeypatch, PADDED._replace(chunk=64))
    sizes = dict(cache_tokens=512, page_size=4, max_num_seqs=5, max_num_lanes=15)
    policy = stars.STARS(5, 4, 0.2, 0.5, 3.0, width=3)
    params = [stars.SamplingParams(max_tokens=18, seed=20 + seed, **(
        some_edits(seed) | dict(bad_words=None) if seed % 3 else {})) for seed in range(5)]
    wanted = run(toy_engine(LM, RM, **sizes), params, policy, 5)
    gpu = recorded_gpu.install(monkeypatch)
    made = recorded_gpu.build(gpu, LM.decoder(), stars.CausalReward(RM.decoder()), **sizes)
    for _ in range(3):  # launched, captured, replayed
        assert [one.token_ids for one in run(made, params, policy, 5)] == [one.token_ids for one in wanted]
    spec, matchers = stars.proposer.LaneSpec, []

    def matched(*given, params, edits, **named):
        if params.min_tokens:
            matchers.append(Anything())
            named["matcher"] = matchers[-1]
        return spec(*given, params=params, edits=edits, **named)

    def by_name(table, last, slab, max_tokens, seed, attempt, stream, params, *rest, **named):
        return matched(table, last, slab, max_tokens, seed, attempt, stream, params=params, **dict(zip(
            ("stop_ids", "history", "entropy_cut", "least_tokens", "weights"), rest, strict=False)), **named)

    monkeypatch.setattr(stars.proposer, "LaneSpec", by_name)
    for _ in range(3):
        assert [one.token_ids for one in run(made, params, policy, 5)] == [one.token_ids for one in wanted]
    assert sum(len(matcher.accepted) for matcher in matchers) > 40


class Anything:
    """Allows all of a vocabulary."""

    def __init__(self):
        self.accepted = []

    def fill(self, row: np.ndarray) -> None:
        row[:] = mask_of(slice(VOCAB), VOCAB)

    def accept(self, token: int) -> None:
        self.accepted.append(token)


class Only:
    """Allows these tokens, one set after the other."""

    def __init__(self, *sets: Sequence[int]):
        self.sets, self.accepted = sets, []

    def fill(self, row: np.ndarray) -> None:
        row[:] = mask_of(self.sets[len(self.accepted)], 5)

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def drafted(target, lanes: list[dict], ranks: bool = False) -> list:
    """Drafts of four tokens after one prompt, twice: recorded, then replayed."""
    decoder, cache, passes, config = setting(ToyModel(vocab=5, seed=3), target)
    drafter = Drafter(decoder, cache, config)
    table = cache.open(PROMPTS[0][:-1])
    passes.prefill([(table, PROMPTS[0], len(PROMPTS[0]) - 1)])
    results = []
    for _ in range(2):
        specs = [LaneSpec(table, PROMPTS[0][-1], slab, 4, 11, slab + 1, pack_stream(0, 0), stars.SamplingParams(), (0,),
                          **{name: value() if callable(value) else value for name, value in lane.items()})
                 for slab, lane in enumerate(lanes)]
        results.append((drafter.draft(specs), specs))
    assert results[0][0] == results[1][0]
    return results[1]


def edited(base: int = 0, **asked) -> Edited:
    """What a lane is told whose request has a grammar too."""
    params = stars.SamplingParams(structured_outputs=dict(json_object=True), **asked)
    edits = edits_of(params, Digits(), (0,) if params.min_tokens else (), 5)
    return Edited(edits, base, ())


@pytest.mark.parametrize("target", [CPU, PADDED])
def test_masks_of_a_matcher_and_of_the_request(target):
    """Both hold; a stop id that comes too early is left out where anything else is allowed, and drawn where not."""
    lanes = [
        dict(matcher=lambda: Only([2], [3], [4], [1])),
        dict(matcher=lambda: Only([1, 2], [2, 3], [3, 4], [1, 4]), edits=edited(allowed_token_ids=[2, 4])),
        {},
        dict(matcher=lambda: Only([0, 3], [0, 3], [0, 3], [0, 3]), edits=edited(base=2, min_tokens=5)),
        dict(matcher=lambda: Only([0, 3], [0]), edits=edited(min_tokens=5)),
        dict(matcher=lambda: Only([0])),
        dict(matcher=lambda: Only([1, 3], [2, 4]), ranks=5),
    ]
    got, specs = drafted(target, lanes)
    assert [one.token_ids for one in got[:2]] == [[2, 3, 4, 1], [2, 2, 4, 4]]
    assert got[2] == drafted(target, [{}, {}, {}])[0][2]
    assert got[3].token_ids[:3] == [3, 3, 3] and got[4].token_ids == [3, 0] and got[5].token_ids == [0]
    assert sorted(got[6].token_ids) == [1, 3] and specs[6].matcher.accepted == []
    for one, spec in zip(got[:6], specs, strict=False):
        assert spec.matcher is None or spec.matcher.accepted == one.token_ids


def test_what_a_matcher_raises_is_raised_by_the_draft():
    class Broken(Only):
        def fill(self, row):
            raise ValueError("no such state")

    with pytest.raises(ValueError, match="no such state"):
        drafted(CPU, [dict(matcher=lambda: Broken([1])), {}])


def test_masks_under_way_end_before_the_next_draft_writes():
    """Of a draft that was interrupted; and the thread that fills them ends with its owner."""
    helper, written, going = Helper("masks"), [], Event()
    helper.begin(lambda: (going.wait(10), written.append(1)))
    Timer(0.05, going.set).start()
    helper.settle()
    assert written == [1]
    helper.begin(lambda: written.append(2))
    helper.wait()
    helper.settle()
    thread = helper._thread
    del helper
    thread.join(10)
    assert written == [1, 2] and not thread.is_alive()
