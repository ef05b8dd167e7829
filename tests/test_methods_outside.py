"""Methods that the package does not know, defined here and run through the engine as they are.

A threshold rule is one function and one row: its law is tested by enumeration as those of the package are. A second
method has a population of three, of which it keeps two winners, drops one, forks one and continues one with tokens that
were not drafted. It is compared with a slow oracle that has no cache and recomputes everything. If the pages of either
model held a wrong row after a fork, a cut or a forced token, log-probabilities and rewards would differ from the
oracle's by far more than the rounding (2e-4, as in test_oracle.py). Soon the tokens would too.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

import oracle
import stars
from building import PADDED, work_as
from law import DRAWS, FALSE_POSITIVE_RATE, MAX_TOKENS, MODEL, PROMPT, REWARD, candidates, p_value
from stars.passes import Passes
from stars.plan import Fixed, Lanes, Plan, Sampled, Score, Whole
from stars.rules import Decision, Judged, Keep, Note, State, whole
from test_conservation import nothing_is_held, stepped_through_interrupts
from toy import EOS, ToyModel, facts, ids, table_reward, toy_engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TOLERANCE = 2e-4  # of log-probabilities and rewards, as in test_oracle.py


# -- a threshold rule: one function and one row -------------------------------------------------------------------

MIDDLE, SCALE = 2.5, 0.3


def logistic(judged: Sequence[Judged], state: State) -> Decision | None:
    """Accepts the first attempt with u < 1 / (1 + exp((MIDDLE - r) / SCALE)): a threshold, soft on both sides."""
    for one in judged:
        probability = 1 / (1 + math.exp((MIDDLE - one.reward) / SCALE))
        if one.uniforms[0] < probability:
            return Decision([whole(one)], [], {(one.hypothesis, one.attempt): Note(MIDDLE, probability, True)})
    return None


logistic.in_order, logistic.uniforms = True, 1


@dataclass(frozen=True)
class Logistic:
    """Segments of two tokens, four attempts each."""

    width: int | None = 3

    def plan(self) -> Plan:
        return Plan(Sampled(), Fixed(2), Lanes(self.width, 4), Score("segment"), logistic)


def logistic_law(prefix: tuple[int, ...], params: stars.SamplingParams, middle: float = MIDDLE) -> dict:
    """The exact law of the segment that follows `prefix`."""
    accepted, rejected, rewards = {}, {}, {}
    for segment, probability in candidates(prefix, min(2, MAX_TOKENS - len(prefix)), params):
        rewards[segment] = REWARD([token for token in prefix + segment if token != EOS])
        accept = 1 / (1 + math.exp((middle - rewards[segment]) / SCALE))
        accepted[segment], rejected[segment] = probability * accept, probability * (1 - accept)
    again = sum(rejected.values())
    law = {segment: probability * sum(again**tried for tried in range(4)) for segment, probability in accepted.items()}
    for segment, probability in rejected.items():  # all four were rejected, and this one was the best: no two are equal
        below = sum(p for other, p in rejected.items() if rewards[other] < rewards[segment])
        law[segment] += (below + probability) ** 4 - below**4
    return law


def test_a_threshold_rule_follows_its_law():
    """Fails a correct engine once in 1e6 choices of the seed (FALSE_POSITIVE_RATE, to the accuracy of the chi-square
    approximation at cells of 8 expected counts and more); the seed is fixed. A middle that is off by 1 is seen."""
    params = stars.SamplingParams(max_tokens=MAX_TOKENS, n=DRAWS // 2, seed=41)
    fn = stars.FunctionReward(lambda prompt, responses: [REWARD(response) for response in responses], inputs="ids")
    engine = toy_engine(MODEL, fn, max_num_seqs=512, max_num_lanes=2048, max_segment_size=4, cache_tokens=1 << 14)
    [output] = engine.generate({"prompt_token_ids": PROMPT}, params, Logistic(), use_tqdm=False)
    followers: dict[tuple[int, ...], Counter] = defaultdict(Counter)
    for completion in output.outputs:
        prefix: tuple[int, ...] = ()
        for segment in completion.segments:
            followers[prefix][tuple(segment.token_ids)] += 1
            prefix += tuple(segment.token_ids)
        assert list(prefix) == completion.token_ids and completion.error is None
    assert p_value(followers, lambda prefix: logistic_law(prefix, params)) > FALSE_POSITIVE_RATE
    assert p_value(followers, lambda prefix: logistic_law(prefix, params, MIDDLE + 1.0)) < FALSE_POSITIVE_RATE
    rate = output.metrics.accept_rate
    assert 0.2 < rate < 0.6 and output.metrics.fallbacks > 0.02 * output.metrics.segments
    noted = [segment for one in output.outputs for segment in one.segments if segment.accepted]
    assert all(segment.threshold == MIDDLE for segment in noted)


# -- two winners, a drop, a fork and tokens that were not drafted -------------------------------------------------

FORCED = 2
SIZE = 3
POPULATION = 3


def forced(one: Judged, count: int, state: State) -> Keep:
    """An attempt with `count` tokens that were not drafted in the place of its last two; all of one that has ended."""
    cut = min(2, one.drafted)
    room = state.max_tokens - one.tokens + cut
    return whole(one) if one.finished else Keep(one.hypothesis, one.attempt, one.drafted - cut, [
        FORCED, 1, FORCED][-min(room, count):])


def breed(judged: Sequence[Judged], state: State) -> Decision | None:
    """The best hypothesis is kept twice, the second once, the third is dropped."""
    if state.left:
        return None
    families: dict[int, list[Judged]] = defaultdict(list)
    for one in judged:
        families[one.hypothesis].append(one)
    order = sorted(families, key=lambda slot: (-max(one.reward for one in families[slot]), slot))
    drop = [order.pop()] if len(order) == POPULATION else []
    keep = []
    for place, slot in enumerate(order):
        ranked = sorted(families[slot], key=lambda one: (-one.reward, one.attempt))
        best, other = ranked[0], ranked[-1]
        if place == 0:  # two winners: the same attempt twice, or two, one of them with forced tokens
            keep += [(whole(best), whole(best)), (forced(best, 2, state), whole(other)),
                     (whole(best), forced(other, 1, state))][state.segment % 3]
        else:
            keep.append(forced(best, 3, state))
    notes = {(one.hypothesis, one.attempt): Note(None, None, (one.hypothesis, one.attempt) == keep[0][:2])
             for one in judged}
    return Decision(keep, drop, notes, (state.memory or 0) + 1)


breed.in_order, breed.uniforms = False, 0


@dataclass(frozen=True)
class Breed:
    attempts: int = 2
    population: int = POPULATION

    def plan(self) -> Plan:
        return Plan(Sampled(), Fixed(SIZE), Lanes(None, self.attempts, self.population), Score("segment"), breed)


@dataclass
class Line:
    """A hypothesis of the oracle's: tokens, and the (tokens, attempts, kept attempt) of each segment."""

    response: list[int]
    segments: list[tuple[list[int], list, int]]
    reward: float | None = None
    finish_reason: str | None = None


def slow_breed(lm: Callable, reward: Callable, prompt: list[int], params, seed: int, completion: int,
               stop_ids: set[int], attempts: int) -> tuple[Line, int, int]:
    """(the completion, attempts drawn, tokens drawn), with everything recomputed from the text alone."""
    live = {slot: Line([], []) for slot in range(POPULATION)}
    drawn = tokens_drawn = segment = 0
    memory = None
    while any(line.finish_reason is None for line in live.values()):
        judged, cut = [], {}
        for slot, line in sorted(live.items()):
            if line.finish_reason is not None:
                judged.append(Judged(slot, 0, len(line.response), True, (), (), (), line.reward, line.reward, ()))
                continue
            for attempt in range(1, attempts + 1):
                size = min(SIZE, params.max_tokens - len(line.response))
                tokens, logprob = oracle.draw_segment(lm, prompt, line.response, size, stop_ids, params, seed, attempt,
                                                      segment, completion * POPULATION + slot)
                score = reward(oracle.content(line.response + tokens, stop_ids))
                drawn, tokens_drawn = drawn + 1, tokens_drawn + len(tokens)
                cut[slot, attempt] = tokens, score, logprob
                length = len(line.response) + len(tokens)
                judged.append(Judged(slot, attempt, length, tokens[-1] in stop_ids or length == params.max_tokens, (),
                                     [0.0] * len(tokens), (), score, None, ()))
        decision = breed(judged, State(segment, 0, 0, 0, params.max_tokens, None, 0, sorted(live), (), memory))
        memory = decision.memory
        before = live
        live = {slot: line for slot, line in before.items() if slot not in decision.drop}
        grown: dict[int, Line] = {}
        free = [slot for slot in range(POPULATION) if slot not in live]
        for keep in decision.keep:
            line = before[keep.hypothesis]
            slot = free.pop(0) if keep.hypothesis in grown else keep.hypothesis
            if keep.attempt == 0:
                grown[slot] = line
                continue
            tokens = cut[keep.hypothesis, keep.attempt][0][: keep.tokens] + list(keep.then)
            own = [cut[keep.hypothesis, number] for number in range(1, attempts + 1)]
            new = Line(line.response + tokens, [*line.segments, (tokens, own, keep.attempt - 1)])
            if tokens[-1] in stop_ids or len(new.response) == params.max_tokens:
                new.finish_reason = "stop" if tokens[-1] in stop_ids else "length"
            new.reward = reward(oracle.content(new.response, stop_ids))
            grown[slot] = new
        live = grown
        segment += 1
    chosen = max(sorted(live), key=lambda slot: live[slot].reward)
    return live[chosen], drawn, tokens_drawn


LM = ToyModel(vocab=11, seed=1, layers=2, positions=96)
RM = ToyModel(vocab=11, seed=3, layers=2, positions=96, head="reward", sharpness=1.5)
TABLE = table_reward(seed=3)


def breeding_engine(causal: bool = True, **options) -> stars.Engine:
    reward = stars.CausalReward(RM.decoder()) if causal else stars.FunctionReward(
        lambda prompt, responses: [TABLE(response) for response in responses], inputs="ids")
    return toy_engine(LM, reward, **options)


@pytest.mark.parametrize("causal, trailing", [(True, False), (True, True), (False, False)],
                         ids=["reward model", "trailing reward model", "function"])
@pytest.mark.parametrize("lanes", [64, 3], ids=["one round", "rounds of one lane"])
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_a_population_equals_the_slow_oracle(causal, trailing, lanes, ignore_eos, monkeypatch):
    """With two requests of other policies, step by step; attempts that no longer have their slab are kept, too.

    Trailing: scores after the draft without the host, which read what the reward's pages hold after cuts and forks.
    """
    if trailing:
        work_as(monkeypatch, PADDED)
        passes, score = [], Passes.launch_prepared
        monkeypatch.setattr(Passes, "launch_prepared", lambda *given: (passes.append(1), score(*given))[1])
    engine = breeding_engine(causal, max_num_lanes=lanes * 6, max_num_seqs=12, page_size=16 if trailing else 4)
    params = stars.SamplingParams(max_tokens=17, n=2, seed=7 + lanes, ignore_eos=ignore_eos)
    prompts = [ids(9, 11, seed=1), ids(4, 11, seed=2)]
    attempts = 2 if lanes == 64 else 4
    names = [engine.add_request({"prompt_token_ids": prompt}, params, Breed(attempts)) for prompt in prompts]
    engine.add_request({"prompt_token_ids": prompts[0]}, params, stars.STARS(4, 3, reward_threshold=1.0, width=2))
    engine.add_request({"prompt_token_ids": prompts[1]}, params, stars.Sample())
    last: dict[str, stars.RequestOutput] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            for old, new in zip(last.get(output.request_id, output).outputs, output.outputs, strict=True):
                assert new.token_ids[: len(old.token_ids)] == old.token_ids, "text was taken back"
            last[output.request_id] = output
        engine.check_integrity()
    nothing_is_held(engine)
    assert not trailing or len(passes) > 5
    stop_ids = set() if ignore_eos else {EOS}
    for name, prompt in zip(names, prompts, strict=True):
        def reward(response: list[int], prompt: list[int] = prompt) -> float:
            return RM.reward(prompt + response) if causal else TABLE(response)

        for completion in last[name].outputs:
            line, drawn, tokens_drawn = slow_breed(LM.logits, reward, prompt, params, params.seed, completion.index,
                                                   stop_ids, attempts)
            assert completion.error is None
            assert completion.token_ids == line.response
            assert completion.finish_reason == line.finish_reason
            assert completion.reward == pytest.approx(line.reward, abs=TOLERANCE)
            assert len(completion.segments) == len(line.segments)
            for got, (tokens, own, winner) in zip(completion.segments, line.segments, strict=True):
                assert got.token_ids == tokens and got.winner == winner
                assert [attempt.token_ids for attempt in got.attempts] == [tokens for tokens, *_ in own]
                for attempt, (_, score, logprob) in zip(got.attempts, own, strict=True):
                    assert attempt.reward == pytest.approx(score, abs=TOLERANCE)
                    assert attempt.logprob == pytest.approx(logprob, abs=TOLERANCE)
            metrics = completion.metrics
            assert (metrics.attempts, metrics.lm_tokens_drawn) == (drawn, tokens_drawn)
            assert (metrics.segments, metrics.lm_tokens_kept) == (len(line.segments), len(line.response))
            assert metrics.accepted + metrics.fallbacks == metrics.segments
            assert metrics.attempts_counted == attempts * metrics.segments
    completions = [completion for name in names for completion in last[name].outputs]
    assert any(segment.token_ids[-2:] == [1, FORCED]
               and segment.token_ids not in [attempt.token_ids for attempt in segment.attempts]
               for completion in completions for segment in completion.segments), "no forced token was ever kept"


@pytest.mark.parametrize("place", ["fork", "prefill", "commit", "resume", "reward fork"])
def test_an_interrupted_round_of_a_population_never_happened(place):
    """Hypotheses that appeared are gone, those that vanished are there again, and the text is the same."""
    params = stars.SamplingParams(max_tokens=17, n=2, seed=7, ignore_eos=True)

    def run(interrupts: Sequence[int]) -> stars.RequestOutput:
        engine = breeding_engine()
        holder, name = {"fork": (engine._cache, "fork"), "prefill": (engine._models.own.passes, "prefill"),
                        "commit": (engine._cache, "commit"), "resume": (engine.reward, "resume"),
                        "reward fork": (engine.reward, "fork")}[place]
        right, calls = getattr(holder, name), []

        def interrupted(*arguments):
            calls.append(1)
            if len(calls) in interrupts:
                raise KeyboardInterrupt
            return right(*arguments)

        setattr(holder, name, interrupted)
        engine.add_request({"prompt_token_ids": ids(9, 11, seed=1)}, params, Breed())
        done = stepped_through_interrupts(engine)
        assert len(calls) > max(interrupts, default=0)
        nothing_is_held(engine)
        return done

    whole_run, broken = run([]), run([2, 3, 7])
    assert [[segment.token_ids for segment in one.segments] for one in broken.outputs] == [
        [segment.token_ids for segment in one.segments] for one in whole_run.outputs]
    for one, other in zip(broken.outputs, whole_run.outputs, strict=True):
        assert (one.metrics.attempts, one.metrics.segments) == (other.metrics.attempts, other.metrics.segments)
        assert one.reward == pytest.approx(other.reward, abs=TOLERANCE)
        assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=TOLERANCE)


@pytest.mark.parametrize("causal", [True, False], ids=["reward model", "function"])
def test_a_population_that_gives_way_goes_on_to_the_same_text(causal):
    """Three requests of populations in caches that hold little more than one of them."""
    params = [stars.SamplingParams(max_tokens=30, n=2, seed=seed, ignore_eos=True) for seed in (1, 2, 3)]
    prompts = [{"prompt_token_ids": ids(length, 11, seed=length)} for length in (11, 5, 14)]

    def run(cache_tokens: int) -> list[stars.RequestOutput]:
        engine = breeding_engine(causal, cache_tokens=cache_tokens)
        outputs = engine.generate(prompts, params, Breed(), use_tqdm=False)
        nothing_is_held(engine)
        return outputs

    roomy, scarce = run(4096), run(180)
    assert sum(output.metrics.num_preemptions for output in scarce) >= 2
    assert not sum(output.metrics.num_preemptions for output in roomy)
    for one, other in zip(scarce, roomy, strict=True):
        for got, wanted in zip(one.outputs, other.outputs, strict=True):
            assert got.error is None
            assert [segment.token_ids for segment in got.segments] == [segment.token_ids for segment in wanted.segments]
            assert got.reward == pytest.approx(wanted.reward, abs=TOLERANCE)
            assert got.cumulative_logprob == pytest.approx(wanted.cumulative_logprob, abs=TOLERANCE)


def test_the_best_seen_of_earlier_rounds_is_committed_from_its_slab():
    """Every attempt is rejected, a lane a round: nothing but the prompt is read anew, by either model."""
    engine = breeding_engine()
    prefills = []
    for passes in (engine._models.own.passes, engine.reward._passes):
        prefill = passes.prefill
        passes.prefill = lambda given, *rows, prefill=prefill: (
            prefills.append(len(given)), prefill(given, *rows))[1]
    [output] = engine.generate({"prompt_token_ids": ids(9, 11)}, stars.SamplingParams(max_tokens=12, seed=1),
                               stars.STARS(4, 5, reward_threshold=math.inf, width=1), use_tqdm=False)
    assert prefills == [1, 1] and output.metrics.fallbacks == output.metrics.segments > 1
    assert len({segment.winner for segment in output.outputs[0].segments}) > 1


# -- whole responses, and the random numbers of a rule ------------------------------------------------------------


def second_best(judged: Sequence[Judged], state: State) -> Decision:
    """The second best of the whole responses; all of them are shown at once."""
    assert [one.attempt for one in judged] == [1] * len(judged) and all(one.finished for one in judged)
    ranked = sorted(judged, key=lambda one: -one.reward)
    return Decision([whole(ranked[1])], [one.hypothesis for one in ranked if one is not ranked[1]])


second_best.in_order, second_best.uniforms = False, 0


@dataclass(frozen=True)
class SecondBest:
    def plan(self) -> Plan:
        return Plan(Sampled(), Whole(16), Lanes(1, population=4), Score("end"), second_best)


def test_whole_responses_under_a_rule_of_ones_own():
    """The same four responses as best-of-4's, of which another is returned."""
    params = stars.SamplingParams(max_tokens=20, n=2, seed=3)
    prompt = {"prompt_token_ids": ids(9, 11, seed=1)}
    engine = breeding_engine()
    [second], [best] = (engine.generate(prompt, params, policy, use_tqdm=False)
                        for policy in (SecondBest(), stars.BestOfN(4)))
    for one, other in zip(second.outputs, best.outputs, strict=True):
        [segment], [wanted] = one.segments, other.segments
        assert [a._replace(accepted=False) for a in segment.attempts] == [
            a._replace(accepted=False) for a in wanted.attempts]
        rewards = [attempt.reward for attempt in wanted.attempts]
        assert one.reward == segment.reward == sorted(rewards)[-2] and not segment.accepted
        assert one.token_ids == wanted.attempts[segment.winner].token_ids
        assert (one.metrics.fallbacks, one.metrics.attempts, one.metrics.attempts_counted) == (1, 4, 4)
    nothing_is_held(engine)


def test_the_random_numbers_of_a_rule():
    """As many as it declares, of kinds 1, 2 and 3, by seed, attempt, segment, round and sample."""
    seen, groups = {}, {}

    def rule(judged, state):
        for one in judged:
            seen[one.hypothesis, one.attempt, state.segment] = list(one.uniforms)
        groups[state.segment, state.round] = list(state.uniforms)
        return None

    rule.in_order, rule.uniforms, rule.group_uniforms = True, 6, 5

    class Uses:
        def plan(self):
            return Plan(Sampled(), Fixed(4), Lanes(1, 2, 2), Score("segment"), rule)

    engine = breeding_engine(causal=False)
    params = stars.SamplingParams(max_tokens=8, n=1, seed=99, ignore_eos=True)
    [output] = engine.generate({"prompt_token_ids": ids(5, 11)}, params, Uses(), use_tqdm=False)
    assert output.outputs[0].error is None and output.metrics.fallbacks == output.metrics.segments == 2
    assert len(seen) == 2 * 2 * 2 and set(groups) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    for (slot, attempt, segment), numbers in seen.items():
        assert numbers == [*oracle.uniforms(99, 1, 0, attempt, 1, segment, slot),
                           *oracle.uniforms(99, 5, 0, attempt, 2, segment, slot)]
    for (segment, number), numbers in groups.items():
        assert numbers == oracle.uniforms(99, 5, 0, number + 1, 3, segment, 0).tolist()


# -- rules at fault -----------------------------------------------------------------------------------------------


def at_fault(answer: Callable) -> object:
    """A policy of two hypotheses whose rule answers as told."""

    def naughty(judged, state):
        return answer(judged, state)

    naughty.in_order, naughty.uniforms = True, 0

    class Naughty:
        def plan(self):
            return Plan(Sampled(), Fixed(4), Lanes(2, 2, 2), Score("segment"), naughty)

    return Naughty()


def every(judged, **changes):
    """Both first attempts kept, the second one as told."""
    first = {}
    for one in judged:
        first.setdefault(one.hypothesis, one)
    return [whole(first[0]), whole(first[1])._replace(**changes)]


@pytest.mark.parametrize("answer, message", [
    (lambda judged, state: Decision([whole(judged[0])]), "leaves hypothesis 1 neither kept nor dropped"),
    (lambda judged, state: Decision(every(judged, attempt=9)), "keeps attempt 9 of hypothesis 1, which was not judged"),
    (lambda judged, state: Decision(every(judged, hypothesis=2)),
     "keeps attempt 1 of hypothesis 2, which was not judged"),
    (lambda judged, state: Decision(every(judged, hypothesis=[])), "raised TypeError"),
    (lambda judged, state: Decision(every(judged, tokens=5)), "keeps 5 tokens of attempt 1 of hypothesis 1, which has"),
    (lambda judged, state: Decision(every(judged, tokens=0)), "keeps no token of attempt 1 of hypothesis 1"),
    (lambda judged, state: Decision(every(judged, tokens=1, then=[11])), "with what is no list of token ids below 11"),
    (lambda judged, state: Decision(every(judged, tokens=1, then=3)), "with what is no list of token ids below 11"),
    (lambda judged, state: Decision(every(judged, tokens=1, then=[1] * 12)), "past max_tokens=12"),
    (lambda judged, state: Decision(every(judged, tokens=1, then=[EOS, 1])), "after a token that ends the response"),
    (lambda judged, state: Decision([*every(judged), whole(judged[0])]), "more than the population of 2"),
    (lambda judged, state: Decision([], [0, 1]), "drops every hypothesis of its group"),
    (lambda judged, state: Decision(every(judged), [0]), "drops hypothesis 0, which it keeps too"),
    (lambda judged, state: Decision(every(judged), [7]), "drops hypothesis 7, which is not there"),
    (lambda judged, state: Decision([(0, 1, 4)], [1]), "keeps tuple instead of a stars.rules.Keep"),
    (lambda judged, state: "yes", "returned str instead of a stars.rules.Decision or None"),
    (lambda judged, state: Decision(every(judged), [], {(0, 1): True}), "returned notes that are no stars.rules.Note"),
    (lambda judged, state: 1 / 0, "raised ZeroDivisionError: division by zero"),
])
def test_a_rule_at_fault_ends_its_request_and_no_other(answer, message):
    engine = breeding_engine(causal=False)
    params = stars.SamplingParams(max_tokens=12, n=2, seed=5, stop_token_ids=[EOS])
    prompt = {"prompt_token_ids": ids(5, 11, seed=5)}
    [alone] = engine.generate(prompt, params, stars.STARS(4, 3, reward_threshold=1.0, width=2), use_tqdm=False)
    with pytest.warns(UserWarning, match="1 of 2 requests ended with an error"):
        bad, good = engine.generate([prompt, prompt], params, [at_fault(answer), stars.STARS(
            4, 3, reward_threshold=1.0, width=2)], use_tqdm=False)
    assert [one.finish_reason for one in bad.outputs] == ["error"] * 2
    error = bad.outputs[0].error
    assert error.startswith("the rule naughty ") and message in error and error.endswith(": mend the rule")
    assert facts(good) == facts(alone)
    nothing_is_held(engine)


def test_a_whole_response_can_be_neither_cut_nor_forked():
    engine = breeding_engine(causal=False)

    def answers(keep):
        def rule(judged, state):
            return Decision(keep(judged), [one.hypothesis for one in judged[1:]])

        rule.in_order, rule.uniforms = False, 0

        class Wholes:
            def plan(self):
                return Plan(Sampled(), Whole(16), Lanes(1, population=3), Score("end"), rule)

        return Wholes()

    for keep, message in ((lambda judged: [whole(judged[0])._replace(tokens=3)], "which is a whole response"),
                          (lambda judged: [whole(judged[0])] * 2, "forks a whole response, which has ended")):
        with pytest.warns(UserWarning, match="ended with an error"):
            [output] = engine.generate({"prompt_token_ids": ids(5, 11)}, stars.SamplingParams(max_tokens=9, seed=1),
                                       answers(keep), use_tqdm=False)
        assert message in output.outputs[0].error and not output.outputs[0].token_ids
        nothing_is_held(engine)


def test_a_population_beyond_the_engine_is_refused():
    engine = breeding_engine(max_num_seqs=2)
    with pytest.raises(stars.RequestError, match="population is 3 and the engine decodes 2 responses at once"):
        engine.add_request({"prompt_token_ids": ids(5, 11)}, stars.SamplingParams(max_tokens=9), Breed())


def test_a_reward_that_cannot_be_forked_says_so():
    class Own(stars.reward.base.Reward):
        def open(self, prompt, max_tokens):
            return object()

        def score(self, candidates):
            return [stars.reward.base.Scored(float(sum(c.token_ids))) for c in candidates]

    engine = toy_engine(LM, Own())
    with pytest.warns(UserWarning, match="ended with an error"):
        [output] = engine.generate({"prompt_token_ids": ids(5, 11)}, stars.SamplingParams(max_tokens=9, seed=1),
                                   Breed(), use_tqdm=False)
    assert "Own cannot keep a response twice" in output.outputs[0].error
    nothing_is_held(engine)


# -- what a rule may ask of an engine that is full, and what it may get wrong ------------------------------------


class Shorten:
    """Keeps one token of each hypothesis' last attempt, and ends the third segment with EOS."""

    in_order, uniforms = False, 0

    def __call__(self, judged: Sequence[Judged], state: State) -> Decision | None:
        if state.left:
            return None
        last = {one.hypothesis: one for one in judged}
        then = [EOS] if state.segment == 2 else []
        return Decision([Keep(slot, one.attempt, 1, then) for slot, one in last.items()])


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_is_cut_is_scored_when_every_slab_is_held(deterministic):
    """Four lanes and four best seen hold all slabs of the reward model while the segment is decided."""
    params = stars.SamplingParams(max_tokens=12, seed=5, top_k=1, stop_token_ids=[EOS], ignore_eos=True)
    policy = Planned(Plan(Sampled(), Fixed(3), Lanes(1, 2, 4), Score("segment"), Shorten()))
    outputs = [breeding_engine(max_num_lanes=lanes, max_num_seqs=4, deterministic=deterministic).generate(
        {"prompt_token_ids": ids(5, 11, seed=1)}, params, policy, use_tqdm=False)[0].outputs[0] for lanes in (4, 64)]
    assert outputs[0].error is None and len(outputs[0].segments) == 3 and outputs[0].token_ids[-1] == EOS
    assert outputs[0].token_ids == outputs[1].token_ids
    assert outputs[0].reward == pytest.approx(outputs[1].reward, abs=TOLERANCE)


class Swell:
    """Of four hypotheses one is left after the first segment, and four again after the third."""

    in_order, uniforms = False, 0

    def __call__(self, judged: Sequence[Judged], state: State) -> Decision | None:
        first, *others = judged
        if state.segment not in (0, 2):
            return Decision([whole(one) for one in judged])
        return Decision([whole(first)] * (1 if state.segment == 0 else 4), [one.hypothesis for one in others])


def test_a_population_that_shrank_may_grow_again():
    """Nobody is admitted into its places meanwhile: an engine of four lanes cannot draw for seven responses."""
    engine = breeding_engine(causal=False, max_num_lanes=4, max_num_seqs=4)
    params = stars.SamplingParams(max_tokens=12, seed=5, ignore_eos=True)
    prompt = {"prompt_token_ids": ids(5, 11, seed=1)}
    engine.add_request(prompt, params, Planned(Plan(Sampled(), Fixed(2), Lanes(1, 1, 4), Score("segment"), Swell())))
    for _ in range(4):
        engine.add_request(prompt, params, stars.BlockwiseBestOfK(1, 1))
    done = {}
    while engine.has_unfinished_requests():
        assert sum(len(unit.unfinished) for unit in engine._scheduler.running) <= 4
        done |= {output.request_id: output for output in engine.step() if output.finished}
    assert len(done) == 5 and all(output.outputs[0].error is None for output in done.values())
    nothing_is_held(engine)


@dataclass(frozen=True)
class Planned:
    """A policy of a plan that is given."""

    made: Plan

    def plan(self) -> Plan:
        return self.made


def exits(judged: Sequence[Judged], state: State) -> Decision | None:
    raise SystemExit(3)


@pytest.mark.parametrize("answer, problem", [
    (exits, "raised SystemExit: 3"),
    (lambda judged, state: Decision([whole(judged[0])], [1, 1]), "drops a hypothesis twice"),
    (lambda judged, state: Decision([Keep(one.hypothesis, 1.0, one.drafted) for one in judged]),
     "keeps attempt 1.0 of hypothesis 0, which was not judged"),
    (lambda judged, state: Decision([whole(one) for one in judged], [], {(0, 1): Note(None, None, "yes")}),
     "returned notes whose threshold, probability and accepted are not a float, a float and a bool"),
], ids=["exit", "dropped twice", "no attempt number", "not accepted"])
def test_a_rule_at_fault_is_named(answer, problem):
    class Faulty:
        in_order, uniforms = False, 0

        def __call__(self, judged: Sequence[Judged], state: State) -> Decision | None:
            return answer(judged, state)

    engine = breeding_engine(causal=False)
    policy = Planned(Plan(Sampled(), Fixed(3), Lanes(1, 1, 2), Score("segment"), Faulty()))
    params = stars.SamplingParams(max_tokens=6, seed=5, ignore_eos=True)
    with pytest.warns(UserWarning):
        [output] = engine.generate({"prompt_token_ids": ids(5, 11, seed=1)}, params, policy, use_tqdm=False)
    assert output.outputs[0].error.startswith(f"the rule Faulty {problem}")
    nothing_is_held(engine)


def test_a_rule_whose_attributes_raise_is_refused():
    class Unreadable(Swell):
        @property
        def in_order(self) -> bool:
            raise KeyError("order")

    policy = Planned(Plan(Sampled(), Fixed(3), Lanes(1, 1, 2), Score("segment"), Unreadable()))
    with pytest.raises(stars.RequestError, match=r"Planned.plan\(\) returned a plan that raised KeyError: 'order'"):
        breeding_engine(causal=False).add_request({"prompt_token_ids": [1]}, stars.SamplingParams(), policy)


def test_a_population_that_the_reward_model_cannot_hold_is_refused(tiny_model):
    """One of another vocabulary takes room for texts that re-encode to more tokens: refused before it is queued."""
    policy = Planned(Plan(Sampled(), Fixed(3), Lanes(1, 1, 3), Score("segment"), Swell()))
    engines = [stars.Engine(str(tiny_model(tokenizer=True, chat_template=True)), stars.CausalReward(
        str(tiny_model(tokenizer=True, chat_template=True, head="reward", tokenizer_seed=seed))), cache_tokens=128,
        max_num_seqs=4, max_num_lanes=4) for seed in (0, 1)]
    params = stars.SamplingParams(max_tokens=6, seed=5)
    engines[0].add_request("The dog", params, policy)
    with pytest.raises(stars.RequestError, match="^Planned decodes 3 responses of up to 6 tokens together, which do "
                       "not fit the reward model's cache of cache_tokens=128: raise it, lower max_tokens, or draw few"):
        engines[1].add_request("The dog", params, policy)


def test_the_threshold_is_shown_every_attempt_once(monkeypatch):
    """Its verdict on one is final. Shown again each round, 4,000 attempts of width 1 took 22 s and not 2."""
    seen, decide = [], stars.rules.Threshold.__call__
    monkeypatch.setattr(stars.rules.Threshold, "__call__", lambda rule, judged, state: (
        seen.extend(one.attempt for one in judged), decide(rule, judged, state))[1])
    params = stars.SamplingParams(max_tokens=3, seed=5, ignore_eos=True)
    [output] = breeding_engine(causal=False).generate({"prompt_token_ids": ids(5, 11, seed=1)}, params, stars.STARS(
        3, 40, alpha=1.0, beta=0.0, reward_threshold=1e9, width=1), use_tqdm=False)
    [segment] = output.outputs[0].segments
    assert seen == list(range(1, 41)) and not segment.accepted
    assert segment.reward == max(attempt.reward for attempt in segment.attempts)
    assert [attempt.threshold for attempt in segment.attempts] == [1e9] * 40


@pytest.mark.parametrize("width", [None, 1, 2, 5])
def test_attempts_by_segment(width):
    """The last number counts from then on; at temperature 0 one is drawn, whatever the plan says."""
    policy = Planned(Plan(Sampled(), Fixed(3), Lanes(width, (4, 1, 2)), Score("segment"), stars.rules.Argmax()))
    prompt = {"prompt_token_ids": ids(5, 11, seed=1)}
    engine = breeding_engine(causal=False)
    for temperature, wanted in ((1.0, [4, 1, 2, 2, 2]), (0.0, [1] * 5)):
        params = stars.SamplingParams(max_tokens=15, seed=5, ignore_eos=True, temperature=temperature)
        [output] = engine.generate(prompt, params, policy, use_tqdm=False)
        assert [len(segment.attempts) for segment in output.outputs[0].segments] == wanted
    nothing_is_held(engine)


def test_a_hypothesis_of_fewer_attempts_waits_for_the_others(monkeypatch):
    """It draws no further attempt at this segment, and as many as the plan says at the next."""
    left = []

    def rule(judged: Sequence[Judged], state: State) -> Decision | None:
        left.append(state.left)
        if state.left:
            return None
        last = {one.hypothesis: one for one in judged}
        return Decision([whole(one) for one in last.values()])

    rule.in_order, rule.uniforms = False, 0
    monkeypatch.setattr(stars.request.Hypothesis, "most_attempts", property(
        lambda self: 1 if self.slot == 1 and not self.segments else 3))
    policy = Planned(Plan(Sampled(), Fixed(3), Lanes(1, 3, 2), Score("segment"), rule))
    engine = breeding_engine()
    [output] = engine.generate({"prompt_token_ids": ids(5, 11, seed=1)}, stars.SamplingParams(
        max_tokens=6, seed=5, ignore_eos=True), policy, use_tqdm=False)
    assert output.outputs[0].error is None and output.metrics.attempts == 3 + 1 + 3 + 3
    assert left == [2, 1, 0, 4, 2, 0]
    nothing_is_held(engine)
