"""The public calls: what goes in, what comes out, and that requests do not disturb each other."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pytest

import oracle
import stars
from editing import edit_json
from stars.stops import hold_back
from toy import ToyModel, facts, ids, scripted_engine, table_reward, toy_engine

LM = ToyModel(vocab=5, seed=1)
REWARD = table_reward(seed=3)
PROMPT = {"prompt_token_ids": ids(7, seed=1)}
POLICY = stars.STARS(segment_size=3, max_attempts=5, alpha=0.4, beta=0.5, reward_threshold=1.5, width=2)
PARAMS = stars.SamplingParams(max_tokens=14, n=2, seed=3)


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def rewarding(fn=REWARD, **options) -> stars.FunctionReward:
    return stars.FunctionReward(lambda prompt, responses: [fn(r) for r in responses], inputs="ids", **options)


class Bytes:
    """A tokenizer whose tokens are bytes, but for EOS (0): every character of two bytes is cut somewhere."""

    has_chat_template = True
    eos_token_id, bos_token_id, bos_token = 0, 1, "\x01"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + list(text.encode())

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(i for i in ids if not (skip_special_tokens and i in (0, 1))).decode(errors="replace")

    def apply_chat_template(self, messages, add_generation_prompt=True) -> str:
        return "\x01" + "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant: "


def scripted(text: str, reward=None) -> stars.Engine:
    """An engine with a byte tokenizer whose model writes `text`, then EOS, after any prompt of five tokens."""
    return scripted_engine(Bytes(), 256, text.encode(), 5, reward)


# -- what goes in -------------------------------------------------------------------------------------------------


def test_prompts_of_every_form():
    """Text, ids, messages and {"prompt": ...}; one or a list; always a list comes out, with the prompt as given."""
    engine = toy_engine(ToyModel(vocab=256, seed=5, layers=1), tokenizer=Bytes())
    params = stars.SamplingParams(max_tokens=3)
    messages = [{"role": "user", "content": "hi"}]
    [one] = engine.generate("abc", params, use_tqdm=False)
    assert one.prompt == "abc" and one.prompt_token_ids == [1, 97, 98, 99]
    outputs = engine.generate(["abc", {"prompt": "abc"}, {"prompt_token_ids": [1, 97]}, {"messages": messages}], params,
                              use_tqdm=False)
    assert [o.prompt for o in outputs] == ["abc", "abc", None, messages]
    assert outputs[3].prompt_token_ids == list(b"\x01user: hi\nassistant: "), "BOS must come from the template alone"
    assert engine.generate([], params, use_tqdm=False) == []
    [numpy_ids] = engine.generate({"prompt_token_ids": np.array([1, 97])}, params, use_tqdm=False)
    assert numpy_ids.prompt_token_ids == [1, 97]


def test_defaults_are_as_documented():
    """vLLM's names and defaults, plain sampling without a policy."""
    params = stars.SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.max_tokens, params.n, params.seed) == (
        1.0, 0, 1.0, 0.0, 128, 1, None)
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == ((), (), False)
    policy = stars.STARS(reward_threshold=1.0)
    assert (policy.segment_size, policy.max_attempts, policy.width) == (16, 20, None)
    assert (policy.alpha, policy.beta) == (0.5, 0.7)
    assert stars.SamplingParams(top_k=-1).top_k == 0  # vLLM's other way to say off
    [output] = toy_engine(LM).generate(PROMPT, use_tqdm=False)
    assert output.policy == stars.Sample() and output.outputs[0].reward is None


def test_one_of_each_or_one_for_all():
    """Parameters and policies, given once or one for each prompt, act as if each prompt came alone."""
    engine = toy_engine(LM, rewarding())
    params = [dataclasses.replace(PARAMS, seed=seed) for seed in (1, 2, 3)]
    policies = [POLICY, stars.Sample(), stars.BlockwiseBestOfK(3, 2)]
    together = engine.generate([PROMPT] * 3, params, policies, use_tqdm=False)
    for output, one, policy in zip(together, params, policies, strict=True):
        [alone] = engine.generate(PROMPT, one, policy, use_tqdm=False)
        assert [o.token_ids for o in alone.outputs] == [o.token_ids for o in output.outputs]
    same = engine.generate([PROMPT] * 2, params[0], POLICY, use_tqdm=False)
    assert same[0].outputs[0].token_ids == same[1].outputs[0].token_ids == together[0].outputs[0].token_ids


def test_seed_is_reported_and_reproduces():
    """seed=None draws one of 63 bits, another each time; given back, it gives the same text."""
    engine = toy_engine(LM, rewarding())
    first, second = engine.generate([PROMPT] * 2, dataclasses.replace(PARAMS, seed=None), POLICY, use_tqdm=False)
    assert first.seed != second.seed
    [again] = engine.generate(PROMPT, dataclasses.replace(PARAMS, seed=first.seed), POLICY, use_tqdm=False)
    assert [o.token_ids for o in again.outputs] == [o.token_ids for o in first.outputs]
    for seed in (-2, (1 << 64) - 1, 0):
        [output] = engine.generate(PROMPT, dataclasses.replace(PARAMS, seed=seed), POLICY, use_tqdm=False)
        assert output.seed == seed


def test_samples_use_streams_0_to_n_minus_1():
    """A larger n adds samples and does not change the first ones."""
    engine = toy_engine(LM, rewarding())
    [one] = engine.generate(PROMPT, dataclasses.replace(PARAMS, n=1), POLICY, use_tqdm=False)
    [five] = engine.generate(PROMPT, dataclasses.replace(PARAMS, n=5), POLICY, use_tqdm=False)
    assert [o.index for o in five.outputs] == [0, 1, 2, 3, 4]
    assert five.outputs[0].token_ids == one.outputs[0].token_ids
    assert len({tuple(o.token_ids) for o in five.outputs}) > 1


# -- what comes out -----------------------------------------------------------------------------------------------


def test_metrics_add_up():
    """Counts against the attempts themselves."""
    engine = toy_engine(LM, rewarding())
    [output] = engine.generate(PROMPT, dataclasses.replace(PARAMS, n=4), POLICY, use_tqdm=False)
    for completion in output.outputs:
        metrics, segments = completion.metrics, completion.segments
        attempts = [attempt for segment in segments for attempt in segment.attempts]
        assert metrics.segments == len(segments) and metrics.attempts == len(attempts)
        assert metrics.lm_tokens_drawn == sum(len(attempt.token_ids) for attempt in attempts)
        assert metrics.lm_tokens_kept == len(completion.token_ids)
        assert metrics.accepted == sum(s.accepted for s in segments)
        assert metrics.fallbacks == sum(not s.accepted for s in segments)
        counted = sum(s.winner + 1 if s.accepted else len(s.attempts) for s in segments)
        assert metrics.attempts_counted == counted and metrics.accept_rate == metrics.accepted / counted
        assert metrics.width == 2 and metrics.lm_seconds > 0 and metrics.rm_seconds > 0
        assert completion.reward == segments[-1].reward
    assert output.metrics.attempts == sum(o.metrics.attempts for o in output.outputs)


def test_reward_model_tokens_are_counted():
    """Incremental scoring reads each candidate's own tokens; from scratch it would have read everything."""
    reward_model = ToyModel(vocab=5, seed=3, head="reward")
    engine = toy_engine(LM, reward_model)
    policy = stars.STARS(4, 3, 1.0, 0.0, math.inf, 3)
    [output] = engine.generate(PROMPT, stars.SamplingParams(max_tokens=12, seed=1, ignore_eos=True), policy,
                               use_tqdm=False)
    metrics = output.outputs[0].metrics
    prompt = len(PROMPT["prompt_token_ids"])
    # Three segments of three candidates of 4 tokens; each reads the last token before it again, for its row.
    assert metrics.rm_tokens_scored == 3 * 3 * (4 + 1)
    assert metrics.rm_tokens_full_rescore == 3 * sum(prompt + 4 * k for k in (1, 2, 3))


def test_logprobs_are_of_the_raw_model():
    """Temperature and filters shape the draw and not the log-probability."""
    engine = toy_engine(LM)
    params = stars.SamplingParams(max_tokens=9, temperature=0.5, top_k=2, seed=4)
    [output] = engine.generate(PROMPT, params, use_tqdm=False)
    completion = output.outputs[0]
    expected, context = 0.0, list(output.prompt_token_ids)
    for token in completion.token_ids:
        expected += oracle.log_softmax(LM.logits(context))[token]
        context.append(token)
    assert completion.cumulative_logprob == pytest.approx(expected, abs=1e-4)


def test_finish_reasons():
    """EOS: "stop" without a stop_reason; a stop token: its id; max_tokens: "length"; EOS ignored: length."""
    engine = toy_engine(LM)
    [free] = engine.generate(PROMPT, stars.SamplingParams(max_tokens=30, n=8, seed=1), use_tqdm=False)
    assert {o.finish_reason for o in free.outputs} <= {"stop", "length"}
    ended = [o for o in free.outputs if o.finish_reason == "stop"]
    assert ended and all(o.token_ids[-1] == 0 and o.stop_reason is None for o in ended)
    [ignoring] = engine.generate(PROMPT, stars.SamplingParams(max_tokens=30, n=8, seed=1, ignore_eos=True),
                                 use_tqdm=False)
    assert all(o.finish_reason == "length" and len(o.token_ids) == 30 for o in ignoring.outputs)
    [stopped] = engine.generate(PROMPT, stars.SamplingParams(max_tokens=30, n=8, seed=1, stop_token_ids=[2, 3]),
                                use_tqdm=False)
    assert any(o.token_ids[-1] in (2, 3) for o in stopped.outputs)
    assert all(o.stop_reason == o.token_ids[-1] for o in stopped.outputs if o.token_ids[-1] in (2, 3))
    assert all(o.stop_reason is None for o in stopped.outputs if o.token_ids[-1] not in (2, 3))


def test_eos_is_in_token_ids_and_not_in_text():
    [output] = scripted("hello").generate("abcd", stars.SamplingParams(max_tokens=30), use_tqdm=False)
    completion = output.outputs[0]
    assert completion.text == "hello" and completion.token_ids == [*b"hello", 0]
    assert completion.finish_reason == "stop" and completion.stop_reason is None


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("text, stop, kept", [
    ("one two three", ["two"], "one "), ("one two three", ["three", "o t"], "one tw"), ("aab", ["ab"], "a"),
    ("one", ["two"], "one"), ("größe", ["ö"], "gr"),
])
def test_stop_strings(text, stop, kept, size):
    """Found wherever segments are cut, left out of the text, and reported; nothing behind them is kept."""
    seen = []

    def reward(prompt, responses):
        seen.extend(responses)
        return [1.0] * len(responses)

    engine = scripted(text, stars.FunctionReward(reward))
    policy = stars.STARS(segment_size=size, alpha=1.0, reward_threshold=0.0, width=1)
    [output] = engine.generate("abcd", stars.SamplingParams(max_tokens=30, stop=stop), policy, use_tqdm=False)
    completion = output.outputs[0]
    assert completion.text == kept
    if kept == text:
        assert completion.stop_reason is None and completion.token_ids[-1] == 0
    else:
        assert completion.finish_reason == "stop" and completion.stop_reason in stop
        assert bytes(completion.token_ids).decode() == kept + completion.stop_reason
    assert seen[-1] == kept and not any(one in response for one in stop for response in seen)


def test_streaming_is_cumulative_and_holds_back():
    """No text is ever taken back: half a character and the start of a stop string wait."""
    text = "grüße an 東京 STOP und mehr"
    for size in (1, 2, 3, 7):
        engine = scripted(text, stars.FunctionReward(lambda prompt, responses: [1.0] * len(responses)))
        policy = stars.STARS(segment_size=size, alpha=1.0, reward_threshold=0.0, width=1)
        texts = []
        for output in engine.stream("abcd", stars.SamplingParams(max_tokens=60, stop="STOP"), policy):
            texts.append(output.outputs[0].text)
            assert "\ufffd" not in texts[-1]
        assert output.finished and texts[-1] == "grüße an 東京 "
        assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:]))
        assert not any(one.endswith(("S", "ST", "STO")) for one in texts)


def test_hold_back():
    assert hold_back("abc", ["cd", "bcde"]) == "a"
    assert hold_back("abc", ["x"]) == "abc"
    assert hold_back("ab\ufffd", []) == "ab"
    assert hold_back("", ["x"]) == ""


def test_stream_equals_generate():
    """Same tokens, each output a longer prefix, the last one finished; closing early aborts and leaves nothing."""
    engine = toy_engine(LM, rewarding())
    [whole] = engine.generate(PROMPT, PARAMS, POLICY, use_tqdm=False)
    outputs = list(engine.stream(PROMPT, PARAMS, POLICY))
    assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
    assert facts(outputs[-1]) == facts(whole)
    for earlier, later in zip(outputs, outputs[1:]):
        for a, b in zip(earlier.outputs, later.outputs, strict=True):
            assert b.token_ids[: len(a.token_ids)] == a.token_ids and b.segments[: len(a.segments)] == a.segments
    stream = engine.stream(PROMPT, PARAMS, POLICY)
    next(stream)
    stream.close()
    assert not engine.has_unfinished_requests()
    engine.check_integrity()


# -- step by step -------------------------------------------------------------------------------------------------


def test_add_request_and_step():
    """The same responses as generate; ids are given or chosen, used once, and free again after the last output."""
    engine = toy_engine(LM, rewarding())
    [whole] = engine.generate(PROMPT, PARAMS, POLICY, use_tqdm=False)
    mine = engine.add_request(PROMPT, PARAMS, POLICY, request_id="mine")
    other = engine.add_request(PROMPT, PARAMS, POLICY)
    assert mine == "mine" and other != mine
    with pytest.raises(stars.RequestError, match="'mine' is in use"):
        engine.add_request(PROMPT, PARAMS, POLICY, request_id="mine")
    finished = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            assert output.request_id not in finished
            if output.finished:
                finished[output.request_id] = output
    assert set(finished) == {mine, other}
    assert all(facts(output) == facts(whole) for output in finished.values())
    assert engine.step() == []
    assert engine.add_request(PROMPT, PARAMS, POLICY, request_id="mine") == "mine"


def test_ids_chosen_by_the_engine_avoid_those_in_use():
    engine = toy_engine(LM)
    given = [engine.add_request(PROMPT, PARAMS, request_id=str(number)) for number in range(3)]
    assert engine.add_request(PROMPT, PARAMS) not in given
    engine.generate(PROMPT, PARAMS, use_tqdm=False)


def test_abort_keeps_what_was_committed():
    engine = toy_engine(LM, rewarding())
    request_id = engine.add_request(PROMPT, dataclasses.replace(PARAMS, ignore_eos=True), POLICY)
    while not (outputs := engine.step()):
        pass
    before = [list(o.token_ids) for o in outputs[0].outputs]
    assert any(before)
    assert engine.abort(request_id) and not engine.abort(request_id) and not engine.abort("never was")
    [last] = engine.step()
    assert last.finished and {o.finish_reason for o in last.outputs} == {"abort"}
    assert [o.token_ids for o in last.outputs] == before
    assert not engine.has_unfinished_requests()
    waiting = engine.add_request(PROMPT, PARAMS, POLICY)
    assert engine.abort(waiting) and engine.step()[0].outputs[0].token_ids == []
    engine.check_integrity()


def test_calls_interleave():
    """A queued request goes on while generate and stream run, and its outputs wait for step."""
    engine = toy_engine(LM, rewarding())
    [whole] = engine.generate(PROMPT, PARAMS, POLICY, use_tqdm=False)
    request_id = engine.add_request(PROMPT, PARAMS, POLICY)
    stream = engine.stream(PROMPT, PARAMS, POLICY)
    streamed = [next(stream)]
    [generated] = engine.generate(PROMPT, PARAMS, POLICY, use_tqdm=False)
    streamed += stream
    stepped = []
    while engine.has_unfinished_requests():
        stepped += engine.step()
    assert [o.request_id for o in stepped] == [request_id] and stepped[-1].finished
    for output in (generated, streamed[-1], stepped[-1]):
        assert facts(output) == facts(whole)


def test_one_failing_request_leaves_the_others_alone():
    """The failing one says why; the others are what they are without it."""
    bad = ids(6, seed=9)

    def fn(prompt, responses):
        if prompt == bad and len(responses[0]) > 4:
            raise ValueError("no opinion")
        return [REWARD(response) for response in responses]

    engine = toy_engine(LM, stars.FunctionReward(fn, inputs="ids"))
    [alone] = engine.generate(PROMPT, PARAMS, POLICY, use_tqdm=False)
    params = dataclasses.replace(PARAMS, ignore_eos=True)
    outputs = engine.generate([PROMPT, {"prompt_token_ids": bad}, PROMPT], [PARAMS, params, PARAMS], POLICY,
                              use_tqdm=False)
    for output in (outputs[0], outputs[2]):
        assert facts(output) == facts(alone)
    for completion in outputs[1].outputs:
        assert completion.finish_reason == "error"
        assert completion.error == "the reward function raised ValueError: no opinion"
        assert len(completion.token_ids) <= 6  # what was committed before
    engine.check_integrity()


@pytest.mark.parametrize(("common", "own", "waves"), [
    (40, 20, [1, 5]),  # all but the first share two pages, and go on apart
    (0, 40, [6]), (10, 30, [6]),  # nothing to share
    (48, 5, [1, 5]), (48, 0, [1, 5]),  # whole pages, and less than a page behind them
])
def test_prompts_with_a_common_beginning_wait_for_it_once(monkeypatch, common, own, waves):
    """Chat templates give all prompts the same first page: one at a time, each would cost a pass of few rows."""
    engine = toy_engine(LM, max_num_seqs=8, page_size=16)
    started = []
    prefill = engine._models.own.passes.prefill
    monkeypatch.setattr(engine._models.own.passes, "prefill", lambda tables, *rows: (
        started.append(len(tables)), prefill(tables, *rows))[1])
    draw = np.random.default_rng(1)
    head = draw.integers(1, 5, common).tolist()
    prompts = [{"prompt_token_ids": [*head, *draw.integers(1, 5, own).tolist(), 1]} for _ in range(6)]
    engine.generate(prompts, stars.SamplingParams(max_tokens=2), use_tqdm=False)
    assert started == waves


# -- policies -----------------------------------------------------------------------------------------------------


def test_best_of_n_by_brute_force():
    """The earliest best of n plain samples, which stand in its one segment as attempts."""
    engine = toy_engine(LM, rewarding())
    [plain] = engine.generate(PROMPT, dataclasses.replace(PARAMS, n=6), stars.Sample(score=True), use_tqdm=False)
    [best] = engine.generate(PROMPT, dataclasses.replace(PARAMS, n=2), stars.BestOfN(3), use_tqdm=False)
    for group, completion in enumerate(best.outputs):
        samples = plain.outputs[3 * group : 3 * group + 3]
        rewards = [REWARD([token for token in s.token_ids if token]) for s in samples]
        assert [s.reward for s in samples] == rewards
        assert completion.reward == max(rewards)
        assert completion.token_ids == samples[rewards.index(max(rewards))].token_ids
        assert [a.token_ids for a in completion.segments[0].attempts] == [s.token_ids for s in samples]
        assert completion.segments[0].winner == rewards.index(max(rewards))
        assert completion.metrics.lm_tokens_drawn == sum(len(s.token_ids) for s in samples)
        assert completion.metrics.lm_tokens_kept == len(completion.token_ids)
        assert (completion.metrics.segments, completion.metrics.attempts) == (1, 3)
        assert completion.metrics.accept_rate == 1 / 3
    assert best.metrics.segments == 2 and best.metrics.attempts == best.metrics.attempts_counted == 6


def test_blockwise_best_of_k_by_brute_force():
    """The earliest best of k candidates of every segment."""
    engine = toy_engine(LM, rewarding())
    [output] = engine.generate(PROMPT, PARAMS, stars.BlockwiseBestOfK(4, 3), use_tqdm=False)
    for completion in output.outputs:
        expected = oracle.run(LM.logits, REWARD, output.prompt_token_ids, PARAMS,
                              stars.STARS(3, 4, reward_threshold=math.inf), PARAMS.seed, completion.index, (0,))
        assert [s.token_ids for s in completion.segments] == [s.token_ids for s in expected]
        for segment, wanted in zip(completion.segments, expected, strict=True):
            assert segment.accepted and segment.winner == wanted.attempts.index(
                max(wanted.attempts, key=lambda attempt: attempt.reward))
            assert sum(attempt.accepted for attempt in segment.attempts) == 1


def test_calibrate_is_the_quantile_of_plain_samples():
    engine = toy_engine(LM, rewarding())
    prompts = [PROMPT, {"prompt_token_ids": ids(4, seed=2)}]
    params = stars.SamplingParams(max_tokens=9, seed=8)
    outputs = engine.generate(prompts, dataclasses.replace(params, n=16), stars.Sample(score=True), use_tqdm=False)
    rewards = [o.reward for output in outputs for o in output.outputs]
    assert engine.calibrate(prompts, params) == pytest.approx(np.quantile(rewards, 0.9))
    assert engine.calibrate(prompts, params, quantile=0.25) == pytest.approx(np.quantile(rewards, 0.25))
    assert [sample.reward for own in engine.plain_samples(prompts, params) for sample in own] == rewards


def test_a_threshold_out_of_reach_warns_once():
    """Rewards of at most 3 and a threshold of 500: said once, with what was seen; never for a threshold of +inf."""
    engine = toy_engine(LM, rewarding())
    params = stars.SamplingParams(max_tokens=30, n=4, seed=1, ignore_eos=True)
    policy = stars.STARS(3, 10, 1.0, 0.5, 500.0)
    with pytest.warns(UserWarning, match="reward_threshold=500 accepted 0 of .*engine.calibrate"):
        engine.generate(PROMPT, params, policy, use_tqdm=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate(PROMPT, params, policy, use_tqdm=False)
        engine.generate(PROMPT, params, dataclasses.replace(policy, reward_threshold=math.inf), use_tqdm=False)


def test_width_beyond_the_lanes_is_clipped():
    """More lanes than there are: rounds become narrower, the text stays."""
    wide = toy_engine(LM, rewarding(), max_num_lanes=64)
    narrow = toy_engine(LM, rewarding(), max_num_lanes=3, max_num_seqs=2)
    policy = dataclasses.replace(POLICY, width=16, max_attempts=16)
    params = dataclasses.replace(PARAMS, n=4)
    [one] = wide.generate(PROMPT, params, policy, use_tqdm=False)
    [other] = narrow.generate(PROMPT, params, policy, use_tqdm=False)
    assert [o.token_ids for o in one.outputs] == [o.token_ids for o in other.outputs]
    assert one.metrics.width > 3 >= other.metrics.width


def test_width_chosen_by_the_engine():
    """None: recorded in the metrics, and the text is that of any width."""
    engine = toy_engine(LM, rewarding())
    [chosen] = engine.generate(PROMPT, PARAMS, dataclasses.replace(POLICY, width=None), use_tqdm=False)
    [given] = engine.generate(PROMPT, PARAMS, POLICY, use_tqdm=False)
    assert [o.token_ids for o in chosen.outputs] == [o.token_ids for o in given.outputs]
    assert 1 <= chosen.metrics.width <= POLICY.max_attempts
    engine.check_integrity()


def test_sampling_values_of_generation_config_are_not_applied(tiny_model, copied):
    """temperature and top_k of generation_config.json are the model author's, EOS ids the model's own."""
    directory = tiny_model(family="llama")
    copy = copied(directory)
    edit_json(copy / "generation_config.json", temperature=0.01, top_k=1, do_sample=True, eos_token_id=[2, 9])
    params = stars.SamplingParams(max_tokens=12, n=4, seed=1, ignore_eos=True)
    texts = []
    for path in (directory, copy):
        engine = stars.Engine(path, cache_tokens=512)
        [output] = engine.generate({"prompt_token_ids": [5, 6, 7]}, params, use_tqdm=False)
        texts.append([o.token_ids for o in output.outputs])
    assert texts[0] == texts[1]
    assert set(engine.model_config.eos_token_ids) == {2, 9}


def test_progress_bar_counts_prompts():
    """use_tqdm may be a tqdm of the caller's choice."""
    updates = []

    class Bar:
        def __init__(self, total, **_):
            self.total = total

        def update(self, count):
            updates.append(count)

        def close(self):
            updates.append("closed")

    toy_engine(LM).generate([PROMPT] * 3, PARAMS, use_tqdm=Bar)
    assert sum(updates[:-1]) == 3 and updates[-1] == "closed"
