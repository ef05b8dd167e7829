"""Conversations: a turn runs its own new tokens through both models, and what earlier turns have read and written is
found in their caches.

Prompts of a turn are the last prompt and response and some new tokens. Of such a prompt a model need not run the full
pages of what it shares with them and has read: of the language model all but the response's last token, of the reward
model on the CPU the same. So it runs the turn's new tokens and at most page_size - 1 more.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import stars
from editing import edit_json
from stars.chat import Chat
from stars.engine import Engine
from stars.exhaustions import BackUp
from stars.outputs import RequestOutput
from stars.passes import Passes
from stars.prompt import Prompt
from stars.reward.base import with_parts
from stars.reward.session import SessionReward
from toy import Digits, ToyModel, ids, toy_engine, toy_pair

PAGE = 4
LM, RM = toy_pair(23, (1, 2), positions=512)
TURNS = 10


class Rows:
    """Counts the rows that passes over prompts have run, of the language model and of each reward model."""

    def __init__(self, engine: Engine):
        self.counts = [0]
        self._count(0, engine._models.own.passes)
        for reward in with_parts(engine.reward) if engine.reward is not None else []:
            if isinstance(reward, SessionReward):
                self.counts.append(0)
                self._count(len(self.counts) - 1, reward._passes)

    def _count(self, place: int, passes: Passes) -> None:
        def prefill(*given: Any, right: Callable[..., int] = passes.prefill, **named: Any) -> int:
            rows = right(*given, **named)
            self.counts[place] += rows
            return rows

        passes.prefill = prefill

    def take(self) -> list[int]:
        counts, self.counts[:] = list(self.counts), [0] * len(self.counts)
        return counts


def common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def unread(prompt: Sequence[int], before: Sequence[int]) -> int:
    """Rows that a model with a lag of a token runs of a prompt, where it has read the text `before`, but for its last
    token."""
    shared = min(common(prompt, before), len(before) - 1, len(prompt) - 1) // PAGE * PAGE
    return len(prompt) - 1 - shared


def nothing(output: RequestOutput) -> tuple[int, int]:
    """Rows that a turn may run besides its new tokens, of the language model and of a reward model."""
    return 0, 0


def converse(engine: Engine, policy: Any, params: Callable[[int], stars.SamplingParams], *, turns: int = TURNS,
             choose: int = 0, begin: int = 3, between: Callable[[int], None] = lambda turn: None,
             beside: Callable[[RequestOutput], tuple[int, int]] = nothing) -> list[RequestOutput]:
    """A chat by token ids, which goes on from the completion `choose` of each turn: every turn's rows are checked."""
    rows, before, outputs = Rows(engine), list[int](), []
    size = engine.model_config.vocab_size
    prompt = ids(9, size, begin)
    for turn in range(turns):
        rows.take()
        [output] = engine.generate({"prompt_token_ids": prompt}, params(turn), policy, use_tqdm=False)
        engine.check_integrity()
        counts, more = rows.take(), beside(output)
        for place, counted in enumerate(counts):
            fewest, most = unread(prompt, before or [0]), more[min(place, 1)]
            assert fewest <= counted <= fewest + most, (turn, place, counted, fewest)
            assert counted <= len(prompt) - len(before) + PAGE - 1 + most  # in words: new tokens, and less than a page
        outputs.append(output)
        completion = output.outputs[choose]
        assert completion.error is None and completion.token_ids
        before = prompt + completion.token_ids
        prompt = before + ids(3 + turn % 5, size, 50 + turn)
        between(turn)
    return outputs


def params(turn: int, **given: Any) -> stars.SamplingParams:
    return stars.SamplingParams(**dict(max_tokens=13 + turn % 4, seed=turn, ignore_eos=True) | given)


STRICT = stars.STARS(segment_size=5, max_attempts=4, alpha=0.5, beta=0.5, reward_threshold=2.0, width=3)
SEGMENTS = {"wide": STRICT, "narrow": stars.STARS(5, 6, 0.5, 0.5, 2.0, 1), "blocks": stars.BlockwiseBestOfK(3, 4),
            "cut by entropy": stars.CARDS(2.0, 2, 7, 4, reward_threshold=2.0, width=2)}


@pytest.mark.parametrize("name", SEGMENTS)
def test_a_turn_runs_its_new_tokens(name):
    """Ten turns, by token ids, attempts rejected or not: exactly what is to be run, in both models."""
    outputs = converse(toy_engine(LM, RM, page_size=PAGE), SEGMENTS[name], params)
    metrics = [output.metrics for output in outputs]
    assert sum(one.attempts for one in metrics) > 1.2 * sum(one.segments for one in metrics)
    for one in metrics[1:]:
        assert one.prompt_tokens_cached == one.rm_tokens_cached > 0
    assert [output.num_cached_tokens for output in outputs] == [one.prompt_tokens_cached for one in metrics]


def test_plain_turns():
    """Without a reward; and with one that is asked at the end, which then reads the response of its turn, too."""
    converse(toy_engine(LM, page_size=PAGE), stars.Sample(), params)
    converse(toy_engine(LM, RM, page_size=PAGE), stars.Sample(score=True), params,
             beside=lambda output: (0, len(output.outputs[0].token_ids)))


@pytest.mark.parametrize("policy", [stars.Sample(), stars.BestOfN(3), stars.ParticleFilter(3, 0.7, 4)])
def test_cached_tokens_of_a_request_are_those_its_first_response_found(policy):
    """Whatever the others found, which read the same prompt after it."""
    engine, found = toy_engine(LM, RM, page_size=PAGE), []
    for prompt in (ids(9, 23, 3), ids(9, 23, 3) + [5, 6]):
        engine.add_request({"prompt_token_ids": prompt}, params(0, n=2), policy)
        while engine.has_unfinished_requests():
            found += [output for output in engine.step() if output.finished]
    assert [output.num_cached_tokens for output in found] == [0, 8]
    assert all(output.metrics.prompt_tokens_cached > output.num_cached_tokens for output in found)


def test_two_completions_a_turn():
    """The chat goes on from either; the second one reads the tail that the first one could not share."""
    for choose in (0, 1):
        outputs = converse(toy_engine(LM, RM, page_size=PAGE), STRICT, lambda turn: params(turn, n=2), choose=choose,
                           beside=lambda output: (PAGE - 1, PAGE - 1))
        assert any(len({tuple(one.token_ids) for one in output.outputs}) == 2 for output in outputs)


@pytest.mark.parametrize("name, reads_at_end", [("whole", True), ("in turn", True), ("beam", False),
                                                ("particles", False), ("speculative", False)])
def test_a_winner_stays_and_losers_go(name, reads_at_end):
    """Of several responses that are judged together the one that was kept is what the next turn goes on from; nothing
    of the others stays in either cache. Forks share pages, of which each has a tail of its own."""
    policy = {"whole": stars.BestOfN(3), "in turn": stars.RejectionSampling(reward_threshold=1.5, max_attempts=4),
              "beam": stars.SegmentBeam(2, 2, 4), "particles": stars.ParticleFilter(3, 0.7, 4),
              "speculative": stars.SpeculativeRejection(4, 0.5, 4)}[name]
    engine, places = toy_engine(LM, RM, page_size=PAGE), 4

    def beside(output: RequestOutput) -> tuple[int, int]:
        text = len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1
        for cache in (engine._cache, engine.reward.cache):
            assert cache.pool.num_published == text // PAGE
        tails = (places - 1) * (PAGE - 1)  # of responses that are opened once the prompt was read
        return tails, tails + reads_at_end * places * 16

    converse(engine, policy, params, beside=beside)
    assert engine._cache.num_tables == engine.reward.cache.num_tables == 0


def test_traffic_between_the_turns():
    """Other prompts and other chats come and go; there is room for all."""
    engine = toy_engine(LM, RM, page_size=PAGE)

    def traffic(turn: int) -> None:
        prompts = [{"prompt_token_ids": ids(5 + 3 * index, 23, 900 + 7 * turn + index)} for index in range(5)]
        engine.generate(prompts, params(turn, max_tokens=9), STRICT, use_tqdm=False)

    converse(engine, STRICT, params, between=traffic)


def test_a_turn_that_was_aborted():
    """What had been committed before is found by whoever goes on from it."""
    engine, prompt = toy_engine(LM, RM, page_size=PAGE), ids(9, 23, 3)
    rows = Rows(engine)
    name = engine.add_request({"prompt_token_ids": prompt}, params(1, max_tokens=60), STRICT)
    for _ in range(12):
        engine.step()
    [before] = engine._requests[name].hypotheses
    text = prompt + before.token_ids
    assert len(text) > len(prompt) + 2 * PAGE
    engine.abort(name)
    rows.take()
    again = text + ids(2, 23, 9)
    engine.generate({"prompt_token_ids": again}, params(2), STRICT, use_tqdm=False)
    assert rows.take() == [unread(again, text)] * 2
    engine.check_integrity()


def test_the_oldest_conversation_goes_first():
    """Three chats in a cache that holds two: a turn of the first one makes the second one the oldest, and the third one
    takes its pages, the last ones first."""
    texts, engine = {}, toy_engine(LM, RM, page_size=PAGE, cache_tokens=88, max_num_seqs=1)
    rows = Rows(engine)

    def turn(name: str, prompt: list[int]) -> list[int]:
        rows.take()
        [output] = engine.generate({"prompt_token_ids": prompt}, params(len(prompt), max_tokens=10), STRICT,
                                   use_tqdm=False)
        engine.check_integrity()
        texts[name] = prompt + output.outputs[0].token_ids
        return rows.take()

    turn("a", ids(21, 23, 1))
    turn("b", ids(21, 23, 2))
    prompt = texts["a"] + ids(2, 23, 4)
    assert turn("a", prompt) == [unread(prompt, texts["a"][: len(prompt) - 2])] * 2  # a is newer than b from here on
    turn("c", ids(21, 23, 3))
    for cache in (engine._cache, engine.reward.cache):
        kept = {name: cache.shared_length(text[:-1]) for name, text in texts.items()}
        assert kept["a"] == (len(texts["a"]) - 1) // PAGE * PAGE and kept["c"] == (len(texts["c"]) - 1) // PAGE * PAGE
        assert kept["b"] < (len(texts["b"]) - 1) // PAGE * PAGE
    prompt = texts["a"] + ids(2, 23, 5)
    assert turn("a", prompt) == [unread(prompt, texts["a"][: len(prompt) - 2])] * 2


class Numbers(Digits):
    """Of both models."""

    eos_token_id = None

    def same_vocabulary(self, other: Any) -> bool:
        return self is other


def test_segments_cut_by_stop_strings():
    """A response ends in the midst of a segment: what was drawn behind its end is in no page that is found."""
    lm, rm = toy_pair(10, (3, 4), positions=512)
    digits, outputs = Numbers(), []
    engine = toy_engine(lm, stars.CausalReward(rm.decoder(), tokenizer=digits), page_size=PAGE, tokenizer=digits)
    for seed in range(4):
        outputs += converse(engine, stars.STARS(7, 4, 0.5, 0.5, 2.0, 3), lambda turn: params(
            10 * seed + turn, max_tokens=20, stop=["3", "71"]), begin=100 + seed)
    ends = [output.outputs[0].stop_reason for output in outputs]
    assert ends.count("3") + ends.count("71") > 10


def test_segments_that_are_taken_back():
    """What took the place of a segment is found, and not what was taken back."""
    engine, lengths = toy_engine(LM, RM, page_size=PAGE), []
    policy = stars.STARS(5, 2, 1.0, 0.0, 2.2, 2, exhaust=BackUp(3))

    def beside(output: RequestOutput) -> tuple[int, int]:
        lengths.append(output.metrics.lm_tokens_drawn)
        return 0, 5  # a reward model reads on after a segment that was taken back
    outputs = converse(engine, policy, lambda turn: params(turn, max_tokens=20), beside=beside)
    assert sum(lengths) > sum(2 * len(one.outputs[0].token_ids) for one in outputs)



@pytest.mark.parametrize("kind", ["weighted", "implicit"])
def test_rewards_of_several_models(kind):
    other = ToyModel(23, 7, layers=1, positions=512, head="reward" if kind == "weighted" else "lm")
    if kind == "weighted":
        reward = stars.WeightedReward([(stars.CausalReward(RM.decoder()), 1.0),
                                       (stars.CausalReward(other.decoder()), 0.5)])
    else:
        reward = stars.ImplicitReward(other.decoder(), ToyModel(23, 8, layers=1, positions=512).decoder())
    engine = toy_engine(LM, reward, page_size=PAGE)
    outputs = converse(engine, stars.STARS(5, 4, 0.5, 0.5, 0.5, 2), params)
    assert all(one.metrics.rm_tokens_cached == 2 * one.metrics.prompt_tokens_cached for one in outputs)
    for part in reward.parts:
        assert 0 < part.cache.prefix_hits < part.cache.prefix_queries


@pytest.mark.parametrize("same", [True, False], ids=["one vocabulary", "two vocabularies"])
def test_messages_by_a_template(tiny_model, copied, same):
    """What a turn shares with the last one is what of its text is encoded alike; a random model's text often is not, as
    nobody would write the tokens that it writes. Each model renders and encodes for itself."""
    lm = copied(tiny_model(tokenizer=True, chat_template=True))
    rm = copied(tiny_model(tokenizer=True, chat_template=True, head="reward", tokenizer_seed=0 if same else 5))
    for directory in (lm, rm):
        edit_json(directory / "config.json", max_position_embeddings=1024)
    engine = Engine(lm, stars.CausalReward(rm, close="template"), page_size=PAGE, cache_tokens=4096)
    assert engine.reward.same_vocabulary == same
    rows, reward, messages, found = Rows(engine), engine.reward, [{"role": "user", "content": "what is a dog?"}], []
    before, read = list[int](), list[int]()  # what both models have read

    def session(self: Any, given: Any, right: Any = reward.close) -> None:
        read[:] = given.committed[: given.table.length]
        right(given)

    reward.close = session.__get__(reward)
    for turn in range(TURNS):
        rows.take()
        known, theirs = list(before), list(read)
        [output] = engine.generate({"messages": list(messages)}, params(turn, max_tokens=9), STRICT, use_tqdm=False)
        engine.check_integrity()
        prompt = output.prompt_token_ids
        frame = reward.framing._chat(Chat(messages), Prompt(messages, prompt, None)).prefix
        [language, scored] = rows.take()
        assert language == unread(prompt, known or [0])
        shared = min(common(frame, theirs), len(frame) - 1) // PAGE * PAGE
        assert scored == len(frame) - 1 - shared
        assert output.metrics.rm_tokens_cached == shared
        # Never less than the turn before, but for a page's tail and the token that the models lag behind.
        if known:
            found.append((common(prompt, known), common(frame, theirs)))
            assert language <= len(prompt) - found[-1][0] + PAGE - 1
        before = prompt + output.outputs[0].token_ids
        messages += [{"role": "assistant", "content": output.outputs[0].text},
                     {"role": "user", "content": f"and turn {turn}?"}]
    assert all(one > 9 and other > 9 for one, other in found)
    assert found[-1][0] > 60 and found[-1][1] > 60


def test_texts_of_deterministic_engines_do_not_depend_on_earlier_turns():
    """Keys of drafted tokens have other bits than those of a prompt, so of a response nothing is found there."""
    def made() -> Engine:
        return toy_engine(LM, RM, page_size=PAGE, deterministic=True)

    chat, outputs, prompt = made(), [], ids(9, 23, 3)
    for turn in range(6):
        [output] = chat.generate({"prompt_token_ids": prompt}, params(turn), STRICT, use_tqdm=False)
        [alone] = made().generate({"prompt_token_ids": prompt}, params(turn), STRICT, use_tqdm=False)
        assert output.outputs[0].segments == alone.outputs[0].segments  # rewards and log-probabilities to the last bit
        last = len(outputs[-1].prompt_token_ids) if outputs else 0
        assert output.metrics.prompt_tokens_cached == output.metrics.rm_tokens_cached == max(0, last - 1) // PAGE * PAGE
        outputs.append(output)
        prompt = prompt + output.outputs[0].token_ids + ids(2, 23, turn)
    chat.check_integrity()


def test_who_gave_way_is_computed_again_as_far_as_it_was_evicted():
    """Two long responses in a cache for one and a half: the younger one comes back to what is left of its pages, and to
    the same text."""
    def run(tokens: int) -> tuple[list[RequestOutput], list[int]]:
        engine = toy_engine(LM, RM, page_size=PAGE, cache_tokens=tokens)
        rows = Rows(engine)
        outputs = engine.generate([{"prompt_token_ids": ids(6, 23, seed)} for seed in (1, 2)], [
            params(seed, max_tokens=most) for seed, most in ((1, 60), (2, 70))], STRICT, use_tqdm=False)
        engine.check_integrity()
        return outputs, rows.take()

    (roomy, fewest), (tight, more) = run(4096), run(112)
    assert [one.outputs[0].token_ids for one in tight] == [one.outputs[0].token_ids for one in roomy]
    assert sum(one.metrics.num_preemptions for one in roomy) == 0 < sum(one.metrics.num_preemptions for one in tight)
    lost = tight[1].metrics.num_preemptions * 70  # at most, were everything run again each time
    for most, least in zip(more, fewest):
        assert least < most < least + lost / 2


def test_models_that_lag_behind():
    """Of a response that several models have read in turn what all of them hold is found, whatever one was last."""
    small = ToyModel(23, 9, layers=1, positions=512)
    engine = toy_engine(LM, RM, page_size=PAGE, models={"small": small.decoder()})
    policy = stars.STARS(5, 2, 1.0, 0.0, 2.2, 2, exhaust="redraft:small")
    prompt, before, drawn = ids(9, 23, 3), list[int](), set()
    for turn in range(6):
        [output] = engine.generate({"prompt_token_ids": prompt}, params(turn, max_tokens=22), policy, use_tqdm=False)
        engine.check_integrity()
        drawn |= {segment.model for segment in output.outputs[0].segments}
        cached = output.metrics.prompt_tokens_cached
        assert cached % PAGE == 0 and cached <= max(0, len(before) - 1)
        fresh = toy_engine(LM, RM, page_size=PAGE, models={"small": small.decoder()})
        [alone] = fresh.generate({"prompt_token_ids": prompt}, params(turn, max_tokens=22), policy, use_tqdm=False)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
        before = prompt + output.outputs[0].token_ids
        prompt = before + ids(2, 23, turn)
    assert drawn == {"lm", "small"}


def test_a_response_that_ended_with_an_error_leaves_nothing_but_its_prompt():
    def fails(prompt: Any, responses: Sequence[Any]) -> list[float]:
        return [float("nan") if len(response) > 12 else 1.0 for response in responses]

    engine = toy_engine(LM, stars.FunctionReward(fails, inputs="ids"), page_size=PAGE)
    [output] = engine.generate({"prompt_token_ids": ids(9, 23, 3)}, params(1, max_tokens=40),
                               stars.STARS(4, 2, 1.0, 0.0, 0.5, 1), use_tqdm=False)
    assert output.outputs[0].finish_reason == "error" and len(output.outputs[0].token_ids) == 12
    assert engine._cache.pool.num_published == 8 // PAGE
    engine.check_integrity()


@pytest.mark.parametrize("name", ["causal", "weighted", "implicit", "beam", "at the end", "another vocabulary"])
def test_what_is_found_is_what_would_be_computed(tiny_model, name):
    """Texts are those of an engine that has seen nothing, and rewards, too, but for rounding: keys of drafted tokens
    are summed up in another order than those of a prompt."""
    policy: Any = {"beam": stars.SegmentBeam(2, 2, 4), "at the end": stars.Sample(score=True)}.get(
        name, stars.STARS(5, 4, 0.5, 0.5, 0.5, 2))
    lm = tiny_model(tokenizer=True, chat_template=True)

    def made() -> Engine:
        if name == "another vocabulary":
            rm = tiny_model(tokenizer=True, chat_template=True, head="reward", tokenizer_seed=5)
            return Engine(lm, rm, page_size=PAGE, cache_tokens=1024)
        other = ToyModel(23, 7, layers=1, positions=512, head="lm" if name == "implicit" else "reward")
        reward: Any = RM
        if name == "weighted":
            reward = stars.WeightedReward([(stars.CausalReward(RM.decoder()), 1.0),
                                           (stars.CausalReward(other.decoder()), 0.5)])
        elif name == "implicit":
            reward = stars.ImplicitReward(other.decoder(), ToyModel(23, 8, layers=1, positions=512).decoder())
        return toy_engine(LM, reward, page_size=PAGE)

    chat, fresh = made(), made()
    prompt: Any = "the dog" if name == "another vocabulary" else ids(9, 23, 3)
    for turn in range(4):
        given = prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        fresh._cache.reset()
        fresh.reward.reset()
        [[output], [alone]] = [one.generate(given, params(turn, max_tokens=12), policy, use_tqdm=False)
                               for one in (chat, fresh)]
        if name != "beam":  # whose members share
            assert alone.metrics.prompt_tokens_cached == alone.metrics.rm_tokens_cached == 0
        assert turn == 0 or output.metrics.prompt_tokens_cached > 0 < output.metrics.rm_tokens_cached
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids
        assert output.outputs[0].reward == pytest.approx(alone.outputs[0].reward, abs=1e-4)
        for one, other in zip(output.outputs[0].segments, alone.outputs[0].segments, strict=True):
            assert [a.reward for a in one.attempts] == pytest.approx([a.reward for a in other.attempts], abs=1e-4)
        prompt = (output.prompt + output.outputs[0].text + " and" if isinstance(prompt, str) else
                  prompt + output.outputs[0].token_ids + ids(3, 23, turn))


@pytest.mark.parametrize("seed", range(2))
def test_many_chats_in_a_tight_cache(seed):
    """Chats of every policy side by side, some aborted, in caches that hold a few of them: they give way, are evicted
    and come back. The books balance after every step, and every text is that of an engine with room for all."""
    draw = random.Random(seed)
    kinds: list[Any] = [STRICT, stars.BestOfN(3), stars.ParticleFilter(3, 0.7, 4), stars.SegmentBeam(2, 2, 4),
                        stars.STARS(5, 2, 1.0, 0.0, 2.2, 2, exhaust=BackUp(3)), stars.RejectionSampling(1.0)]
    engine, roomy = (toy_engine(LM, RM, page_size=PAGE, cache_tokens=tokens) for tokens in (256, 16384))
    prompts = {chat: ids(3 + 4 * (chat % 2), 23, 60 + chat // 2) for chat in range(8)}  # two each begin alike
    running: dict[str, tuple[int, stars.SamplingParams, Any]] = {}
    ended = gave_way = aborted = 0
    while ended < 30:
        for chat in prompts.keys() - {one[0] for one in running.values()}:
            asked = params(draw.randrange(1000), max_tokens=draw.randint(12, 40), n=draw.choice([1, 1, 2]))
            policy = kinds[draw.randrange(len(kinds))]
            running[engine.add_request({"prompt_token_ids": prompts[chat]}, asked, policy)] = chat, asked, policy
        if draw.random() < 0.05:
            engine.abort(draw.choice(list(running)))
        for output in engine.step():
            if not output.finished:
                continue
            chat, asked, policy = running.pop(output.request_id)
            ended, gave_way = ended + 1, gave_way + output.metrics.num_preemptions
            if output.outputs[0].finish_reason == "abort":
                aborted += 1
            else:
                [alone] = roomy.generate({"prompt_token_ids": prompts[chat]}, asked, policy, use_tqdm=False)
                assert [one.token_ids for one in output.outputs] == [one.token_ids for one in alone.outputs]
            prompts[chat] = prompts[chat] + output.outputs[-1].token_ids + ids(2, 23, draw.randrange(1000))
            if len(prompts[chat]) > 60:
                prompts[chat] = prompts[chat][:draw.randint(3, 30)]
        engine.check_integrity()
    assert gave_way > 2 and aborted and engine._cache.prefix_hits > engine._cache.prefix_queries / 3
