"""score: rewards of responses that nobody drew are those that the loop would have given, a slice at a time, whatever
else runs, fails or is interrupted meanwhile."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest

import stars
from lora import ALL, write_adapter
from process_models import source_of, write_process_model
from stars import response_scorer
from stars.errors import RewardError
from stars.model.tokenizer import Detokenizer
from stars.reward.base import ContextFull, Reward, Scored
from stars.score_call import PairParser, score_call
from test_conservation import nothing_is_held
from test_encoder_rewards import write_encoder
from test_faults import IGNORED, Interrupts
from test_lora_reward import head
from test_text import loaded  # noqa: F401, a fixture
from toy import Digits, ToyModel, ids, toy_engine, toy_pair

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LIMIT = 60  # seconds; what takes longer hangs
TOLERANCE = 1e-4
SMALL = dict(cache_tokens=2048, page_size=4, max_num_seqs=8, max_num_lanes=16, max_segment_size=16)
PROMPTS = ["The quick brown fox", "The little girl lived near the forest"]
TEXTS = [" jumps over", " sleeps"]
CHAT = {"messages": [{"role": "user", "content": "The quick brown fox"}]}
KINDS = ["same", "same, eos", "other", "other, chat", "process", "encoder", "pair encoder", "text", "ids", "later",
         "implicit", "weighted", "cached", "lora"]
LM, RM = toy_pair(11, (1, 3), layers=2)
POLICY = stars.STARS(3, 4, 0.5, 0.4, 1.0, 2)


def run(coroutine: Any) -> Any:
    """asyncio.run, with an end."""
    return asyncio.run(asyncio.wait_for(coroutine, LIMIT))


def of_text(prompt: Any, responses: list[str]) -> list[float]:
    """Depends on every letter, and on what stands where."""
    texts = [f"{prompt}|{response}" for response in responses]
    return [sum(place * ord(letter) for place, letter in enumerate(text, 1)) % 97 / 7.0 for text in texts]


def prompt(length: int = 9, seed: int = 0) -> dict:
    return {"prompt_token_ids": [1, *ids(length - 1, 11, seed)]}


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(family="llama", tokenizer=True, chat_template=True)


@pytest.fixture(scope="module")
def made(model, tiny_model, tmp_path_factory):
    """made(kind): an engine whose reward is of that kind; made once."""
    engines: dict[str, stars.Engine] = {}

    def reward(kind: str) -> Reward:
        same = tiny_model(family="llama", head="reward", tokenizer=True, chat_template=True)
        other = tiny_model(family="llama", head="reward", tokenizer=True, chat_template=True, tokenizer_seed=2, seed=7)
        if kind in ("same", "same, eos"):
            return stars.CausalReward(same, close="eos" if "eos" in kind else "none")
        if kind.startswith("other"):
            return stars.CausalReward(other, **(dict(template="chat", close="template") if "chat" in kind else {}))
        if kind == "process":
            directory = tmp_path_factory.mktemp("process") / "mlp"
            return stars.ProcessReward(write_process_model(directory, source_of(tiny_model, "mlp"), "mlp"),
                                       step_separator="e", aggregate="prod", template="raw")
        if "encoder" in kind:
            directory = write_encoder(tmp_path_factory.mktemp("encoder"), "Bert", max_position_embeddings=150)
            return stars.EncoderReward(directory, inputs="pair" if "pair" in kind else "joined")
        if kind == "ids":
            return stars.FunctionReward(lambda p, all_ids: [sum(p) % 7 + sum(one) % 31 - 0.5 * len(one)
                                                            for one in all_ids], inputs="ids")
        if kind == "implicit":
            return stars.ImplicitReward(tiny_model(family="llama", tokenizer=True, chat_template=True, seed=5), model,
                                        beta=0.5, length_normalised=True)
        if kind == "weighted":
            return stars.WeightedReward([(reward("same"), 0.5), (reward("other"), -1.0), (reward("later"), 0.25)])
        if kind == "cached":
            return stars.CachedReward(reward("text"))
        return stars.FunctionReward(of_text, blocking=kind == "later")

    def get(kind: str) -> stars.Engine:
        if kind == "lora" and kind not in engines:
            base = tiny_model(tokenizer=True, chat_template=True, family="llama", vocab=311, dtype="bfloat16")
            adapter = write_adapter(tmp_path_factory.mktemp("rewards") / "reward", base, ALL, rank=3, scale=1.0,
                                    whole=head(36), task_type="SEQ_CLS", modules_to_save=["score"])
            engines[kind] = stars.Engine(base, str(adapter), dtype="float32", **SMALL)
        if kind not in engines:
            engines[kind] = stars.Engine(model, reward(kind), **SMALL)
        return engines[kind]

    return get


# -- what the loop says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", [*PROMPTS, CHAT], ids=["text", "longer text", "chat"])
@pytest.mark.parametrize("tokens", [5, 24], ids=["within a slab", "beyond"])
def test_rewards_are_those_of_the_loop(made, kind, asked, tokens):
    """Of finished samples, by their tokens with the EOS that ended some, and by their texts where these are read."""
    engine = made(kind)
    params = stars.SamplingParams(max_tokens=tokens, n=4, seed=3, logit_bias={engine._intake._eos_token_ids[0]: 3.0})
    [output] = engine.generate(asked, params, stars.Sample(score=True), use_tqdm=False)
    wanted = [completion.reward for completion in output.outputs]
    assert len(set(wanted)) > 1 and {one.finish_reason for one in output.outputs} <= {"stop", "length"}
    scored = engine.score(asked, [completion.token_ids for completion in output.outputs])
    assert scored == pytest.approx(wanted, abs=TOLERANCE)
    if engine.reward.needs_text:
        texts = [completion.text for completion in output.outputs]
        if kind != "weighted":  # of which a part reads the tokens that these texts are encoded to
            assert engine.score(asked, texts) == pytest.approx(wanted, abs=TOLERANCE)
    nothing_is_held(engine)


def test_a_response_ends_with_its_eos(made):
    """What ended it counts where the reward says so, and is no part of the response."""
    engine = made("implicit")
    eos = engine._intake._eos_token_ids[0]
    open_end, ended = engine.score(PROMPTS[0], [[5, 6], [5, 6, eos]])
    assert abs(open_end - ended) > 1e-3


def test_ids_and_texts_of_one_response_are_one(made, model):
    """A text has the tokens that it has behind its prompt, which is not always what it is encoded to by itself."""
    engine = made("same")
    text = PROMPTS[0] + " jumps over the lazy dog"
    whole = engine.tokenizer.encode(text)
    begin = engine.tokenizer.encode(PROMPTS[0])
    assert whole[: len(begin)] == begin
    by_ids, = engine.score(PROMPTS[0], [whole[len(begin):]])
    by_text, = engine.score(PROMPTS[0], " jumps over the lazy dog")
    assert by_ids == by_text and engine.score([text]) == pytest.approx([by_text], abs=TOLERANCE)
    apart, = engine.score({"prompt": PROMPTS[0], "special_tokens": "text"}, " jumps over the lazy dog")
    assert apart == by_text


@pytest.mark.parametrize("kind", ["fallback", "metaspace", "byte level"])
@pytest.mark.parametrize("begin, text", [("the cat", " sat on"), ("the c", "at sat"), ("the", "cat"), ("T", "he cat")])
def test_a_text_has_the_tokens_that_it_has_behind_its_prompt(request, kind, begin, text):
    """Many tokenizers treat a text's first token in their own way: by itself a response would begin with a space."""
    tokenizer, _ = request.getfixturevalue("loaded")[kind]
    parser = PairParser(tokenizer, tokenizer.vocab_size, (), stars.FunctionReward(of_text, inputs="ids"))
    call = score_call(begin, [text])
    pair = parser.next_of(call)
    assert Detokenizer(tokenizer, pair.prompt.token_ids).decode(pair.token_ids) == text


def test_one_prompt_or_one_for_each(made):
    engine = made("other")
    first, second = (engine.score(prompt, [" jumps", " sleeps on"]) for prompt in PROMPTS)
    assert engine.score(PROMPTS * 2, [" jumps", " jumps", " sleeps on", " sleeps on"]) == pytest.approx(
        [first[0], second[0], first[1], second[1]], abs=TOLERANCE)
    assert engine.score([PROMPTS[0]], [" jumps", " sleeps on"]) == pytest.approx(first, abs=TOLERANCE)
    assert engine.score(PROMPTS[0], " jumps") == pytest.approx(first[:1], abs=TOLERANCE)
    assert engine.score(PROMPTS[0], []) == [] and engine.score([], []) == []
    assert isinstance(engine.score(PROMPTS[0], ""), stars.Rewards)


def test_messages_whose_last_turn_is_scored(made):
    """The conversation before it is the prompt, as in a request."""
    engine = made("other, chat")
    messages = [*CHAT["messages"], {"role": "assistant", "content": " jumps over"}]
    assert engine.score({"messages": messages}) == engine.score(CHAT, " jumps over")
    parts = [*CHAT["messages"], {"role": "assistant", "content": [{"type": "text", "text": " jumps over"}]}]
    assert engine.score([{"messages": parts}]) == engine.score(CHAT, " jumps over")


@pytest.mark.parametrize("kind", ["same", "same, eos", "other", "encoder"])
def test_a_text_that_nobody_has_divided_is_read_as_one(made, kind):
    """By a model that reads prompt and response as one text, with what its tokenizer puts around it."""
    engine = made(kind)
    assert engine.score([PROMPTS[0] + " jumps over", PROMPTS[0]]) == pytest.approx(
        engine.score(PROMPTS[0], [" jumps over", ""]), abs=TOLERANCE)


def test_a_callable_reads_such_a_text_as_a_response(made):
    assert made("text").score(["ab c", "d"]) == of_text("", ["ab c", "d"])
    assert made("cached").score(["ab c", "d"]) == of_text("", ["ab c", "d"])
    engine = made("ids")
    assert engine.score([{"prompt_token_ids": [5, 6]}]) == engine.score([{"prompt_token_ids": [7]}], [[5, 6]])


@pytest.mark.parametrize("kind", ["process", "pair encoder", "implicit", "weighted"])
def test_who_reads_responses_alone_refuses_such_a_text(made, kind):
    with pytest.raises(stars.RequestError, match="the reward reads the response alone, and this is one text"):
        made(kind).score(PROMPTS)


def test_tokens_of_the_reward_model_are_counted(made):
    engine = made("same, eos")
    count = len(engine.tokenizer.encode(PROMPTS[0]))
    assert engine.score(PROMPTS[0], [[5, 6, 7], []]).num_tokens == 2 * count + 3 + 2  # an EOS behind each
    assert made("text").score(PROMPTS[0], [" a"]).num_tokens == 0


def test_a_text_without_the_tokenizer_s_special_tokens(made):
    """As a rendered chat is, which holds them: for the language model, and for a reward of another tokenizer."""
    engine = made("other")
    params = stars.SamplingParams(max_tokens=4, seed=1)
    with_bos, bare = engine.generate([PROMPTS[0], {"prompt": PROMPTS[0], "add_special_tokens": False}], params,
                                     stars.Sample(score=True), use_tqdm=False)
    assert with_bos.prompt_token_ids[1:] == bare.prompt_token_ids
    begun = {"prompt": engine.tokenizer.bos_token + PROMPTS[0], "add_special_tokens": False}
    assert engine.score(begun, TEXTS) == pytest.approx(engine.score(PROMPTS[0], TEXTS), abs=TOLERANCE)
    gap = [one - other for one, other in zip(engine.score(PROMPTS[0], TEXTS), engine.score(
        {"prompt": PROMPTS[0], "add_special_tokens": False}, TEXTS), strict=True)]
    assert max(map(abs, gap)) > 1e-3
    with pytest.raises(stars.RequestError, match="add_special_tokens is 'no', it must be True or False"):
        engine.score({"prompt": "x", "add_special_tokens": "no"}, " a")
    with pytest.raises(stars.RequestError, match='with "messages" does not take "add_special_tokens"'):
        engine.score({**CHAT, "add_special_tokens": False}, " a")


def test_whether_rewards_are_probabilities(made):
    assert {kind: made(kind).reward.activated for kind in ("same", "process", "text", "weighted")} == {
        "same": False, "process": True, "text": False, "weighted": False}


# -- what cannot be scored --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts, responses, message", [
    (PROMPTS, [" a"] * 3, "there are 2 prompts and 3 responses: give one prompt for all, or one for each"),
    (PROMPTS, " a", "there are 2 prompts and 1 responses"),
    (PROMPTS[0], [" a", 3], "responses[1]: a response is 3, it must be a text or a list of token ids"),
    (PROMPTS[0], [[5], [True]], "responses[1]: a response is [True]"),
    (PROMPTS[0], [[5], [5, 10**6]], "responses[1]: token id 1000000 of the response is outside"),
    (["x", ""], [" a", " b"], "responses[1]: the prompt is empty"),
    (PROMPTS[0], {"text": 1}, "a response is {'text': 1}"),
    (None, [" a"], "a prompt is a string or a dictionary, not NoneType"),
    ([1, 2], [" a"], "the prompt is a bare list of token ids"),
    ([""], None, "the prompt is empty"),
    (CHAT, None, "the last of the messages must be the assistant's turn"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, None, "the last of the messages must be"),
    ({"messages": []}, None, "the last of the messages must be"),
    ({"messages": "x"}, None, "the last of the messages must be"),
])
def test_what_is_wrong_is_said_before_anything_is_scored(made, prompts, responses, message):
    engine = made("same")
    with pytest.raises(stars.RequestError) as caught:
        engine.score(prompts, responses)
    assert message in str(caught.value) and not str(caught.value).endswith(".")
    nothing_is_held(engine)


def test_nothing_is_scored_where_one_is_wrong():
    asked: list[Any] = []
    engine = toy_engine(LM, stars.FunctionReward(lambda p, r: asked.append(r) or [0.0] * len(r), inputs="ids"))
    with pytest.raises(stars.RequestError, match=r"responses\[300\]: token id 11 "):
        engine.score(prompt(), [[1, 2]] * 300 + [[11]])
    assert not asked


def test_an_engine_without_a_reward_says_so(model):
    engine = toy_engine(LM)
    with pytest.raises(stars.RequestError, match=r"score needs a reward: build the engine with Engine\(model, reward"):
        engine.score("x", "y")


def test_keywords_that_are_not_there():
    engine = toy_engine(LM, RM)
    for call in (engine.score, lambda *given, **more: run(stars.AsyncEngine(toy_engine(LM, RM)).score(*given, **more))):
        with pytest.raises(stars.RequestError, match="score has no parameter 'temperature': give SamplingParams"):
            call(prompt(), [[1]], temperature=1.0)
        with pytest.raises(stars.RequestError, match="score has no parameter 'response': did you mean responses"):
            call(prompt(), response=[[1]])


def test_what_can_never_fit_is_refused_at_once():
    """By the cache, and by the context, with what there is; running requests do not matter."""
    engine = toy_engine(LM, stars.CausalReward(RM.decoder()), cache_tokens=64)
    engine.add_request(prompt(), stars.SamplingParams(max_tokens=30, ignore_eos=True), POLICY)
    engine.step()
    with pytest.raises(stars.RequestError, match="need 69 tokens of the reward model's cache, which has 64"):
        engine.score(prompt(9), [[1] * 5, [1] * 60])
    with pytest.raises(stars.RequestError, match="make 109 tokens for the reward model, whose context is 96"):
        engine.score(prompt(9), [[1] * 100])
    engine.abort("0")
    engine.step()
    nothing_is_held(engine)


def test_a_text_that_outgrows_the_context_is_told_as_that(model, tiny_model):
    """Re-encoded it is longer than the response's tokens said: the type of the error says so to whoever asks over
    HTTP."""
    other = tiny_model(family="llama", head="reward", tokenizer=True, chat_template=True, tokenizer_seed=2, seed=7)
    engine = stars.Engine(model, stars.CausalReward(other), **SMALL | dict(cache_tokens=16384))
    limit = engine.reward.max_model_len
    text = next(" sleeps" * count for count in range(20, limit) if len(
        engine.reward.tokenizer.encode(PROMPTS[0] + " sleeps" * count)) > limit)
    assert len(engine.tokenizer.encode(PROMPTS[0] + text)) < limit // 2
    with pytest.raises(ContextFull, match=r"responses\[1\]: the response re-encodes to "):
        engine.score(PROMPTS[0], [" a", text])
    nothing_is_held(engine)


@pytest.mark.parametrize("values, message", [
    ([math.nan], "the reward is NaN"), ([math.inf], r"the reward is \+inf"), ([1.0, 2.0], "returned 2 values for 1"),
    (None, "returned None where a list")])
def test_a_response_without_a_reward_ends_the_call(values, message):
    bad = [9, 9]
    reward = stars.FunctionReward(lambda p, r: values if bad in r else [1.0] * len(r), inputs="ids", batch_size=1)
    engine = toy_engine(LM, reward)
    with pytest.raises(stars.RewardError, match=rf"^responses\[2\]: .*{message}"):
        engine.score(prompt(), [[1], [2], bad, [3]])
    with pytest.raises(stars.RewardError, match="^the reward"):
        engine.score(prompt(), [bad])
    assert engine.score(prompt(), [[1], [2]]) == [1.0, 1.0]
    nothing_is_held(engine)


def test_a_reward_that_rejects_is_a_reward():
    engine = toy_engine(LM, stars.FunctionReward(lambda p, r: [-math.inf] * len(r), inputs="ids"))
    assert engine.score(prompt(), [[1], [2]]) == [-math.inf, -math.inf]


# -- slices -----------------------------------------------------------------------------------------------------------


class Told(stars.CausalReward):
    """Notes what is asked of it."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.slices: list[int] = []  # candidates of each score
        self.tokens: list[int] = []  # of their responses
        self.rows: list[int] = []  # rows of each start and each resume

    def score(self, candidates):
        self.slices.append(len(candidates))
        self.tokens.append(sum(len(candidate.token_ids) for candidate in candidates))
        return super().score(candidates)

    def start_in_chunks(self, sessions, max_rows):
        progress = super().start_in_chunks(sessions, max_rows)
        self.rows.append(progress.rows)
        return progress

    def resume_in_chunks(self, session, token_ids, text, max_rows):
        progress = super().resume_in_chunks(session, token_ids, text, max_rows)
        self.rows.append(progress.rows)
        return progress


def turns_of(engine: stars.Engine, prompts: Any, responses: Any) -> tuple[list[float], int]:
    """The rewards, and in how many turns, between which nothing is held."""
    call, turns = score_call(prompts, responses), 0
    while not call.done:
        engine._score_turn(call)
        nothing_is_held(engine) if not engine._requests else engine.check_integrity()
        if isinstance(engine.reward, stars.CausalReward) and not engine._requests:
            assert not engine.reward.cache.num_tables
        turns += 1
        assert turns < 500
    return call.result(), turns


def test_a_long_list_takes_many_turns_which_hold_nothing():
    reward = Told(RM.decoder())
    engine = toy_engine(LM, reward, max_num_lanes=12, max_num_batched_tokens=32)
    responses = [ids(1 + seed % 7, 11, seed) for seed in range(50)]
    rewards, turns = turns_of(engine, prompt(), responses)
    assert turns > 7 and max(reward.slices) <= 12 and sum(reward.slices) == 50
    assert max(reward.tokens) <= 32
    wanted = [RM.reward(prompt()["prompt_token_ids"] + [token for token in one]) for one in responses]
    assert rewards == pytest.approx(wanted, abs=2e-3)
    assert sum(reward.rows) < 9 + 4 * turns  # the prompt's pages are found again


def test_many_prompts_are_read_together_and_shared_beginnings_once():
    reward = Told(RM.decoder())
    engine = toy_engine(LM, reward, max_num_lanes=16, max_num_batched_tokens=64)
    prompts = [prompt(9, seed) for seed in range(6)] + [{"prompt_token_ids": [1] * 8 + [seed]} for seed in range(2, 8)]
    responses = [ids(3, 11, seed) for seed in range(12)]
    rewards, turns = turns_of(engine, prompts, responses)
    assert rewards == pytest.approx([RM.reward(one["prompt_token_ids"] + response) for one, response in
                                     zip(prompts, responses, strict=True)], abs=2e-3)
    assert turns < 7 and max(reward.slices) > 3


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("forgets", [False, True], ids=["pages stay", "pages are taken"])
def test_a_long_text_is_read_in_chunks(deterministic, forgets):
    """Prompt and response, as many rows a turn as a round may read; where others have taken the pages meanwhile, it
    ends all the same. Not where every bit counts."""
    lm, rm = toy_pair(11, (1, 3), layers=2, positions=256)
    reward = Told(rm.decoder())
    engine = toy_engine(lm, reward, max_num_batched_tokens=16, deterministic=deterministic)
    long, response = prompt(90), ids(70, 11, 5)
    call, turns = score_call(long, [response, [3]]), 0
    while not call.done:
        engine._score_turn(call)
        nothing_is_held(engine)
        if forgets:
            reward.cache.reset()
        turns += 1
        assert turns < 100
    wanted = [rm.reward(long["prompt_token_ids"] + one) for one in (response, [3])]
    assert call.result() == pytest.approx(wanted, abs=2e-3)
    if deterministic:
        assert turns == 3
    elif not forgets:
        assert turns > 7 and max(reward.rows) <= 16
        assert sum(reward.rows) < 90 + 70 + 4 * turns
    else:
        assert turns > 3


# -- room -------------------------------------------------------------------------------------------------------------


def busy_engine(**options: Any) -> stars.Engine:
    """Whose cache two responses fill."""
    return toy_engine(LM, stars.CausalReward(RM.decoder()), cache_tokens=96, max_num_seqs=3, max_num_lanes=6, **options)


def filling(engine: stars.Engine, count: int = 3) -> list[str]:
    params = stars.SamplingParams(max_tokens=40, seed=5, ignore_eos=True)
    return [engine.add_request(prompt(20, seed), params, POLICY) for seed in range(count)]


def ends_of(engine: stars.Engine) -> dict[str, Any]:
    done: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        done |= {output.request_id: output.outputs[0] for output in engine.step() if output.finished}
    return done


def texts_of(engine: stars.Engine) -> dict[str, Any]:
    return {name: (one.token_ids, one.finish_reason) for name, one in ends_of(engine).items()}


@pytest.mark.parametrize("patience", [0, 2, 16])
def test_where_pages_are_short_others_give_way_and_lose_nothing(monkeypatch, patience):
    """A call of one thread, whose own rounds are all that could free pages: so many of them, then those who run give
    way, and go on to the same text. With much patience they have ended before."""
    monkeypatch.setattr(response_scorer, "PATIENCE", patience)
    engine = busy_engine()
    filling(engine)
    ends = ends_of(engine)
    wanted = {name: (one.token_ids, one.finish_reason) for name, one in ends.items()}
    before = sum(one.metrics.num_preemptions for one in ends.values())
    engine = busy_engine()
    filling(engine)
    for _ in range(3):
        engine.step()
    assert engine.reward.cache.num_free_pages < 15  # of 24: a response of 60 tokens needs as many
    response = ids(40, 11, 2)
    assert engine.score(prompt(20, 7), [response]) == pytest.approx(
        [RM.reward(prompt(20, 7)["prompt_token_ids"] + response)], abs=2e-3)
    engine.check_integrity()
    ends = ends_of(engine)
    assert {name: (one.token_ids, one.finish_reason) for name, one in ends.items()} == wanted
    gave_way = sum(one.metrics.num_preemptions for one in ends.values())
    assert gave_way > before if patience < 16 else gave_way == before
    nothing_is_held(engine)


def test_where_nobody_steps_but_all_wait_pages_are_found():
    """Running responses that wait for a slow reward keep their pages; a call waits for a while, and then one gives
    way."""
    gate = threading.Event()
    slow = stars.FunctionReward(lambda p, r: gate.wait(LIMIT) and [1.0] * len(r), inputs="ids", blocking=True)
    engine = toy_engine(LM, stars.WeightedReward([(stars.CausalReward(RM.decoder()), 1.0), (slow, 0.0)]),
                        cache_tokens=96, max_num_seqs=2, max_num_lanes=6)
    filling(engine, 2)
    for _ in range(3):
        engine.step()
    timer = threading.Timer(2.0, gate.set)
    timer.start()
    response = ids(60, 11, 2)
    [scored] = engine.score(prompt(30, 7), [response])
    timer.cancel()
    gate.set()
    assert scored == pytest.approx(RM.reward(prompt(30, 7)["prompt_token_ids"] + response), abs=2e-3)
    assert {reason for _, reason in texts_of(engine).values()} == {"length"}
    engine.check_integrity()


def test_a_reward_that_refuses_what_it_let_pass_is_at_fault():
    class Full(stars.FunctionReward):
        def reserve(self, session, tokens):
            return False

    engine = toy_engine(LM, Full(lambda p, r: [0.0] * len(r), inputs="ids"))
    with pytest.raises(stars.RewardError, match="Full has no room for this response while nothing else is open"):
        engine.score(prompt(), [[1]])
    nothing_is_held(engine)


# -- rewards that come later ------------------------------------------------------------------------------------------


def test_slow_rewards_are_awaited_outside_of_the_turn():
    """While a call waits for them another thread has its rounds."""
    gate, asked = threading.Event(), threading.Event()

    def slow(prompt, responses):
        if [9] in responses:
            asked.set()
            assert gate.wait(LIMIT)
        return [float(sum(one)) for one in responses]

    engine = toy_engine(LM, stars.FunctionReward(slow, inputs="ids", blocking=True))
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(engine.score(prompt(), [[9], [2, 3]])))
    thread.start()
    assert asked.wait(LIMIT)
    [output] = engine.generate(prompt(), stars.SamplingParams(max_tokens=6, seed=1), POLICY, use_tqdm=False)
    assert output.finished and not found
    gate.set()
    thread.join(LIMIT)
    assert found == [[9.0, 5.0]]
    nothing_is_held(engine)


def test_a_fault_of_one_that_came_later_cancels_the_others():
    class Later(Reward):
        def __init__(self):
            self.futures: list[Future] = []

        def open(self, prompt, max_tokens):
            return object()

        def score(self, candidates):
            self.futures += [Future() for _ in candidates]
            return [Scored(future) for future in self.futures[-len(candidates):]]

    reward = Later()
    engine = toy_engine(LM, reward)
    call = score_call(prompt(), [[1], [2], [3]])
    for _ in range(4):
        engine._score_turn(call)
    assert len(reward.futures) == 3 and not call.done and engine._scorer.waits(call)
    reward.futures[1].set_result(RewardError("no"))
    assert call.done and reward.futures[0].cancelled() and reward.futures[2].cancelled()
    with pytest.raises(stars.RewardError, match=r"^responses\[1\]: no$"):
        call.result()


# -- faults and interrupts --------------------------------------------------------------------------------------------


def test_an_exception_is_the_call_s_own():
    """Those of its slice are scored by themselves, others go on to the same text, and the books balance."""
    class Falls(stars.CausalReward):
        def score(self, candidates):
            scored = super().score(candidates)  # whose slabs nobody gives back
            if any(candidate.token_ids[:2] == [7, 7] for candidate in candidates):
                raise ZeroDivisionError("fell over")
            return scored

    def running() -> stars.Engine:
        engine = toy_engine(LM, Falls(RM.decoder()))
        params = stars.SamplingParams(max_tokens=30, seed=5, ignore_eos=True, bad_words=None, logit_bias={7: -100.0})
        for seed in range(3):
            engine.add_request(prompt(20, seed), params, POLICY)
        return engine

    wanted = texts_of(running())
    engine = running()
    engine.step()
    good = [[1, 2], [3]]
    with pytest.raises(stars.RewardError, match=r"^responses\[2\]: ZeroDivisionError: fell over$"):
        engine.score(prompt(), [*good, [7, 7, 1], [4]])
    engine.check_integrity()
    engine.step()
    assert engine.score(prompt(), good) == pytest.approx(
        [RM.reward(prompt()["prompt_token_ids"] + one) for one in good], abs=2e-3)
    assert texts_of(engine) == wanted
    nothing_is_held(engine)


def test_an_exception_while_texts_are_checked_disturbs_nobody():
    """Nothing was begun: what others hold stays where it is."""
    class Picky(stars.CausalReward):
        def check(self, prompt, max_tokens):
            if max_tokens == 2:
                raise KeyError("two")
            super().check(prompt, max_tokens)

    engine = toy_engine(LM, Picky(RM.decoder()))
    engine.add_request(prompt(20), stars.SamplingParams(max_tokens=30, ignore_eos=True), POLICY)
    engine.step()
    running = engine._scheduler.running[0].unfinished[0].table
    with pytest.raises(stars.RewardError, match=r"^responses\[1\]: KeyError: 'two'$"):
        engine.score(prompt(), [[1], [1, 2]])
    assert engine._scheduler.running[0].unfinished[0].table is running and running.length > 0
    texts_of(engine)
    nothing_is_held(engine)


def test_only_one_slice_that_falls_together_is_taken_apart():
    """A reward that cannot score several at once still scores each; it is not asked for those again together."""
    raised: list[int] = []

    class One(stars.CausalReward):
        def score(self, candidates):
            if len(candidates) > 1:
                raised.append(len(candidates))
                raise ZeroDivisionError
            return super().score(candidates)

    engine = toy_engine(LM, One(RM.decoder()))
    responses = [ids(3, 11, seed) for seed in range(5)]
    assert engine.score(prompt(), responses) == pytest.approx(
        [RM.reward(prompt()["prompt_token_ids"] + one) for one in responses], abs=2e-3)
    assert raised == [5]
    nothing_is_held(engine)


def interrupted_traffic(engine: stars.Engine) -> tuple[Any, Any]:
    """A call between rounds of others; interrupts are survived, by asking again."""
    filling(engine, 2)
    scored = None
    for _ in range(3):
        try:
            engine.step()
            scored = engine.score(prompt(20, 7), [ids(12, 11, 2), [3], ids(55, 11, 3)])
        except KeyboardInterrupt:
            continue
        break
    engine.check_integrity()
    return scored, texts_of(engine)


@IGNORED
@pytest.mark.parametrize("step", [113, pytest.param(5, marks=pytest.mark.slow)])
def test_an_interrupt_anywhere_in_a_call_loses_nothing(monkeypatch, step):
    """At the code of this feature: some of its bytecodes, and a fifth of them."""
    monkeypatch.setattr(response_scorer, "PATIENCE", 2)
    wanted = interrupted_traffic(busy_engine())
    with Interrupts() as interrupts:
        interrupted_traffic(busy_engine())
    chosen = sorted(place for place in interrupts.seen if place[0].endswith(("score_call.py", "response_scorer.py"))
                    or place[2] in ("score", "_score_turn", "_score_slice", "_changed_by", "make_way"))
    assert len(chosen) > 300 and {"_score_slice", "make_way", "_take_up"} <= {place[2] for place in chosen}
    for place in chosen[3::step]:
        engine = busy_engine()
        with Interrupts(place):
            scored, texts = interrupted_traffic(engine)
        assert scored == pytest.approx(wanted[0], abs=1e-4), place
        assert texts == wanted[1], place
        nothing_is_held(engine)


# -- beside tasks -----------------------------------------------------------------------------------------------------


def test_tasks_get_what_a_caller_would_get():
    async def main() -> None:
        async with stars.AsyncEngine(toy_engine(LM, RM)) as engine:
            responses = [ids(1 + seed % 7, 11, seed) for seed in range(60)]
            lists = await asyncio.gather(*(engine.score(prompt(9, seed), responses) for seed in range(3)))
            for seed, rewards in enumerate(lists):
                begin = prompt(9, seed)["prompt_token_ids"]
                assert rewards == pytest.approx([RM.reward(begin + one) for one in responses], abs=2e-3)
            with pytest.raises(stars.RequestError, match="2 prompts and 1 responses"):
                await engine.score([prompt(), prompt()], [[1]])
            with pytest.raises(stars.RequestError, match=r"responses\[1\]: token id 11 "):
                await engine.score(prompt(), [[1], [11]])
        nothing_is_held(engine.engine)
    run(main())


def test_a_long_list_holds_up_nobody_for_longer_than_a_slice():
    """Between two rounds of a request there is one slice, whoever asks for how much."""
    reward = Told(RM.decoder())
    engine = toy_engine(LM, reward, max_num_lanes=8)
    order: list[str] = []
    slice_, round_ = engine._score_slice, engine._round.run
    engine._score_slice = lambda call: order.append("slice") or slice_(call)
    engine._round.run = lambda groups: order.append("round") or round_(groups)

    async def main() -> None:
        async with stars.AsyncEngine(engine) as shared:
            lists = [asyncio.ensure_future(shared.score(prompt(9, seed), [[1, 2, seed]] * 10_000)) for seed in range(2)]
            while order.count("slice") < 6:
                await asyncio.sleep(0.001)
            begin = len(order)
            async for _ in shared.generate(prompt(), stars.SamplingParams(max_tokens=30, ignore_eos=True), POLICY):
                assert not any(one.done() for one in lists)
            during = order[begin:]
            rounds = [place for place, what in enumerate(during) if what == "round"]
            assert len(rounds) >= 10
            assert {after - before for before, after in zip(rounds, rounds[1:], strict=False)} <= {1, 2}
            for one in lists:
                one.cancel()
            assert len(await shared.score(prompt(), [[1, 2]] * 100)) == 100
    run(main())


def test_a_cancelled_call_ends_before_its_next_slice():
    gate, calls = threading.Event(), []

    def reward(prompt, responses):
        calls.append(len(responses))
        if len(calls) == 3:
            assert gate.wait(LIMIT)
        return [0.0] * len(responses)

    async def main() -> None:
        engine = stars.AsyncEngine(toy_engine(LM, stars.FunctionReward(reward, inputs="ids"), max_num_lanes=4))
        task = asyncio.ensure_future(engine.score(prompt(), [[1]] * 100))
        while len(calls) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()  # not before: the slice might end, and the next begin, while the task has yet to hear of it
        assert await engine.score(prompt(), [[2]]) == [0.0]
        assert len(calls) == 4 and not engine._loop._scores
        await engine.shutdown()
        nothing_is_held(engine.engine)
    run(main())


def test_a_call_whose_rewards_come_later_is_cancelled_with_them():
    gate, begun = threading.Event(), threading.Semaphore(0)

    def slow(prompt, responses):
        begun.release()
        assert gate.wait(LIMIT)
        return [0.0] * len(responses)

    async def main() -> None:
        reward = stars.FunctionReward(slow, inputs="ids", blocking=True, max_workers=1, batch_size=1)
        engine = stars.AsyncEngine(toy_engine(LM, reward))
        task = asyncio.ensure_future(engine.score(prompt(), [[1], [2], [3]]))
        assert await asyncio.to_thread(begun.acquire, timeout=LIMIT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while engine._loop._scores:
            await asyncio.sleep(0.001)
        gate.set()
        assert await engine.score(prompt(), [[4]]) == [0.0]
        assert begun.acquire(timeout=LIMIT) and not begun.acquire(blocking=False)  # 2 and 3 were never begun
        await engine.shutdown()
    run(main())


def test_a_shutdown_finishes_what_was_asked_for_or_ends_it():
    async def main(drain: bool) -> Any:
        engine = stars.AsyncEngine(toy_engine(LM, RM, max_num_lanes=2))
        task = asyncio.ensure_future(engine.score(prompt(), [[1]] * 50))
        await asyncio.sleep(0)
        await engine.shutdown(drain=drain)
        with pytest.raises(stars.EngineDeadError, match="shut down"):
            await engine.score(prompt(), [[1]])
        return await task
    assert len(run(main(True))) == 50
    with pytest.raises(stars.EngineDeadError, match="shut down"):
        run(main(False))


def test_a_dead_loop_tells_everybody(monkeypatch):
    async def main() -> None:
        engine = stars.AsyncEngine(toy_engine(LM, RM))
        monkeypatch.setattr(engine.engine, "_score_slice", lambda call: (_ for _ in ()).throw(SystemError("gone")))
        for _ in range(2):
            with pytest.raises(stars.EngineDeadError, match="SystemError: gone"):
                await engine.score(prompt(), [[1]])
        assert not engine.is_running
    run(main())


def test_a_list_waits_for_room_while_requests_of_tasks_run():
    """The loop's own requests fill the cache again and again; the call gets its turn all the same."""
    async def main() -> None:
        engine = stars.AsyncEngine(busy_engine())
        stop = False

        async def fill(seed: int) -> int:
            count = 0
            while not stop:
                params = stars.SamplingParams(max_tokens=40, seed=seed, ignore_eos=True)
                async for output in engine.generate(prompt(20, seed), params, POLICY):
                    last = output
                assert last.outputs[0].finish_reason == "length"
                count += 1
            return count

        tasks = [asyncio.ensure_future(fill(seed)) for seed in range(4)]
        await asyncio.sleep(0.05)
        begin, response = time.monotonic(), ids(60, 11, 2)
        for _ in range(3):
            assert await engine.score(prompt(30, 7), [response]) == pytest.approx(
                [RM.reward(prompt(30, 7)["prompt_token_ids"] + response)], abs=2e-3)
        assert time.monotonic() - begin < LIMIT / 2
        stop = True
        assert min(await asyncio.gather(*tasks)) > 0
        await engine.shutdown()
        nothing_is_held(engine.engine)
    run(main())


def test_a_reward_cannot_ask_the_engine_that_asks_it():
    engine: stars.Engine
    reward = stars.FunctionReward(lambda p, r: engine.score(prompt(), [[1]]), inputs="ids")
    engine = toy_engine(LM, reward)
    with pytest.raises(stars.RewardError, match="a reward cannot call the engine that asked it"):
        engine.score(prompt(), [[1]])
    assert isinstance(LM, ToyModel) and Digits().encode("12") == [1, 2]
    nothing_is_held(engine)
